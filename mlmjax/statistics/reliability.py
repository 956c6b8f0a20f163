"""Measure how well probabilities fit the right labels: losses and calibration errors."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlmjax.errors import InputError
from mlmjax.statistics.calibration import check_gold, check_log_probs, log_softmax

BINS = 15


class Bin(NamedTuple):
    """Describe the rows whose confidence is in `(low, high]`.

    `confidence` and `accuracy` are means, or None for a bin without rows.
    """

    low: float
    high: float
    rows: int
    confidence: float | None
    accuracy: float | None


def confidence(
    log_probs: np.ndarray, gold: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of each row's answer and whether it is right, both `[rows]`.

    Probabilities are over the labels that the row has, and sum to 1.
    """
    scores = check_log_probs(log_probs, ("rows", "labels"))
    truth = check_gold(gold, scores)
    return np.exp(log_softmax(scores).max(axis=1)), scores.argmax(axis=1) == truth


def equal_width(sure: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Put rows `[rows]` into bins of equal width by confidence; a bin excludes its lower edge.

    `confidence` returns both arrays.

    >>> [b.rows for b in equal_width(np.array([0.2, 0.5, 0.6]), np.array([True, True, False]), 2)]
    [2, 1]
    """
    _check(sure, right, bins)
    return _binned(sure, right, np.arange(bins + 1) / bins)


def equal_mass(sure: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Put rows into bins of nearly equal numbers of rows by confidence.

    Rows of equal confidence share a bin.

    >>> [b.rows for b in equal_mass(np.array([0.2, 0.5, 0.6]), np.array([True, True, False]), 3)]
    [1, 1, 1]
    """
    _check(sure, right, bins)
    edges = np.quantile(sure, np.arange(1, bins) / bins, method="inverted_cdf")
    return _binned(sure, right, np.unique([0.0, *edges, 1.0]))


def _check(sure: np.ndarray, right: np.ndarray, bins: int) -> None:
    if bins < 1:
        raise InputError(f"bins is {bins}; expected 1 or more")
    shapes = np.shape(sure), np.shape(right)
    if len(shapes[0]) != 1 or shapes[0] != shapes[1] or not shapes[0][0]:
        raise InputError(
            f"sure and right have shapes {list(shapes[0])} and {list(shapes[1])}; expected [rows] "
            "for both, as confidence(log_probs, gold) returns them"
        )


def _binned(sure: np.ndarray, right: np.ndarray, edges: np.ndarray) -> list[Bin]:
    # Rounding may put a probability a little above 1.
    place = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, len(edges) - 2)
    rows = np.bincount(place, minlength=len(edges) - 1)
    sums = [np.bincount(place, values, minlength=len(rows)) for values in (sure, right)]
    return [
        Bin(
            float(edges[i]),
            float(edges[i + 1]),
            int(n),
            *(float(total[i] / n) if n else None for total in sums),
        )
        for i, n in enumerate(rows)
    ]


def expected_error(bins: Sequence[Bin]) -> float:
    """Return the mean distance between confidence and accuracy of each row's bin.

    >>> expected_error([Bin(0.0, 0.5, 1, 0.5, 1.0), Bin(0.5, 1.0, 3, 0.9, 0.9)])
    0.125
    """
    total = sum(one.rows for one in bins)
    parts = (
        one.rows * abs(one.confidence - one.accuracy)
        for one in bins
        if one.confidence is not None and one.accuracy is not None
    )
    return sum(parts) / total


def calibration(log_probs: np.ndarray, gold: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return how well log probabilities `[rows, labels]` fit the gold labels.

    `gold` is an index per row. `nll`: the mean negative log-likelihood of the gold label, in nats.
    `brier`: the mean squared distance to the gold label, summed over labels, 0 to 2 (Brier 1950).
    `ece`: the expected calibration error of the answers over 15 bins of equal width (Guo et al.
    2017, arXiv 1706.04599); `ece_equal_mass`: the same over 15 bins of equal numbers of rows
    (Nixon et al. 2019, arXiv 1904.01685). `confidence`: the mean probability of the answers; above
    the accuracy, the model is overconfident.

    >>> found = calibration(np.log([[0.8, 0.2], [0.6, 0.4]]), [0, 0])
    >>> {name: round(value, 3) for name, value in found.items()}
    {'nll': 0.367, 'brier': 0.2, 'ece': 0.3, 'ece_equal_mass': 0.3, 'confidence': 0.7}
    """
    scores = check_log_probs(log_probs, ("rows", "labels"))
    truth = check_gold(gold, scores)
    scores = log_softmax(scores)
    sure, right = confidence(scores, truth)
    rows = np.arange(len(scores))
    squares = np.exp(scores)
    squares[rows, truth] -= 1
    return {
        "nll": float(-scores[rows, truth].mean()),
        "brier": float((squares**2).sum(axis=1).mean()),
        "ece": expected_error(equal_width(sure, right)),
        "ece_equal_mass": expected_error(equal_mass(sure, right)),
        "confidence": float(sure.mean()),
    }
