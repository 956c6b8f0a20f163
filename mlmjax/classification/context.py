"""Long texts: cut into windows that overlap, each of which is asked about on its own."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


BLOCK = "TEXT:\n{text}\nAnswer: {answer}\n\n"
JOINT = 2  # tokens that a block may have more in a prompt than alone


class Shot(NamedTuple):
    """A text and the labels it has: one, or with several labels per text any number."""

    text: str
    labels: tuple[str, ...]


class Shots:
    """A pool of examples; `counts` says how many prompts had how many of them so far.

    The order is by turns: the first example of each label, then the second of each, and so on. An
    example that does not fit in what room is left is passed over.
    """

    def __init__(self, pool: Sequence[Shot], tokenizer: Tokenizer):
        self.pool = in_turn(pool)
        blocks = [BLOCK.format(text=shot.text, answer="") for shot in self.pool]
        self._tokens = [len(ids) + JOINT for ids in tokenizer.encode_plain_batch(blocks)]
        self._tokenizer = tokenizer
        self.counts: Counter[int] = Counter()

    def fill(self, room: int, answer_of: Callable[[Shot], str | None]) -> str:
        """Return the examples that fit in `room` tokens, answered; no answer leaves one out."""
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
    """Order examples by turns of their first labels.

    >>> [shot.text for shot in in_turn([Shot(t, (t[0],)) for t in ("a1", "a2", "b1", "b2")])]
    ['a1', 'b1', 'a2', 'b2']
    """
    seen: Counter[tuple[str, ...]] = Counter()
    turns = []
    for number, shot in enumerate(pool):
        turns.append((seen[shot.labels[:1]], number))
        seen[shot.labels[:1]] += 1
    return [pool[number] for _, number in sorted(turns)]
