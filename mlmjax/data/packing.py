"""Pack examples into rows of a fixed length, and lay rows out as arrays."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

import numpy as np

from mlmjax.errors import InputError, suggest_keywords

WINDOW_ROWS = 512
"""Rows' worth of tokens that `pack_stream` packs together, which bounds its memory."""

T = TypeVar("T", bound=Sized)


@suggest_keywords
def pack(examples: Sequence[Sized], seq_length: int) -> list[list[int]]:
    """Pack examples into rows of at most `seq_length` tokens; return the indices in each row.

    Best fit decreasing: from the longest to the shortest, each example goes to the fullest row that
    has room for it (D. S. Johnson, Near-optimal bin packing algorithms, 1973). The same lengths
    always give the same rows, and every example is in exactly one. Time is O(n log n + n seq_length
    / 64).

    >>> pack(["aaaa", "bb", "ccc", "d"], 5)
    [[0, 3], [1, 2]]

    Raises `InputError` that names the first example longer than `seq_length`.
    """
    if seq_length < 1:
        raise InputError(f"seq_length {seq_length}: expected a positive number of tokens")
    lengths = [len(example) for example in examples]
    for index, length in enumerate(lengths):
        if length > seq_length:
            raise InputError(
                f"example {index} has {length} tokens and does not fit seq_length {seq_length}; "
                "shorten it or raise seq_length"
            )
    rows: list[list[int]] = []
    rows_by_free: dict[int, list[int]] = {}
    # Bit f is set while a row has f free tokens: the best fit is the lowest from the length up.
    free_sizes = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        fitting = free_sizes >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_sizes ^= 1 << free
            rows[row].append(index)
        else:
            free, row = seq_length, len(rows)
            rows.append([index])
        left = free - length
        rows_by_free.setdefault(left, []).append(row)
        free_sizes |= 1 << left
    return [sorted(row) for row in rows]


def pack_stream(examples: Iterable[T], seq_length: int) -> Iterator[list[T]]:
    """Pack a stream in windows of `WINDOW_ROWS` rows' worth of tokens.

    The window bounds memory, and the same stream gives the same rows. A window wastes at most its
    last rows, so padding is close to that of packing all at once.
    """
    window: list[T] = []
    tokens = 0
    for example in examples:
        if tokens + len(example) > WINDOW_ROWS * seq_length:
            yield from ([window[i] for i in row] for row in pack(window, seq_length))
            window, tokens = [], 0
        window.append(example)
        tokens += len(example)
    yield from ([window[i] for i in row] for row in pack(window, seq_length))


def lay_out(
    rows: Sequence[Sequence[Any] | None], seq_length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay out packed rows as input ids, segment ids and position ids, int32 `[rows, seq_length]`.

    A row is its tokens, the lengths of its segments, and anything else; None is padding.

    >>> ids, segments, positions = lay_out([([5, 6, 7], [1, 2]), None], 4, pad_id=9)
    >>> ids.tolist(), segments.tolist(), positions.tolist()[0]
    ([[5, 6, 7, 9], [9, 9, 9, 9]], [[1, 2, 2, 0], [0, 0, 0, 0]], [0, 0, 1, 0])
    """
    ids = np.full((len(rows), seq_length), pad_id, np.int32)
    segments, positions = np.zeros_like(ids), np.zeros_like(ids)
    for row, content in enumerate(rows):
        if content is not None:
            tokens, lengths, *_ = content
            count, starts = len(tokens), np.cumsum(lengths) - lengths
            ids[row, :count] = tokens
            segments[row, :count] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            positions[row, :count] = np.arange(count) - np.repeat(starts, lengths)
    return ids, segments, positions
