"""The classifier learns, repeats itself, saves and restores, and behaves like an estimator."""

import ast
import inspect
import json
import pydoc
import re
import shutil
import warnings
from functools import cache
from unittest import SkipTest

import jax
import numpy as np
import pytest
from flax import nnx
from labelled_texts import FAST, SHORT, WORDS, examples
from pages import read_markdown
from sklearn.base import ClassifierMixin, clone, is_classifier
from sklearn.model_selection import GridSearchCV, ShuffleSplit, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from small_models import small_model

from mlmjax.classification import predictor
from mlmjax.classification.classifier import Classifier, classifier_card
from mlmjax.classification.settings import Settings
from mlmjax.errors import InputError, RunError
from mlmjax.model.modernbert import ModernBertForSequenceClassification
from mlmjax.storage import CARD, CLASSIFIER, TRAINING
from mlmjax.weights.pretrained import load_pretrained, save_pretrained


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "model"
    save_pretrained(*pair, path)
    return path


@pytest.fixture(scope="module")
def fitted(folder):
    texts, labels = examples(96)
    classifier = Classifier(folder, list(WORDS), template=SHORT)
    return classifier.fit(texts, labels, validation=examples(20, seed=1), **FAST)


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    path = tmp_path_factory.mktemp("fitted") / "saved"
    fitted.save_pretrained(path)
    return path


def weights(classifier):
    return jax.tree.leaves(nnx.state(classifier.asking_.scorer.model))


def test_zero_shot_answers_have_the_shapes_of_an_estimator(folder):
    classifier = Classifier(folder, ["b", "a", "c"])
    texts = np.array(["one text", "another text"])
    probabilities = classifier.predict_proba(texts)
    assert list(classifier.classes_) == ["b", "a", "c"]
    assert probabilities.shape == (2, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    predicted = classifier.predict(texts)
    assert predicted.dtype.kind == "U"
    assert list(predicted) == [classifier.classes_[i] for i in probabilities.argmax(axis=1)]
    assert classifier.predict([]).shape == (0,)


def test_help_explains_every_argument_with_its_default():
    text = pydoc.plain(pydoc.render_doc(Classifier))
    explained = {}
    for name, kind in re.findall(r"^ \|  (\w+) : (.+)$", text, re.MULTILINE):
        explained[name] = kind.partition("default=")[2]
    for name, parameter in inspect.signature(Classifier).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            assert not explained[name]
        else:
            assert ast.literal_eval(explained[name]) == parameter.default, name


def test_nothing_is_read_before_it_is_needed():
    classifier = Classifier("/no/such/folder", ["a", "b"])
    assert not hasattr(classifier, "classes_")
    with pytest.raises(InputError, match="no such folder"):
        classifier.predict(["text"])
    with pytest.raises(InputError, match="no such folder"):
        Classifier.from_pretrained("/no/such/folder", ["a", "b"])


def test_fit_learns_and_reports(fitted):
    texts, labels = examples(60, seed=2)
    assert fitted.score(texts, labels) > 0.95
    assert [entry["epoch"] for entry in fitted.history_] == list(range(1, FAST["epochs"] + 1))
    assert fitted.history_[-1]["loss"] < fitted.history_[0]["loss"]
    assert fitted.history_[-1]["validation_accuracy"] > 0.9
    assert list(fitted.classes_) == ["sports", "money"]


def test_the_same_seed_gives_the_same_weights_and_a_refit_starts_again(fitted):
    texts, labels = examples(96)
    other = clone(fitted).fit(texts, labels, **FAST, seed=1)
    assert not all(map(np.array_equal, weights(fitted), weights(other)))
    again = other.fit(texts, labels, **FAST)
    assert all(map(np.array_equal, weights(fitted), weights(again)))


def test_the_source_pair_is_never_changed(pair):
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(pair[0]))]
    texts, labels = examples(16)
    classifier = Classifier(pair, template=SHORT)
    classifier.fit(texts, labels, validation=(texts, labels), **{**FAST, "epochs": 1})
    assert list(classifier.classes_) == ["money", "sports"]
    assert all(map(np.array_equal, before, jax.tree.leaves(nnx.state(pair[0]))))


