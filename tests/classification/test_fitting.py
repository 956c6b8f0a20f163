"""A classification head learns, training stops early, and bad recipes raise errors."""

import copy
import pickle

import numpy as np
import pytest
from labelled_texts import FAST, SHORT, examples
from sklearn.base import clone

from mlmjax.classification.classifier import Classifier
from mlmjax.classification.fitting import split_rows
from mlmjax.classification.predictor import Predictor
from mlmjax.errors import InputError
from mlmjax.model.modernbert import ModernBertForSequenceClassification
from mlmjax.weights.pretrained import load_pretrained


@pytest.fixture(scope="module")
def with_head(pair):
    return Classifier(pair, ["sports", "money"], head="classification").fit(*examples(96), **FAST)


def test_a_head_learns_and_is_saved_as_a_classification_model(with_head, tmp_path):
    texts, labels = examples(60, seed=2)
    assert with_head.score(texts, labels) > 0.95
    with_head.save_pretrained(tmp_path / "saved")
    model, _ = load_pretrained(tmp_path / "saved")
    assert isinstance(model, ModernBertForSequenceClassification)
    assert model.config.id2label == {0: "sports", 1: "money"}
    restored = Classifier.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(restored.predict_proba(texts), with_head.predict_proba(texts))
    # Without our own file it is a plain classification model, and its names are its labels.
    (tmp_path / "saved" / "mlmjax_classifier.json").unlink()
    plain = Classifier.from_pretrained(tmp_path / "saved")
    assert list(plain.classes_) == ["sports", "money"]
    expected = with_head.predict_proba(texts)
    np.testing.assert_allclose(plain.predict_proba(texts), expected, atol=1e-5)
    turned = Classifier.from_pretrained(tmp_path / "saved", ["money", "sports"])
    np.testing.assert_allclose(turned.predict_proba(texts), expected[:, ::-1], atol=1e-5)
    assert turned.score(texts, labels) == with_head.score(texts, labels)


def test_a_head_can_be_calibrated_and_read_windows(with_head):
    texts, labels = examples(60, seed=5)
    clone(with_head)
    sets = with_head.conform(texts, labels).predict_set(texts, coverage=0.9)
    assert sets.shape == (60, 2)
    options = {"head": "classification", "long_text": "mean", "max_length": 8}
    windows = Classifier(with_head.source, ["sports", "money"], **options)
    # Two windows of each text, in batches of the shape that is compiled already.
    windows.fit(["goal " * 7, "bank " * 7] * 4, ["sports", "money"] * 4, epochs=1, batch_size=16)
    assert windows.predict_proba(["goal " * 30]).shape == (1, 2)
    assert windows.shortened == 0


def test_training_ends_when_held_out_texts_say_so_and_keeps_the_best(pair):
    texts, labels = examples(64)
    noise = list(np.random.default_rng(0).permutation(labels))
    classifier = Classifier(pair, ["sports", "money"], template=SHORT, epochs=30, patience=2)
    classifier.set_params(validation_share=0.25, learning_rate=1e-2, train_batch_size=16)
    classifier.fit(texts, noise)
    history = classifier.history_
    assert 3 <= len(history) < 30
    key = [(entry["validation_accuracy"], -entry["validation_loss"]) for entry in history]
    best = key.index(max(key))
    assert best == len(history) - 3
    # The weights kept are the best epoch's.
    numbers = [str(["sports", "money"].index(label)) for label in noise]
    _, held = split_rows(numbers, classifier.validation_share, classifier.seed)
    accuracy = classifier.score([texts[i] for i in held], [noise[i] for i in held])
    assert accuracy == pytest.approx(history[best]["validation_accuracy"])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"epochs": 0}, "epochs: found 0"),
        ({"epochs": 1.5}, r"epochs: found 1\.5"),
        ({"patience": 0}, "patience: found 0"),
        ({"patience": 2}, "no texts are held out"),
        ({"batch_size": 10**9}, "batch_size: found 1000000000"),
        ({"seed": -1}, "seed: found -1"),
        ({"learning_rate": float("nan")}, "learning_rate: found nan"),
        ({"learning_rate": -1.0}, "learning_rate: found -1"),
        ({"validation_share": 1.0}, r"validation_share: found 1\.0"),
        ({"validation": ([], [])}, "no text to hold out"),
        ({"validation": 5}, "expected a pair"),
        ({"validation": (["x"], ["a", "b"])}, "1 texts and 2 labels"),
        ({"speed": 1}, "speed: unknown key"),
    ],
)
def test_bad_recipes_are_rejected(pair, recipe, message):
    with pytest.raises(InputError, match=message):
        Classifier(pair, ["a", "b"]).fit(["x", "y"], ["a", "b"], **recipe)


def test_a_share_of_few_texts_is_one_at_least(pair):
    classifier = Classifier(pair, ["sports", "money"], template=SHORT, validation_share=0.01)
    classifier.fit(*examples(18), epochs=1, batch_size=16)
    assert "validation_accuracy" in classifier.history_[0]
    with pytest.raises(InputError, match="no text to hold out"):
        classifier.fit(["x", "y"], ["sports", "money"])


def test_a_fitted_classifier_can_be_copied_and_sent_to_other_processes(with_head, pair):
    texts, labels = examples(16, seed=6)
    masked = Classifier(pair, ["sports", "money"], template=SHORT)
    masked.fit(texts, labels, epochs=1, batch_size=16)
    asked = Predictor(pair, ["sports", "money"], template=SHORT)
    for classifier in (with_head, masked, asked):
        expected = classifier.predict_proba(texts)
        for copied in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
            np.testing.assert_array_equal(copied.predict_proba(texts), expected)
