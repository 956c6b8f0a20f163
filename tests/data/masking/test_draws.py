"""Masking: exact counts, special tokens spared, inputs unchanged."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from mlmjax import InputError
from mlmjax.data import mask_answer, mask_dummy, mask_random
from mlmjax.data.masking.draws import (
    SPAN_LENGTHS,
    SPAN_SHARES,
    count_masked,
    draw_words,
    replace_tokens,
    weighted_order,
)

SPECIAL, MASK = {0, 1, 2, 3}, 99
TOKENS = st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=60)


@pytest.mark.parametrize(
    "ids", [[0, 7, 8, 9, 1], (0, 7, 8, 9, 1), *(np.array([0, 7, 8, 9, 1], t) for t in "iIlB")]
)
def test_only_the_answer_is_masked(ids):
    masked = mask_answer(ids, 3, mask_id=MASK)
    assert [array.tolist() for array in masked] == [[0, 7, 8, MASK, 1], [3], [9]]
    assert list(ids) == [0, 7, 8, 9, 1]
    assert {array.dtype for array in masked} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("ids", "position", "message"),
    [
        *[([0, 7, 8, 1], n, "outside the example of 4 tokens") for n in (-1, 4, 100)],
        *[(ids, 0, "a flat list of whole token ids") for ids in ([1.5, 2.0], [[1, 2]], "ab")],
    ],
)
def test_what_is_no_answer_is_rejected(ids, position, message):
    with pytest.raises(InputError, match=message):
        mask_answer(ids, position, mask_id=MASK)


STARTS = "needs word_starts, one for each of 2 tokens; found"


@pytest.mark.parametrize(
    ("ids", "rate", "options", "message"),
    [
        *[([7, 8], rate, {}, "rate") for rate in (0.0, 1.0, -0.1, 1.5, float("nan"))],
        *[(ids, 0.3, {}, "nothing to mask") for ids in ([0, 1, 2], [])],
        ([7, 8], 0.3, {"masking": "span"}, STARTS),
        ([7, 8], 0.3, {"masking": "span", "word_starts": np.ones(3, bool)}, STARTS),
    ],
)
def test_what_cannot_be_masked_is_rejected(ids, rate, options, message):
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match=message):
        mask_dummy(ids, rate, rng, special_ids=SPECIAL, mask_id=MASK, **options)


def words_of(ids, starts):
    """Return the words as lists of positions: special tokens are in none, and end one."""
    words = [[]]
    for position, token in enumerate(ids):
        if starts[position] or token in SPECIAL:
            words.append([])
        if token not in SPECIAL:
            words[-1].append(position)
    return [word for word in words if word]


@settings(deadline=None)
@given(
    example=TOKENS.filter(lambda tokens: {token for token, _ in tokens} - SPECIAL),
    rate=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**32),
    masking=st.sampled_from(["token", "whole_word", "span"]),
)
def test_exactly_as_many_positions_are_masked_and_words_whole(example, rate, seed, masking):
    ids, starts = map(list, zip(*example, strict=True))
    given_ids = np.array(ids)

    def mask(function):
        rng = np.random.default_rng(seed)
        options = {"masking": masking, "word_starts": np.array(starts)}
        return function(given_ids, rate, rng, special_ids=SPECIAL, mask_id=MASK, **options)

    inputs, positions, targets = mask(mask_random)
    chosen = set(positions.tolist())
    words = words_of(ids, starts)
    assert len(positions) == len(chosen) == max(1, round(rate * sum(map(len, words))))
    assert positions.tolist() == sorted(chosen)
    assert chosen <= set(itertools.chain(*words))
    assert targets.tolist() == [ids[position] for position in positions]
    assert inputs.tolist() == [MASK if i in chosen else token for i, token in enumerate(ids)]
    assert given_ids.tolist() == ids
    for again, target in ((mask(mask_random), targets), (mask(mask_dummy), [MASK] * len(targets))):
        for one, other in zip(again, (inputs, positions, target), strict=True):
            np.testing.assert_array_equal(one, other)
    if masking == "token":
        return
    parts = [chosen & set(word) for word in words]
    cut = [p for p, word in zip(parts, words, strict=True) if 0 < len(p) < len(word)]
    untouched = [word for part, word in zip(parts, words, strict=True) if not part]
    assert len(cut) <= 1
    for part in cut:
        assert max(part) - min(part) + 1 == len(part)
        assert all(len(word) > len(part) for word in untouched)  # none would have fitted


@pytest.mark.parametrize("masking", ["token", "whole_word", "span"])
def test_every_word_is_drawn_about_equally_often(masking):
    ids, rng, drawn = np.full(300, 50), np.random.default_rng(0), np.zeros(300)
    options = {"special_ids": SPECIAL, "mask_id": MASK, "word_starts": np.ones(300, bool)}
    for _ in range(500):
        drawn[mask_random(ids, 0.3, rng, masking=masking, **options)[1]] += 1
    assert drawn.sum() == 500 * 90
    # 150 expected, standard deviation about 10; a span is cut off at the ends of the text.
    assert np.abs(drawn[10:-10] - 150).max() < 50


def runs_of(positions):
    return np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)


def test_spans_are_as_long_as_in_spanbert():
    """At a low rate they seldom touch, so that runs of masked words are the spans drawn."""
    rng, starts, lengths = np.random.default_rng(0), np.ones(5000, bool), []
    for _ in range(40):
        lengths += map(len, runs_of(draw_words(np.arange(5000), starts, 0.02, rng, spans=True)))
    lengths = np.array(lengths)
    assert abs(np.mean(lengths) - 3.8) < 0.3
    assert np.mean(lengths > 10) < 0.03
    assert abs(np.mean(lengths == 1) - 0.2 / (1 - 0.8**10)) < 0.05
    assert pytest.approx(3.8, abs=0.005) == SPAN_LENGTHS @ SPAN_SHARES


def test_spans_begin_at_words():
    ids = np.array([0, *[50] * 40, 0, *[50] * 40, 0])
    starts = np.arange(len(ids)) % 2 == 1  # words of two tokens
    maskable = np.flatnonzero(ids == 50)
    for seed in range(50):
        positions = draw_words(maskable, starts, 0.25, np.random.default_rng(seed), spans=True)
        assert all(starts[run[0]] or ids[run[0] - 1] == 0 for run in runs_of(positions))
        assert 41 not in positions


@pytest.mark.parametrize(("apart", "expected"), [(1, 0.74), (2, 0.1)])
def test_spans_end_at_specials(apart, expected):
    """Side by side, 3.8 words make 2.8 neighbours; with a special between any two, chance does."""
    maskable = np.arange(0, 3000 * apart, apart)
    starts = np.ones(3000 * apart, bool)
    positions = draw_words(maskable, starts, 0.1, np.random.default_rng(0), spans=True)
    assert np.mean(np.diff(positions) == apart) == pytest.approx(expected, abs=0.07)


def test_weighted_order_puts_what_weighs_nothing_last_and_at_random():
    rng, last = np.random.default_rng(0), set()
    for _ in range(50):
        order = weighted_order(np.array([0.0, 1e-300, 0.0, 1e30]), rng).tolist()
        assert sorted(order[:2]) == [1, 3]
        last.add(tuple(order[2:]))
    assert last == {(0, 2), (2, 0)}


def test_masked_tokens_are_replaced_by_their_shares():
    rng, ids = np.random.default_rng(0), np.full(20_000, 5)
    shares = {"random_share": 0.1, "kept_share": 0.3}
    found = replace_tokens(ids, MASK, rng, **shares, vocabulary=np.arange(10, 20))
    drawn = found[(found >= 10) & (found < 20)]
    counts = [(found == MASK).sum(), len(drawn), (found == 5).sum()]
    assert chisquare(counts, [12_000, 2_000, 6_000]).pvalue > 0.001
    assert chisquare(np.bincount(drawn - 10, minlength=10)).pvalue > 0.001
    assert (ids == 5).all()


@pytest.mark.parametrize(("rate", "count"), [(1.0, 7), (0.999, 7), (0.5, 4), (1e-9, 1), (0.0, 1)])
def test_a_drawn_rate_masks_at_least_one_and_at_most_all(rate, count):
    assert count_masked(np.arange(7), rate) == count
