"""Calibration: what it promises for any probabilities, known biases found, what is rejected."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import log_loss

from mlmjax.errors import InputError
from mlmjax.statistics.calibration import (
    Calibration,
    batch_calibration,
    null_calibration,
    order_calibration,
    temperature_calibration,
)

NUMBERS = st.floats(-60, 3, width=32)


@st.composite
def log_probs(draw, labels=None):
    """Unnormalised log probabilities whose rows have between one and all of the labels."""
    labels = labels or draw(st.integers(1, 6))
    rows = draw(st.integers(1, 5))
    values = draw(arrays(np.float64, (rows, labels), elements=NUMBERS))
    counts = draw(st.lists(st.integers(1, labels), min_size=rows, max_size=rows))
    counts[0] = labels
    return np.where(np.arange(labels) < np.array(counts)[:, None], values, -np.inf)


@given(log_probs(), st.floats(0.05, 20), st.data())
@settings(deadline=None)
def test_calibrated_rows_sum_to_one_over_the_labels_they_have(scores, temperature, data):
    bias = data.draw(arrays(np.float64, scores.shape[1], elements=st.floats(-9, 9)))
    both = Calibration(method="batch", bias=tuple(bias), temperature=temperature, rows=1)
    found = both.apply(scores)
    assert np.allclose(np.exp(found).sum(axis=1), 1)
    assert (np.isneginf(found) == np.isneginf(scores)).all()
    cooled = Calibration(method="temperature", temperature=temperature, rows=1).apply(scores)
    best = np.take_along_axis(cooled, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
    assert np.allclose(best, cooled.max(axis=1))


@given(log_probs(labels=4), st.data())
@settings(deadline=None)
def test_one_after_another_is_both_at_once(scores, data):
    def draw(method):
        bias = data.draw(st.none() | st.tuples(*[st.floats(-5, 5)] * 4))
        temperature = data.draw(st.floats(0.2, 5))
        return Calibration(method=method, bias=bias, temperature=temperature, rows=3)

    first, second = draw("null"), draw("temperature")
    together = first.then(second)
    assert together.method == "null+temperature"
    expected = second.apply(first.apply(scores))
    assert np.allclose(together.apply(scores), expected, rtol=1e-9, atol=1e-9)


@given(log_probs())
@settings(deadline=None)
def test_batch_bias_is_the_mean_probability_of_the_rows_that_have_the_label(scores):
    probs = np.exp(log_softmax(scores, axis=1))
    expected = [column[np.isfinite(s)].mean() for column, s in zip(probs.T, scores.T, strict=True)]
    assert np.allclose(np.exp(batch_calibration(scores).bias), expected)
    assert null_calibration(scores).bias == batch_calibration(scores).bias


def test_a_bias_of_the_names_is_found_again_from_shifts():
    rng = np.random.default_rng(0)
    rows, labels = 60, 4
    content = rng.normal(size=(rows, labels))
    prior = np.log([0.55, 0.2, 0.15, 0.1])
    asked = [np.roll(content, -shift, axis=1) + prior for shift in range(labels)]
    scores = log_softmax(np.stack(asked, axis=1), axis=2)
    found = order_calibration(scores)
    assert np.allclose(np.exp(found.bias), np.exp(prior))  # the content cancels in every row
    assert np.allclose(np.exp(found.apply(scores[:, 0])), np.exp(log_softmax(content, axis=1)))
    fewer = order_calibration(scores[:, [0, 2]])
    error = np.abs(np.exp([fewer.bias, np.full(4, np.log(0.25))]) - np.exp(prior)).max(axis=1)
    assert 1e-3 < error[0] < error[1] / 3  # roughly, over the rows


def test_rows_with_fewer_options_have_fewer_shifts():
    prior = np.log([0.5, 0.3, 0.2])
    scores = np.full((2, 3, 3), -np.inf)
    content = np.array([0.3, -1.0, 0.4])
    for shift in range(3):
        scores[0, shift] = log_softmax(np.roll(content, -shift) + prior)
    for shift in range(2):
        scores[1, shift, :2] = log_softmax(np.roll(content[:2], -shift) + prior[:2])
    bias = np.exp(order_calibration(scores).bias)
    assert np.allclose(bias, [(0.5 + 0.5 / 0.8) / 2, (0.3 + 0.3 / 0.8) / 2, 0.2])
    with pytest.raises(InputError, match=r"row 1 \(index 0\) of log_probs has one shift"):
        order_calibration(scores[:, :1])
    torn = scores.copy()
    torn[0, 1, 2] = -np.inf
    with pytest.raises(InputError, match="other option names under one shift"):
        order_calibration(torn)


def test_a_temperature_of_bad_answers_makes_no_loss_worse():
    """Every row gets the first label, which a quarter of the rows has, and the rest helps a bit."""
    logits = np.zeros((40, 4))
    gold = np.arange(40) % 4
    logits[np.arange(40), gold] = 1.0
    logits[:, 0] = 2.0
    assert (logits.argmax(axis=1) == gold).mean() == 0.25
    before = log_softmax(logits, axis=1)
    found = temperature_calibration(before, gold)
    after = found.apply(before)
    assert found.temperature > 1
    assert log_loss(gold, np.exp(after)) < min(log_loss(gold, np.exp(before)), np.log(4))


@pytest.mark.parametrize("truth", [0.3, 1.0, 4.0])
def test_temperature_has_the_least_loss(truth):
    rng = np.random.default_rng(1)
    logits = 3 * rng.normal(size=(4000, 5))
    logits[::3, 4] = -np.inf
    probs = np.exp(log_softmax(logits / truth, axis=1))
    gold = np.array([rng.choice(5, p=row) for row in probs])
    found = temperature_calibration(log_softmax(logits, axis=1), gold)
    assert found.bias is None
    assert found.temperature == pytest.approx(truth, rel=0.1)

    def loss(temperature):
        scaled = np.exp(log_softmax(logits / temperature, axis=1))
        return log_loss(gold, scaled, labels=range(5))

    best = minimize_scalar(loss, bounds=(truth / 3, truth * 3), options={"xatol": 1e-9})
    assert found.temperature == pytest.approx(best.x, rel=1e-4)
    found_loss = loss(found.temperature)
    assert found_loss <= loss(found.temperature * 1.01)
    assert found_loss <= loss(found.temperature * 0.99)


def test_where_no_temperature_fits_it_says_so():
    scores = np.log([[0.9, 0.1], [0.2, 0.8]])
    for given_scores, gold, message in (
        (scores, [0, 1], "answers of all these 2 rows are right"),
        (scores, [1, 0], "are no better than guessing"),
        (np.zeros((3, 2)), [1, 0, 1], "are no better than guessing"),
    ):
        with pytest.raises(InputError, match=message):
            temperature_calibration(given_scores, gold)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0, 1.0], r"shape \[2\]; expected \[rows, labels\]"),
        (np.zeros((0, 3)), r"shape \[0, 3\]"),
        ([[0.0, np.nan]], r"row 1 \(index 0\) holds NaN"),
        ([[0.0, 1.0], [np.inf, 0.0]], r"row 2 \(index 1\) holds"),
        ([[0.0, 1.0], [-np.inf, -np.inf]], r"row 2 \(index 1\) has no label"),
        ([["a", "b"]], "are not numbers"),
        ([[0.0, -np.inf]], "no row has label 2"),
    ],
)
def test_what_is_no_table_of_log_probabilities_is_rejected(scores, message):
    with pytest.raises(InputError, match=message):
        batch_calibration(scores)


@pytest.mark.parametrize("gold", [[0], [0, 2], [0, -1], [0.0, 1.0], ["a", "b"], [[0], [1]], [1, 1]])
def test_wrong_gold_is_rejected(gold):
    scores = np.array([[-1.0, -0.5], [-0.1, -np.inf]])
    with pytest.raises(InputError, match="gold"):
        temperature_calibration(scores, gold)


def test_it_comes_back_from_json():
    found = batch_calibration(np.log([[0.7, 0.3]])).then(
        temperature_calibration(np.log([[0.7, 0.3]] * 3), [0, 0, 1])
    )
    again = Calibration.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    with pytest.raises(InputError, match="has 3 labels and the calibration 2"):
        found.apply(np.zeros((1, 3)))
    with pytest.raises(InputError, match="have 2 and 3 labels"):
        found.then(Calibration(method="null", bias=(0.0, 0.0, 0.0), rows=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "names 'magic'; expected batch"),
        ({"method": "batch+"}, "names ''"),
        ({"bias": [0.1, float("nan")]}, r"bias\.1"),
        ({"bias": []}, "bias"),
        ({"bias": "0.1"}, "bias"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"rows": 0}, "rows"),
        ({"more": 1}, "more: unknown key"),
    ],
)
def test_a_strangers_values_are_rejected(change, message):
    values = {"method": "batch", "bias": [0.1, 0.2], "temperature": 1.0, "rows": 5}
    Calibration.from_dict(values)
    with pytest.raises(InputError, match=rf"mine: .*{message}"):
        Calibration.from_dict(values | change, "mine")
    with pytest.raises(InputError, match="rows is missing"):
        Calibration.from_dict({"method": "batch"})
    with pytest.raises(InputError):
        Calibration.from_dict([values])


def test_a_temperature_for_distributions_brings_the_probabilities_to_them():
    rng = np.random.default_rng(4)
    shares = rng.dirichlet(np.ones(3), 40)
    found = temperature_calibration(2.5 * np.log(shares), shares)
    assert found.temperature == pytest.approx(2.5, rel=1e-6)
    gold = shares.argmax(axis=1)
    scores = np.log(rng.dirichlet(np.ones(3), 40))
    assert temperature_calibration(scores + np.eye(3)[gold], gold) == temperature_calibration(
        scores + np.eye(3)[gold], np.eye(3)[gold]
    )
    for wrong in (shares[:, :2], shares / 2, 2 * shares - 1 / 3):
        with pytest.raises(InputError, match="gold has shape"):
            temperature_calibration(scores, wrong)
    missing = np.where(np.arange(3) == 2, -np.inf, scores)
    with pytest.raises(InputError, match="a label that it does not have"):
        temperature_calibration(missing, shares)
