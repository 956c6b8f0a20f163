"""Show what a question is about, a text or JSON, and shorten it where it is long."""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mlmjax.errors import InputError
from mlmjax.text.checks import check_text
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.truncation import Span

MOST_DEPTH = 64
INDENT = "  "
PIECE = 1 << 16
"""Characters that are encoded at once to count the tokens of a long text."""


class Part(NamedTuple):
    """A value of a state, and the text before it, which names its key."""

    before: str
    value: str


class Shown(NamedTuple):
    """A state as text, and the number of tokens that were removed from it."""

    text: str
    removed: int


class State:
    """A text, or JSON shown with one `key: value` on a line and nested values indented.

    Keys keep their order. `masked` are the spans of the text that prompts mask. Raises `InputError`
    for anything else, for values that JSON cannot hold, and for more than 64 levels.

    >>> print(State({"subject": "Hello", "tags": ["new", {"id": 7}]}).text)
    subject: Hello
    tags:
      - new
      - id: 7
    """

    def __init__(self, value: Any):
        if isinstance(value, str):
            check_text(value, "state")
            self.parts = [Part("", value)]
        elif isinstance(value, Mapping | list | tuple):
            found = list(_parts(value, 0, "\n"))
            if found:
                found[0] = found[0]._replace(before=found[0].before.lstrip("\n"))
            self.parts = found
        else:
            raise InputError(
                f"state: is {type(value).__name__} ({value!r:.60}); expected text, a table or a "
                "list"
            )
        self.is_plain = isinstance(value, str)
        self.masked: tuple[Span, ...] = ()
        self._bounded: tuple[int, Shown] | None = None
        self._tokens: int | None = None

    @property
    def text(self) -> str:
        """Return the whole state as text."""
        return "".join(before + value for before, value in self.parts)

    def masking(self, span: Span) -> "State":
        """Return the state with a span of its text masked."""
        state = copy.copy(self)
        state.masked = (span,)
        return state

    def bounded(self, tokenizer: Tokenizer, room: int) -> Shown:
        """Return the state in about `room` tokens at most, worked out once."""
        if self._bounded is None or self._bounded[0] != room:
            text = self.text
            fits = len(text) <= room // 4 or len(tokenizer.encode_plain(text[:PIECE])) <= room
            is_short = fits and len(text) <= PIECE
            shown = Shown(text, 0) if is_short else self.fitted(tokenizer, room)
            self._bounded = room, shown
        return self._bounded[1]

    def tokens(self, tokenizer: Tokenizer, text: str) -> int:
        """Return about the number of tokens of the state's `text`, worked out once."""
        if self._tokens is None:
            self._tokens = _count(tokenizer, text)
        return self._tokens

    def fitted(self, tokenizer: Tokenizer, room: int) -> Shown:
        """Return the state in about `room` tokens; long values lose their ends.

        The longest values are shortened first, down to one common number of tokens. Where keys
        alone are too long, the end of the whole is removed.
        """
        if self.is_plain:
            return _cut(tokenizer, self.text, room)
        if len(self.parts) <= room:
            cuts = [_cut(tokenizer, part.value, room) for part in self.parts]
            lengths = [len(ids) for ids in tokenizer.encode_plain_batch([c.text for c in cuts])]
            fixed = _count(tokenizer, "".join(part.before for part in self.parts))
            most = _level(lengths, room - fixed)
            while most > 0:
                kept = [
                    _cut(tokenizer, cut.text, most) if length > most else Shown(cut.text, 0)
                    for cut, length in zip(cuts, lengths, strict=True)
                ]
                text = "".join(p.before + k.text for p, k in zip(self.parts, kept, strict=True))
                over = len(tokenizer.encode_plain(text)) - room
                if over <= 0:
                    return Shown(text, sum(one.removed for one in (*cuts, *kept)))
                most -= max(1, over // len(kept))
        return _cut(tokenizer, self.text, room)


def as_state(value: Any) -> State:
    """Return a state as it is, or made from a text or JSON."""
    return value if isinstance(value, State) else State(value)


def _parts(value: Any, depth: int, start: str) -> Iterator[Part]:
    """Yield the parts of a table or list; `start` stands before its first line."""
    if depth > MOST_DEPTH:
        raise InputError(f"state: is nested more than {MOST_DEPTH} levels deep; flatten it")
    is_table = isinstance(value, Mapping)
    items = value.items() if is_table else ((None, item) for item in value)
    indent = "\n" + INDENT * depth
    for key, item in items:
        if is_table:
            check_text(key, "state: a key")
            name = f"{start}{key}:" if start != "\n" else f"{indent}{key}:"
        else:
            name = f"{start}-" if start != "\n" else f"{indent}-"
        start = "\n"
        if isinstance(item, Mapping | list | tuple) and item:
            # A table in a list begins on the line of its dash.
            first = f"{name} " if not is_table and isinstance(item, Mapping) else "\n"
            if first == "\n":
                yield Part(name, "")
            yield from _parts(item, depth + 1, first)
        else:
            yield Part(f"{name} ", _scalar(item).replace("\n", indent + INDENT))


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        check_text(value, "state: a value")
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"state: holds {value!r:.60}, which JSON cannot hold; expected texts, numbers, true, "
            "false, null, tables and lists"
        ) from error


def _cut(tokenizer: Tokenizer, text: str, room: int) -> Shown:
    """Return the first `room` tokens of a text; a long one is encoded piece by piece."""
    kept, count, at = "", 0, 0
    while at < len(text) and count < room:
        piece = text[at : at + PIECE]
        spans = tokenizer.plain_offsets(piece)
        if count + len(spans) > room:
            stop = room - count
            while stop > 0 and spans[stop - 1][1] > spans[stop][0]:
                stop -= 1  # tokens that share a character stay together
            piece = piece[: spans[stop][0]]
            spans = spans[:stop]
            kept += piece
            return Shown(kept, _count(tokenizer, text[len(kept) :]))
        kept, count, at = kept + piece, count + len(spans), at + PIECE
    return Shown(kept, _count(tokenizer, text[len(kept) :]))


def _count(tokenizer: Tokenizer, text: str) -> int:
    """Return the number of tokens of a text, estimated from the beginning of a long one."""
    count = len(tokenizer.encode_plain(text[:PIECE]))
    return count if len(text) <= PIECE else round(count * len(text) / PIECE)


def _level(lengths: list[int], room: int) -> int:
    """Return the largest number of tokens that each value may keep, so that all fit in `room`.

    >>> _level([10, 900, 500], 210)
    100
    """
    left, remaining = room, sorted(lengths)
    for at, length in enumerate(remaining):
        share = left // (len(remaining) - at)
        if length > share:
            return share
        left -= length
    return max(remaining, default=0)
