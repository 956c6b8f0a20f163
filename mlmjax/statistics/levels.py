"""Measure distributions over ordered levels against the right level."""

from collections.abc import Sequence

import numpy as np

from mlmjax.statistics.calibration import check_gold, check_log_probs, log_softmax


def level_metrics(
    log_probs: np.ndarray, gold: Sequence[int] | np.ndarray
) -> dict[str, float | None]:
    """Return how far answers `[rows, levels]` are from the right levels.

    `mae`: the mean distance of the expected level. `within_one`: the share whose most probable
    level is at most one away. `rps`: the mean ranked probability score, the squared distance of the
    cumulative probabilities divided by the number of levels less 1, 0 to 1 (Epstein 1969).
    `quadratic_kappa`: agreement of the most probable levels with weights of squared distance
    (Cohen 1968); None if all rows have one level and all answers are that level.

    >>> found = level_metrics(np.log([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]), [0, 2])
    >>> {name: round(value, 3) for name, value in found.items()}
    {'mae': 0.3, 'within_one': 1.0, 'rps': 0.025, 'quadratic_kappa': 1.0}
    """
    scores = check_log_probs(log_probs, ("rows", "levels"))
    truth = check_gold(gold, scores)
    probs = np.exp(log_softmax(scores))
    levels = np.arange(probs.shape[1])
    best = probs.argmax(axis=1)
    is_reached = levels[None, :] >= truth[:, None]
    squares = ((probs.cumsum(axis=1) - is_reached)[:, :-1] ** 2).sum(axis=1)
    expected = probs @ levels
    return {
        "mae": float(np.abs(expected - truth).mean()),
        "within_one": float((np.abs(best - truth) <= 1).mean()),
        "rps": float(squares.mean() / (len(levels) - 1)),
        "quadratic_kappa": quadratic_kappa(truth, best),
    }


def quadratic_kappa(truth: np.ndarray, answers: np.ndarray) -> float | None:
    """Return Cohen's kappa with weights of squared distance; None if it is not defined.

    >>> quadratic_kappa(np.array([0, 1, 2]), np.array([2, 1, 0]))
    -1.0
    """
    seen = float(((truth - answers) ** 2).mean())
    by_chance = float(((truth[:, None] - answers[None, :]) ** 2).mean())
    return 1.0 - seen / by_chance if by_chance else None
