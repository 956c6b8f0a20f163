"""Maskers: exact counts, special tokens spared, and the distributions that their tables say."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from mlmjax import InputError
from mlmjax.data.masking.maskers import LossMasker, MaskTable, WordReader, make_masker
from mlmjax.text.words import word_starts

TEXT = "The untokenizable cat saw New York City, and (the) cat sat."
WORDS = MaskTable("word", {"cat": 3.0, "untokenizable": 2.0, "the": 0.0}, others=0.5)
TOKENS = MaskTable("token", {"Ġcat": 4.0, "Ġsaw": 2.0, "Ġand": 1.0})
PHRASES = MaskTable("phrase", {"New York": 1.0, "New York City": 1.0, "cat sat": 1.0})
CASES = {
    "token": ("token", None),
    "whole_word": ("whole_word", None),
    "span": ("span", None),
    "words": ("weights", WORDS),
    "tokens": ("weights", TOKENS),
    "phrases": ("phrases", PHRASES),
    "loss": ("loss", None),
    "entities": ("weights", PHRASES),
}


@pytest.fixture(scope="module")
def maskers(tokenizer):
    return {name: make_masker(name_, tokenizer, table) for name, (name_, table) in CASES.items()}


@pytest.fixture(scope="module")
def ids(tokenizer):
    return np.array(tokenizer.encode_plain(TEXT), np.uint32)


def maskable_of(ids, tokenizer):
    return np.flatnonzero(~np.isin(ids, list(tokenizer.special_ids)))


@settings(deadline=None, max_examples=30)
@given(data=st.data(), seed=st.integers(0, 2**32))
@pytest.mark.parametrize("name", CASES)
def test_exactly_as_many_positions_are_masked_and_none_is_special(
    maskers, ids, tokenizer, name, data, seed
):
    specials = [tokenizer.cls_id, tokenizer.sep_id, tokenizer.anchor_id, tokenizer.mask_id]
    pool = st.sampled_from([*ids.tolist(), *specials, 0, 50_000])
    example = np.array(data.draw(st.lists(pool, min_size=1, max_size=60)), np.uint32)
    maskable = maskable_of(example, tokenizer)
    if not len(maskable):
        return
    count, before = data.draw(st.integers(1, len(maskable))), example.copy()
    found = maskers[name](example, maskable, count, np.random.default_rng(seed))
    assert found.dtype == np.int32
    assert len(found) == count
    assert (np.diff(found) > 0).all()
    assert np.isin(found, maskable).all()
    again = maskers[name](example, maskable, count, np.random.default_rng(seed))
    np.testing.assert_array_equal(found, again)
    np.testing.assert_array_equal(example, before)


DRAWS = pytest.mark.parametrize("draws", [4_000, pytest.param(100_000, marks=pytest.mark.long)])


@DRAWS
@pytest.mark.parametrize("name", ["words", "tokens"])
def test_a_first_draw_is_in_proportion_to_the_table(maskers, tokenizer, name, draws):
    ids = np.array(tokenizer.encode_plain(" cat and saw the cat sat"))
    weights = {"words": [3, 0.5, 0.5, 0, 3, 0.5], "tokens": [4, 1, 2, 0, 4, 0]}[name]
    assert len(ids) == len(weights)
    rng, drawn = np.random.default_rng(1), np.zeros(len(ids), int)
    for _ in range(draws):
        (position,) = maskers[name](ids, np.arange(len(ids)), 1, rng)
        drawn[position] += 1
    expected = np.array(weights) / sum(weights) * draws
    assert not drawn[expected == 0].any()
    assert chisquare(drawn[expected > 0], expected[expected > 0]).pvalue > 0.001


@DRAWS
def test_losses_of_a_validation_are_the_weights(draws):
    masker, ids = LossMasker(6), np.array([0, 1, 2, 3])
    losses = np.array([6.0, 2.0, 1.0, 8.0])
    masker.update(np.array([0, 0, 1, 4]), losses, np.array([1.0, 1.0, 0.5, 1.0]))
    masker.update(np.array([1]), np.array([1.0]), np.array([1.0]))
    again = LossMasker(6)
    again.load(masker.dump(), "here")
    expected = np.array([4.0, 1.0, 1.0, 1.0])  # others weigh the mean of the last validation
    rng, drawn = np.random.default_rng(3), np.zeros(4)
    for _ in range(draws):
        drawn[again(ids, np.arange(4), 1, rng)] += 1
    assert chisquare(drawn, expected / expected.sum() * draws).pvalue > 0.001


@DRAWS
def test_later_draws_are_without_replacement(maskers, tokenizer, draws):
    """The chance of a pair is that of drawing one after the other, in either order."""
    ids, weights = np.array(tokenizer.encode_plain(" cat and saw the")), np.array([4.0, 1, 2, 0])
    rng, drawn = np.random.default_rng(2), dict.fromkeys(itertools.combinations(range(3), 2), 0)
    for _ in range(draws):
        drawn[tuple(maskers["tokens"](ids, np.arange(4), 2, rng).tolist())] += 1
    share = weights / weights.sum()
    expected = [share[i] * share[j] * (1 / (1 - share[i]) + 1 / (1 - share[j])) for i, j in drawn]
    assert chisquare(list(drawn.values()), draws * np.array(expected)).pvalue > 0.001


def test_weighted_words_are_masked_whole(maskers, ids, tokenizer):
    starts, maskable = word_starts(tokenizer)(ids), np.arange(len(ids))
    (at,) = [i for i in maskable if tokenizer.decode([ids[i]]) == " un"]
    assert starts[at : at + 4].tolist() == [True, False, False, True]
    rng = np.random.default_rng(0)
    masks = [set(maskers["words"](ids, maskable, 4, rng).tolist()) for _ in range(200)]
    parts = [len(mask & {at, at + 1, at + 2}) for mask in masks]
    assert set(parts) == {0, 3}
    assert 50 < parts.count(3) < 190  # it has 2 of about 13


def test_the_longest_phrase_is_one_unit(maskers, ids, tokenizer):
    texts = WordReader(tokenizer)(ids, np.arange(len(ids)))[1]
    assert " ".join(texts) == "The untokenizable cat saw New York City , and ( the ) cat sat ."
    rng = np.random.default_rng(0)
    city = {i for i in range(len(ids)) if tokenizer.decode([ids[i]]) in (" New", " York", " City")}
    parts = [
        len(city & set(maskers["phrases"](ids, np.arange(len(ids)), 5, rng).tolist()))
        for _ in range(200)
    ]
    assert set(parts) == {0, 3}
    assert parts.count(3) > 20


def test_weighted_phrases_are_masked_whole_and_first(maskers, ids, tokenizer):
    rng, texts = np.random.default_rng(0), [tokenizer.decode([i]) for i in ids]
    for _ in range(20):
        found = maskers["entities"](ids, np.arange(len(ids)), 6, rng)
        drawn = [texts[i] for i in found]
        assert {" New", " York", " City", " sat"} < set(drawn)


def test_a_phrase_ends_at_a_special_token(tokenizer):
    masker = make_masker("phrases", tokenizer, MaskTable("phrase", {"New York": 1.0}))
    new, york = tokenizer.encode_plain(" New York")
    ids, rng = np.array([new, tokenizer.sep_id, york]), np.random.default_rng(0)
    drawn = {tuple(masker(ids, np.array([0, 2]), 1, rng).tolist()) for _ in range(50)}
    assert drawn == {(0,), (2,)}


@pytest.mark.parametrize(
    ("masking", "table", "message"),
    [
        ("weights", None, "found no table; expected a table with a column token or wo"),
        ("phrases", WORDS, "found a table of words; expected a table with a column phrase"),
        ("my.masks:nouns", None, "is code of your own"),
    ],
)
def test_a_table_of_another_kind_is_rejected(tokenizer, masking, table, message):
    with pytest.raises(InputError, match=message):
        make_masker(masking, tokenizer, table)
