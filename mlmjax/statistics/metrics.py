"""Compute accuracy, macro-F1 and MCC, their intervals, and figures by group."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import ndtri

RESAMPLES = 2000
_BLOCK = 100  # resamples held in memory at once

Margins = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Correct, gold and predicted rows per label, each `[..., labels]`."""

Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""A function of margins that returns a figure `[...]`."""


def wilson_interval(correct: float, n: float, z: float = 1.959964) -> tuple[float, float]:
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
    """Return Matthews' correlation for any number of labels (Gorodkin 2004); 0 if undefined.

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
    answers: Sequence[Sequence[str]],
    figures: Callable[[list[Margins]], list[np.ndarray]],
    *,
    resamples: int = RESAMPLES,
) -> list[tuple[float, tuple[float, float]]]:
    """Return figures of `answers[model][row]` with 95 % percentile bootstrap intervals.

    `figures` takes the margins of each model and returns arrays `[...]`. Rows are drawn with the
    answers of all models (Efron 1979). A figure sees a resample only through its counts of equal
    rows, and these are multinomial: so counts are drawn, which is the same and quick.
    """
    labels = {name: i for i, name in enumerate(sorted(set(gold).union(*answers)))}
    rows = Counter(zip(gold, *answers, strict=True))
    kinds = sorted(rows)
    truth, *guesses = np.array([[labels[name] for name in kind] for kind in kinds]).T

    def measure(counts: np.ndarray) -> list[np.ndarray]:
        """Turn counts `[..., kinds]` into figures `[...]`."""
        of_gold = _sums_by_label(counts, truth, len(labels))
        return figures(
            [
                (
                    _sums_by_label(counts * (guess == truth), truth, len(labels)),
                    of_gold,
                    _sums_by_label(counts, guess, len(labels)),
                )
                for guess in guesses
            ]
        )

    found = np.array([rows[kind] for kind in kinds])
    n = len(gold)
    rng = np.random.default_rng([0, n])
    blocks = [
        measure(rng.multinomial(n, found / n, min(_BLOCK, resamples - start)))
        for start in range(0, resamples, _BLOCK)
    ]
    results = []
    for value, drawn in zip(measure(found), zip(*blocks, strict=True), strict=True):
        low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
        results.append((float(value), (float(low), float(high))))
    return results


def _sums_by_label(counts: np.ndarray, label: np.ndarray, labels: int) -> np.ndarray:
    """Sum counts `[..., kinds]` of kinds with one label: float `[..., labels]`."""
    order = np.argsort(label, kind="stable")
    present, starts = np.unique(label[order], return_index=True)
    sums = np.zeros((*counts.shape[:-1], labels))
    sums[..., present] = np.add.reduceat(counts[..., order], starts, axis=-1)
    return sums


def mean_interval(
    gold: Sequence[str], answers: Sequence[Sequence[str]], statistic: Statistic
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of a statistic over several models.

    >>> mean_interval(["a", "b"], [["a", "b"], ["a", "b"]], macro_f1)
    (1.0, 1.0)
    """
    found = bootstrap(
        gold, answers, lambda models: [np.mean([statistic(*one) for one in models], axis=0)]
    )
    return found[0][1]


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
    """Return accuracy, macro-F1 and MCC with 95 % intervals, and the majority's share.

    The interval of accuracy is Wilson's; the others are bootstrapped. Macro-F1 is the mean over
    labels that occur as gold or prediction, as in scikit-learn.
    """
    correct = sum(truth == guess for truth, guess in zip(gold, predicted, strict=True))
    (f1, f1_interval), (correlation, mcc_interval) = bootstrap(
        gold, [predicted], lambda models: [macro_f1(*models[0]), mcc(*models[0])]
    )
    return {
        "accuracy": correct / len(gold),
        "accuracy_ci95": list(wilson_interval(correct, len(gold))),
        "macro_f1": f1,
        "macro_f1_ci95": list(f1_interval),
        "mcc": correlation,
        "mcc_ci95": list(mcc_interval),
        "majority": Counter(gold).most_common(1)[0][1] / len(gold),
    }


def js_of_normals(means: np.ndarray, deviations: np.ndarray) -> np.ndarray:
    """Return the Jensen-Shannon divergence of two normal distributions in bits, `[...]`.

    `means` and `deviations` are `[2, ...]`. It is 0 for equal distributions, 1 for disjoint ones.

    >>> js_of_normals(np.array([[0.0, 0.0], [0.0, 50.0]]), np.ones((2, 2))).round(6).tolist()
    [0.0, 1.0]
    """
    # Each half is the mean over one distribution, at the middles of equally probable parts.
    parts = 500
    places = ndtri((np.arange(parts) + 0.5) / parts).reshape(-1, *[1] * (means.ndim - 1))
    divergence = np.zeros(means.shape[1:])
    for mean, deviation in zip(means, deviations, strict=True):
        at = mean + deviation * places
        logs = _log_density(at[None], means[:, None], deviations[:, None])
        own = _log_density(at, mean, deviation)
        divergence += (own - np.logaddexp(*logs) + math.log(2)).mean(axis=0) / 2
    return np.maximum(0.0, divergence / math.log(2))


def _log_density(at: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Return the log density of normal distributions, less a constant."""
    density: np.ndarray = -0.5 * ((at - mean) / deviation) ** 2 - np.log(deviation)
    return density


def js_of_rows(
    scores: np.ndarray, is_first: np.ndarray, is_second: np.ndarray, *, resamples: int = RESAMPLES
) -> tuple[float, list[float]] | None:
    """Return the divergence of two kinds of scores, and its 95 % percentile bootstrap interval.

    `scores`, `is_first` and `is_second` are `[rows, columns]`. Normal distributions are fitted to
    both kinds. Whole rows are resampled. None if there are fewer than two rows, or a kind is
    constant.
    """
    kinds = (is_first, is_second)
    sums = np.array(
        [
            [np.where(kind, np.where(kind, scores, 0) ** power, 0).sum(axis=1) for kind in kinds]
            for power in (0, 1, 2)
        ]
    )  # [3, 2, rows]
    rows, found = len(scores), list[np.ndarray]()
    rng = np.random.default_rng([1, rows])
    for start in range(0, resamples, _BLOCK):
        weights = rng.multinomial(rows, np.full(rows, 1 / rows), min(_BLOCK, resamples - start))
        if not start:
            weights = np.concatenate([np.ones((1, rows), int), weights])
        count, total, squares = np.einsum("pkr,wr->pkw", sums, weights)
        means = total / np.maximum(count, 1)
        variances = squares / np.maximum(count, 1) - means**2
        usable = (variances > 1e-9).all(axis=0)
        if not start and (rows < 2 or not usable[0]):
            return None
        found.append(js_of_normals(means[:, usable], np.sqrt(variances[:, usable])))
    value, *others = np.concatenate(found)
    low, high = np.quantile(others or [value], [0.025, 0.975])
    return float(value), [float(low), float(high)]
