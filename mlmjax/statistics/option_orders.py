"""Shift options cyclically, pool the answers, and measure how much the order matters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mlmjax.config.suite import ORDER_ROWS, SHIFTS
from mlmjax.errors import InputError
from mlmjax.statistics.calibration import check_gold, check_log_probs
from mlmjax.statistics.metrics import wilson_interval

T = TypeVar("T")


def shifts(options: int, count: int | None = None) -> list[int]:
    """Return `count` evenly spaced cyclic shifts of `options` options, 0 first.

    None means all; there are at most as many as options. Raises `InputError` for numbers below 1.

    >>> shifts(4), shifts(10, 4), shifts(2, 4)
    ([0, 1, 2, 3], [0, 2, 5, 7], [0, 1])
    """
    if options < 1 or (count is not None and count < 1):
        raise InputError(f"shifts: {options} options, count {count}; expected 1 or more of each")
    count = options if count is None else min(count, options)
    return [i * options // count for i in range(count)]


def shifted(options: Sequence[T], shift: int) -> list[T]:
    """Return the options from number `shift` on, followed by those before it.

    >>> shifted(["x", "y", "z"], 1)
    ['y', 'z', 'x']
    """
    return [options[(j + shift) % len(options)] for j in range(len(options))]


def unshifted(log_probs: np.ndarray, shift: int, options: int) -> np.ndarray:
    """Return the answer to a shifted prompt with its columns back in the given order.

    Column j of a shifted prompt is option `(j + shift) % options`; columns `[labels]` past the
    row's own number of options keep their place. Raises `InputError` for fewer columns than
    options.

    >>> unshifted(np.array([0.7, 0.2, 0.1, -np.inf]), 1, 3).tolist()
    [0.1, 0.7, 0.2, -inf]
    """
    columns = np.array(log_probs)
    if columns.ndim != 1 or not 1 <= options <= len(columns):
        raise InputError(
            f"unshifted: {options} options and columns {list(columns.shape)}; expected one axis "
            "with a column for each option"
        )
    columns[:options] = np.roll(columns[:options], shift)
    return columns


def pooled(log_probs: np.ndarray) -> np.ndarray:
    """Average probabilities over shifts, in logs: `[..., shifts, labels] -> [..., labels]`.

    A shift that was not prompted is -inf throughout and does not count.

    >>> np.exp(pooled(np.log([[0.8, 0.2], [0.4, 0.6]]))).round(3).tolist()
    [0.6, 0.4]
    """
    scores = np.asarray(log_probs, dtype=np.float64)
    asked = np.isfinite(scores).any(axis=-1).sum(axis=-1)
    if scores.ndim < 2 or not np.all(asked):
        raise InputError("pooled: no shift was prompted; expected log probabilities")
    return np.asarray(np.logaddexp.reduce(scores, axis=-2) - np.log(asked)[..., None])


def sensitivity(log_probs: np.ndarray, gold: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Return how answers `[rows, shifts, labels]` depend on the order of the options.

    Columns are in the given order (`unshifted`). A row was prompted with the first of
    `shifts(its options, number of shifts)`; its other shifts are -inf throughout. A row changes if
    its most probable option differs between its shifts.

    Gives `rows`, `shifts` (the most of any row), `changed` (a share), `changed_ci95` (Wilson),
    `accuracy_by_shift` and `accuracy_by_position` (of the gold option, 0 is the first), each a list
    of `{"rows", "accuracy"}` (None without rows), `position_spread` (largest minus smallest of the
    latter), and `pooled_accuracy`, of the probabilities averaged over shifts.
    """
    scores = check_log_probs(log_probs, ("rows", "shifts", "labels"))
    asked = np.isfinite(scores).any(axis=2)
    number = asked.sum(axis=1)
    if not all(row[:n].all() for row, n in zip(asked, number, strict=True)):
        raise InputError("log_probs: a row has a shift of -inf before a prompted one")
    answers = scores.argmax(axis=2)
    changed = int(((answers != answers[:, :1]) & asked).any(axis=1).sum())
    truth = check_gold(gold, scores[:, 0])
    right = answers == truth[:, None]
    options = np.isfinite(scores[:, 0]).sum(axis=1)
    moved = [
        shifts(n, k) + [0] * (scores.shape[1] - k) for n, k in zip(options, number, strict=True)
    ]
    position = (truth[:, None] - np.array(moved)) % options[:, None]
    by_position = [
        _share(right[asked & (position == place)]) for place in range(int(options.max()))
    ]
    known = [one["accuracy"] for one in by_position if one["accuracy"] is not None]
    return {
        "rows": len(scores),
        "shifts": int(number.max()),
        "changed": changed / len(scores),
        "changed_ci95": list(wilson_interval(changed, len(scores))),
        "accuracy_by_shift": [
            _share(right[row, i]) for i, row in enumerate(asked.T[: number.max()])
        ],
        "accuracy_by_position": by_position,
        "position_spread": max(known) - min(known),
        "pooled_accuracy": float(np.mean(pooled(scores).argmax(axis=1) == truth)),
    }


def _share(right: np.ndarray) -> dict[str, Any]:
    return {"rows": right.size, "accuracy": float(right.mean()) if right.size else None}


def order_sensitivity(
    ask: Callable[[Sequence[Mapping[str, Any]]], np.ndarray],
    rows: Sequence[Mapping[str, Any]],
    log_probs: np.ndarray,
    gold: Sequence[int] | np.ndarray,
    *,
    order_rows: int = ORDER_ROWS,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Prompt a sample of rows again in other orders; return its `sensitivity`.

    `log_probs` `[rows, labels]` are the answers in the given order, whose column j is option j. At
    most `order_rows` rows, drawn by the seed, are prompted again with up to 3 more evenly spaced
    cyclic shifts: at most `3 * order_rows` forward passes. Returns None if `order_rows` is 0.
    """
    if not order_rows:
        return None
    drawn = list(range(len(rows)))
    if order_rows < len(rows):
        rng = np.random.default_rng([seed, len(rows)])
        drawn = sorted(rng.choice(len(rows), order_rows, replace=False).tolist())
    scores = np.full((len(drawn), SHIFTS, log_probs.shape[1]), -np.inf)
    scores[:, 0] = log_probs[drawn]
    asked = [
        (at, place, shift, rows[row])
        for at, row in enumerate(drawn)
        for place, shift in enumerate(shifts(len(rows[row]["options"]), SHIFTS))
        if shift
    ]
    answers = ask([{**row, "options": shifted(row["options"], s)} for _, _, s, row in asked])
    for (at, place, shift, row), answer in zip(asked, answers, strict=True):
        scores[at, place] = unshifted(answer, shift, len(row["options"]))
    return sensitivity(scores, np.asarray(gold)[drawn])
