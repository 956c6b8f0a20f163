"""Mask one example for each of the three training objectives, in numpy.

Every function returns `(input_ids, target_positions, target_ids)`, int32, with sorted positions,
and never changes its inputs. A selected token always becomes `[MASK]`, without random or unchanged
tokens (ModernBERT-Large-Instruct, arXiv 2502.03793). As many positions are masked as tokens, whole
words, or spans of words (SpanBERT, arXiv 1907.10529, section 3.1).
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np

from mlmjax.errors import InputError, suggest_keywords

Ids = Sequence[int] | np.ndarray
Masked = tuple[np.ndarray, np.ndarray, np.ndarray]
Masking = Literal["token", "whole_word", "span"]

SPAN_LENGTHS = np.arange(1, 11)
SPAN_SHARES = 0.2 * 0.8 ** (SPAN_LENGTHS - 1)
SPAN_SHARES /= SPAN_SHARES.sum()
"""Shares of spans by their number of words: geometric up to 10, with a mean of 3.8."""


@suggest_keywords
def mask_answer(ids: Ids, answer_position: int, *, mask_id: int) -> Masked:
    """Mask only the answer: answer token prediction (ATP).

    >>> inputs, positions, targets = mask_answer([1, 5, 7, 2], 2, mask_id=9)
    >>> inputs.tolist(), positions.tolist(), targets.tolist()
    ([1, 5, 9, 2], [2], [7])

    Raises `InputError` for a position outside the example, and for ids that are not whole numbers.
    """
    inputs = _as_ids(ids)
    if not 0 <= answer_position < len(inputs):
        raise InputError(
            f"answer position {answer_position} is outside the example of {len(inputs)} tokens"
        )
    return _mask(inputs, np.array([answer_position], np.int32), mask_id)


@suggest_keywords
def mask_random(
    ids: Ids,
    rate: float,
    rng: np.random.Generator,
    *,
    special_ids: Collection[int],
    mask_id: int,
    masking: Masking = "token",
    word_starts: np.ndarray | None = None,
) -> Masked:
    """Mask a share of the tokens, which are the targets: masked language modelling.

    Exactly `max(1, round(rate * maskable))` positions are drawn without replacement from those
    whose token is not in `special_ids`; the answer may be one of them. `draw_words` draws them if
    `masking` is not `"token"`; `word_starts`, bool `[tokens]`, says where words begin
    (`text.words.word_starts`).

    >>> rng = np.random.default_rng(0)
    >>> inputs, positions, targets = mask_random(
    ...     [1, 5, 6, 7, 8, 2], 0.5, rng, special_ids={1, 2}, mask_id=9
    ... )
    >>> inputs.tolist(), positions.tolist(), targets.tolist()
    ([1, 5, 6, 9, 9, 2], [3, 4], [7, 8])

    Raises `InputError` for a rate outside (0, 1), for an example with nothing to mask, and for
    words without `word_starts` for each token.
    """
    inputs = _as_ids(ids)
    maskable = np.flatnonzero(~np.isin(inputs, list(special_ids)))
    if masking == "token":
        return _mask(inputs, draw_positions(maskable, rate, rng), mask_id)
    if word_starts is None or np.shape(word_starts) != inputs.shape:
        found = "none" if word_starts is None else f"shape {list(np.shape(word_starts))}"
        raise InputError(
            f"masking {masking!r} needs word_starts, one for each of {len(inputs)} tokens; "
            f"found {found}"
        )
    positions = draw_words(maskable, word_starts, rate, rng, spans=masking == "span")
    return _mask(inputs, positions, mask_id)


@suggest_keywords
def mask_dummy(
    ids: Ids, rate: float, rng: np.random.Generator, *, mask_id: int, **options: Any
) -> Masked:
    """Mask as `mask_random` does, with its options; every target is the `[MASK]` token itself.

    >>> rng = np.random.default_rng(0)
    >>> inputs, positions, targets = mask_dummy(
    ...     [1, 5, 6, 7, 8, 2], 0.5, rng, special_ids={1, 2}, mask_id=9
    ... )
    >>> inputs.tolist(), positions.tolist(), targets.tolist()
    ([1, 5, 6, 9, 9, 2], [3, 4], [9, 9])
    """
    inputs, positions, targets = mask_random(ids, rate, rng, mask_id=mask_id, **options)
    return inputs, positions, np.full_like(targets, mask_id)


def draw_positions(maskable: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Draw `max(1, round(rate * maskable))` of the positions; int32, sorted.

    Raises `InputError` for a rate outside (0, 1) and if there are no positions.
    """
    count = _budget(maskable, rate)
    return np.sort(rng.choice(maskable, count, replace=False)).astype(np.int32)


