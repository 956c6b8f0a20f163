"""Calibrate label probabilities by a bias per label and a temperature."""

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from mlmjax.config.tables import StrictTable
from mlmjax.errors import InputError

METHODS = ("batch", "null", "order", "temperature")
COLDEST, HOTTEST = 1e-4, 1e4
"""The range that temperatures are searched in."""


class Calibration(StrictTable):
    """Calibrate log probabilities: `log_softmax((log_probs - bias) / temperature)`.

    `method` says how it was found (several joined by `+`), `bias` has one number per label or is
    None, and `rows` is the number of rows it was found from.
    """

    method: str
    bias: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=1e-8, le=1e8)] = 1.0
    rows: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _known(self) -> "Calibration":
        unknown = [name for name in self.method.split("+") if name not in METHODS]
        if unknown:
            raise ValueError(
                f"method names {unknown[0]!r}; expected {', '.join(METHODS)}, or several joined "
                "by +"
            )
        return self

    def apply(self, log_probs: np.ndarray) -> np.ndarray:
        """Return calibrated log probabilities, float64 `[rows, labels]`.

        Each row sums to 1 over its finite entries; -inf (a label the row does not have) stays.
        Raises `InputError` if the bias has another number of labels.

        >>> halved = Calibration(method="batch", bias=(math.log(2), 0.0), rows=1)
        >>> np.exp(halved.apply(np.log([[0.5, 0.5]]))).round(3).tolist()
        [[0.333, 0.667]]
        """
        scores = check_log_probs(log_probs, ("rows", "labels"))
        if self.bias is not None:
            if len(self.bias) != scores.shape[1]:
                raise InputError(
                    f"log_probs has {scores.shape[1]} labels and the calibration {len(self.bias)}; "
                    "calibrate again for these labels"
                )
            scores = scores - np.array(self.bias)
        return np.asarray(log_softmax(scores / self.temperature))

    def then(self, other: "Calibration") -> "Calibration":
        """Return the calibration that applies this one, then the other; `rows` is the fewer.

        >>> cooled = Calibration(method="temperature", temperature=0.5, rows=9)
        >>> cooled.then(Calibration(method="batch", bias=(2.0, 4.0), rows=7))
        Calibration(method='temperature+batch', bias=(1.0, 2.0), temperature=0.5, rows=7)
        """
        bias = self.bias
        if other.bias is not None:
            # Normalising a row shifts all of its labels alike; the next normalisation undoes it.
            later = tuple(self.temperature * one for one in other.bias)
            if bias is not None and len(bias) != len(later):
                raise InputError(
                    f"the calibrations have {len(bias)} and {len(later)} labels; expected the same"
                )
            bias = later if bias is None else tuple(np.add(bias, later).tolist())
        return Calibration(
            method=f"{self.method}+{other.method}",
            bias=bias,
            temperature=self.temperature * other.temperature,
            rows=min(self.rows, other.rows),
        )


def batch_calibration(log_probs: np.ndarray) -> Calibration:
    """Remove what a model says of all rows alike, found without labels from `[rows, labels]`.

    The bias is the log of each label's mean probability over the rows that have it, as in batch
    calibration (Zhou et al. 2024, arXiv 2309.17249). It assumes that labels are about equally
    frequent in the rows; where they are not, it also removes real signal.

    >>> np.exp(batch_calibration(np.log([[0.8, 0.2], [0.6, 0.4]])).bias).round(3).tolist()
    [0.7, 0.3]
    """
    scores = check_log_probs(log_probs, ("rows", "labels"))
    return Calibration(method="batch", bias=_log_mean(scores), rows=len(scores))


def null_calibration(null_log_probs: np.ndarray) -> Calibration:
    """Remove what a model says of inputs without content, `[inputs, labels]`.

    The bias is the log of each label's mean probability over the inputs: contextual calibration
    for inputs such as `N/A` (Zhao et al. 2021, arXiv 2102.09690), and domain-conditional pointwise
    mutual information for the prompt without the text (Holtzman et al. 2021, arXiv 2104.08315).
    """
    scores = check_log_probs(null_log_probs, ("inputs", "labels"))
    return Calibration(method="null", bias=_log_mean(scores), rows=len(scores))


