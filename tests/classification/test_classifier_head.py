"""The classification head as a baseline of the classifier, early stopping, and the estimator."""

import copy
import pickle
import warnings
from unittest import SkipTest

import numpy as np
import pytest
from labelled_texts import FAST, examples
from sklearn.base import ClassifierMixin, clone, is_classifier
from sklearn.model_selection import GridSearchCV
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from mlmjax.classification.classifier import Classifier
from mlmjax.classification.predictor import Predictor
from mlmjax.errors import InputError, RunError
from mlmjax.model.modernbert import ModernBertForSequenceClassification
from mlmjax.weights.pretrained import load_pretrained, save_pretrained

SHORT = "{text}\n{options}[unused0] [MASK]"


@pytest.fixture(scope="module")
def pair(word_pair):
    return word_pair


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
    # Without our own file it is anybody's classification model, and its names are its labels.
    (tmp_path / "saved" / "mlmjax_classifier.json").unlink()
    plain = Classifier.from_pretrained(tmp_path / "saved")
    assert list(plain.classes_) == ["sports", "money"]
    np.testing.assert_allclose(
        plain.predict_proba(texts), with_head.predict_proba(texts), atol=1e-5
    )
    turned = Classifier.from_pretrained(tmp_path / "saved", ["money", "sports"])
    np.testing.assert_allclose(
        turned.predict_proba(texts), with_head.predict_proba(texts)[:, ::-1], atol=1e-5
    )
    assert turned.score(texts, labels) == with_head.score(texts, labels)


def test_a_head_can_be_calibrated_and_read_windows(with_head):
    texts, labels = examples(60, seed=5)
    clone(with_head)
    sets = with_head.conform(texts, labels).predict_set(texts, coverage=0.9)
    assert sets.shape == (60, 2)
    windows = Classifier(
        with_head.source,
        ["sports", "money"],
        head="classification",
        long_text="mean",
        max_length=64,
    )
    windows.fit(["goal " * 100, "bank " * 100], ["sports", "money"], epochs=1)
    assert windows.predict_proba(["goal " * 300]).shape == (1, 2)
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
    # The weights kept are the best epoch's: the same seed ends there when told to.
    held = sorted(set(range(64)) - set(classifier_rows(noise, classifier)))
    kept = classifier.predict_proba([texts[i] for i in held])
    guess = [["sports", "money"][i] for i in kept.argmax(axis=1)]
    accuracy = np.mean([guess[n] == noise[i] for n, i in enumerate(held)])
    assert accuracy == pytest.approx(history[best]["validation_accuracy"])


def classifier_rows(labels, classifier):
    from mlmjax.classification.fitting import split_rows

    names = [str(["sports", "money"].index(label)) for label in labels]
    return split_rows(names, classifier.validation_share, classifier.seed)[0]


def test_hyperparameters_can_be_searched(pair):
    texts, labels = examples(24)
    classifier = Classifier(pair, ["sports", "money"], template=SHORT, train_batch_size=8)
    search = GridSearchCV(classifier, {"epochs": [1, 2]}, cv=2, error_score="raise")
    search.fit(texts, labels)
    assert len(search.cv_results_["mean_test_score"]) == 2
    assert set(search.predict(texts)) <= {"sports", "money"}


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
        ({"validation_share": 1.0}, r"validation_share: found 1\.0"),
        ({"validation": ([], [])}, "no text to hold out"),
        ({"validation": 5}, "expected a pair"),
        ({"speed": 1}, "speed: unknown key"),
    ],
)
def test_bad_recipes_are_refused(pair, recipe, message):
    with pytest.raises(InputError, match=message):
        Classifier(pair, ["a", "b"]).fit(["x", "y"], ["a", "b"], **recipe)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learn_knows_it_for_a_classifier_of_texts(pair):
    classifier = Classifier(pair, ["a", "b"])
    tags = get_tags(classifier)
    assert is_classifier(classifier)
    assert tags.input_tags.string
    assert not tags.input_tags.two_d_array
    assert not tags.requires_fit
    # Of an estimator that takes no table of numbers scikit-learn can check little.
    for estimator, check in estimator_checks_generator(classifier, mark="skip"):
        check(estimator)


