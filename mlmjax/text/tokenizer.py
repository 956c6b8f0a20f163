"""Encode text so that no text can become a special token."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from itertools import accumulate, groupby, zip_longest
from pathlib import Path
from typing import Any

import tokenizers

from mlmjax.errors import InputError, suggest_keywords
from mlmjax.storage import MAX_JSON_BYTES, TOKENIZER_FILES, read_bounded
from mlmjax.text.checks import check_text
from mlmjax.text.tokenizer_files import SETTINGS, around, plain_copy, read_files

log = logging.getLogger(__name__)

ANCHOR = "[unused0]"
NO_ANCHOR = "none"
"""What names no token as the anchor."""
UNUSED = re.compile(r"\[unused\d+\]")
_SPARE = re.compile(r"\[unused\d+\]|<unused\d+>|<\|?reserved\w*\d+\|?>")
_MAX_BYTES = dict.fromkeys(TOKENIZER_FILES, MAX_JSON_BYTES) | {"tokenizer.json": 128 * 2**20}


@suggest_keywords
class Tokenizer:
    """Encode plain text with a fast tokenizer, and hold its special ids.

    Attributes: `backend` (the `tokenizers.Tokenizer`, truncation and padding off), `vocab_size`
    (ids are `0 .. vocab_size - 1`), `prefix_ids` and `suffix_ids` (what the tokenizer's own
    post-processor puts before and after one text: `[CLS]` and `[SEP]` in ModernBERT, other tokens
    or none in others), `mask_id`, `pad_id`, `cls_id` and `sep_id` (None if the tokenizer has no
    such token), `anchor_id` and `anchor` (the token before the slot of a prompt and its text: the
    one that `tokenizer_config.json` names as `anchor`, else `[unused0]`; None if there is none),
    `names` (the text of the token of each role, such as "mask"), `special_ids` (every special
    token and every `[unused*]`: never masked, never a target), `forbidden_ids` (those that no text
    becomes: all but the unknown token), `lstrip_ids` (tokens that include
    the white space before them), `files` (name -> bytes, written by `save`) and `sha256` of
    `files["tokenizer.json"]` and a named anchor.
    """

    def __init__(self, files: Mapping[str, bytes], where: str = "tokenizer"):
        self.files = dict(files)
        self.where = where
        path = f"{where}/tokenizer.json"
        found = read_files(files, where)
        if found.replaced is not None:
            self.files["tokenizer.json"] = found.replaced
        named = "" if found.anchor is None else f"\0anchor {found.anchor}"
        content = self.files["tokenizer.json"] + named.encode()
        self.sha256 = hashlib.sha256(content).hexdigest()

        self.backend, self.names, tokens = found.backend, found.names, found.tokens
        self.vocab_size = len(tokens)
        self.pad_id, self.mask_id = tokens[self.names["pad"]], tokens[self.names["mask"]]
        self.cls_id = tokens[self.names["cls"]] if "cls" in self.names else None
        self.sep_id = tokens[self.names["sep"]] if "sep" in self.names else None
        self._named, self._said, self._others = found.anchor, False, dict[str, Tokenizer]()
        self.anchor = self._find_anchor(tokens)
        self.anchor_id = None if self.anchor is None else tokens[self.anchor]
        self.prefix_ids, self.suffix_ids = around(self.backend, self.names["mask"], path)

        outer = {*self.prefix_ids, *self.suffix_ids}
        taken = {name for name, one in found.added.items() if one["special"] or one["id"] in outer}
        taken |= {*self.names.values()}
        taken |= {name for name in tokens if UNUSED.fullmatch(name)}
        taken |= {self.anchor} if self.anchor is not None else set()
        self.special_ids = frozenset(tokens[name] for name in taken)
        added = {entry["id"]: entry for entry in found.added.values()}
        self.lstrip_ids = frozenset(number for number, entry in added.items() if entry["lstrip"])
        self._words = {
            number: added[number]["content"] for number in self.lstrip_ids - self.special_ids
        }
        self._plain, self._secrets = plain_copy(found, taken, path)
        # A word-level vocabulary may not know a text; any other special id would be a breach.
        self.forbidden_ids = self.special_ids - found.unknown
        for name in sorted(taken):
            self.encode_plain(name)

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> "Tokenizer":
        """Read `tokenizer.json` (and its two companions) from a folder; None: the packaged one.

        Raises `InputError` for a folder without it, a file that is too large or not JSON, ids with
        gaps, missing or repeated special tokens. Truncation and padding settings are removed.

        >>> Tokenizer.from_pretrained().mask_id
        50284
        """
        packaged = Path(str(resources.files("mlmjax") / "assets" / "small"))
        folder = packaged if path is None else Path(path)
        if not (folder / "tokenizer.json").is_file():
            raise InputError(
                f"{folder}: has no tokenizer.json; give the folder of a fast tokenizer"
            )
        there = {name: most for name, most in _MAX_BYTES.items() if (folder / name).is_file()}
        files = {name: read_bounded(folder / name, most) for name, most in there.items()}
        where = "tokenizer" if path is None else str(folder)
        return _parse(_Source(tuple(files.items()), where))._again(where)

    def _again(self, where: str) -> "Tokenizer":
        """Return another tokenizer of the same files; both encode with the same objects."""
        again = object.__new__(Tokenizer)
        again.__dict__.update(self.__dict__)
        again.files, again.names = dict(self.files), dict(self.names)
        again.where, again._said, again._others = where, False, {}
        return again

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.files, self.where)

    @property
    def outer(self) -> int:
        """Return the number of tokens around a text."""
        return len(self.prefix_ids) + len(self.suffix_ids)

    def wrap(self, ids: Iterable[int]) -> list[int]:
        """Return ids between the tokens that the tokenizer puts around a text.

        >>> Tokenizer.from_pretrained().wrap([329])
        [50281, 329, 50282]
        """
        return [*self.prefix_ids, *ids, *self.suffix_ids]

    def with_ends(self, first: str, last: str) -> "Tokenizer":
        """Return a tokenizer that puts the tokens of two roles before and after a text."""
        ends = [(self.names[role], getattr(self, f"{role}_id")) for role in (first, last)]
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[ends[0][0], "$A", ends[1][0]], special_tokens=ends
        )
        table = json.loads(self.files["tokenizer.json"])
        table["post_processor"] = json.loads(backend.to_str())["post_processor"]
        content = json.dumps(table, indent=2, ensure_ascii=False).encode()
        return Tokenizer(self.files | {"tokenizer.json": content}, self.where)

    def with_anchor(self, name: str) -> "Tokenizer":
        """Return a tokenizer whose anchor is the token of this name, or "none" for no anchor.

        It is saved in `tokenizer_config.json`, from which other libraries read nothing new. Raises
        `InputError` for a text that is not one token.

        >>> Tokenizer.from_pretrained().with_anchor("[unused7]").anchor_id
        50292
        """
        if name == (self._named or self.anchor):
            return self
        if name not in self._others:
            check_text(name, "anchor")
            table = json.loads(self.files.get(SETTINGS, b"{}")) | {"anchor": name}
            content = json.dumps(table, indent=2, ensure_ascii=False).encode()
            self._others[name] = Tokenizer(self.files | {SETTINGS: content}, self.where)
        return self._others[name]

    @property
    def named_anchor(self) -> str | None:
        """Return the anchor that the files name, if they name a token."""
        return None if self._named is None else self.anchor

    def anchor_name(self) -> str:
        """Return the anchor of prompts by its name, or "none"; says and raises as `find_anchor`.

        >>> Tokenizer.from_pretrained().anchor_name()
        '[unused0]'
        """
        return NO_ANCHOR if self.find_anchor() is None else str(self.anchor)

    def find_anchor(self) -> int | None:
        """Return the id of the anchor of prompts, or None for no anchor; say which, once.

        Raises `InputError` for a tokenizer that has spare tokens but no `[unused0]`: which of them
        a model was trained with is not guessed.
        """
        if self.anchor is None and self._named is None:
            names = self.backend.get_vocab()
            spare = sorted(filter(_SPARE.fullmatch, names), key=lambda name: (len(name), name))
            if any(map(UNUSED.fullmatch, spare)):
                raise InputError(
                    f"{self.where}/tokenizer.json: has no token {ANCHOR}, which stands before the "
                    f"answer in a prompt; name another with anchor ({_few(spare)} are spare, "
                    f'"{NO_ANCHOR}" is for no anchor), or for tokens of your own rename others of '
                    f"the spare tokens and leave {ANCHOR} its name"
                )
            if not self._said:
                hint = f", such as {spare[0]}" if spare else ""
                log.warning(
                    "%s: has no token %s, so prompts have no anchor before the mask; name a token "
                    "with anchor%s if the model was trained with one",
                    *(self.where, ANCHOR, hint),
                )
        elif self._named is not None and not self._said:
            shown = self.anchor or "no anchor"
            log.warning("%s: before the mask of a prompt stands %s", self.where, shown)
        self._said = True
        return self.anchor_id

    def encode_plain(self, text: str) -> list[int]:
        """Encode only the text, without [CLS] and [SEP]; nothing becomes a special token.

        >>> Tokenizer.from_pretrained().encode_plain(" A")
        [329]
        """
        return self.encode_plain_batch([text])[0]

    def encode_plain_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once, each as `encode_plain` does.

        Raises `InputError` for a value that is not text or that this tokenizer cannot encode.
        """
        for text in texts:
            check_text(text, "text")
        return self._encode(list(texts), [()] * len(texts))

    def encode_parts_batch(self, rows: Sequence[Sequence[str | int]]) -> list[list[int]]:
        """Encode rows of texts and special tokens, each row as one string, without outer tokens.

        A number is the id of a special token. It acts on the text around it as its flags say, for
        example by including the white space before it. Nothing in the texts becomes a special
        token. Raises `InputError` as `encode_plain_batch`, and for a special token that cannot
        stand where it is.

        >>> tokenizer = Tokenizer.from_pretrained()
        >>> tokenizer.encode_parts_batch([["[MASK] is ", tokenizer.mask_id, "."]])
        [[60, 18690, 62, 310, 50284, 15]]
        """
        for row in rows:
            for part in row:
                if not isinstance(part, int):
                    check_text(part, "text")
        strings = [
            "".join(part if isinstance(part, str) else self._secrets[part] for part in row)
            for row in rows
        ]
        return self._encode(strings, [[i for i in row if isinstance(i, int)] for row in rows])

    def plain_json(self) -> str:
        """Return the `tokenizer.json` of a tokenizer that knows special tokens by secret names."""
        return self._plain.to_str()

    def hide_names(self, text: str) -> str:
        """Return a text with the secret names of `plain_json` in place of special tokens' names."""
        secrets = {self.backend.id_to_token(i) or "": own for i, own in self._secrets.items()}
        pattern = "|".join(map(re.escape, sorted(secrets, key=len, reverse=True)))
        return re.sub(pattern, lambda match: secrets[match[0]], text)

    def plain_offsets(self, text: str) -> list[tuple[int, int]]:
        """Return the span of each token of `encode_plain(text)`, `[start, end)` in characters."""
        check_text(text, "text")
        return self._plain.encode(text, add_special_tokens=False).offsets

    def parts_offsets(
        self, parts: Sequence[str | int]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Return the spans of the tokens of `encode_parts_batch([parts])[0]`, and of the parts.

        Both are `[start, end)` in the characters of one string, in which a special token takes
        some characters, too.

        >>> tokenizer = Tokenizer.from_pretrained()
        >>> tokenizer.parts_offsets(["A", " cat"])
        ([(0, 1), (1, 5)], [(0, 1), (1, 5)])
        """
        strings = [part if isinstance(part, str) else self._secrets[part] for part in parts]
        ends = [*accumulate(map(len, strings))]
        encoding = self._plain.encode("".join(strings), add_special_tokens=False)
        return encoding.offsets, [*zip([0, *ends], ends, strict=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, special tokens written out.

        The white space before an added word becomes one space.
        """
        numbers = [int(i) for i in ids]
        bad = [i for i in numbers if not 0 <= i < self.vocab_size]
        if bad:
            raise InputError(f"token id {bad[0]}: expected 0 to {self.vocab_size - 1}")
        text = ""
        # Word by word, because a byte-level decoder reads the letters of an added word as bytes.
        for is_word, run in groupby(numbers, self._words.__contains__):
            if not is_word:
                text += self.backend.decode(list(run), skip_special_tokens=False)
                continue
            for number in run:
                text += ("" if text[-1:].isspace() else " ") + self._words[number]
        return text

    def save(self, path: str | Path) -> None:
        """Write the files of this tokenizer into a folder, bytes unchanged."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)

    def _find_anchor(self, tokens: Mapping[str, int]) -> str | None:
        """Return the text of the anchor; raise `InputError` for a named one that cannot be it."""
        if self._named is None:
            found = ANCHOR if ANCHOR in tokens else None
        else:
            found = None if self._named == NO_ANCHOR else self._named
        if found is not None and found not in tokens:
            spare = sorted(filter(_SPARE.fullmatch, tokens), key=lambda name: (len(name), name))
            known = f"; spare tokens: {_few(spare)}" if spare else ""
            raise InputError(
                f"{self.where}: anchor {found!r:.60} is not a token of this tokenizer; expected "
                f'one, or "{NO_ANCHOR}"{known}'
            )
        roles = {name: role for role, name in self.names.items()}
        if found in roles:
            raise InputError(
                f"{self.where}/tokenizer.json: [{roles[found].upper()}] and the anchor {found} are "
                "one token; expected different ones"
            )
        return found

    def _encode(self, texts: list[str], given: Iterable[Sequence[int]]) -> list[list[int]]:
        """Encode texts whose special tokens have their secret names and are the `given` ones."""
        try:
            encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # The library's errors have no narrower type.
            raise InputError(
                f"{self.where}: cannot encode a text ({error}); expected a tokenizer that takes "
                "any text, such as a byte-level one, or that has its unknown token"
            ) from error
        encoded = [encoding.ids for encoding in encodings]
        for own, ids in zip(given, encoded, strict=True):
            found = [i for i in ids if i in self.forbidden_ids]
            if found != [*own]:
                raise self._misread(found, own)
        return encoded

    def _misread(self, found: Sequence[int], given: Sequence[int]) -> InputError:
        """Return the error for the first special token that is found or given, but not both."""
        pairs = zip_longest(found, given)
        one, other = next((one, other) for one, other in pairs if one != other)
        if len(found) > len(given):
            name = self.backend.id_to_token(one)
            return InputError(
                f"{self.where}: plain text becomes the special token {name}; expected a tokenizer "
                "whose special tokens are added tokens"
            )
        name = self.backend.id_to_token(other)
        return InputError(
            f"{self.where}: {name} is not read as one token where it is written; if the tokenizer "
            "finds it only between words (single_word), put a space before and after it"
        )


@dataclass(frozen=True)
class _Source:
    """The files of a tokenizer: equal if their content is, wherever they are."""

    files: tuple[tuple[str, bytes], ...]
    where: str = field(compare=False)


# A run, a plan or a server reads the same files several times, half a second of work each.
@lru_cache(maxsize=2)
def _parse(source: _Source) -> Tokenizer:
    return Tokenizer(dict(source.files), source.where)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]}"