def order_calibration(log_probs: np.ndarray) -> Calibration:
    """Remove the preference for option names, found from cyclic shifts `[rows, shifts, labels]`.

    Column j is the option *name* j (the letter), whatever option a shift puts there; the
    calibration is for columns in that order. The prior of a row is the softmax of the mean log
    probability over its shifts, and the bias is the log of the mean prior (PriDe: Zheng et al.
    2024, arXiv 2309.03882). All shifts together give each option each name once, so its content
    cancels within a row; with fewer shifts it cancels roughly, over many rows. A shift that a row
    was not prompted with is -inf throughout.

    >>> likes_a = np.log([[[0.6, 0.4], [0.6, 0.4]]])
    >>> np.exp(order_calibration(likes_a).bias).round(3).tolist()
    [0.6, 0.4]
    """
    scores = check_log_probs(log_probs, ("rows", "shifts", "labels"))
    asked = np.isfinite(scores).any(axis=2, keepdims=True)
    has = np.isfinite(scores).any(axis=1)
    number = asked.sum(axis=1)
    if (number < 2).any():
        row = int(np.argmax(number[:, 0] < 2))
        raise InputError(
            f"row {row + 1} (index {row}) of log_probs has one shift; expected at least two, "
            "because one order of the options says nothing about their names"
        )
    # Each shift is normalised first, so that its level does not count in the mean.
    mean = np.where(asked, _zeroed(scores), 0.0).sum(axis=1) / number
    if (np.isfinite(scores) != (has[:, None] & asked)).any():
        raise InputError("log_probs: a row has other option names under one shift than another")
    priors = log_softmax(np.where(has, mean, -np.inf))
    return Calibration(method="order", bias=_log_mean(priors), rows=len(scores))


def temperature_calibration(log_probs: np.ndarray, gold: Sequence[int] | np.ndarray) -> Calibration:
    """Find the temperature with the least negative log-likelihood of the gold labels.

    `gold` is an index per row, or a distribution over the labels, `[rows, labels]`; the likelihood
    is then the negative cross-entropy. Only confidence changes, no answer (Guo et al. 2017, arXiv
    1706.04599). Raises `InputError` if there is none: every answer is right, so that no confidence
    is too high, or the probabilities are no better than guessing.
    """
    scores = check_log_probs(log_probs, ("rows", "labels"))
    shares = _as_shares(gold, scores)
    scores = _zeroed(log_softmax(scores), missing=-np.inf)
    values = np.where(np.isfinite(scores), scores, 0.0)
    of_gold = (shares * values).sum(axis=1)

    def slope(log_inverse: float) -> float:
        """Return the likelihood's slope by 1 / temperature, which rises (convexity)."""
        weights = np.exp(log_softmax(math.exp(log_inverse) * scores))
        return float(np.mean((weights * values).sum(axis=1) - of_gold))

    low, high = -math.log(HOTTEST), -math.log(COLDEST)
    if slope(low) >= 0:
        raise InputError(
            f"the probabilities of these {len(scores)} rows are no better than guessing, so no "
            "temperature fits; check the labels and their order"
        )
    if slope(high) <= 0:
        raise InputError(
            f"the answers of all these {len(scores)} rows are right, so no temperature fits; give "
            "more rows, or rows that were not trained on"
        )
    from scipy.optimize import brentq  # Its import takes longer than an answer.

    temperature = math.exp(-brentq(slope, low, high, xtol=1e-10))
    return Calibration(method="temperature", temperature=temperature, rows=len(scores))


def check_log_probs(log_probs: np.ndarray, axes: Sequence[str]) -> np.ndarray:
    """Return log probabilities as float64; raise `InputError` for anything else.

    They are finite, or -inf for a label that a row does not have. Every row has a label.
    """
    shape = f"[{', '.join(axes)}]"
    try:
        scores = np.asarray(log_probs, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"log_probs: are not numbers {shape} ({error})") from error
    if scores.ndim != len(axes) or not scores.size:
        raise InputError(f"log_probs has shape {list(scores.shape)}; expected {shape}, not empty")
    if np.isnan(scores).any() or np.isposinf(scores).any():
        row = int(np.argwhere(np.isnan(scores) | np.isposinf(scores))[0][0])
        raise InputError(f"log_probs: row {row + 1} (index {row}) holds NaN or +inf")
    empty = ~np.isfinite(scores).reshape(len(scores), -1).any(axis=1)
    if empty.any():
        row = int(np.argmax(empty))
        raise InputError(f"log_probs: row {row + 1} (index {row}) has no label; expected one")
    return scores


