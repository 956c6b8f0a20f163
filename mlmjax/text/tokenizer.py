"""Encode text so that no text can become a special token."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers

from mlmjax.errors import InputError
from mlmjax.storage import MAX_JSON_BYTES, TOKENIZER_FILES, parse_object, read_bounded
from mlmjax.text.checks import check_text

ANCHOR = "[unused0]"
UNUSED = re.compile(r"\[unused\d+\]")
_ROLES = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
_OTHER_ROLES = ("unk", "bos", "eos")
_MAX_BYTES = dict.fromkeys(TOKENIZER_FILES, MAX_JSON_BYTES) | {"tokenizer.json": 128 * 2**20}


class Tokenizer:
    """Encode plain text with a fast tokenizer, and hold its special ids.

    Attributes: `backend` (the `tokenizers.Tokenizer`, truncation and padding off), `vocab_size`
    (ids are `0 .. vocab_size - 1`), `cls_id`, `sep_id`, `pad_id`, `mask_id`, `anchor_id`
    (`[unused0]`, None if there is no such token), `special_ids` (every special token and every
    `[unused*]`: never masked, never a target), `lstrip_ids` and `rstrip_ids` (tokens that include
    the white space before or after them), `files` (name -> bytes, written by `save`) and `sha256`
    of `files["tokenizer.json"]`.
    """

    def __init__(self, files: Mapping[str, bytes], where: str = "tokenizer"):
        self.files = dict(files)
        self.where = where
        tables = {name: parse_object(data, f"{where}/{name}") for name, data in files.items()}
        table = tables.pop("tokenizer.json")
        path = f"{where}/tokenizer.json"
        if baked := _baked_in(table):
            table |= baked
            self.files["tokenizer.json"] = json.dumps(table, indent=2, ensure_ascii=False).encode()
        self.backend = _backend(table, path)
        self.sha256 = hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

        added = _added_tokens(table, path)
        tokens = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = len(tokens)
        _check_ids(tokens, added, path)

        names = _special_names(tables, where)
        if missing := [role for role in _ROLES if names[role] not in tokens]:
            keys = ", ".join(f"{role}_token" for role in missing)
            raise InputError(
                f"{path}: has no token {', '.join(names[role] for role in missing)}; expected a "
                f"tokenizer with {', '.join(names[r] for r in _ROLES)}, or other names for them in "
                f"tokenizer_config.json ({keys})"
            )
        self.cls_id, self.sep_id, self.pad_id, self.mask_id = (tokens[names[r]] for r in _ROLES)
        self.anchor_id = tokens.get(ANCHOR)
        taken = {name for name, flags in added.items() if flags["special"]} | set(names.values())
        taken |= {name for name in tokens if UNUSED.fullmatch(name)}
        self.special_ids = frozenset(tokens[name] for name in taken if name in tokens)
        roles = [*_ROLES.values(), *([] if self.anchor_id is None else [ANCHOR])]
        distinct = {self.cls_id, self.sep_id, self.pad_id, self.mask_id, self.anchor_id} - {None}
        if len(distinct) < len(roles):
            raise InputError(
                f"{path}: two of {', '.join(roles)} are one token; expected different tokens"
            )
        self.lstrip_ids = frozenset(flags["id"] for flags in added.values() if flags.get("lstrip"))
        self.rstrip_ids = frozenset(flags["id"] for flags in added.values() if flags.get("rstrip"))
        self._words = {
            flags["id"]: name
            for name, flags in added.items()
            if flags.get("lstrip") and name not in taken
        }
        self._plain, self._renumber = _plain(table, taken, path)
        # A word-level vocabulary may not know a text; any other special id would be a breach.
        self._forbidden = self.special_ids - {tokens.get(names.get("unk", "[UNK]"), -1)}
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
        return cls(files, "tokenizer" if path is None else str(folder))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.files, self.where)

    def require_anchor(self) -> int:
        """Return `anchor_id`; raise `InputError` that says what to do if there is none."""
        if self.anchor_id is not None:
            return self.anchor_id
        spare = sorted(filter(UNUSED.fullmatch, self.backend.get_vocab()), key=_unused_number)
        if spare:
            advice = f"for tokens of your own, rename others of the spare tokens ({_few(spare)})"
        else:
            advice = (
                "without it the model can fill masks, train on plain text and have a "
                "classification head; for prompts give a tokenizer such as ModernBERT's"
            )
        raise InputError(
            f"{self.where}/tokenizer.json: has no token {ANCHOR}, which stands before the answer "
            f"in a prompt; {advice}" + (f", and leave {ANCHOR} its name" if spare else "")
        )

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
        try:
            encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # The library's errors have no narrower type.
            raise InputError(
                f"{self.where}: cannot encode a text ({error}); expected a tokenizer that takes "
                "any text, such as a byte-level one, or that has its unknown token"
            ) from error
        return [self._checked(encoding.ids) for encoding in encodings]

    def plain_offsets(self, text: str) -> list[tuple[int, int]]:
        """Return the span of each token of `encode_plain(text)`, `[start, end)` in characters."""
        check_text(text, "text")
        return self._plain.encode(text, add_special_tokens=False).offsets

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

    def _checked(self, ids: list[int]) -> list[int]:
        if self._renumber:
            ids = [self._renumber.get(i, i) for i in ids]
        if not self._forbidden.isdisjoint(ids):
            found = self.backend.id_to_token(next(i for i in ids if i in self._forbidden))
            raise InputError(
                f"{self.where}: plain text becomes the special token {found}; expected a tokenizer "
                "whose special tokens are added tokens"
            )
        return ids


def _unused_number(name: str) -> int:
    return int(name.removeprefix("[unused").removesuffix("]"))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]}"


def _backend(table: dict[str, Any], where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(table))
    except BaseException as error:
        # A panic of the Rust library is not an Exception, and a bad file can cause one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{where}: is not a tokenizer the library can read ({error})") from error


def _baked_in(table: dict[str, Any]) -> dict[str, Any]:
    """Return replacements for saved settings that would cut, pad or alter every text."""
    found = [key for key in ("truncation", "padding") if table.get(key) is not None]
    settings: dict[str, Any] = dict.fromkeys(found)
    if isinstance(table.get("model"), dict) and table["model"].get("dropout"):
        settings["model"] = table["model"] | {"dropout": None}
    return settings


def _added_tokens(table: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Return `{content: entry}` of the added tokens, each entry checked."""
    entries = table.get("added_tokens") or []
    added: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    if not isinstance(entries, list):
        raise InputError(f"{where}: added_tokens is not a list; expected a list of objects")
    for entry in entries:
        content = entry.get("content") if isinstance(entry, dict) else None
        token_id = entry.get("id") if isinstance(entry, dict) else None
        if not content or not isinstance(content, str) or type(token_id) is not int:
            raise InputError(
                f"{where}: added_tokens holds {entry!r:.80}; expected an object with content and id"
            )
        if content in added or token_id in seen:
            raise InputError(
                f"{where}: added_tokens repeats {content!r} or its id {token_id}; expected every "
                "token once"
            )
        added[content] = {**entry, "special": bool(entry.get("special"))}
        seen.add(token_id)
    return added


