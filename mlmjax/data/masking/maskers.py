"""Make maskers: functions that choose which positions of one example are masked.

A masker is called as `masker(ids, maskable, count, rng)`. `ids` are integers `[tokens]`, `maskable`
the positions whose tokens are not special, and `rng` a generator that depends on seed, epoch and
example only. It returns exactly `count` different positions of `maskable`, sorted.
"""

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

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
Reader = Callable[[np.ndarray, np.ndarray], tuple[Words, list[str]]]
"""Divides the maskable positions of an example into words, and reads each as text."""

Unit = Literal["token", "word", "phrase"]


@dataclass(frozen=True)
class MaskTable:
    """Hold the weights of tokens (by their names in the vocabulary), words or phrases.

    `others` is the weight of every token or word that the table lacks.
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
        units = get_args(Unit) if masking == "weights" else ("phrase",)
        if table is None or table.unit not in units:
            found = "no table" if table is None else f"a table of {table.unit}s"
            raise InputError(
                f"masking {masking!r}: found {found}; expected a table with a column "
                f"{' or '.join(units)}"
            )
        if table.unit == "token":
            return _weighted_tokens(tokenizer, table)
        is_phrase = table.unit == "phrase"
        read: Reader = (
            PhraseReader(tokenizer, table.weights) if is_phrase else WordReader(tokenizer)
        )
        return _words(read) if masking == "phrases" else _weighted_words(read, table)
    if masking == "token":
        return lambda ids, maskable, count, rng: choose_positions(maskable, count, rng)
    if masking == "loss":
        return LossMasker(tokenizer.vocab_size)
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


class LossMasker:
    """Mask tokens in proportion to their mean loss when they were last validated.

    A token that no validation had weighs the mean over all tokens of the last one. Before the first
    validation all weigh 1. (Zhang et al. 2023, arXiv 2302.14225, weigh by the loss in training.)
    """

    def __init__(self, vocab_size: int):
        # The last number is the mean over all tokens; NaN is for tokens that were not validated.
        self._means = np.append(np.full(vocab_size, np.nan, np.float32), np.float32(1.0))

    def __call__(
        self, ids: np.ndarray, maskable: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Return positions as every masker does."""
        means = self._means[ids[maskable]]
        weights = np.where(np.isnan(means), self._means[-1], means).astype(np.float64)
        return np.sort(maskable[weighted_order(weights, rng)[:count]]).astype(np.int32)

    def update(self, ids: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> None:
        """Take the targets of a validation: their tokens, and their losses times their weights."""
        size = len(self._means) - 1
        sums = np.bincount(ids, losses, minlength=size)
        counts = np.bincount(ids, weights, minlength=size)
        if not counts.any():
            return
        means, seen = self._means.copy(), counts > 0
        means[:-1][seen] = sums[seen] / counts[seen]
        means[-1] = sums.sum() / counts.sum()
        self._means = means

    def dump(self) -> str:
        """Return all it knows as text."""
        return base64.b64encode(self._means.astype("<f4").tobytes()).decode()

    def load(self, text: object, where: str) -> None:
        """Take what `dump` returned; raise `InputError` for anything else."""
        try:
            means = np.frombuffer(base64.b64decode(str(text), validate=True), "<f4")
        except ValueError as error:
            raise self._damaged(where) from error
        if means.shape != self._means.shape or np.isinf(means).any() or np.isnan(means[-1]):
            raise self._damaged(where)
        self._means = means.astype(np.float32)

    def _damaged(self, where: str) -> InputError:
        return InputError(
            f"{where}: holds no losses of {len(self._means) - 1} tokens, which masking = 'loss' "
            "needs; resume from another checkpoint, or name another out"
        )


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


def _weighted_words(read: Reader, table: MaskTable) -> Masker:
    def draw(
        ids: np.ndarray, maskable: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        words, texts = read(ids, maskable)
        weights = np.array([table.weights.get(text, table.others) for text in texts])
        return choose_words(words, weighted_order(weights, rng), count, rng)

    return draw


def _words(read: Reader) -> Masker:
    def draw(
        ids: np.ndarray, maskable: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        words, _ = read(ids, maskable)
        return choose_words(words, rng.permutation(len(words.sizes)), count, rng)

    return draw


class PhraseReader:
    """Read words as `WordReader` does, where the words of a phrase are one word.

    The longest phrase counts, from left to right. Its text is that of the table.
    """

    def __init__(self, tokenizer: Tokenizer, phrases: Iterable[str]):
        self._read = WordReader(tokenizer)
        self._longest_first: dict[str, list[tuple[list[str], str]]] = {}
        for phrase in phrases:
            parts = self._read.split(phrase)
            if not parts:
                raise InputError(f"phrase {phrase!r:.60}: has no tokens; leave it out")
            self._longest_first.setdefault(parts[0], []).append((parts, phrase))
        for same_start in self._longest_first.values():
            same_start.sort(key=lambda pair: -len(pair[0]))

    def __call__(self, ids: np.ndarray, maskable: np.ndarray) -> tuple[Words, list[str]]:
        """Return the words and phrases, and their texts."""
        words, texts = self._read(ids, maskable)
        starts, found = list[int](), list[str]()
        at = 0
        while at < len(texts):
            length, text = 1, texts[at]
            for parts, phrase in self._longest_first.get(texts[at], ()):
                stop = at + len(parts)
                if texts[at:stop] == parts and not words.is_apart[at + 1 : stop].any():
                    length, text = len(parts), phrase
                    break
            starts.append(at)
            found.append(text)
            at += length
        first = words.first[starts]
        sizes = np.diff(first, append=len(maskable))
        return Words(maskable, first, sizes, words.is_apart[starts]), found
