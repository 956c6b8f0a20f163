"""Packing: every example once, never too long, as tight as best fit can."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmjax import InputError
from mlmjax.data import pack
from mlmjax.data.packing import pack_stream

SEQ = 32
LENGTHS = st.lists(st.integers(0, SEQ), max_size=80)


def naive_best_fit(lengths):
    """Return the free space of each row, found by looking at all rows every time."""
    free = []
    for length in sorted(lengths, reverse=True):
        best = min((space for space in free if space >= length), default=None)
        if best is not None:
            free.remove(best)
        free.append((SEQ if best is None else best) - length)
    return sorted(free)


@settings(deadline=None)
@given(LENGTHS)
def test_rows_are_those_of_best_fit(lengths):
    rows = pack([range(n) for n in lengths], SEQ)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows)
    free = sorted(SEQ - sum(lengths[i] for i in row) for row in rows)
    assert free == naive_best_fit(lengths)
    assert rows == pack([range(n) for n in lengths], SEQ)
    examples = [[index] * n for index, n in enumerate(lengths)]
    assert list(pack_stream(iter(examples), SEQ)) == [[examples[i] for i in row] for row in rows]


def test_a_stream_is_read_a_window_at_a_time_and_wastes_little():
    lengths = [8 + (i * 37) % 200 for i in range(40_000)]
    read = 0

    def examples():
        nonlocal read
        for length in lengths:
            read += 1
            yield range(length)

    rows = pack_stream(examples(), 512)
    first = next(rows)
    assert read < 4000
    rows = [first, *rows]
    assert sorted(map(len, itertools.chain(*rows))) == sorted(lengths)
    assert all(sum(map(len, row)) <= 512 for row in rows)
    assert len(rows) <= 1.01 * len(pack([range(n) for n in lengths], 512))


@pytest.mark.parametrize(
    ("lengths", "seq_length", "message"),
    [
        ([8, 0, 9, 10], 8, "example 2 has 9 tokens and does not fit seq_length 8"),
        ([], 0, "seq_length 0: expected"),
        ([], -1, "seq_length -1: expected"),
    ],
)
def test_rows_need_room(lengths, seq_length, message):
    with pytest.raises(InputError, match=message):
        pack([range(n) for n in lengths], seq_length)