def test_saving_and_loading_restores_all(fitted, tmp_path):
    texts, _ = examples(20, seed=3)
    for _ in range(2):  # the second replaces the first
        fitted.save_pretrained(tmp_path / "saved")
    restored = Classifier.from_pretrained(tmp_path / "saved")
    assert list(restored.classes_) == list(fitted.classes_)
    np.testing.assert_array_equal(restored.predict_proba(texts), fitted.predict_proba(texts))
    renamed = Classifier.from_pretrained(tmp_path / "saved", ["x", "y", "z"])
    assert list(renamed.classes_) == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"a": ""}}, "expected at least two distinct names"),
        ({"label": {}}, "label: unknown key; did you mean 'labels'"),
        ({"format": 2}, "format: found 2"),
        ({"template": "{other} {options}", "shorten": {}}, "its fields are other, options"),
        ({"max_length": -1}, "max_length: found -1"),
        (
            {"calibration": {"method": "batch", "bias": [1.0], "rows": 2}},
            "calibration.bias has 1 numbers; expected 2",
        ),
        ({"calibration": {"method": "magic", "rows": 2}}, "method names 'magic'"),
        ({"calibration": {"method": "batch", "rows": 2, "temperature": 0.0}}, "temperature"),
        ({"conformal": {"method": "lac", "scores": [2.0]}}, "conformal.scores"),
        ({"conformal": {"method": "lac", "scores": []}}, "conformal.scores"),
        ({"abstain_below": 7}, "abstain_below"),
        ({"orders": -1}, "orders"),
        ({"examples": [{"text": "x", "labels": ["nobody"]}]}, "nobody"),
        ({"examples": [{"text": "x"}]}, "labels"),
    ],
)
def test_broken_settings_are_rejected(saved, tmp_path, change, message):
    folder = shutil.copytree(saved, tmp_path / "saved")
    values = json.loads((folder / CLASSIFIER).read_text()) | change
    (folder / CLASSIFIER).write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        Classifier.from_pretrained(folder)


def test_the_card_shows_how_to_load_the_classifier_and_its_prompt(pair, tmp_path):
    bad = {"```\n# Owned <img src=x>": "$name ${prompt}", "a\x1b[2J\u202eb": ""}
    template = SHORT.replace("{text}", "~~~\n````\n## A prompt $labels\n{text}")
    classifier = Classifier(pair, {"sports": "games"} | bad, template=template)
    classifier.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert 'Classifier.from_pretrained("PATH_OF_THIS_FOLDER")' in card
    assert "\nsports: games\n```⟨U+000A⟩# Owned <img src=x>: $name ${prompt}\n" in card
    assert not {"\x1b", "\u202e"} & set(card)
    _, outside = read_markdown(card)
    headings = [line for line in outside if line.startswith("#")]
    assert headings == ["# Text classifier", "## Labels", "## Answers", "## Prompt"]
    assert not any("Owned" in line or "A prompt" in line for line in outside)
    assert SHORT.splitlines()[1] in card
    settings = Settings(labels={f"label {i}": "" for i in range(102)}, template="{text}")
    assert "\nlabel 99\n... and 2 more\n" in classifier_card(pair[0], settings)


def test_a_fitted_classifier_keeps_what_its_source_was_trained_on_and_adds_itself(folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / TRAINING).write_text('{"format": 1, "runs": []}')
    (source / CARD).write_text("---\nlicense: cc-by-4.0\n---\n\nMade by Ada.\n")
    classifier = Classifier(source, list(WORDS), template=SHORT)
    classifier.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / TRAINING).read_text() == '{"format": 1, "runs": []}'
    classifier.fit(*examples(16), **{**FAST, "epochs": 1}).save_pretrained(tmp_path / "fitted")
    (run,) = json.loads((tmp_path / "fitted" / TRAINING).read_text())["runs"]
    assert run["init_from"] == "source"
    assert run["sources"] == [{"name": "the texts given to Classifier.fit"}]
    for name in ("plain", "fitted"):
        metadata, text = (tmp_path / name / CARD).read_text().split("---\n")[1:3]
        assert "license: cc-by-4.0" in metadata
        assert "## Source of the weights" in text
        assert "Made by Ada." in (tmp_path / name / CARD).read_text()


def test_descriptions_are_in_the_prompt_and_change_the_answer(pair):
    texts, labels = examples(2)[0], {"sports": "games, teams and players", "money": ""}
    plain = Classifier(pair, list(labels), template=SHORT).predict_proba(texts)
    described = Classifier(pair, labels, template=SHORT)
    assert np.abs(described.predict_proba(texts) - plain).max() > 1e-7
    assert list(described.classes_) == ["sports", "money"]
    assert described.settings_.shown == ("sports: games, teams and players", "money")


def test_it_works_inside_scikit_learn(pair):
    texts, labels = examples(32)
    classifier = Classifier(pair, ["sports", "money"], template=SHORT)
    assert classifier.get_params()["labels"] == ["sports", "money"]
    assert clone(classifier).get_params().keys() == classifier.get_params().keys()
    pipeline = Pipeline([("classify", classifier)])
    options = {f"classify__{name}": value for name, value in {**FAST, "epochs": 1}.items()}
    split = ShuffleSplit(1, test_size=8, random_state=0)
    assert cross_val_score(pipeline, texts, labels, cv=split, params=options).shape == (1,)
    assert set(classifier.predict(texts)) <= {"sports", "money"}
    search = GridSearchCV(classifier, {"epochs": [1, 2]}, cv=2, error_score="raise")
    search.fit(texts, labels, batch_size=16)
    assert len(search.cv_results_["mean_test_score"]) == 2
    assert set(search.predict(texts)) <= {"sports", "money"}
    assert not hasattr(classifier.set_params(labels=["x", "y", "z"]), "classes_")


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a", "b", "c"], ["sports"] * 2, "there are 3 texts and 2 labels"),
        (["a", "b"], ["sports", "sports"], "fit: the distinct labels are 'sports'"),
        (["a"], ["sports", "money"], "1 texts and 2 labels"),
        (["a", "b"], ["sports", "mony"], r"row 2 \(index 1\): label 'mony' is not one of"),
        (["a", "b"], ["sports", 1], r"row 2 \(index 1\): label is int"),
        (["a", ""], ["sports", "money"], r"row 2 \(index 1\): field 'text' is blank"),
        (["x", "y"], "ab", "labels: found one str"),
        ("one text", ["sports"], "texts: found one str; expected a list"),
    ],
)
def test_bad_training_data_is_rejected(pair, texts, labels, message):
    with pytest.raises(InputError, match=message):
        Classifier(pair, ["sports", "money"]).fit(texts, labels)


