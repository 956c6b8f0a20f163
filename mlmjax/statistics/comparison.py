"""Test whether two sets of answers differ."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from mlmjax.statistics.metrics import Margins, bootstrap, macro_f1


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of rows that only one of two has right.

    If both are equally good, each such row is like the toss of a coin (McNemar 1947).

    >>> mcnemar(0, 5), mcnemar(3, 3), mcnemar(0, 0)
    (0.0625, 1.0, 1.0)
    """
    return min(1.0, 2 * float(binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))


class Paired(NamedTuple):
    """Hold a figure of both sides, their difference, and its interval."""

    of: tuple[float, float]
    difference: float
    interval: tuple[float, float]


def paired_bootstrap(gold: Sequence[str], a: Sequence[str], b: Sequence[str]) -> dict[str, Paired]:
    """Return accuracy and macro-F1 of two answers to the same rows, and their differences."""

    def figures(models: list[Margins]) -> list[np.ndarray]:
        accuracies = [hits.sum(axis=-1) / rows.sum(axis=-1) for hits, rows, _ in models]
        # Labels are summed one by one: another order of sums would change the last digit.
        scores = [macro_f1(*map(np.asfortranarray, margins)) for margins in models]
        return [one for both in (accuracies, scores) for one in (*both, both[0] - both[1])]

    drawn = bootstrap(gold, [a, b], figures)
    return {
        name: Paired((drawn[i][0], drawn[i + 1][0]), *drawn[i + 2])
        for i, name in ((0, "accuracy"), (3, "macro_f1"))
    }
