"""Calibration, label sets and abstaining are right, and are saved with the classifier."""

import numpy as np
import pytest
from labelled_texts import SHORT

from mlmjax.classification.classifier import Classifier
from mlmjax.classification.predictor import NULL_TEXTS
from mlmjax.errors import InputError
from mlmjax.statistics import label_sets
from mlmjax.statistics.calibration import (
    batch_calibration,
    null_calibration,
    temperature_calibration,
)
from mlmjax.statistics.option_orders import shifted

LABELS = ["sports", "money", "rain"]
WORDS = ["goal", "bank", "rain", "old", "new", "team", "price", "cloud"]


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 4)) for _ in range(count)]


@pytest.fixture
def classifier(noisy_pair):
    return Classifier(noisy_pair, LABELS, template=SHORT)


def log_probs(classifier, items):
    return np.log(classifier.predict_proba(items))


def truth_of(classifier, items, seed=0):
    """Draw labels that follow the classifier's answers, but are less sure than it is."""
    rng = np.random.default_rng(seed)
    probabilities = classifier.predict_proba(items) ** 0.5
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return [LABELS[rng.choice(3, p=row)] for row in probabilities]


def test_biases_are_removed(classifier):
    items = texts(12)
    raw = log_probs(classifier, items)
    classifier.calibrate(items)
    expected = batch_calibration(raw).apply(raw)
    np.testing.assert_allclose(log_probs(classifier, items), expected, atol=1e-5)
    classifier.calibrate()
    nulls = log_probs(Classifier(classifier.source, LABELS, template=SHORT), list(NULL_TEXTS))
    expected = null_calibration(nulls).apply(raw)
    np.testing.assert_allclose(log_probs(classifier, items), expected, atol=1e-5)
    classifier.calibrate(["nothing"], method="null")
    assert classifier.settings_.calibration.rows == 1


def test_a_temperature_is_put_on_top_and_changes_no_answer(classifier):
    items = texts(150)
    classifier.calibrate(items)
    before, labels = log_probs(classifier, items), truth_of(classifier, items)
    classifier.calibrate(items, labels)
    gold = [LABELS.index(label) for label in labels]
    expected = temperature_calibration(before, gold).apply(before)
    after = log_probs(classifier, items)
    np.testing.assert_allclose(after, expected, atol=1e-4)
    assert classifier.settings_.calibration.method == "batch+temperature"
    assert classifier.settings_.calibration.temperature > 1.2  # the labels were drawn less sure
    assert (after.argmax(axis=1) == before.argmax(axis=1)).all()


def test_the_preference_for_letters_is_removed(classifier, noisy_pair):
    """Over all orders of the options, letters are then equally probable."""
    items = texts(10)
    before = [
        log_probs(Classifier(noisy_pair, shifted(LABELS, shift), template=SHORT), items)
        for shift in range(3)
    ]
    classifier.calibrate(items, method="order")
    bias = np.array(classifier.settings_.calibration.bias)
    mean = np.mean(before, axis=0)
    priors = np.exp(mean) / np.exp(mean).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(bias), priors.mean(axis=0), atol=1e-5)
    again = Classifier(noisy_pair, LABELS, template=SHORT, orders="all")
    with pytest.raises(InputError, match="in one order"):
        again.calibrate(items, method="order")


def test_label_sets_cover_the_share_wanted(classifier):
    items = texts(260, seed=1)
    labels = truth_of(classifier, items, seed=2)
    with pytest.raises(InputError, match="call conform"):
        classifier.predict_set(items)
    classifier.conform(items[:130], labels[:130])
    sets = classifier.predict_set(items[130:], coverage=0.8)
    gold = [LABELS.index(label) for label in labels]
    raw = log_probs(classifier, items)
    expected = label_sets.fit(raw[:130], gold[:130]).sets(raw[130:], 0.8)
    assert (sets == expected).all()
    found = label_sets.coverage(sets, gold[130:])
    assert found["coverage_ci95"][1] > 0.8
    with pytest.raises(InputError, match=r"too few for a coverage of 0\.999"):
        classifier.predict_set(items[:1], coverage=0.999)


