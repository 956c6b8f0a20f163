"""Few-shot examples in a prompt: as many as fit beside the text, taken from the labels in turn."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlmjax.text.tokenizer import Tokenizer

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
