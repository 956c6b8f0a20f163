"""Long texts: cut into windows that overlap, each of which is asked about on its own."""

from collections.abc import Sequence

from mlmjax.text.tokenizer import Tokenizer

OVERLAP = 8
"""A window shares one in this many of its tokens with the one before it."""


def windows_of(tokenizer: Tokenizer, text: str, room: int) -> list[str]:
    """Cut a text into windows of at most `room` tokens; one that fits is its own window.

    Windows are of equal width, begin and end between characters, overlap by at least an eighth,
    and together hold the whole text; those of white space alone are left out.

    >>> windows_of(Tokenizer.from_pretrained(), "one two three four five", 3)
    ['one two three', ' three four five']
    """
    spans = tokenizer.plain_offsets(text)
    if len(spans) <= room:
        return [text]
    width = room
    while width > 1:
        found = [text[start:stop] for start, stop in _cuts(spans, width)]
        # A piece cut out of its text can be other tokens than it was there, and more of them.
        longest = max(map(len, tokenizer.encode_plain_batch(found)))
        if longest <= room:
            return _filled(found)
        width = max(1, min(width - 1, width * room // longest))
    return _filled([text[start:stop] for start, stop in _cuts(spans, 1)])


def _filled(windows: list[str]) -> list[str]:
    return [window for window in windows if window.strip()] or windows


def _cuts(spans: Sequence[tuple[int, int]], width: int) -> list[tuple[int, int]]:
    """Return where each window starts and stops in the text."""
    stride = max(1, width - max(1, width // OVERLAP))
    count = 1 + max(0, -(-(len(spans) - width) // stride))
    starts = [round(i * (len(spans) - width) / max(1, count - 1)) for i in range(count)]
    cuts = []
    for start in starts:
        stop = start + width - 1
        cuts.append((spans[start][0] if start else 0, spans[min(stop, len(spans) - 1)][1]))
    cuts[-1] = (cuts[-1][0], max(end for _, end in spans))
    return cuts