def check_gold(gold: Sequence[int] | np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the index of each row's gold label, int `[rows]`, for log probabilities or sets.

    Raises `InputError` for another number of labels, and for a label that the row does not have.
    """
    truth, (rows, labels) = np.asarray(gold), scores.shape
    if truth.shape != (rows,) or truth.dtype.kind not in "iu":
        raise InputError(
            f"gold has shape {list(truth.shape)} and dtype {truth.dtype}; expected the index of a "
            f"label for each of {rows} rows"
        )
    wrong = (truth < 0) | (truth >= labels)
    if scores.dtype != bool:
        wrong |= np.isneginf(scores[np.arange(rows), np.where(wrong, 0, truth)])
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"gold: row {row + 1} (index {row}) is {truth[row]}, a label that the row does not "
            f"have; expected an index below {labels}"
        )
    return truth


def _as_shares(gold: Sequence[int] | np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return right answers as distributions `[rows, labels]`; they may be given as indices."""
    shares = np.asarray(gold)
    if shares.ndim < 2:
        return np.eye(scores.shape[1])[check_gold(gold, scores)]
    if shares.shape != scores.shape or not np.allclose(shares.sum(axis=1), 1) or shares.min() < 0:
        raise InputError(
            f"gold has shape {list(shares.shape)}; expected an index for each row, or a "
            f"distribution over the labels, {list(scores.shape)}, which sums to 1"
        )
    if (shares[np.isneginf(scores)] > 0).any():
        raise InputError("gold: a row has a share of a label that it does not have; set it to 0")
    return shares


def _log_mean(scores: np.ndarray) -> tuple[float, ...]:
    """Return the log of each label's mean probability over the rows `[rows, labels]` with it."""
    rows = np.isfinite(scores).sum(axis=0)
    if not rows.all():
        label = int(np.argmin(rows))
        raise InputError(
            f"log_probs: no row has label {label + 1} (index {label}), so its bias is unknown; "
            "leave the label out, or give rows that have it"
        )
    normalised = log_softmax(scores)
    return tuple((np.logaddexp.reduce(normalised, axis=0) - np.log(rows)).tolist())


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Return the logarithms of the softmax over the last axis; -inf stays -inf.

    >>> np.exp(log_softmax(np.log([[1.0, 3.0]]))).round(3).tolist()
    [[0.25, 0.75]]
    """
    # scipy.special has this function too, but its import takes half a second.
    return np.asarray(scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))


def _zeroed(scores: np.ndarray, missing: float = 0.0) -> np.ndarray:
    """Shift scores so that the largest of the last axis is 0; -inf becomes `missing`."""
    top = scores.max(axis=-1, keepdims=True)
    return np.where(np.isfinite(scores), scores - np.where(np.isfinite(top), top, 0.0), missing)


def abstention_threshold(
    confidences: np.ndarray, is_right: np.ndarray, *, accuracy: float, least: int
) -> float:
    """Return the lowest confidence from which on a share `accuracy` of the answers is right.

    At least `least` answers have that confidence or more (all of them if there are fewer). Raises
    `InputError` if no threshold does.

    >>> is_right = np.array([True, False, True, False])
    >>> abstention_threshold(np.array([0.9, 0.5, 0.7, 0.8]), is_right, accuracy=0.6, least=1)
    0.7
    """
    order = np.argsort(-confidences, kind="stable")
    ranked = confidences[order]
    accuracies = np.cumsum(is_right[order]) / (np.arange(len(order)) + 1)
    # Answers of equal confidence are given together or not at all.
    is_last = np.append(ranked[1:] < ranked[:-1], True)
    is_allowed = is_last & (np.arange(len(order)) >= min(least, len(order)) - 1)
    reached = np.flatnonzero((accuracies >= accuracy) & is_allowed)
    if not len(reached):
        raise InputError(
            f"no threshold reaches an accuracy of {accuracy} with {least} or more answers to these "
            f"{len(order)} texts; the best is {accuracies[is_allowed].max():.3f}; ask for less, or "
            "give more texts"
        )
    return float(ranked[reached[-1]])
