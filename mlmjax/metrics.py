"""What an evaluation reports: accuracy with its interval, macro-F1, figures by group."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from sklearn.metrics import f1_score, matthews_corrcoef

EXTRA_METRICS = {"mcc": matthews_corrcoef}


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share, 95 % by default (Wilson 1927).

    >>> [round(bound, 3) for bound in wilson_interval(43, 100)]
    [0.337, 0.528]
    """
    if not n:
        return 0.0, 1.0
    share, spread = correct / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


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
    gold: Sequence[str], predicted: Sequence[str], extra: Sequence[str] = ()
) -> dict[str, float | list[float]]:
    """Return accuracy, its 95 % Wilson interval, macro-F1, the majority's share and extra metrics.

    Macro-F1 is over the labels that occur as gold or prediction, as in scikit-learn.
    """
    correct = sum(truth == guess for truth, guess in zip(gold, predicted, strict=True))
    return {
        "accuracy": correct / len(gold),
        "accuracy_ci95": list(wilson_interval(correct, len(gold))),
        "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0)),
        "majority": Counter(gold).most_common(1)[0][1] / len(gold),
        **{name: float(EXTRA_METRICS[name](gold, predicted)) for name in extra},
    }