def test_bad_texts_are_rejected(fitted):
    for texts, message in (("one text", "found one str"), (np.array([["a"], ["b"]]), "is a table")):
        with pytest.raises(InputError, match=f"texts: {message}"):
            fitted.predict(texts)


def test_an_error_shows_twenty_more_rows_and_counts_the_others(pair):
    with pytest.raises(InputError, match=r"row 21 .*\n\.\.\. and 9 more$") as caught:
        Classifier(pair, ["sports", "money"]).fit(["a"] * 30, ["mony"] * 30)
    assert len(caught.value.details) == 29


@pytest.mark.parametrize(
    ("labels", "row", "message"),
    [
        (["a", "b"], "b", r"row 2 \(index 1\): its labels are 'b' \(str\); expected a list of na"),
        (["a", "b"], [0, 1, 0], "expected names, or 0 or 1 for each of the 2 labels"),
        (["a", "b"], [0, 2], "expected names, or 0 or 1 for each of the 2 labels"),
        (["a", "b"], ["c"], "label 'c' is not one of a, b"),
        (None, np.eye(2)[0], "rows of numbers have no names"),
    ],
)
def test_bad_rows_of_several_labels_are_rejected(pair, labels, row, message):
    with pytest.raises(InputError, match=message):
        Classifier(pair, labels, multi_label=True).fit(["x", "y"], [["a"], row])


def test_a_loss_that_is_not_finite_stops_the_fit(pair):
    texts, labels = examples(32)
    classifier = Classifier(pair, template=SHORT)
    with pytest.raises(RunError, match=r"loss of epoch \d is not finite"):
        classifier.fit(texts, labels, **{**FAST, "learning_rate": 1e30})
    assert not hasattr(classifier, "asking_")
    with pytest.raises(RunError, match="is not finite"):  # in its last update
        classifier.fit(texts[:16], labels[:16], epochs=1, batch_size=16, learning_rate=1e30)


def test_other_models_are_rejected(tokenizer):
    other = small_model(ModernBertForSequenceClassification)
    with pytest.raises(InputError, match="head has the labels 'LABEL_0', 'LABEL_1'"):
        Classifier((other, tokenizer), ["a", "b"]).predict(["text"])
    with pytest.raises(InputError, match="has no masked-language-model head"):
        Classifier((other, tokenizer), ["a", "b"], head="mlm").predict(["text"])


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


class Numbers(Classifier):
    """What scikit-learn's checks can feed: rows of numbers, each written out as a text."""

    def __init__(self, source=None, labels=None, template=SHORT, epochs=1, max_length=32):
        options = {"template": template, "epochs": epochs, "max_length": max_length}
        super().__init__(source, labels, **options)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = False
        tags.input_tags.two_d_array = tags.requires_fit = tags.classifier_tags.poor_score = True
        return tags

    def fit(self, X, y):
        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        self.names_ = {str(value): value for value in np.unique(y)}
        copies = -(-16 // len(y))  # so that all batches have one shape
        texts, labels = written(X) * copies, [str(value) for value in y] * copies
        return super().fit(texts, labels, learning_rate=1e-3, batch_size=16)

    def predict_proba(self, X):
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
    "check_classifiers_one_label": "with one label there is nothing to choose; it is rejected",
    "check_fit2d_1sample": "one text has one label, which is rejected for that",
    "check_array_api_input": "texts are no arrays",
}


def test_the_checks_of_scikit_learn_that_apply_pass(folder, monkeypatch):
    """All of them, texts being written from their numbers; those that fail are known, and why."""
    # Reading the model takes half the time of a fit.
    monkeypatch.setattr(predictor, "load_pretrained", cache(load_pretrained))
    failed, passed = {}, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for estimator, check in estimator_checks_generator(Numbers(str(folder))):
            name = check.func.__name__
            try:
                check(estimator)
                passed += 1
            except (AssertionError, InputError, SkipTest) as error:
                failed[name] = str(error)
    assert failed.keys() == NOT_OURS.keys(), failed
    assert passed > 45
