"""What an evaluation reports: accuracy, macro-F1, MCC, their intervals, figures by group."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
_BLOCK = 100  # resamples held in memory at once

Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From correct, gold and predicted rows per label, `[..., labels]`, to a figure `[...]`."""


def wilson_interval(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share, 95 % by default (Wilson 1927).

    >>> [round(bound, 3) for bound in wilson_interval(43, 100)]
    [0.337, 0.528]
    """
    if not n:
        return 0.0, 1.0
    share, spread = correct / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # Exact at both ends, where rounding would give 0.9999999999999999.
    low, high = 0.0 if not correct else centre - half, 1.0 if correct == n else centre + half
    return max(0.0, low), min(1.0, high)


def macro_f1(correct: np.ndarray, gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the mean F1 over the labels that occur as gold or prediction.

    >>> float(macro_f1(np.array([1, 1]), np.array([2, 1]), np.array([1, 2])).round(3))
    0.667
    """
    rows = gold + predicted
    f1 = 2 * correct / np.maximum(rows, 1)
    return f1.sum(axis=-1) / (rows > 0).sum(axis=-1)


def mcc(correct: np.ndarray, gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return Matthews' correlation for any number of labels (Gorodkin 2004), 0 where undefined.

    >>> float(mcc(np.array([2, 0]), np.array([3, 0]), np.array([2, 1])))
    0.0
    """
    right, gold, predicted = correct.sum(axis=-1), gold.astype(float), predicted.astype(float)
    n = gold.sum(axis=-1)
    covariance = right * n - (gold * predicted).sum(axis=-1)
    spread = (n * n - (gold * gold).sum(axis=-1)) * (n * n - (predicted * predicted).sum(axis=-1))
    return np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)


def bootstrap(
    gold: Sequence[str],
    predicted: Sequence[str],
    statistics: Sequence[Statistic],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[tuple[float, tuple[float, float]]]:
    """Return each statistic and its 95 % percentile bootstrap interval (Efron 1979) over the rows.

    A statistic sees a resample only through its counts of (gold, prediction) pairs, and those of
    rows drawn with replacement are multinomial: so counts are drawn, which is the same and quick.
    """
    labels = {name: i for i, name in enumerate(sorted({*gold, *predicted}))}
    pairs = Counter(zip(gold, predicted, strict=True))
    ordered = sorted(pairs)
    found = np.array([pairs[pair] for pair in ordered])
    is_gold, is_predicted = np.zeros((2, len(ordered), len(labels)))
    for cell, (truth, guess) in enumerate(ordered):
        is_gold[cell, labels[truth]] = is_predicted[cell, labels[guess]] = 1

    def figures(counts: np.ndarray) -> list[np.ndarray]:
        """[..., pairs] -> each statistic [...]."""
        margins = counts @ (is_gold * is_predicted), counts @ is_gold, counts @ is_predicted
        return [statistic(*margins) for statistic in statistics]

    return percentile_bootstrap(found, figures, resamples=resamples, seed=seed)


def percentile_bootstrap(
    found: np.ndarray,
    figures: Callable[[np.ndarray], Sequence[np.ndarray]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[tuple[float, tuple[float, float]]]:
    """Return each figure of counts of rows by kind, int `[kinds]`, and its 95 % interval.

    `figures` takes counts `[..., kinds]` to some figures `[...]`.
    """
    n = int(found.sum())
    rng = np.random.default_rng([seed, n])
    blocks = [
        figures(rng.multinomial(n, found / n, min(_BLOCK, resamples - start)))
        for start in range(0, resamples, _BLOCK)
    ]
    results = []
    for value, drawn in zip(figures(found), zip(*blocks, strict=True), strict=True):
        low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
        results.append((float(value), (float(low), float(high))))
    return results


def mean_interval(
    gold: Sequence[str],
    predicted: Sequence[Sequence[str]],
    statistic: Statistic,
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of a statistic over several models' answers.

    The rows are drawn, each with the answers `predicted[model][row]` of all models, so that what
    the models have in common stays.

    >>> mean_interval(["a", "b"], [["a", "b"], ["a", "b"]], macro_f1)
    (1.0, 1.0)
    """
    labels = {name: i for i, name in enumerate(sorted({*gold, *(p for m in predicted for p in m)}))}
    seen = Counter(zip(gold, *predicted, strict=True))
    patterns = sorted(seen)
    places = np.array([[labels[name] for name in pattern] for pattern in patterns])
    one_hot = np.eye(len(labels))[places]  # [patterns, 1 + models, labels]
    truth, answers = one_hot[:, 0], np.moveaxis(one_hot[:, 1:], 1, 0)

    def figures(counts: np.ndarray) -> list[np.ndarray]:
        """[..., patterns] -> the mean [...]."""
        values = [
            statistic(counts @ (truth * own), counts @ truth, counts @ own) for own in answers
        ]
        return [np.mean(values, axis=0)]

    found = np.array([seen[pattern] for pattern in patterns])
    ((_, interval),) = percentile_bootstrap(found, figures)
    return interval


def accuracy_by_group(
    gold: Sequence[str], predicted: Sequence[str], groups: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return `{group: {"n": rows, "accuracy": share}}`, groups in alphabetical order.

    >>> accuracy_by_group(["a", "b", "a"], ["a", "a", "a"], ["x", "x", "y"])
    {'x': {'n': 2, 'accuracy': 0.5}, 'y': {'n': 1, 'accuracy': 1.0}}
    """
    right = defaultdict(list)
    for truth, guess, group in zip(gold, predicted, groups, strict=True):
        right[group].append(truth == guess)
    return {
        group: {"n": len(right[group]), "accuracy": float(np.mean(right[group]))}
        for group in sorted(right)
    }


def classification_metrics(
    gold: Sequence[str], predicted: Sequence[str]
) -> dict[str, float | list[float]]:
    """Return accuracy, macro-F1 and MCC with their 95 % intervals, and the majority's share.

    The interval of accuracy is Wilson's, the others are bootstrapped. Macro-F1 is over the labels
    that occur as gold or prediction, as in scikit-learn.
    """
    correct = sum(truth == guess for truth, guess in zip(gold, predicted, strict=True))
    (f1, f1_interval), (correlation, mcc_interval) = bootstrap(gold, predicted, [macro_f1, mcc])
    return {
        "accuracy": correct / len(gold),
        "accuracy_ci95": list(wilson_interval(correct, len(gold))),
        "macro_f1": f1,
        "macro_f1_ci95": list(f1_interval),
        "mcc": correlation,
        "mcc_ci95": list(mcc_interval),
        "majority": Counter(gold).most_common(1)[0][1] / len(gold),
    }