def test_a_fit_that_diverges_in_its_last_update_is_refused(pair):
    classifier = Classifier(pair, ["a", "b"], template=SHORT)
    with pytest.raises(RunError, match="is not finite"):
        classifier.fit(["x", "y", "z", "w"], list("abab"), epochs=1, learning_rate=1e30)


def test_a_share_of_few_texts_is_one_at_least(pair):
    classifier = Classifier(pair, ["a", "b"], template=SHORT)
    classifier.fit(["x", "y", "z", "w"], list("abab"), epochs=1, validation_share=0.1)
    assert "validation_accuracy" in classifier.history_[0]
    with pytest.raises(InputError, match="no text to hold out"):
        classifier.fit(["x", "y"], ["a", "b"], epochs=1, validation_share=0.1)
    with pytest.raises(InputError, match="labels: is one str"):
        classifier.fit(["x", "y"], "ab")


class Numbers(Classifier):
    """What scikit-learn's checks can feed: rows of numbers, each written out as a text."""

    def __init__(self, source=None, labels=None, template=SHORT, epochs=1, max_length=32):
        options = {"template": template, "epochs": epochs, "max_length": max_length}
        super().__init__(source, labels, **options)

    def get_params(self, deep=True):
        names = ("source", "labels", "template", "epochs", "max_length")
        return {name: getattr(self, name) for name in names}

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = False
        tags.input_tags.two_d_array = tags.requires_fit = tags.classifier_tags.poor_score = True
        return tags

    def fit(self, X, y):
        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        self.names_ = {str(value): value for value in np.unique(y)}
        recipe = {"learning_rate": 1e-3, "batch_size": 8}
        return super().fit(written(X), [str(value) for value in y], **recipe)

    def predict_proba(self, X):
        if isinstance(X, list) and isinstance(X[0], str):
            return super().predict_proba(X)
        check_is_fitted(self, "names_")
        return super().predict_proba(written(validate_data(self, X, reset=False)))

    def predict(self, X):
        return np.array([self.names_[name] for name in super().predict(X)])

    def score(self, X, y):
        return ClassifierMixin.score(self, X, y)


def written(rows):
    """Each of the first numbers as a letter: texts of one length, so that programs are shared."""
    return [" ".join(chr(65 + int(value * 8) % 26) for value in np.resize(row, 6)) for row in rows]


NOT_OURS = {
    "check_classifiers_classes": "labels are texts, so classes_ is an array of texts",
    "check_classifiers_one_label": "with one label there is nothing to choose; it is refused",
    "check_fit2d_1sample": "one text has one label, which is refused for that",
    "check_array_api_input": "texts are no arrays",
}


def test_the_checks_of_scikit_learn_that_apply_pass(pair, tmp_path):
    """All of them, texts being written from their numbers; those that fail are known, and why."""
    save_pretrained(*pair, tmp_path / "model")
    failed = {}
    passed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for estimator, check in estimator_checks_generator(Numbers(str(tmp_path / "model"))):
            name = check.func.__name__
            try:
                check(estimator)
                passed += 1
            except (AssertionError, InputError, SkipTest) as error:
                failed[name] = str(error)
    assert failed.keys() == NOT_OURS.keys(), failed
    assert passed > 45


def test_a_fitted_classifier_can_be_copied_and_sent_to_other_processes(with_head, pair):
    texts, labels = examples(20, seed=6)
    masked = Classifier(pair, ["sports", "money"], template=SHORT).fit(texts, labels, epochs=1)
    asked = Predictor(pair, ["sports", "money"], template=SHORT)
    for classifier in (with_head, masked, asked):
        expected = classifier.predict_proba(texts)
        for copied in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
            np.testing.assert_array_equal(copied.predict_proba(texts), expected)


def test_everything_reads_an_iterator_once(noisy_pair):
    classifier = Classifier(noisy_pair, ["a", "b"], template=SHORT)
    texts = [f"text {i}" for i in range(40)]
    read = []

    def reading():
        for text in texts:
            read.append(text)
            yield text

    expected = classifier.predict_proba(texts)
    np.testing.assert_allclose(classifier.predict_proba(reading()), expected, atol=1e-6)
    assert read == texts
    read.clear()
    stream = classifier.stream(reading(), part=16)
    assert len(next(stream)) == len(read) == 16
    assert [len(part) for part in stream] == [16, 8]