def draw_words(
    maskable: np.ndarray,
    word_starts: np.ndarray,
    rate: float,
    rng: np.random.Generator,
    *,
    spans: bool = False,
) -> np.ndarray:
    """Draw whole words, or spans of them, with as many positions as `draw_positions`; sorted.

    Words are taken in random order until the number is reached; a word that is too long for the
    rest is skipped. If all words left are too long, the first of them is masked in part: adjacent
    tokens, as many as are missing. So the number is exact, and at most one word is masked in part.
    A special token ends a word.

    With `spans`, the order is that of spans of 1 to 10 words (`SPAN_SHARES`), which begin at words
    in random order that are not in a span yet. A special token ends a span.

    >>> starts = np.array([1, 1, 0, 0, 1, 0, 1, 1], bool)  # words of 1, 3, 2, 1 and 1 tokens
    >>> rng = np.random.default_rng(1)
    >>> [draw_words(np.arange(8), starts, 0.5, rng).tolist() for _ in range(3)]
    [[0, 4, 5, 7], [0, 3, 6, 7], [0, 1, 2, 3]]
    >>> [draw_words(np.arange(8), starts, 0.5, rng, spans=True).tolist() for _ in range(3)]
    [[1, 2, 3, 6], [0, 4, 5, 6], [1, 2, 3, 6]]

    Raises `InputError` as `draw_positions`.
    """
    budget = _budget(maskable, rate)
    is_apart = np.diff(maskable, prepend=-2) != 1
    begins = word_starts[maskable] | is_apart
    first = np.flatnonzero(begins)
    sizes = np.diff(first, append=len(maskable))
    order = rng.permutation(len(sizes))
    if spans:
        order = _span_order(order, sizes, is_apart[first], budget, rng)
    taken, missing = _take(sizes[order], budget)
    is_masked = np.zeros(len(sizes), bool)
    is_masked[order[taken]] = True
    chosen = is_masked[np.cumsum(begins) - 1]
    if missing:
        cut = order[np.argmin(taken)]
        start = first[cut] + rng.integers(sizes[cut] - missing + 1)
        chosen[start : start + missing] = True
    return maskable[chosen].astype(np.int32)


def _budget(maskable: np.ndarray, rate: float) -> int:
    if not 0.0 < rate < 1.0:
        raise InputError(f"mask rate {rate} is not between 0 and 1 (both excluded)")
    if len(maskable) == 0:
        raise InputError("nothing to mask: the example holds only special tokens")
    return max(1, round(rate * len(maskable)))


def _take(sizes: np.ndarray, budget: int) -> tuple[np.ndarray, int]:
    """Take sizes in order if they fit the rest; return which, and the rest.

    >>> _take(np.array([2, 3, 2, 1, 1]), 4)
    (array([ True, False,  True, False, False]), 0)
    """
    taken = np.cumsum(sizes) <= budget
    left = budget - int(sizes[taken].sum())
    at = int(taken.sum())
    while left and len(fits := np.flatnonzero(sizes[at:] <= left)):
        at += int(fits[0])
        taken[at] = True
        left -= int(sizes[at])
        at += 1
    return taken, left


def _span_order(
    words: np.ndarray,
    sizes: np.ndarray,
    is_apart: np.ndarray,
    budget: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Order words by random spans until these fill the budget; the other words follow."""
    lengths = rng.choice(SPAN_LENGTHS, len(words), p=SPAN_SHARES)
    stretches = np.append(np.flatnonzero(is_apart), len(words))
    stop = stretches[np.cumsum(is_apart)]
    is_taken, left = [False] * len(words), budget
    order: list[int] = []
    ends = np.minimum(words + lengths, stop[words])
    for word, end in zip(words.tolist(), ends.tolist(), strict=True):
        if left <= 0:
            break
        inside = [] if is_taken[word] else [w for w in range(word, end) if not is_taken[w]]
        for one in inside:
            is_taken[one] = True
            left -= int(sizes[one])
        order += inside
    rest = words[~np.array(is_taken)[words]]
    return np.concatenate([np.array(order, words.dtype), rest])


def _as_ids(ids: Ids) -> np.ndarray:
    """Copy to int32 `[tokens]`, so that masking never writes into the caller's array."""
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
