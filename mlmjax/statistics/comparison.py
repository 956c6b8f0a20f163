"""Tests of whether two sets of answers differ."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import binom

from mlmjax.statistics.metrics import macro_f1, percentile_bootstrap


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided exact p-value of the rows that one of two alone has right.

    If both were equally good, such a row would be either's like the toss of a coin (McNemar 1947).

    >>> mcnemar(0, 5), mcnemar(3, 3), mcnemar(0, 0)
    (0.0625, 1.0, 1.0)
    """
    fewer = binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)
    return min(1.0, 2 * float(fewer))


class _Paired(NamedTuple):
    """A figure of both sides, their difference, and its interval."""

    of: tuple[float, float]
    difference: float
    interval: tuple[float, float]


def _bootstrap(gold: Sequence[str], a: Sequence[str], b: Sequence[str]) -> dict[str, _Paired]:
    """Bootstrap differences over rows drawn with both of their answers (Efron 1979)."""
    labels = {name: i for i, name in enumerate(sorted({*gold, *a, *b}))}
    cells = Counter(zip(gold, a, b, strict=True))
    kinds = sorted(cells)
    columns = np.array([[labels[name] for name in kind] for kind in kinds]).T
    shape, at = (len(kinds), len(labels)), np.arange(len(kinds))

    def one_hot(column: np.ndarray, keep: np.ndarray | bool = True) -> csr_array:
        values = np.broadcast_to(keep, len(kinds)).astype(float)
        return csr_array((values, (at, column)), shape=shape)

    truth = one_hot(columns[0])
    sides = [(one_hot(own, own == columns[0]), one_hot(own)) for own in columns[1:]]

    def figures(counts: np.ndarray) -> list[np.ndarray]:
        """[..., kinds] -> accuracy and macro-F1 of A, of B, and their differences [...]."""
        flat = np.atleast_2d(counts).astype(float)
        found = []
        for correct, guessed in sides:
            hits, rows = flat @ correct, flat @ truth
            found.append(
                (hits.sum(axis=-1) / flat.sum(axis=-1), macro_f1(hits, rows, flat @ guessed))
            )
        (accuracy_a, f1_a), (accuracy_b, f1_b) = found
        both = [accuracy_a, accuracy_b, accuracy_a - accuracy_b, f1_a, f1_b, f1_a - f1_b]
        return [one.reshape(counts.shape[:-1]) for one in both]

    drawn = percentile_bootstrap(np.array([cells[kind] for kind in kinds]), figures)
    return {
        name: _Paired((drawn[i][0], drawn[i + 1][0]), *drawn[i + 2])
        for i, name in ((0, "accuracy"), (3, "macro_f1"))
    }
