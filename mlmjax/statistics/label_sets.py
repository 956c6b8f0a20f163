"""Predict sets of labels that contain the right one with a chosen probability (conformal)."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mlmjax.config.tables import StrictTable
from mlmjax.errors import InputError
from mlmjax.statistics.calibration import check_gold, check_log_probs, log_softmax
from mlmjax.statistics.metrics import wilson_interval

Method = Literal["lac", "aps"]


class Conformal(StrictTable):
    """Hold the scores of labelled rows: how badly each gold label fits.

    A new row that is drawn as these were gets a set of labels that contains the right one with at
    least the chosen probability. This holds on average over rows. It does not hold for each label
    separately, or for other kinds of text.
    """

    method: Method
    scores: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)]

    def threshold(self, coverage: float) -> float:
        """Return the highest score of a label in the set.

        It is the ceil((n + 1) coverage)-th smallest. Raises `InputError` for a coverage that is
        not between 0 and 1, or that needs more rows.

        >>> Conformal(method="lac", scores=(0.1, 0.4, 0.2, 0.3)).threshold(0.75)
        0.4
        """
        if not isinstance(coverage, float | np.floating) or not 0 < coverage < 1:
            raise InputError(f"coverage is {coverage!r}; expected a number between 0 and 1")
        # Exact, because 0.1 * 30 is not 3 in floating point and rounds up to 4.
        exact, rows = Fraction(repr(float(coverage))), len(self.scores)
        rank = math.ceil((rows + 1) * exact)
        if rank > rows:
            raise InputError(
                f"{rows} labelled rows are too few for a coverage of {coverage}; give at least "
                f"{math.ceil(exact / (1 - exact))}, or ask for less"
            )
        return float(np.partition(self.scores, rank - 1)[rank - 1])

    def sets(self, log_probs: np.ndarray, coverage: float) -> np.ndarray:
        """Return which labels are in each row's set, bool `[rows, labels]`; `lac` may have none."""
        scores = _scores(check_log_probs(log_probs, ("rows", "labels")), self.method)
        return scores <= self.threshold(coverage)


def fit(
    log_probs: np.ndarray, gold: Sequence[int] | np.ndarray, *, method: Method = "lac"
) -> Conformal:
    """Score labelled rows `[rows, labels]` that neither training nor calibration used.

    `lac` scores a label by 1 - its probability: the smallest sets on average (Sadinle, Lei and
    Wasserman 2019, arXiv 1609.00451). `aps` sums the probabilities above the label's: larger sets
    for harder rows (Romano, Sesia and Candès 2020, arXiv 2006.02544). The paper adds a random part
    of the label's own probability. Without it a row always has the same set, which is never empty
    and covers slightly more.

    >>> fit(np.log([[0.5, 0.3, 0.2]]), [1], method="aps").scores
    (0.5,)
    """
    if method not in ("lac", "aps"):
        raise InputError(f"method is {method!r}; expected 'lac' or 'aps'")
    scores = check_log_probs(log_probs, ("rows", "labels"))
    truth = check_gold(gold, scores)
    of_gold = _scores(scores, method)[np.arange(len(scores)), truth]
    return Conformal(method=method, scores=tuple(of_gold.tolist()))


def coverage(sets: np.ndarray, gold: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Measure sets bool `[rows, labels]` on labelled rows.

    Gives `rows`, `coverage` (the share of sets with the gold label), `coverage_ci95` (Wilson),
    `mean_size`, and the shares `empty` and `single` of sets with no and with one label.

    >>> coverage(np.array([[True, False], [True, True]]), [1, 1])["coverage"]
    0.5
    """
    sets = np.asarray(sets)
    if sets.ndim != 2 or sets.dtype != bool or not sets.size:
        raise InputError(
            f"sets has shape {list(sets.shape)} and dtype {sets.dtype}; expected bool "
            "[rows, labels], not empty"
        )
    truth = check_gold(gold, sets)
    hits, sizes = int(sets[np.arange(len(sets)), truth].sum()), sets.sum(axis=1)
    return {
        "rows": len(sets),
        "coverage": hits / len(sets),
        "coverage_ci95": list(wilson_interval(hits, len(sets))),
        "mean_size": float(sizes.mean()),
        "empty": float((sizes == 0).mean()),
        "single": float((sizes == 1).mean()),
    }


def _scores(log_probs: np.ndarray, method: Method) -> np.ndarray:
    """Return how badly each label fits, `[rows, labels]`; inf for one that the row lacks."""
    probs = np.exp(log_softmax(log_probs))
    if method == "lac":
        scores = 1 - probs
    else:
        order = np.argsort(-probs, axis=1, kind="stable")
        above = np.take_along_axis(probs, order, axis=1)[:, :-1].cumsum(axis=1)
        scores = np.zeros_like(probs)
        np.put_along_axis(scores, order[:, 1:], above, axis=1)
    # Rounding may take sums of probabilities slightly outside.
    return np.where(np.isfinite(log_probs), np.clip(scores, 0.0, 1.0), np.inf)
