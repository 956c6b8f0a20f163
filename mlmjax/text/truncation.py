"""Truncate texts token by token, and find the tokens that have masked characters."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]
"""Characters or tokens `[start, end)`."""


def level(lengths: Mapping[str, int], uses: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return the tokens each field keeps: short fields whole, long ones one common length.

    >>> level({"a": 10, "b": 900, "c": 500}, {"a": 1, "b": 1, "c": 1}, 210)
    {'a': 10, 'b': 100, 'c': 100}
    """
    kept = {}
    ascending = sorted(lengths, key=lambda name: lengths[name])
    for at, name in enumerate(ascending):
        share = budget // sum(uses[other] for other in ascending[at:])
        kept[name] = min(lengths[name], share)
        budget -= kept[name] * uses[name]
    return {name: kept[name] for name in lengths}


def cut(length: int, spans: Sequence[Span], kept: int, side: str) -> tuple[list[Span], int]:
    """Return the pieces of at most `kept` tokens of a text, and the number of tokens removed.

    `spans` has the characters of each token, `length` is that of the text. Tokens that share a
    character are kept or removed together.

    >>> cut(7, [(0, 1), (1, 3), (3, 5), (5, 7)], 2, "middle")
    ([(0, 1), (5, 7)], 2)
    """
    if kept >= len(spans):
        return [(0, length)], 0
    stop = {"head": 0, "tail": kept, "middle": (kept + 1) // 2}[side]
    start = len(spans) - (kept - stop)
    while stop > 0 and spans[stop - 1][1] > spans[stop][0]:
        stop -= 1
    while start < len(spans) and spans[start - 1][1] > spans[start][0]:
        start += 1
    pieces = [(0, spans[stop][0])] if stop else []
    if start < len(spans):
        pieces.append((spans[start][0], length))
    return pieces, start - stop


def spans_from(spans: Sequence[Span], start: int) -> list[Span]:
    """Return spans in the characters of a piece that starts at `start`.

    >>> spans_from([(0, 2), (3, 6)], 4)
    [(0, 0), (0, 2)]
    """
    return [(max(0, first - start), max(0, end - start)) for first, end in spans]


def kept_flags(length: int, masked: Sequence[Span], pieces: Sequence[Span]) -> list[bool]:
    """Tell for each character of the pieces that are kept of a text if it is masked.

    >>> kept_flags(6, [(0, 1), (3, 5)], [(0, 2), (4, 6)])
    [True, False, True, False]
    """
    flags = [False] * length
    for start, end in masked:
        flags[start:end] = [True] * len(flags[start:end])
    return [flag for start, end in pieces for flag in flags[start:end]]


def masked_tokens(offsets: Sequence[Span], places: Mapping[int, list[bool]]) -> Iterator[int]:
    """Yield the numbers of the tokens that have a masked character.

    `offsets` are the spans of the tokens. `places` maps where a text starts among the characters
    to its flags.

    >>> list(masked_tokens([(0, 2), (2, 6), (6, 7)], {3: [False, True, False, False]}))
    [1]
    """
    masked = {
        start + at for start, flags in places.items() for at, flag in enumerate(flags) if flag
    }
    for token, (start, end) in enumerate(offsets):
        if not masked.isdisjoint(range(start, end)):
            yield token
