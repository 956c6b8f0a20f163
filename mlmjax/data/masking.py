"""The three training objectives as masks over one example: pure numpy, inputs never modified.

Every function gives `(input_ids, target_positions, target_ids)`, int32; positions are sorted. A
selected token always becomes `[MASK]`: the recipe has no share of random or unchanged tokens
(ModernBERT-Large-Instruct, arXiv 2502.03793, and its published training code).
"""

from collections.abc import Collection, Sequence

import numpy as np

from mlmjax.errors import InputError

Ids = Sequence[int] | np.ndarray
Masked = tuple[np.ndarray, np.ndarray, np.ndarray]


def mask_answer(ids: Ids, answer_position: int, *, mask_id: int) -> Masked:
    """Mask the answer alone: answer token prediction (ATP).

    >>> inputs, positions, targets = mask_answer([1, 5, 7, 2], 2, mask_id=9)
    >>> inputs.tolist(), positions.tolist(), targets.tolist()
    ([1, 5, 9, 2], [2], [7])

    Raises `InputError` for a position outside the example, and for ids that are no whole numbers.
    """
    inputs = _as_ids(ids)
    if not 0 <= answer_position < len(inputs):
        raise InputError(
            f"answer position {answer_position} is outside the example of {len(inputs)} tokens"
        )
    positions = np.array([answer_position], np.int32)
    return _mask(inputs, positions, mask_id)


def mask_random(
    ids: Ids,
    rate: float,
    rng: np.random.Generator,
    *,
    special_ids: Collection[int],
    mask_id: int,
) -> Masked:
    """Mask a share of the tokens, the target is the original token: masked language modelling.

    Exactly `max(1, round(rate * maskable))` positions are drawn without replacement from those
    whose token is not in `special_ids`; the answer may be among them.

    >>> rng = np.random.default_rng(0)
    >>> inputs, positions, targets = mask_random(
    ...     [1, 5, 6, 7, 8, 2], 0.5, rng, special_ids={1, 2}, mask_id=9
    ... )
    >>> inputs.tolist(), positions.tolist(), targets.tolist()
    ([1, 5, 6, 9, 9, 2], [3, 4], [7, 8])

    Raises `InputError` for a rate outside (0, 1) and for an example with nothing to mask.
    """
    inputs = _as_ids(ids)
    maskable = np.flatnonzero(~np.isin(inputs, list(special_ids)))
    return _mask(inputs, draw_positions(maskable, rate, rng), mask_id)


def mask_dummy(
    ids: Ids,
    rate: float,
    rng: np.random.Generator,
    *,
    special_ids: Collection[int],
    mask_id: int,
) -> Masked:
    """Mask as `mask_random` does, the target at each position is the `[MASK]` token itself.

    >>> rng = np.random.default_rng(0)
    >>> inputs, positions, targets = mask_dummy(
    ...     [1, 5, 6, 7, 8, 2], 0.5, rng, special_ids={1, 2}, mask_id=9
    ... )
    >>> inputs.tolist(), positions.tolist(), targets.tolist()
    ([1, 5, 6, 9, 9, 2], [3, 4], [9, 9])
    """
    inputs, positions, targets = mask_random(
        ids, rate, rng, special_ids=special_ids, mask_id=mask_id
    )
    return inputs, positions, np.full_like(targets, mask_id)


def draw_positions(maskable: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Draw `max(1, round(rate * maskable))` of the positions given; int32, sorted.

    Raises `InputError` for a rate outside (0, 1) and when there are no positions.
    """
    if not 0.0 < rate < 1.0:
        raise InputError(f"mask rate {rate} is not between 0 and 1 (both excluded)")
    if len(maskable) == 0:
        raise InputError("nothing to mask: the example holds special tokens only")
    count = max(1, round(rate * len(maskable)))
    return np.sort(rng.choice(maskable, count, replace=False)).astype(np.int32)


def _as_ids(ids: Ids) -> np.ndarray:
    """Copy to int32 `[tokens]`, so that masking never writes into what the caller holds."""
    given = np.asarray(ids)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise InputError(
            f"ids of shape {list(given.shape)} and type {given.dtype}: expected a flat list of "
            "whole token ids"
        )
    return np.array(given, np.int32)


def _mask(inputs: np.ndarray, positions: np.ndarray, mask_id: int) -> Masked:
    targets = inputs[positions]
    inputs[positions] = mask_id
    return inputs, positions, targets
