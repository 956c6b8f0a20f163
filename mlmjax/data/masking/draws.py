"""Mask one example for each of the three training objectives, in numpy.

Every function returns `(input_ids, target_positions, target_ids)`, int32, with sorted positions,
and never changes its inputs. A selected token becomes `[MASK]` (ModernBERT-Large-Instruct, arXiv
2502.03793); a run may replace some by `replace_tokens`. As many positions are masked as tokens,
whole words, or spans of words (SpanBERT, arXiv 1907.10529, section 3.1).
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

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
    _check_rate(rate)
    return choose_positions(maskable, count_masked(maskable, rate), rng)


def choose_positions(maskable: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` of the positions; int32, sorted."""
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

    Words are taken in random order as `choose_words` says. With `spans`, the order is that of spans
    of 1 to 10 words (`SPAN_SHARES`), which begin at words in random order that are not in a span
    yet. A special token ends a word and a span.

    >>> starts = np.array([1, 1, 0, 0, 1, 0, 1, 1], bool)  # words of 1, 3, 2, 1 and 1 tokens
    >>> rng = np.random.default_rng(1)
    >>> [draw_words(np.arange(8), starts, 0.5, rng).tolist() for _ in range(3)]
    [[0, 4, 5, 7], [0, 3, 6, 7], [0, 1, 2, 3]]
    >>> [draw_words(np.arange(8), starts, 0.5, rng, spans=True).tolist() for _ in range(3)]
    [[1, 2, 3, 6], [0, 4, 5, 6], [1, 2, 3, 6]]

    Raises `InputError` as `draw_positions`.
    """
    _check_rate(rate)
    words, count = find_words(maskable, word_starts), count_masked(maskable, rate)
    order = span_order(words, count, rng) if spans else rng.permutation(len(words.sizes))
    return choose_words(words, order, count, rng)


class Words(NamedTuple):
    """The words of one example, each a run of adjacent maskable positions.

    `positions` are those that may be masked, `first` the place in it where each word begins, and
    `sizes` the tokens of each word. `is_apart` is True for a word after a special token.
    """

    positions: np.ndarray
    first: np.ndarray
    sizes: np.ndarray
    is_apart: np.ndarray


def find_words(maskable: np.ndarray, word_starts: np.ndarray) -> Words:
    """Divide the maskable positions into words; `word_starts` is bool `[tokens]`."""
    is_apart = np.diff(maskable, prepend=-2) != 1
    first = np.flatnonzero(word_starts[maskable] | is_apart)
    return Words(maskable, first, np.diff(first, append=len(maskable)), is_apart[first])


def choose_words(
    words: Words, order: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Mask whole words in this order until `count` positions are masked; int32, sorted.

    A word that is too long for the rest is skipped. If all words left are too long, the first of
    them is masked in part: adjacent tokens, as many as are missing. So the number is exact, and at
    most one word is masked in part.
    """
    taken, missing = _take(words.sizes[order], count)
    is_masked = np.zeros(len(words.sizes), bool)
    is_masked[order[taken]] = True
    chosen = np.repeat(is_masked, words.sizes)
    if missing:
        cut = order[np.argmin(taken)]
        start = words.first[cut] + rng.integers(words.sizes[cut] - missing + 1)
        chosen[start : start + missing] = True
    return words.positions[chosen].astype(np.int32)


def weighted_order(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Order items by successive draws without replacement, each in proportion to the weights.

    The order is that of the logarithms of the weights with Gumbel noise (Gumbel top-k, Kool et al.
    2019, arXiv 1903.06059). Items of weight 0 come last, in random order.

    >>> weighted_order(np.array([0.0, 5.0, 0.0]), np.random.default_rng(0)).tolist()
    [1, 2, 0]
    """
    is_last = weights <= 0
    noise = rng.gumbel(size=len(weights))
    return np.lexsort((-noise - np.log(np.where(is_last, 1.0, weights)), is_last))


def replace_tokens(
    ids: np.ndarray,
    mask_id: int,
    rng: np.random.Generator,
    *,
    random_share: float,
    kept_share: float,
    vocabulary: np.ndarray,
) -> np.ndarray:
    """Return what stands in place of masked tokens: `[MASK]`, a random token, or the token itself.

    The shares are drawn for each token; 0.1 and 0.1 are those of BERT (arXiv 1810.04805). Random
    tokens come from `vocabulary`, each as likely as any other.

    >>> rng, ids = np.random.default_rng(1), np.array([5, 6, 7, 8])
    >>> shares = {"random_share": 0.5, "kept_share": 0.25}
    >>> replace_tokens(ids, 9, rng, **shares, vocabulary=np.arange(20, 30)).tolist()
    [5, 9, 22, 9]
    """
    draw, found = rng.random(len(ids)), np.full_like(ids, mask_id)
    is_random = draw < random_share
    is_kept = ~is_random & (draw < random_share + kept_share)
    found[is_random] = rng.choice(vocabulary, int(is_random.sum()))
    found[is_kept] = ids[is_kept]
    return found


def count_masked(maskable: np.ndarray, rate: float) -> int:
    """Return how many of the maskable positions a rate masks: at least one, at most all.

    Raises `InputError` if there are no positions.
    """
    if len(maskable) == 0:
        raise InputError("nothing to mask: the example holds only special tokens")
    return min(len(maskable), max(1, round(rate * len(maskable))))


def _check_rate(rate: float) -> None:
    if not 0.0 < rate < 1.0:
        raise InputError(f"mask rate {rate} is not between 0 and 1 (both excluded)")


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


def span_order(words: Words, count: int, rng: np.random.Generator) -> np.ndarray:
    """Order words by random spans until these fill `count` positions; the other words follow."""
    order_of_starts, sizes = rng.permutation(len(words.sizes)), words.sizes
    lengths = rng.choice(SPAN_LENGTHS, len(sizes), p=SPAN_SHARES)
    stretches = np.append(np.flatnonzero(words.is_apart), len(sizes))
    stop = stretches[np.cumsum(words.is_apart)]
    is_taken, left = [False] * len(sizes), count
    order: list[int] = []
    ends = np.minimum(order_of_starts + lengths, stop[order_of_starts])
    for word, end in zip(order_of_starts.tolist(), ends.tolist(), strict=True):
        if left <= 0:
            break
        inside = [] if is_taken[word] else [w for w in range(word, end) if not is_taken[w]]
        for one in inside:
            is_taken[one] = True
            left -= int(sizes[one])
        order += inside
    rest = order_of_starts[~np.array(is_taken)[order_of_starts]]
    return np.concatenate([np.array(order, order_of_starts.dtype), rest])


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
