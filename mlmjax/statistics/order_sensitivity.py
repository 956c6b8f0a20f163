"""Rows asked again under other orders of their options, to see whether the answers stay."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlmjax.errors import InputError
from mlmjax.statistics.option_orders import sensitivity, shifted, shifts, unshifted

ORDER_ROWS, SHIFTS = 200, 4


def order_sensitivity(
    ask: Callable[[Sequence[Mapping[str, Any]]], np.ndarray],
    rows: Sequence[Mapping[str, Any]],
    log_probs: np.ndarray,
    gold: Sequence[int] | np.ndarray,
    *,
    order_rows: int = ORDER_ROWS,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Tell how the answers to rows depend on the order of their `options`.

    `log_probs` `[rows, labels]` are the answers in the given order, whose column j is option j.
    At most `order_rows` rows, drawn by the seed, are asked again under up to 3 more cyclic shifts,
    evenly spaced: so at most `3 * order_rows` forward passes. Returns what `orders.sensitivity`
    does, or None if `order_rows` is 0. Raises `InputError` if it is less.
    """
    check_order_rows(order_rows)
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


def check_order_rows(order_rows: int) -> None:
    """Raise `InputError` for a number of rows below 0."""
    if order_rows < 0:
        raise InputError(f"order_rows is {order_rows}; expected a number of rows, or 0 for none")
