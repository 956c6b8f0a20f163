"""Render prompts from a template that no text can break."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from mlmjax.errors import InputError, suggest_keywords
from mlmjax.text.checks import check_fields, check_text, for_each_row, name_rows
from mlmjax.text.tokenizer import ANCHOR, NO_ANCHOR, Tokenizer
from mlmjax.text.truncation import Span, cut, kept_flags, level, masked_tokens
from mlmjax.text.verbalizer import OptionNames, option_names

# Unicode's White_Space, which a token with lstrip or rstrip includes (str.isspace differs).
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
WHITE_SPACE += "".join(map(chr, range(0x2000, 0x200B)))
MASK = "[MASK]"
_TOKENS = {"[CLS]": "cls_id", "[SEP]": "sep_id", MASK: "mask_id", ANCHOR: "anchor_id"}
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SPECIAL = re.compile("(" + "|".join(re.escape(name) for name in _TOKENS) + ")")
_SIDES = ("head", "tail", "middle")
_OPTIONS = "options"
MASKED = "masked_spans"
"""The key of a row under which spans of its fields are masked: {field: [(start, end), ...]}."""


class Prompt(NamedTuple):
    """Hold a prompt: ids, position of `[MASK]` (-1: none), tokens cut per field."""

    ids: list[int]
    slot: int
    shortened: dict[str, int]


class _Field(NamedTuple):
    name: str


class _Token(NamedTuple):
    name: str


_Part: TypeAlias = str | _Field | _Token
Spans: TypeAlias = Mapping[str, Sequence[Span]]
"""Spans `[start, end)` of the characters of fields, by the name of the field."""


@suggest_keywords
@dataclass(frozen=True)
class Template:
    """Render rows into prompts: `{field}`, `{options}`, `{{` and `}}` for braces.

    `[MASK]`, `[unused0]`, `[SEP]` and `[CLS]` in the template are special tokens; in a field they
    are ordinary text. ` [unused0] [MASK]` is appended if `[MASK]` is missing. The tokens that the
    tokenizer puts around a text ([CLS] and [SEP] in ModernBERT) are added around the prompt.

    `shorten` says which part of a field to truncate if the prompt is too long: `"head"`, `"tail"`
    or `"middle"`. Of several such fields the longest are truncated first, down to one common
    number of tokens. Nothing else of a prompt is ever truncated.

    The prompt is encoded as one string, so ordinary text has the ids of the whole string, whatever
    white space the tokenizer's special tokens include. `{options}` is one line `- A: text` per
    option (`- 1: text` with `names="numbers"`), last newline included. A line inside a field or an
    option is only text, even if it looks like an option. One field may be blank, but not all.

    `[unused0]` stands for the anchor of the tokenizer, whatever its name is. If the tokenizer has
    none, it is left out with the white space after it. `anchor` names another token, which the
    template may write by that name, or "none": then `[MASK]` may follow anything.

    A row may name spans of its fields under the key `MASKED`, in characters. Every token that has
    one of them is replaced by the mask in the finished prompt; the slot stays where it is.

    With `slot=False`, for the classification head, a prompt has no `[MASK]` and no anchor, and its
    slot is -1.

    Raises `InputError` for a malformed template.
    """

    text: str
    shorten: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    slot: bool = field(default=True, kw_only=True)
    names: OptionNames = field(default="letters", kw_only=True)
    anchor: str | None = field(default=None, kw_only=True)
    fields: tuple[str, ...] = field(init=False, compare=False)
    _parts: tuple[_Part, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_text(self.text, "template")
        if not isinstance(self.shorten, Mapping):
            raise InputError(f"shorten: is {self.shorten!r:.60}; expected field -> side")
        own = list(_parse(self.text, self.anchor))
        has_anchor = self.anchor != NO_ANCHOR
        parts = _with_slot(own, has_anchor) if self.slot else _without_slot(own)
        names = tuple(dict.fromkeys(part.name for part in parts if isinstance(part, _Field)))
        for name, side in self.shorten.items():
            if name == _OPTIONS or name not in names:
                known = ", ".join(n for n in names if n != _OPTIONS) or "none"
                raise InputError(f"shorten: {name!r} cannot be shortened; fields here: {known}")
            if side not in _SIDES:
                raise InputError(f"shorten: {name} is {side!r}; expected {', '.join(_SIDES)}")
        object.__setattr__(self, "shorten", dict(self.shorten))
        object.__setattr__(self, "fields", names)
        object.__setattr__(self, "_parts", parts)

    def uses(self, name: str) -> int:
        """Return how often the template uses a field."""
        return sum(part == _Field(name) for part in self._parts)

    def around(
        self, name: str, row: Mapping[str, Any], tokenizer: Tokenizer | None = None
    ) -> list[str]:
        r"""Return the texts of a prompt before, between and after the places of a field.

        Joined by the text of the field they are the whole prompt, with special tokens as text, by
        the names that they have in `tokenizer` (default: in ModernBERT).

        >>> Template("Is it good?\n{text}").around("text", {})
        ['Is it good?\n', ' [unused0] [MASK]']
        """
        pieces = [""]
        parts: Sequence[_Part] = self._parts
        if tokenizer is not None:
            tokenizer = self._own(tokenizer)
            parts = self._parts_for(tokenizer)
        for part in parts:
            if part == _Field(name):
                pieces.append("")
            elif isinstance(part, _Field):
                value = row[part.name]
                pieces[-1] += (
                    option_lines(value, self.names, tokenizer) if part.name == _OPTIONS else value
                )
            else:
                pieces[-1] += part if isinstance(part, str) else _name_of(part, tokenizer)
        return pieces

    def length(self, tokenizer: Tokenizer, row: Mapping[str, Any]) -> int:
        """Return the number of tokens of a prompt before truncation; fields may be blank."""
        return self.lengths(tokenizer, [row])[0]

    def lengths(self, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return what `length` does of many rows, which are encoded together."""

        def texts(row: Mapping[str, Any]) -> dict[str, str]:
            return {
                name: option_lines(row[name], self.names, tokenizer)
                if name == _OPTIONS
                else row.get(name) or ""
                for name in self.fields
            }

        return [len(ids) for ids in self._assemble(tokenizer, [texts(row) for row in rows])]

    def encode(
        self, tokenizer: Tokenizer, row: Mapping[str, Any], max_length: int
    ) -> tuple[list[int], int]:
        """Return `(ids, slot)` of a row; see `render`."""
        prompt = self.render(tokenizer, row, max_length)
        return prompt.ids, prompt.slot

    def render(self, tokenizer: Tokenizer, row: Mapping[str, Any], max_length: int) -> Prompt:
        """Return the prompt of a row, at most `max_length` tokens.

        Raises `InputError` that names a field that is missing or not text, for a row whose fields
        are all blank, and for a prompt that does not fit even after truncation.
        """
        texts = self._texts(row, tokenizer)
        ids = self._assemble(tokenizer, [texts])[0]
        return self._fit(tokenizer, texts, ids, max_length, row.get(MASKED))

    def render_batch(
        self,
        tokenizer: Tokenizer,
        rows: Sequence[Mapping[str, Any]],
        max_length: int,
        names: Iterable[str] | None = None,
    ) -> list[Prompt]:
        """Return the prompts of many rows, encoded together; the same as one by one.

        Raises `InputError` that names, by `names` or its number, every row that `render` rejects.
        """
        names = [name for name, _ in name_rows(rows)] if names is None else list(names)
        texts = for_each_row(lambda row: self._texts(row, tokenizer), zip(names, rows, strict=True))
        masked = [row.get(MASKED) for row in rows]
        encoded = zip(texts, self._assemble(tokenizer, texts), masked, strict=True)
        return for_each_row(
            lambda one: self._fit(tokenizer, one[0], one[1], max_length, one[2]),
            zip(names, encoded, strict=True),
        )

    def _texts(self, row: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
        """Return the text of every field of the template, options as lines."""
        check_fields(row, self.fields)
        given = [row[name] if name != _OPTIONS else "".join(row[name]) for name in self.fields]
        if given and not any(text.strip() for text in given):
            raise InputError(f"field {', '.join(map(repr, self.fields))} is blank; expected text")
        return {
            name: option_lines(row[name], self.names, tokenizer) if name == _OPTIONS else row[name]
            for name in self.fields
        }

    def _assemble(self, tokenizer: Tokenizer, rows: Sequence[Mapping[str, str]]) -> list[list[int]]:
        """Return the ids of many rows before truncation, outer tokens included."""
        tokenizer = self._own(tokenizer)
        filled = [self._filled(tokenizer, row) for row in rows]
        return [tokenizer.wrap(ids) for ids in tokenizer.encode_parts_batch(filled)]

    def _filled(self, tokenizer: Tokenizer, row: Mapping[str, str]) -> list[str | int]:
        """Return the parts of a prompt as texts and ids of special tokens."""
        tokenizer = self._own(tokenizer)
        return [
            _id_of(part, tokenizer)
            if isinstance(part, _Token)
            else row[part.name]
            if isinstance(part, _Field)
            else part
            for part in self._parts_for(tokenizer)
        ]

    def _own(self, tokenizer: Tokenizer) -> Tokenizer:
        return tokenizer if self.anchor is None else tokenizer.with_anchor(self.anchor)

    def _parts_for(self, tokenizer: Tokenizer) -> Sequence[_Part]:
        """Return the parts; without the anchor, and white space after it, if there is none."""
        anchor = _Token(ANCHOR)
        if anchor not in self._parts or tokenizer.find_anchor() is not None:
            return self._parts
        parts: list[_Part] = []
        previous: _Part | None = None
        for part in self._parts:
            if isinstance(part, str) and previous == anchor:
                parts.append(part.lstrip(WHITE_SPACE))
            elif part != anchor:
                parts.append(part)
            previous = part
        return parts

    def _fit(
        self,
        tokenizer: Tokenizer,
        texts: dict[str, str],
        ids: list[int],
        max_length: int,
        masked: Spans | None,
    ) -> Prompt:
        """Truncate fields until the prompt fits, check the prompt, and mask spans of fields."""
        shortened: dict[str, int] = {}
        kept: Spans = {}
        if len(ids) > max_length:
            ids, shortened, kept = self._shortened(tokenizer, texts, len(ids), max_length)
        slot = ids.index(tokenizer.mask_id) if self.slot else -1
        assert ids.count(tokenizer.mask_id) == self.slot
        assert len(ids) <= max_length
        if masked:
            ids = self._masked(tokenizer, texts, ids, kept, masked)
        return Prompt(ids, slot, shortened)

    def _masked(
        self,
        tokenizer: Tokenizer,
        texts: dict[str, str],
        ids: list[int],
        pieces: Spans,
        masked: Spans,
    ) -> list[int]:
        """Return the ids of a prompt with the tokens masked that have characters of spans.

        `pieces` has what is kept of each field that was truncated.
        """
        left, flags = {}, {}
        for name, text in texts.items():
            kept = pieces.get(name, [(0, len(text))])
            left[name] = "".join(text[start:end] for start, end in kept)
            flags[name] = kept_flags(len(text), masked.get(name, ()), kept)
        tokenizer = self._own(tokenizer)
        offsets, spans = tokenizer.parts_offsets(self._filled(tokenizer, left))
        parts = zip(self._parts_for(tokenizer), spans, strict=True)
        places = {start: flags[p.name] for p, (start, _) in parts if isinstance(p, _Field)}
        ids, first = list(ids), len(tokenizer.prefix_ids)
        for token in masked_tokens(offsets, places):
            ids[first + token] = tokenizer.mask_id
        return ids

    def _shortened(
        self, tokenizer: Tokenizer, texts: dict[str, str], length: int, max_length: int
    ) -> tuple[list[int], dict[str, int], Spans]:
        """Truncate the fields of `shorten`, the longest first, until the prompt fits.

        Return the ids, and for each field the number of tokens removed and the pieces kept. Each
        field is encoded once for its offsets; then only the kept text is encoded again.
        """
        if not self.shorten:
            raise InputError(
                f"the prompt has {length} tokens and at most {max_length} fit; "
                "name the fields to truncate in shorten, or shorten the text"
            )
        spans = {name: tokenizer.plain_offsets(texts[name]) for name in self.shorten}
        uses = {name: self.uses(name) for name in spans}
        fixed = len(self._assemble(tokenizer, [texts | dict.fromkeys(spans, "")])[0])
        budget = max_length - fixed
        while budget > 0:
            kept = level({name: len(span) for name, span in spans.items()}, uses, budget)
            pieces, lost = {}, {}
            for name, span in spans.items():
                pieces[name], lost[name] = cut(
                    len(texts[name]), span, kept[name], self.shorten[name]
                )
            left = {
                name: "".join(texts[name][start:end] for start, end in own)
                for name, own in pieces.items()
            }
            if not any(left.values()):
                break
            ids = self._assemble(tokenizer, [texts | left])[0]
            if len(ids) <= max_length:
                return ids, {name: count for name, count in lost.items() if count}, pieces
            budget -= len(ids) - max_length
        raise InputError(
            f"the prompt has {fixed} tokens without {', '.join(spans)} and at most {max_length} "
            "fit, so there is no room; shorten the rest of the prompt or allow more tokens "
            "(max_length, --max-length)"
        )


def _parse(text: str, anchor: str | None) -> Iterator[_Part]:
    """Yield the template's literal texts, fields and special tokens, in order."""
    literal, end = "", 0
    for match in _BRACES.finditer(text):
        literal += text[end : match.start()]
        end = match.end()
        if match[0] in ("{{", "}}"):
            literal += match[0][0]
            continue
        name = match[1]
        if name is None:
            raise InputError(
                f"template: single {match[0]!r} at character {match.start() + 1}; "
                "write {field} for a field, {{ or }} for the brace itself"
            )
        if not name.strip() or ":" in name or "!" in name:
            raise InputError(
                f"template: {match[0]!r} at character {match.start() + 1} is not a field; "
                "expected a plain name, such as {text}"
            )
        yield from _literals(literal, anchor)
        yield _Field(name)
        literal = ""
    yield from _literals(literal + text[end:], anchor)


def _literals(text: str, anchor: str | None) -> Iterator[str | _Token]:
    """Split a text at its special tokens; the anchor may have a name of its own."""
    special = _SPECIAL
    if anchor is not None and anchor not in (NO_ANCHOR, *_TOKENS):
        special = re.compile(f"({re.escape(anchor)}|{_SPECIAL.pattern[1:]}")
    for piece in special.split(text):
        if piece:
            own = ANCHOR if piece == anchor != NO_ANCHOR else piece
            yield _Token(own) if own in _TOKENS else piece


def _with_slot(parts: list[_Part], has_anchor: bool) -> tuple[_Part, ...]:
    """Append anchor and mask if there is no mask, and check the pair."""
    anchor, mask = _Token(ANCHOR), _Token(MASK)
    if mask in parts:
        if parts.count(mask) > 1:
            raise InputError(
                f"template: has {parts.count(mask)} {MASK}; expected one, directly after {ANCHOR}"
            )
        if has_anchor and anchor not in _without_space(parts[: parts.index(mask)])[-1:]:
            raise InputError(
                f"template: {MASK} is not directly after {ANCHOR}; write {ANCHOR} {MASK}, or leave "
                "both out to append them"
            )
        return tuple(parts)
    space = [] if _ends_in_space(parts) else [" "]
    if not has_anchor or anchor in _without_space(parts)[-1:]:
        return (*parts, *space, mask)
    return (*parts, *space, anchor, " ", mask)


def _ends_in_space(parts: list[_Part]) -> bool:
    return not parts or (isinstance(parts[-1], str) and parts[-1][-1] in WHITE_SPACE)


def _id_of(token: _Token, tokenizer: Tokenizer) -> int:
    """Return the id of a special token; raises `InputError` if the tokenizer has none."""
    number: int | None = getattr(tokenizer, _TOKENS[token.name])
    if number is None:
        raise InputError(
            f"template: has {token.name}, which {tokenizer.where} does not have; leave it out"
        )
    return number


def _name_of(token: _Token, tokenizer: Tokenizer | None) -> str:
    """Return the text of a special token in a tokenizer that has it."""
    if tokenizer is None:
        return token.name
    return tokenizer.backend.id_to_token(_id_of(token, tokenizer)) or ""


def _without_slot(parts: list[_Part]) -> tuple[_Part, ...]:
    """Raise `InputError` for parts of a slot, which a classification head does not read."""
    for token in (MASK, ANCHOR):
        if _Token(token) in parts:
            raise InputError(
                f"template: has {token}, which a classification head does not read; leave it out"
            )
    return tuple(parts)


def _without_space(parts: list[_Part]) -> list[_Part]:
    """Return the parts without a last one of only white space."""
    last = parts[-1] if parts else None
    return parts[:-1] if isinstance(last, str) and not last.strip(WHITE_SPACE) else parts


def option_lines(
    options: Collection[str], names: OptionNames = "letters", tokenizer: Tokenizer | None = None
) -> str:
    r"""Return the text of `{options}`, with the option names of a tokenizer.

    >>> option_lines(["sports", "world"])
    '- A: sports\n- B: world\n'
    """
    chosen = option_names(len(options), names, tokenizer)
    return "".join(f"- {name}: {text}\n" for name, text in zip(chosen, options, strict=True))
