"""A fit learns or warns, starts again, stops early, and bad recipes raise errors."""

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
from labelled_texts import FAST, SHORT, examples
from sklearn.base import clone

from mlmjax.classification.classifier import Classifier
from mlmjax.classification.fitting import LearnedNothingWarning, split_rows
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
        ({"patience": 2}, "patience is 2, but no texts are held out"),
        ({"restarts": 2}, "restarts is 2, but no texts are held out"),
        ({"restarts": -1}, "restarts: found -1"),
        ({"learning_rate": "fast"}, "learning_rate: found 'fast'"),
        ({"accumulate": 0}, "accumulate: found 0"),
        ({"accumulate": 64}, "accumulate is 64, and a batch has only 32 prompts"),
        ({"ema": 1.0}, r"ema: found 1\.0"),
        ({"layer_decay": 0.0}, r"layer_decay: found 0\.0"),
        ({"layer_decay": 0.5, "train": ["*bias"]}, "counts the layers of a whole model"),
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


def fitted(pair, count=96, **options):
    """Return a classifier of sports and money, fitted without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", LearnedNothingWarning)
        return Classifier(pair, ["sports", "money"], template=SHORT).fit(
            *examples(count), **{**FAST, **options}
        )


def test_a_fit_that_learns_reports_itself_without_a_warning(pair):
    classifier = fitted(pair, validation=examples(40, seed=1))
    summary = classifier.fit_summary_
    assert summary.warning is None
    assert len(summary.attempts) == 1
    assert summary.training.accuracy > 0.95
    assert summary.training.n == 96
    assert summary.training.majority == 0.5
    assert summary.training.baseline_loss == pytest.approx(np.log(2), abs=0.01)
    assert summary.training.loss < 0.3
    assert summary.validation.n == 40
    last = classifier.history_[-1]
    assert last["validation_accuracy"] == summary.validation.accuracy
    assert last["validation_majority"] == 0.5
    assert last["baseline_loss"] == pytest.approx(np.log(2), abs=0.01)
    assert last["accuracy"] > 0.9
    assert json.loads(json.dumps(summary.to_dict()))["kept"] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"learning_rate": 1e-7, "epochs": 1}, "training texts is .*always giving the label"),
        (
            {"learning_rate": 1e-7, "epochs": 1},
            "What usually helps: answer='words', learning_rate=3e-08 or",
        ),
        (
            {"learning_rate": 1e-7, "epochs": 1},
            r"3e-07 in place of 1e-07, epochs=3, restarts=3 with validation_share=0.2",
        ),
        ({"learning_rate": 3.0, "epochs": 3, "warmup": 0}, "the fit may have learned nothing: "),
    ],
)
def test_a_fit_that_learns_nothing_warns_in_one_line(pair, options, says):
    classifier = Classifier(pair, ["sports", "money"], template=SHORT)
    with pytest.warns(LearnedNothingWarning, match=says) as caught:
        classifier.fit(*examples(96), **{**FAST, **options})
    (warning,) = caught
    assert str(warning.message) == classifier.fit_summary_.warning
    assert "\n" not in classifier.fit_summary_.warning
    assert warning.filename == __file__


def test_restarts_end_with_the_attempt_that_learns(pair):
    given = {"restarts": 5, "validation_share": 0.25}
    once = fitted(pair, **given)
    assert len(once.fit_summary_.attempts) == 1
    classifier = Classifier(pair, ["sports", "money"], template=SHORT, restarts=2)
    with pytest.warns(LearnedNothingWarning, match="in any of 3 attempts"):
        classifier.fit(*examples(96), learning_rate=1e-7, epochs=1, validation_share=0.25)
    summary = classifier.fit_summary_
    assert [one.warmup for one in summary.attempts] == [0.05, 0.1, 0.2]
    assert len({one.seed for one in summary.attempts}) == 3
    accuracies = [one.validation.accuracy for one in summary.attempts]
    assert accuracies[summary.kept] == max(accuracies)
    # The weights are those of the attempt that was kept.
    numbers = [str(i % 2) for i in range(96)]
    _, held = split_rows(numbers, 0.25, 0)
    texts, labels = examples(96)
    own = classifier.score([texts[i] for i in held], [labels[i] for i in held])
    assert own == summary.validation.accuracy


def test_a_rate_is_found_that_learns(pair):
    classifier = fitted(pair, learning_rate="auto", epochs=8)
    (attempt,) = classifier.fit_summary_.attempts
    assert 1e-4 < attempt.learning_rate < 1e-1


def test_the_usual_rate_follows_the_size_of_the_model(pair):
    classifier = Classifier(pair, ["sports", "money"], template=SHORT)
    classifier.fit(*examples(32), epochs=1)
    assert classifier.fit_summary_.attempts[0].learning_rate == 1e-3
