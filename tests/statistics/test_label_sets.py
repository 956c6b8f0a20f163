"""Conformal sets: coverage on rows drawn alike, plain forms of the scores, what is rejected."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from mlmjax.errors import InputError
from mlmjax.statistics import label_sets
from mlmjax.statistics.label_sets import Conformal


def drawn(rows, labels, seed, sharpness=2.0):
    """Log probabilities of a model that is far too sure, and labels; some rows have fewer."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, labels))
    logits[rng.random(rows) < 0.25, -1] = -np.inf
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gold = (truth.cumsum(axis=1) > rng.random((rows, 1))).argmax(axis=1)
    return sharpness * logits, gold


@pytest.mark.parametrize("method", ["lac", "aps"])
@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.95])
def test_coverage_is_what_was_asked_for(method, wanted):
    """One row after 49 labelled ones, many times over: hits are binomial, at least as asked for."""
    draws = 2000
    scores, gold = drawn(50 * draws, 5, seed=int(100 * wanted))
    hits = 0
    for first in range(0, 50 * draws, 50):
        known, new = slice(first, first + 49), slice(first + 49, first + 50)
        fitted = label_sets.fit(scores[known], gold[known], method=method)
        hits += label_sets.coverage(fitted.sets(scores[new], wanted), gold[new])["coverage"]
    assert binom.cdf(hits, draws, wanted) > 1e-3
    if method == "lac":  # whose scores have no ties
        assert binom.sf(hits - 1, draws, wanted + 1 / 50) > 1e-3


@given(st.integers(0, 10**6), st.sampled_from(["lac", "aps"]), st.floats(0.05, 0.9))
@settings(deadline=None, max_examples=50)
def test_more_coverage_never_takes_labels_out(seed, method, wanted):
    scores, gold = drawn(60, 4, seed)
    fitted = label_sets.fit(scores, gold, method=method)
    small, large = fitted.sets(scores, wanted), fitted.sets(scores, min(wanted + 0.07, 0.96))
    assert (small <= large).all()
    assert not large[np.isneginf(scores)].any()
    # On the very rows it was fitted on, the share is exact.
    assert small[np.arange(60), gold].mean() >= wanted


@given(st.integers(0, 10**6), st.integers(1, 7))
@settings(deadline=None, max_examples=50)
def test_scores_are_their_plain_forms(seed, labels):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(labels), size=6)
    gold = rng.integers(labels, size=6)
    lac, aps = (label_sets.fit(np.log(probs), gold, method=m).scores for m in ("lac", "aps"))
    for row, truth, one, other in zip(probs, gold, lac, aps, strict=True):
        assert one == pytest.approx(1 - row[truth])
        assert other == pytest.approx(row[row > row[truth]].sum())


def test_aps_has_the_answer_in_every_set():
    scores, gold = drawn(300, 5, 1)
    sets = label_sets.fit(scores, gold, method="aps").sets(scores, 0.1)
    assert sets[np.arange(300), scores.argmax(axis=1)].all()
    tied = label_sets.fit(np.zeros((20, 3)), [0] * 20, method="aps")
    assert tied.sets(np.zeros((1, 3)), 0.5).tolist() == [[True, False, False]]


@pytest.mark.parametrize(("wanted", "needed"), [(0.9, 9), (0.95, 19), (0.99, 99), (0.1, 1)])
def test_how_many_rows_are_needed(wanted, needed):
    scores = tuple(i / 200 for i in range(needed))
    assert Conformal(method="lac", scores=scores).threshold(wanted) == max(scores)
    if needed > 1:
        with pytest.raises(InputError, match=f"too few for a coverage .* at least {needed}, or"):
            Conformal(method="lac", scores=scores[:-1]).threshold(wanted)


def test_ranks_are_exact():
    """0.7 * 30 is 21 and 0.1 * 30 is 3, which floating point would round up."""
    scores = tuple(i / 100 for i in range(1, 30))
    for wanted, rank in ((0.7, 21), (0.1, 3), (0.9, 27)):
        assert Conformal(method="lac", scores=scores).threshold(wanted) == rank / 100


def test_measured_sets():
    sets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    found = label_sets.coverage(sets, [0, 2, 1, 1])
    low, high = found.pop("coverage_ci95")
    assert 0 < low < 0.5 < high < 1
    expected = {"coverage": 0.5, "mean_size": 1.5, "empty": 0.25, "single": 0.25, "rows": 4}
    assert found == expected


def test_bad_input_is_rejected():
    scores, gold = drawn(20, 3, 0)
    fitted = label_sets.fit(scores, gold)
    for wanted in (0.0, 1.0, -1.0, float("nan"), 1, "0.9", None):
        with pytest.raises(InputError, match="between 0 and 1"):
            fitted.sets(scores, wanted)
    for act, arguments, options, message in (
        (label_sets.fit, (scores, gold), {"method": "raps"}, "'lac' or 'aps'"),
        (label_sets.fit, (scores, gold[1:]), {}, "gold has shape"),
        (label_sets.coverage, (scores, gold), {}, r"sets has shape .* bool"),
        (label_sets.coverage, (np.ones((1, 2), bool), [2]), {}, "gold: row 1"),
    ):
        with pytest.raises(InputError, match=message):
            act(*arguments, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "raps"}, "method"),
        ({"scores": []}, "scores"),
        ({"scores": [0.5, float("nan")]}, r"scores\.1"),
        ({"scores": [1.5]}, r"scores\.0"),
        ({"scores": 0.5}, "scores"),
        ({"more": 0}, "more: unknown key"),
    ],
)
def test_it_comes_back_from_json_and_strangers_values_do_not(change, message):
    fitted = label_sets.fit(*drawn(20, 3, 0), method="aps")
    values = json.loads(json.dumps(fitted.to_dict()))
    assert Conformal.from_dict(values) == fitted
    with pytest.raises(InputError, match=rf"mine: .*{message}"):
        Conformal.from_dict(values | change, "mine")
