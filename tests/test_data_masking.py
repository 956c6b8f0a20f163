"""Masking: exact counts, specials spared, inputs left alone."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmjax import InputError
from mlmjax.data import mask_answer, mask_dummy, mask_random, masking

SPECIAL, MASK = {0, 1, 2, 3}, 99
IDS = st.lists(st.integers(0, 50), min_size=1, max_size=60).filter(lambda ids: set(ids) - SPECIAL)
RATES = st.floats(0.001, 0.999)


def test_examples_in_the_documentation():
    assert doctest.testmod(masking).failed == 0


@pytest.mark.parametrize(
    "ids", [[0, 7, 8, 9, 1], (0, 7, 8, 9, 1), *(np.array([0, 7, 8, 9, 1], t) for t in "iIlB")]
)
def test_only_the_answer_is_masked(ids):
    inputs, positions, targets = mask_answer(ids, 3, mask_id=MASK)
    assert inputs.tolist() == [0, 7, 8, MASK, 1]
    assert positions.tolist() == [3]
    assert targets.tolist() == [9]
    assert list(ids) == [0, 7, 8, 9, 1]
    assert {array.dtype for array in (inputs, positions, targets)} == {np.dtype(np.int32)}


@settings(deadline=None)
@given(ids=IDS, rate=RATES, seed=st.integers(0, 2**32), dummy=st.booleans())
def test_random_masks_hit_the_exact_number_of_ordinary_tokens(ids, rate, seed, dummy):
    given_ids = np.array(ids)
    mask = mask_dummy if dummy else mask_random
    inputs, positions, targets = mask(
        given_ids, rate, np.random.default_rng(seed), special_ids=frozenset(SPECIAL), mask_id=MASK
    )
    maskable = [i for i, token in enumerate(ids) if token not in SPECIAL]
    assert len(positions) == max(1, round(rate * len(maskable)))
    assert positions.tolist() == sorted(set(positions.tolist()))
    assert set(positions.tolist()) <= set(maskable)
    assert targets.tolist() == [MASK if dummy else ids[i] for i in positions]
    expected = [MASK if i in set(positions.tolist()) else token for i, token in enumerate(ids)]
    assert inputs.tolist() == expected
    assert given_ids.tolist() == ids


@settings(deadline=None)
@given(ids=IDS, rate=RATES, seed=st.integers(0, 100))
def test_dummy_and_random_masks_agree_on_where(ids, rate, seed):
    def masked(mask):
        rng = np.random.default_rng(seed)
        return mask(ids, rate, rng, special_ids=list(SPECIAL), mask_id=MASK)

    random, dummy = masked(mask_random), masked(mask_dummy)
    assert random[0].tolist() == dummy[0].tolist()
    assert random[1].tolist() == dummy[1].tolist()


def test_every_ordinary_position_is_drawn_equally_often():
    ids = [0, *range(10, 20), 3]
    rng = np.random.default_rng(0)
    drawn = np.zeros(len(ids))
    for _ in range(2000):
        drawn[mask_random(ids, 0.3, rng, special_ids=SPECIAL, mask_id=MASK)[1]] += 1
    assert drawn[0] == drawn[-1] == 0
    # 600 expected, standard deviation below 21.
    assert np.abs(drawn[1:-1] - 600).max() < 100


@pytest.mark.parametrize("position", [-1, 4, 100])
def test_an_answer_outside_the_example_is_refused(position):
    with pytest.raises(InputError, match="outside the example of 4 tokens"):
        mask_answer([0, 7, 8, 1], position, mask_id=MASK)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_rate_outside_the_open_interval_is_refused(rate):
    with pytest.raises(InputError, match="rate"):
        mask_random([7, 8], rate, np.random.default_rng(0), special_ids=SPECIAL, mask_id=MASK)


@pytest.mark.parametrize("ids", [[0, 1, 2], []])
def test_nothing_to_mask_is_refused(ids):
    with pytest.raises(InputError, match="nothing to mask"):
        mask_dummy(ids, 0.3, np.random.default_rng(0), special_ids=SPECIAL, mask_id=MASK)


@pytest.mark.parametrize("ids", [[1.5, 2.0], [[1, 2]], "ab"])
def test_ids_that_are_no_flat_list_of_numbers_are_refused(ids):
    with pytest.raises(InputError, match="expected a flat list of whole token ids"):
        mask_answer(ids, 0, mask_id=MASK)
