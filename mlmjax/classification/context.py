"""Fit long texts into windows, and few-shot examples next to a text."""

from collections import Counter
from collections.abc import Callable, Sequence

from mlmjax.config.tables import StrictTable
from mlmjax.text.tokenizer import Tokenizer

OVERLAP = 8
"""A window shares one in this many of its tokens with the window before it."""

BLOCK = "TEXT:\n{text}\nAnswer: {answer}\n\n"
JOINT = 2
"""Tokens that a block may have more inside a prompt than by itself."""


def windows_of(tokenizer: Tokenizer, text: str, room: int) -> list[str]:
    """Cut a text into windows of at most `room` tokens.

    A text that fits is one window. Windows are of equal width, begin and end between characters,
    overlap by at least an eighth, and together hold the whole text. Blank windows are left out.

    >>> windows_of(Tokenizer.from_pretrained(), "one two three four five", 3)
    ['one two three', ' three four five']
    """
    return [text[start:stop] for start, stop in window_spans(tokenizer, text, room)]


def window_spans(tokenizer: Tokenizer, text: str, room: int) -> list[tuple[int, int]]:
    """Return where each window of `windows_of` starts and stops in the text."""
    offsets = tokenizer.plain_offsets(text)
    if len(offsets) <= room:
        return [(0, len(text))]
    width = room
    while True:
        spans = _cuts(offsets, width)
        # A piece cut out of its text can be other tokens than it was there, and more of them.
        pieces = tokenizer.encode_plain_batch([text[start:stop] for start, stop in spans])
        longest = max(map(len, pieces))
        if longest <= room or width == 1:
            return [(start, stop) for start, stop in spans if text[start:stop].strip()] or spans
        width = max(1, min(width - 1, width * room // longest))


def _cuts(spans: Sequence[tuple[int, int]], width: int) -> list[tuple[int, int]]:
    """Return where each window starts and stops in the text."""
    stride = max(1, width - max(1, width // OVERLAP))
    count = 1 + max(0, -(-(len(spans) - width) // stride))
    starts = [round(i * (len(spans) - width) / max(1, count - 1)) for i in range(count)]
    stops = [spans[start + width - 1][1] for start in starts[:-1]]
    begins = [0, *(spans[start][0] for start in starts[1:])]
    return list(zip(begins, [*stops, max(end for _, end in spans)], strict=True))


class Shot(StrictTable):
    """A few-shot example: a text and its labels, one or (with `multi_label`) any number."""

    text: str
    labels: tuple[str, ...]


class Shots:
    """A pool of few-shot examples, used in turns of their labels.

    The first example of each label comes first, then the second of each, and so on. An example
    that does not fit in the room left is skipped. `counts` says how many prompts had how many.
    """

    def __init__(self, pool: Sequence[Shot], tokenizer: Tokenizer):
        self.pool = in_turn(pool)
        blocks = [BLOCK.format(text=shot.text, answer="") for shot in self.pool]
        self._tokens = [len(ids) + JOINT for ids in tokenizer.encode_plain_batch(blocks)]
        self._tokenizer = tokenizer
        self.counts: Counter[int] = Counter()

    def fill(self, room: int, answer_of: Callable[[Shot], str | None]) -> str:
        """Return the examples that fit in `room` tokens, each with its answer.

        An example without an answer is left out.
        """
        chosen = []
        for shot, tokens in zip(self.pool, self._tokens, strict=True):
            answer = answer_of(shot)
            if answer is None:
                continue
            tokens += len(self._tokenizer.encode_plain(f" {answer}"))
            if tokens <= room:
                room -= tokens
                chosen.append(BLOCK.format(text=shot.text, answer=answer))
        self.counts[len(chosen)] += 1
        return "".join(chosen)


def in_turn(pool: Sequence[Shot]) -> list[Shot]:
    """Order examples in turns of their first labels.

    >>> pool = [Shot(text=text, labels=(text[0],)) for text in ("a1", "a2", "b1", "b2")]
    >>> [shot.text for shot in in_turn(pool)]
    ['a1', 'b1', 'a2', 'b2']
    """
    seen: Counter[tuple[str, ...]] = Counter()
    turns = []
    for number, shot in enumerate(pool):
        turns.append((seen[shot.labels[:1]], number))
        seen[shot.labels[:1]] += 1
    return [pool[number] for _, number in sorted(turns)]
