"""Make maskers: functions that choose which positions of one example are masked.

A masker is called as `masker(ids, maskable, count, rng)`. `ids` are integers `[tokens]`, `maskable`
the positions whose tokens are not special, and `rng` a generator that depends on seed, epoch and
example only. It returns exactly `count` different positions of `maskable`, sorted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from mlmjax.data.masking.draws import (
    Words,
    choose_positions,
    choose_words,
    find_words,
    span_order,
    weighted_order,
)
from mlmjax.errors import InputError
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.words import word_starts

Masker = Callable[[np.ndarray, np.ndarray, int, np.random.Generator], np.ndarray]
Unit = Literal["token", "word", "phrase"]


@dataclass(frozen=True)
class MaskTable:
    """Hold the weights of tokens (by their names in the vocabulary), words or phrases.

    `others` is the weight of every token or word that the table lacks. Phrases have no weights.
    """

    unit: Unit
    weights: Mapping[str, float]
    others: float = 0.0


def make_masker(masking: str, tokenizer: Tokenizer, table: MaskTable | None = None) -> Masker:
    """Return the masker of this name; "weights" and "phrases" have a table.

    >>> tokenizer = Tokenizer.from_pretrained()
    >>> ids = np.array(tokenizer.encode_plain("The cat saw New York"))
    >>> weigh = make_masker("weights", tokenizer, MaskTable("word", {"cat": 1.0, "saw": 1.0}))
    >>> weigh(ids, np.arange(len(ids)), 2, np.random.default_rng(0)).tolist()
    [1, 2]

    Raises `InputError` for a table that is missing, or that is of other units.
    """
    if masking in ("weights", "phrases"):
        units = ("token", "word") if masking == "weights" else ("phrase",)
        if table is None or table.unit not in units:
            found = "no table" if table is None else f"a table of {table.unit}s"
            raise InputError(
                f"masking {masking!r}: found {found}; expected a table with a column "
                f"{' or '.join(units)}"
            )
        if table.unit == "token":
            return _weighted_tokens(tokenizer, table)
        read = WordReader(tokenizer)
        return _phrases(read, table) if masking == "phrases" else _weighted_words(read, table)
    if masking == "token":
        return lambda ids, maskable, count, rng: choose_positions(maskable, count, rng)
    if masking not in ("whole_word", "span"):
        raise InputError(f"masking {masking!r}: is code of your own; give the masker it makes")
    starts, spans = word_starts(tokenizer), masking == "span"

    def draw(
        ids: np.ndarray, maskable: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        words = find_words(maskable, starts(ids))
        order = span_order(words, count, rng) if spans else rng.permutation(len(words.sizes))
        return choose_words(words, order, count, rng)

    return draw


class WordReader:
    """Divide the maskable positions of an example into words, and read each as text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._starts = word_starts(tokenizer)
        self._text_of = lru_cache(2**18)(lambda ids: tokenizer.decode(ids).strip())

    def __call__(self, ids: np.ndarray, maskable: np.ndarray) -> tuple[Words, list[str]]:
        """Return the words, and their texts without outer white space."""
        words, tokens = find_words(maskable, self._starts(ids)), ids[maskable].tolist()
        ends = (words.first + words.sizes).tolist()
        spans = zip(words.first.tolist(), ends, strict=True)
        return words, [self._text_of(tuple(tokens[start:end])) for start, end in spans]

    def split(self, text: str) -> list[str]:
        """Return the words of a text."""
        ids = np.array(self._tokenizer.encode_plain(text))
        return self(ids, np.arange(len(ids)))[1]


def _weighted_tokens(tokenizer: Tokenizer, table: MaskTable) -> Masker:
    of_id = np.full(tokenizer.vocab_size, table.others)
    for name, weight in table.weights.items():
        of_id[tokenizer.backend.token_to_id(name)] = weight

    def draw(
        ids: np.ndarray, maskable: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        order = weighted_order(of_id[ids[maskable]], rng)
        return np.sort(maskable[order[:count]]).astype(np.int32)

    return draw


def _weighted_words(read: WordReader, table: MaskTable) -> Masker:
    def draw(
        ids: np.ndarray, maskable: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        words, texts = read(ids, maskable)
        weights = np.array([table.weights.get(text, table.others) for text in texts])
        return choose_words(words, weighted_order(weights, rng), count, rng)

    return draw


def _phrases(read: WordReader, table: MaskTable) -> Masker:
    """Mask words as "whole_word" does, where the words of a phrase are one word."""
    longest_first: dict[str, list[list[str]]] = {}
    for phrase in table.weights:
        parts = read.split(phrase)
        longest_first.setdefault(parts[0], []).append(parts)
    for same_start in longest_first.values():
        same_start.sort(key=len, reverse=True)

    def draw(
        ids: np.ndarray, maskable: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        words, texts = read(ids, maskable)
        begins = np.ones(len(texts), bool)
        at = 0
        while at < len(texts):
            length = 1
            for parts in longest_first.get(texts[at], ()):
                stop = at + len(parts)
                if texts[at:stop] == parts and not words.is_apart[at + 1 : stop].any():
                    length = len(parts)
                    break
            begins[at + 1 : at + length] = False
            at += length
        first = words.first[begins]
        units = Words(maskable, first, np.diff(first, append=len(maskable)), words.is_apart[begins])
        return choose_words(units, rng.permutation(len(first)), count, rng)

    return draw