def _check_ids(tokens: dict[str, int], added: dict[str, dict[str, Any]], where: str) -> None:
    for content, entry in added.items():
        if tokens.get(content) != entry["id"]:
            raise InputError(
                f"{where}: added token {content!r} has id {entry['id']}, but its place gives "
                f"{tokens.get(content)}; expected ids without gaps"
            )
    ids = set(tokens.values())
    if ids != set(range(len(tokens))):
        gap = next(i for i in range(len(tokens)) if i not in ids)
        raise InputError(
            f"{where}: {len(tokens)} tokens, but no token has id {gap}; expected each of 0 to "
            f"{len(tokens) - 1} once"
        )


def _special_names(tables: Mapping[str, dict[str, Any]], where: str) -> dict[str, str]:
    """Return role -> token text, from the other files, or ModernBERT's names."""
    names: dict[str, str] = {}
    for file, table in tables.items():
        for role in (*_ROLES, *_OTHER_ROLES):
            value = table.get(f"{role}_token")
            value = value.get("content") if isinstance(value, dict) else value
            if value is None:
                continue
            if not isinstance(value, str) or names.get(role, value) != value:
                expected = repr(names[role]) if role in names else "the text of a token"
                raise InputError(
                    f"{where}/{file}: {role}_token is {value!r:.60}; expected {expected}, one name "
                    "in all files"
                )
            names[role] = value
    return _ROLES | names


def _plain(
    table: dict[str, Any], taken: set[str], where: str
) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
    """Build a copy without special tokens, and the map of its ids that differ."""
    kept = [entry for entry in table.get("added_tokens") or [] if entry["content"] not in taken]
    plain = _backend({**table, "added_tokens": kept, "post_processor": None}, where)
    here = plain.get_vocab(with_added_tokens=True)
    moved = {here[entry["content"]]: entry["id"] for entry in kept}
    return plain, {old: new for old, new in moved.items() if old != new}