def test_abstaining_keeps_the_answers_that_are_right_often_enough(classifier):
    items = texts(200, seed=3)
    labels = np.array(truth_of(classifier, items, seed=4))
    plain = classifier.score(items, labels)
    wanted = plain + 0.04
    classifier.abstain(items, labels, accuracy=wanted, least=5)
    assert classifier.threshold_ == classifier.settings_.abstain_below
    answers = classifier.predict(items)
    given = answers != ""
    assert 5 <= given.sum() < 200
    assert (answers[given] == labels[given]).mean() >= wanted
    # One answer more, the next sure one, would be too many.
    sure = classifier.predict_proba(items).max(axis=1)
    limit = classifier.settings_.abstain_below
    lower = sure[sure < limit].max()
    more = classifier.predict(items, abstain_below=lower)
    assert (more[more != ""] == labels[more != ""]).mean() < wanted
    assert (classifier.predict(items, abstain_below=0.0) != "").all()
    assert classifier.score(items, labels) < plain  # no answer is no right one
    wrong = classifier.predict_proba(items[:3]).argmax(axis=1) - 1
    with pytest.raises(InputError, match="no threshold reaches"):
        classifier.abstain(items[:3], [LABELS[i] for i in wrong], accuracy=1.0)


def test_what_was_learned_is_saved_and_restored(classifier, tmp_path):
    items = texts(60)
    labels = truth_of(classifier, items)
    classifier.set_params(examples=[("old goal", "sports")], template=None, long_text="max")
    classifier.calibrate(items).calibrate(items, labels).conform(items, labels)
    classifier.abstain(items, labels, accuracy=0.5)
    classifier.save_pretrained(tmp_path / "saved")
    restored = Classifier.from_pretrained(tmp_path / "saved")
    assert restored.settings_ == classifier.settings_
    assert restored.settings_.examples[0].text == "old goal"
    np.testing.assert_array_equal(restored.predict_proba(items), classifier.predict_proba(items))
    np.testing.assert_array_equal(restored.predict_set(items), classifier.predict_set(items))
    np.testing.assert_array_equal(restored.predict(items), classifier.predict(items))
    # What was learned for these labels does not hold for others.
    other = Classifier.from_pretrained(tmp_path / "saved", ["sports", "x"])
    assert other.settings_.calibration is other.settings_.conformal is None


def test_what_was_learned_holds_only_for_the_same_prompts(classifier, tmp_path):
    items = texts(60)
    own = {"instruction": "Which {topic}?", "template": None, "answer": "letters"}
    classifier.set_params(labels=LABELS[:2], **own)
    classifier.calibrate(items).conform(items, np.array(["sports", "money"] * 30))
    likely = classifier.predict(items)
    likely[::5] = "sports"
    classifier.calibrate(items, likely)
    classifier.save_pretrained(tmp_path / "saved")

    def again(*labels, **options):
        restored = Classifier.from_pretrained(tmp_path / "saved", *labels, **options)
        return restored.calibration_ is not None, restored.settings_.template

    assert again() == (True, classifier.settings_.template)
    assert again(LABELS[1::-1])[0] is again(LABELS)[0] is False
    for changed in ({"orders": 2}, {"answer": "words"}, {"multi_label": True}, {"max_length": 99}):
        kept, template = again(**changed)
        assert not kept
        assert template.startswith("Which {{topic}}?")
    kept, template = again(examples=[("old goal", "sports")])
    assert not kept
    assert "{examples}" in template
    # An own prompt stays, and the error names what it lacks.
    own = Classifier(classifier.source, ["sports", "money"], template=SHORT)
    own.save_pretrained(tmp_path / "own")
    with pytest.raises(InputError, match=r"has no \{examples\}"):
        Classifier.from_pretrained(tmp_path / "own", examples=[("old goal", "sports")])
    with pytest.raises(InputError, match="write the instruction into it"):
        Classifier.from_pretrained(tmp_path / "own", instruction="Say.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], None), "needs texts|list is empty"),
        ((["a"], None, "temperature"), "takes labels"),
        ((["a"], ["sports"], "batch"), "takes no labels"),
        ((["a"], None, "magic"), "method is 'magic'"),
        ((["a", "b"], ["sports"]), "2 texts and 1 labels"),
        ((["a"], ["nobody"]), "label 'nobody' is not one of"),
        (([" "], None), "blank"),
    ],
)
def test_bad_arguments_are_rejected(classifier, arguments, message):
    given, labels, method = (*arguments, None)[:3]
    with pytest.raises(InputError, match=message):
        classifier.calibrate(given, labels, method=method)


def test_several_labels_are_calibrated_as_yes_and_no(noisy_pair):
    items = texts(40)
    classifier = Classifier(noisy_pair, LABELS, multi_label=True)
    raw = classifier.predict_proba(items)
    classifier.calibrate(items)
    mean = np.array([raw.mean(), 1 - raw.mean()])
    odds = raw / mean[0], (1 - raw) / mean[1]
    expected = odds[0] / (odds[0] + odds[1])
    np.testing.assert_allclose(classifier.predict_proba(items), expected, atol=1e-5)
    with pytest.raises(InputError, match="one label per text"):
        classifier.conform(items, [["sports"]] * 40)


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
