"""Find texts that share a run of words with an evaluation set, by word n-grams."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

NGRAM = 13
SHORTEST = 6
"""Words of the shortest text to look for; shorter ones occur in unrelated texts too."""

MOST_TEXTS = 10
"""A run of words in more texts of an evaluation set is its wording, not its content."""

# Runs of letters and digits; ideographs and kana, which no space divides, one by one.
_WORD = re.compile(r"[^\W_぀-ヿ㐀-鿿]+|[぀-ヿ㐀-鿿]")
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


class Hit(NamedTuple):
    """Name an evaluation set, and the first words that a text shares with it."""

    name: str
    words: str


def words_of(text: str) -> list[str]:
    """Return the words of a text without case, punctuation and white space.

    >>> words_of("It's the U.S. _economy_,\\nSTUPID! 日本")
    ['it', 's', 'the', 'u', 's', 'economy', 'stupid', '日', '本']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class OverlapIndex:
    """Index the word n-grams of evaluation sets, to find other texts that share one.

    Only words are compared, without case, punctuation and white space. A text of at least `n` words
    is found by any `n` words in a row, as is customary (n = 13: Brown et al. 2020, arXiv
    2005.14165, appendix C). A text of `SHORTEST` to `n` - 1 words is found as a whole, a shorter
    one never. Words in a row that occur in more than `MOST_TEXTS` different texts of a set (for a
    short text: rows) are its wording and do not count.

    Memory depends on the evaluation sets only: their words, and 10 bytes for every n-gram. Words in
    two sets count for the first.

    >>> index = OverlapIndex({"quiz": ["Which river flows through the city of Vienna?"]})
    >>> index.hit("Q: which river flows THROUGH the city of 'Vienna'? A: the Danube")
    Hit(name='quiz', words='which river flows through the city of vienna')
    >>> index.hit("Which river flows through the city of Graz?") is None
    True
    """

    def __init__(self, texts: Mapping[str, Iterable[str]], n: int = NGRAM):
        self.names, self.n, self.shortest = list(texts), n, min(SHORTEST, n)
        self._ids: dict[str, int] = {}
        sets = [self._number(one) for one in texts.values()]
        # Number 0 is every word that no evaluation set has.
        self._values = np.random.default_rng(n).integers(2**64, size=len(self._ids) + 1, dtype="u8")
        self._set_powers(2**10)
        runs = [self._content(one, n) for one in sets]
        owners = np.repeat(np.arange(len(sets), dtype=np.uint16), [len(one) for one in runs])
        self._runs, first = np.unique(_joined(runs), return_index=True)
        self._owners = owners[first]
        # Short texts by the hash of their first words: length, hash, owner.
        self._short: dict[int, list[tuple[int, int, int]]] = {}
        for owner, one in enumerate(sets):
            self._add_short(owner, one)
        self._starts = np.array(sorted(self._short), np.uint64)

    def __len__(self) -> int:
        """Count the distinct runs of words in the index."""
        return len(self._runs) + sum(map(len, self._short.values()))

    def hit(self, text: str) -> Hit | None:
        """Return the first words that a text shares with an evaluation set; or None.

        Runs of `n` words are looked for before short texts.
        """
        words = words_of(text)
        if len(words) < self.shortest:
            return None
        ids = np.fromiter((self._ids.get(word, 0) for word in words), np.int64, len(words))
        sums = self._sums(ids)
        runs = self._hashes(sums, self.n)
        for at in np.flatnonzero(_member(self._runs, runs))[:1].tolist():
            owner = self._owners[np.searchsorted(self._runs, runs[at])]
            return Hit(self.names[owner], " ".join(words[at : at + self.n]))
        begins = self._hashes(sums, self.shortest)
        for at in np.flatnonzero(_member(self._starts, begins)).tolist():
            for length, whole, owner in self._short[int(begins[at])]:
                if at + length <= len(words) and self._hashes(sums, length)[at] == whole:
                    return Hit(self.names[owner], " ".join(words[at : at + length]))
        return None

    def _number(self, texts: Iterable[str]) -> list[tuple[np.ndarray, int]]:
        """Return the word numbers of each distinct text, and how often it occurs."""
        found: Counter[bytes] = Counter()
        for words in map(words_of, texts):
            if len(words) >= self.shortest:
                ids = [self._ids.setdefault(word, len(self._ids) + 1) for word in words]
                found[np.array(ids, np.int32).tobytes()] += 1
        return [(np.frombuffer(key, np.int32), count) for key, count in found.items()]

    def _set_powers(self, size: int) -> None:
        bases = np.array([[_BASE], [pow(_BASE, -1, 2**64)]], np.uint64)
        factors = np.where(np.arange(size), bases, np.uint64(1))
        self._powers, self._inverses = np.multiply.accumulate(factors, axis=1)

    def _sums(self, ids: np.ndarray) -> np.ndarray:
        """Return running sums, modulo 2**64, of word values times powers; `[words + 1]`."""
        if len(ids) > len(self._powers):
            self._set_powers(2 ** len(ids).bit_length())
        sums = np.zeros(len(ids) + 1, np.uint64)
        np.cumsum(self._values[ids] * self._powers[: len(ids)], out=sums[1:])
        return sums

    def _hashes(self, sums: np.ndarray, length: int) -> np.ndarray:
        """Hash every run of `length` words, as a polynomial of word values in the base."""
        runs = max(0, len(sums) - length)
        return (sums[length:] - sums[:runs]) * self._inverses[:runs]

    def _content(
        self, texts: list[tuple[np.ndarray, int]], length: int, *, repeats: bool = False
    ) -> np.ndarray:
        """Hash the runs of words in a set, except its wording; sorted."""
        parts = [np.unique(self._hashes(self._sums(ids), length)) for ids, _ in texts]
        times = [count if repeats else 1 for _, count in texts]
        hashes, inverse = np.unique(_joined(parts), return_inverse=True)
        weights = np.repeat(np.array(times, np.float64), [len(part) for part in parts])
        return hashes[np.bincount(inverse, weights, len(hashes)) <= MOST_TEXTS]

    def _add_short(self, owner: int, texts: list[tuple[np.ndarray, int]]) -> None:
        """Index the texts of a set that are shorter than n words."""
        for length in sorted({len(ids) for ids, _ in texts if len(ids) < self.n}):
            # A long text in many rows is a passage they ask about, a short one is their wording.
            content = self._content(texts, length, repeats=True)
            for ids, _ in texts:
                sums = self._sums(ids)
                if len(ids) == length and _member(content, self._hashes(sums, length))[0]:
                    whole = int(self._hashes(sums, length)[0])
                    begin = int(self._hashes(sums, self.shortest)[0])
                    known = self._short.setdefault(begin, [])
                    if all(whole != other for _, other, _ in known):
                        known.append((length, whole, owner))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _member(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Tell for each value whether it is in a sorted table."""
    if not len(table):
        return np.zeros(len(values), bool)
    return table[np.minimum(np.searchsorted(table, values), len(table) - 1)] == values
