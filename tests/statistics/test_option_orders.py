"""Cyclic orders of options: there and back, pooled, and how much the order matters."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmjax.errors import InputError
from mlmjax.statistics import option_orders
from mlmjax.statistics.metrics import wilson_interval


@given(st.integers(1, 300), st.none() | st.integers(1, 400))
def test_shifts_are_distinct_evenly_spaced_and_start_at_the_given_order(options, count):
    found = option_orders.shifts(options, count)
    assert len(found) == min(options, count or options)
    assert found[0] == 0
    steps = np.diff([*found, options])
    assert steps.min() >= 1
    assert steps.max() - steps.min() <= 1


@given(st.lists(st.floats(-9, 0), min_size=1, max_size=9), st.integers(0, 20), st.integers(0, 3))
def test_unshifting_undoes_shifting(values, shift, padding):
    asked = np.array([*option_orders.shifted(values, shift), *[-np.inf] * padding])
    kept = asked.copy()
    back = option_orders.unshifted(asked, shift, len(values))
    assert back.tolist() == [*values, *[-np.inf] * padding]
    assert (asked == kept).all()
    for j, value in enumerate(option_orders.shifted(values, shift)):
        assert value == values[(j + shift) % len(values)]


def test_what_cannot_be_shifted_is_rejected():
    for wrong in ((0, 1), (3, 0)):
        with pytest.raises(InputError, match="expected 1 or more"):
            option_orders.shifts(*wrong)
    for columns, options in ((np.zeros(2), 3), (np.zeros((2, 2)), 2), (np.zeros(2), 0)):
        with pytest.raises(InputError, match="a column for each option"):
            option_orders.unshifted(columns, 1, options)
    with pytest.raises(InputError, match="no shift was prompted"):
        option_orders.pooled(np.full((2, 2), -np.inf))


def test_pooled_is_the_mean_of_the_probabilities_of_what_was_asked():
    probs = np.random.default_rng(0).dirichlet(np.ones(4), size=(5, 3))
    assert np.allclose(np.exp(option_orders.pooled(np.log(probs))), probs.mean(axis=1))
    scores = np.log(probs)
    scores[0, 2] = -np.inf
    scores[1, :, 3] = -np.inf
    assert np.allclose(np.exp(option_orders.pooled(scores))[0], probs[0, :2].mean(axis=0))
    assert option_orders.pooled(scores)[1, 3] == -np.inf


def ask(content, prior, count):
    """Log probabilities of options whose letters have a prior, in the given order again."""
    options = len(content)
    result = np.full((count, len(prior)), -np.inf)
    for i, shift in enumerate(option_orders.shifts(options, count)):
        letters = np.array(option_orders.shifted(content.tolist(), shift)) + prior[:options]
        result[i, :options] = option_orders.unshifted(letters, shift, options)
    return result


def test_a_model_that_reads_the_options_never_changes():
    rng = np.random.default_rng(2)
    content = rng.normal(size=(20, 4))
    scores = np.stack([ask(row, np.zeros(4), 4) for row in content])
    found = option_orders.sensitivity(scores, content.argmax(axis=1))
    assert found["changed"] == 0
    assert found["changed_ci95"] == list(wilson_interval(0, 20))
    assert (found["rows"], found["shifts"], found["position_spread"]) == (20, 4, 0)
    assert found["accuracy_by_shift"] == [{"rows": 20, "accuracy": 1}] * 4
    assert found["accuracy_by_position"] == [{"rows": 20, "accuracy": 1}] * 4
    assert found["pooled_accuracy"] == 1


def test_a_model_that_likes_a_letter_is_right_where_that_letter_is():
    prior = np.array([0.0, 9.0, 0.0, 0.0, 0.0])
    content = np.random.default_rng(3).normal(size=(10, 5))
    scores = np.stack([ask(row, prior, 3) for row in content])
    gold = np.arange(10) % 5
    found = option_orders.sensitivity(scores, gold)
    assert found["changed"] == 1
    assert found["position_spread"] == 1
    assert [one["accuracy"] for one in found["accuracy_by_position"]] == [0, 1, 0, 0, 0]
    assert sum(one["rows"] for one in found["accuracy_by_position"]) == 30
    for one, shift in zip(found["accuracy_by_shift"], option_orders.shifts(5, 3), strict=True):
        assert one["accuracy"] == np.mean(gold == (1 + shift) % 5)


def test_rows_of_fewer_options_are_asked_less_often():
    prior = np.array([0.0, 9.0, 0.0, 0.0])
    scores = np.full((2, 4, 4), -np.inf)
    scores[0] = ask(np.array([0.5, 0.1, 0.2, 0.3]), prior, 4)
    scores[1, :2] = ask(np.array([0.5, 0.1]), prior, 2)
    found = option_orders.sensitivity(scores, [0, 1])
    assert [one["rows"] for one in found["accuracy_by_shift"]] == [2, 2, 1, 1]
    assert [one["rows"] for one in found["accuracy_by_position"]] == [2, 2, 1, 1]
    assert found["changed"] == 1
    two = option_orders.sensitivity(np.concatenate([scores[1:], scores[1:]]), [0, 1])
    assert [one["rows"] for one in two["accuracy_by_shift"]] == [2, 2]  # none of a third order
    assert two["shifts"] == 2
    with pytest.raises(InputError, match="before a prompted one"):
        option_orders.sensitivity(scores[:, [0, 2, 1]], [0, 1])
    with pytest.raises(InputError, match="gold: row 2"):
        option_orders.sensitivity(scores, [0, 2])
