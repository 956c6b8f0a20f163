"""Calibration figures against plain loops and scikit-learn, and the diagram."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import has_named_axes, read_picture
from sklearn.metrics import log_loss

from mlmjax.errors import InputError
from mlmjax.evaluation.report import diagram
from mlmjax.reporting import charts
from mlmjax.statistics.reliability import BINS, calibration, confidence, equal_mass, equal_width


def drawn(rows, labels, seed):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(rows, labels))
    return logits, rng.integers(labels, size=rows)


@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_figures_are_their_plain_forms(rows, labels, seed):
    logits, gold = drawn(rows, labels, seed)
    found = calibration(logits, gold)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = log_loss(gold, probs, labels=range(labels)) if labels > 1 else 0.0
    assert found["nll"] == pytest.approx(loss, abs=1e-9)
    brier, bins = 0.0, [[] for _ in range(BINS)]
    for row, truth in zip(probs, gold, strict=True):
        brier += sum((p - (j == truth)) ** 2 for j, p in enumerate(row)) / rows
        best = int(row.argmax())
        place = next(i for i in range(BINS) if row[best] <= (i + 1) / BINS + 1e-12)
        bins[place].append((row[best], best == truth))
    assert found["brier"] == pytest.approx(brier, abs=1e-9)
    error = sum(len(b) / rows * abs(np.mean(b, axis=0) @ [1, -1]) for b in bins if b)
    assert found["ece"] == pytest.approx(error, abs=1e-9)
    assert found["confidence"] == pytest.approx(probs.max(axis=1).mean())


def test_bins_of_equal_mass_hold_equal_numbers():
    logits, gold = drawn(150, 5, 0)
    sure, right = confidence(logits, gold)
    found = equal_mass(sure, right)
    assert [one.rows for one in found] == [10] * BINS
    order = np.argsort(sure)
    parts = zip(np.split(sure[order], BINS), np.split(right[order], BINS), strict=True)
    error = np.mean([abs(s.mean() - r.mean()) for s, r in parts])
    assert calibration(logits, gold)["ece_equal_mass"] == pytest.approx(error)


@given(st.lists(st.sampled_from([0.25, 0.3, 0.5, 0.9, 1.0]), min_size=1, max_size=40))
def test_bins_depend_on_no_order_and_lose_no_row(values):
    sure = np.array(values)
    right = np.random.default_rng(len(values)).random(len(values)) < sure
    back = np.arange(len(sure))[::-1]
    for cut in (equal_width, equal_mass):
        found = cut(sure, right)
        assert sum(one.rows for one in found) == len(sure)
        other = cut(sure[back], right[back])
        assert [one.rows for one in other] == [one.rows for one in found]
        for one in found:
            inside = (sure > one.low) & (sure <= one.high)
            assert one.rows == inside.sum()
            if one.rows:
                assert one.confidence == pytest.approx(sure[inside].mean())
                assert one.accuracy == pytest.approx(right[inside].mean())
            else:
                assert one.confidence is one.accuracy is None


def test_probabilities_that_mean_what_they_say_have_no_error():
    logits = np.log(np.tile([[0.75, 0.25]], (400, 1)))
    gold = np.arange(400) % 4 == 3
    found = calibration(logits, gold.astype(int))
    assert found["ece"] == pytest.approx(0, abs=1e-12)
    assert found["ece_equal_mass"] == pytest.approx(0, abs=1e-12)
    too_sure = calibration(3 * logits, gold.astype(int))
    assert too_sure["ece"] == pytest.approx(0.75**3 / (0.75**3 + 0.25**3) - 0.75)
    assert too_sure["nll"] > found["nll"]
    assert too_sure["brier"] > found["brier"]


def test_probabilities_are_over_the_labels_of_the_row():
    """Under the softmax over a vocabulary they do not sum to 1."""
    logits, gold = drawn(30, 4, 1)
    few = np.where(np.arange(4) < 3, logits, -np.inf)
    gold %= 3
    assert calibration(few - 40.0, gold) == pytest.approx(calibration(logits[:, :3], gold))


def test_bad_input_is_rejected():
    with pytest.raises(InputError, match="log_probs has shape"):
        calibration(np.zeros((0, 2)), [])
    with pytest.raises(InputError, match="gold: row 1"):
        calibration(np.zeros((1, 2)), [2])
    for cut in (equal_width, equal_mass):
        with pytest.raises(InputError, match=r"shapes \[2, 2\] and \[2\]; .*confidence"):
            cut(np.log([[0.8, 0.2], [0.6, 0.4]]), [0, 0])
        with pytest.raises(InputError, match="bins is 0"):
            cut(np.array([0.5]), np.array([True]), 0)


@pytest.mark.parametrize("rows", [1, 500])
def test_the_diagram_shows_every_bin_that_has_rows(rows):
    sure, right = confidence(*drawn(rows, 4, 2))
    figure = diagram(sure, right)
    top, below = figure.axes
    bins = [one for one in equal_width(sure, right) if one.rows]
    assert [bar.get_height() for bar in top.patches] == [one.accuracy for one in bins]
    assert sum(bar.get_height() for bar in below.patches) == rows
    assert has_named_axes(figure)
    assert {"calibrated", "accuracy", "rows"} <= set(read_picture(charts.svg(figure, "it")))
