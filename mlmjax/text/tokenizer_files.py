"""Read the files of a tokenizer as transformers does, and check them."""

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from secrets import choice
from string import ascii_lowercase
from typing import Any, NamedTuple

import tokenizers

from mlmjax.errors import InputError
from mlmjax.storage import TOKENIZER_FILES, parse_object

log = logging.getLogger(__name__)

MAIN, SETTINGS, NAMES = TOKENIZER_FILES
ROLES = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
"""The tokens of ModernBERT, which files that name no others mean."""
_OTHER_ROLES = ("bos", "eos", "unk")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Nobody can guess it, so no text can hold the name that a special token has in `plain_copy`.
_SECRET = "".join(choice(ascii_lowercase) for _ in range(24))


class TokenizerFiles(NamedTuple):
    """What the files of a tokenizer say.

    `table` is tokenizer.json without truncation, padding and dropout, and `replaced` its new text
    if it had any. `added` has the entry of each added token by its text: id and flags. `tokens` has
    the id of every token. `names` has the text of the token of each role that there is. `unknown`
    are the ids of unknown text, `anchor` the token before the slot that the files name.
    """

    backend: tokenizers.Tokenizer
    table: dict[str, Any]
    added: dict[str, dict[str, Any]]
    tokens: dict[str, int]
    names: dict[str, str]
    unknown: frozenset[int]
    anchor: str | None
    replaced: bytes | None


def read_files(files: Mapping[str, bytes], where: str) -> TokenizerFiles:
    """Parse and check the files of a tokenizer.

    The two companions of tokenizer.json name special tokens, may add some, and may change the
    flags of added tokens; their precedence is that of transformers 5. Raises `InputError` for
    files that are no tokenizer, ids with gaps, and special tokens that are missing or repeated.
    """
    tables = {name: parse_object(data, f"{where}/{name}") for name, data in files.items()}
    table, path, replaced = tables[MAIN], f"{where}/{MAIN}", None
    if baked := _baked_in(table):
        table |= baked
        replaced = json.dumps(table, indent=2, ensure_ascii=False).encode()
    backend = load_backend(table, path)
    _check_added(table, path)
    settings = _settings(tables, where)
    _check_split(settings, where)
    if more := _more_tokens(settings, backend, where):
        backend.add_tokens(more)
    added = {
        token.content: {"id": number, "content": token.content}
        | {flag: getattr(token, flag) for flag in _FLAGS}
        for number, token in sorted(backend.get_added_tokens_decoder().items())
    }
    tokens = backend.get_vocab(with_added_tokens=True)
    _check_ids(tokens, table, path)
    named = {role: name for role, (name, _) in _named(settings, where).items()}
    known = {role: name for role, name in (ROLES | named).items() if name in tokens}
    _check_roles(named, known, tokens, path)
    unknown = {named.get("unk", "[UNK]"), table["model"].get("unk_token")} & tokens.keys()
    unknown_ids = frozenset(tokens[name] for name in unknown) | {table["model"].get("unk_id")}
    return TokenizerFiles(
        backend, table, added, tokens, known, unknown_ids, _anchor(settings, where), replaced
    )


def load_backend(table: Mapping[str, Any], where: str) -> tokenizers.Tokenizer:
    """Return the library's tokenizer of a table; raises `InputError`."""
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(table))
    except BaseException as error:
        # A panic of the Rust library is not an Exception, and a bad file can cause one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{where}: is not a tokenizer the library can read ({error})") from error


def around(
    backend: tokenizers.Tokenizer, mask: str, where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the tokenizer's post-processor puts before and after one text.

    The text is the mask, which every tokenizer can encode. Raises `InputError` for a post-processor
    that does more than put tokens around a text.
    """
    inner = backend.encode(mask, add_special_tokens=False).ids
    whole = backend.encode(mask).ids
    starts = [
        at
        for at in range(len(whole) - len(inner) + 1)
        if inner and whole[at : at + len(inner)] == inner
    ]
    if len(starts) != 1:
        raise InputError(
            f"{where}: post_processor turns the ids {inner} of {mask} into {whole}; expected it to "
            "put tokens before and after them"
        )
    return tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(inner) :])


def plain_copy(
    found: TokenizerFiles, taken: Collection[str], where: str
) -> tuple[tokenizers.Tokenizer, dict[int, str]]:
    """Return a tokenizer whose special tokens have other names, and these names by id.

    The tokens in `taken` keep ids and flags. Their new names are secret, so that a text can hold a
    special token only if this program puts it there. The copy has no post-processor.
    """
    secrets = {
        name: f"{name[0]}{_SECRET}{_letters(number)}{name[-1]}"
        for number, name in enumerate(sorted(taken))
    }
    entries = list(found.added.values())
    # A token of the vocabulary alone, such as a spare one of BERT, is found in no text by itself.
    entries += [_entry(name, found.tokens[name]) for name in sorted({*taken} - found.added.keys())]
    added = [entry | {"content": secrets.get(n := entry["content"], n)} for entry in entries]
    model = dict(found.table["model"])
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {secrets.get(name, name): number for name, number in vocabulary.items()}
    elif isinstance(vocabulary, list):  # of Unigram: pieces with their scores
        model["vocab"] = [[secrets.get(name, name), score] for name, score in vocabulary]
    if isinstance(unknown := model.get("unk_token"), str):
        model["unk_token"] = secrets.get(unknown, unknown)
    table = {**found.table, "added_tokens": added, "model": model, "post_processor": None}
    return load_backend(table, where), {found.tokens[name]: secrets[name] for name in secrets}


def _entry(name: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(_FLAGS, False) | {"special": True}
    return {"id": number, "content": name, **flags}


def _letters(number: int) -> str:
    """Return a number as six letters.

    >>> _letters(27)
    'aaaabb'
    """
    digits = (number // 26**power % 26 for power in reversed(range(6)))
    return "".join(ascii_lowercase[digit] for digit in digits)


def _baked_in(table: dict[str, Any]) -> dict[str, Any]:
    """Return replacements for saved settings that would cut, pad or alter every text."""
    found = [key for key in ("truncation", "padding") if table.get(key) is not None]
    settings: dict[str, Any] = dict.fromkeys(found)
    if isinstance(table.get("model"), dict) and table["model"].get("dropout"):
        settings["model"] = table["model"] | {"dropout": None}
    return settings


def _check_added(table: dict[str, Any], where: str) -> None:
    """Raise `InputError` for added tokens that are no list of distinct tokens."""
    entries = table.get("added_tokens") or []
    contents: set[str] = set()
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
        if content in contents or token_id in seen:
            raise InputError(
                f"{where}: added_tokens repeats {content!r} or its id {token_id}; expected every "
                "token once"
            )
        contents.add(content)
        seen.add(token_id)


def _check_ids(tokens: Mapping[str, int], table: Mapping[str, Any], where: str) -> None:
    for entry in table.get("added_tokens") or []:
        if tokens.get(entry["content"]) != entry["id"]:
            raise InputError(
                f"{where}: added token {entry['content']!r} has id {entry['id']}, but its place "
                f"gives {tokens.get(entry['content'])}; expected ids without gaps"
            )
    ids = set(tokens.values())
    if ids != set(range(len(tokens))):
        gap = next(i for i in range(len(tokens)) if i not in ids)
        raise InputError(
            f"{where}: {len(tokens)} tokens, but no token has id {gap}; expected each of 0 to "
            f"{len(tokens) - 1} once"
        )


def _settings(tables: Mapping[str, dict[str, Any]], where: str) -> dict[str, Any]:
    """Return the settings of both companions; raises `InputError` if they name other tokens.

    As in transformers, special_tokens_map.json counts only if tokenizer_config.json has no
    `added_tokens_decoder`; but then, too, it may name the token of a role.
    """
    settings, names = tables.get(SETTINGS, {}), tables.get(NAMES, {})
    for role in (*ROLES, *_OTHER_ROLES):
        first, second = (_text(table.get(f"{role}_token")) for table in (settings, names))
        if first and second and first != second:
            raise InputError(
                f"{where}/{NAMES}: {role}_token is {second!r:.60}; expected {first!r:.60}, one "
                "name in all files"
            )
    if "added_tokens_decoder" not in settings:
        return settings | names
    keys = [f"{role}_token" for role in ROLES]
    return {key: _text(names[key]) for key in keys if key in names} | settings


def _check_split(settings: Mapping[str, Any], where: str) -> None:
    """Say what `split_special_tokens` means here; raise `InputError` for another value."""
    split = settings.get("split_special_tokens")
    if not isinstance(split, bool | None):
        raise InputError(
            f"{where}/{SETTINGS}: split_special_tokens is {split!r:.60}; expected true or false"
        )
    if split:
        log.warning(
            "%s/%s: split_special_tokens is true, and mlmjax always reads special tokens in texts "
            "as plain text; transformers then finds no [MASK] written in a prompt",
            *(where, SETTINGS),
        )


def _named(settings: Mapping[str, Any], where: str) -> dict[str, tuple[str, Any]]:
    """Return the name and the setting of each special token that the settings name, by role."""
    found = {}
    for role in (*_OTHER_ROLES, *reversed(ROLES)):
        value = settings.get(f"{role}_token")
        if value is None or value == "":
            continue
        if not (name := _text(value)):
            raise InputError(
                f"{where}/{SETTINGS}: {role}_token is {value!r:.60}; expected the text of a token"
            )
        found[role] = name, value
    return found


def _anchor(settings: Mapping[str, Any], where: str) -> str | None:
    """Return the name of the anchor, a setting of mlmjax alone."""
    anchor = settings.get("anchor")
    if anchor is not None and not (isinstance(anchor, str) and anchor):
        raise InputError(
            f'{where}/{SETTINGS}: anchor is {anchor!r:.60}; expected the text of a token, or "none"'
        )
    return anchor


def _text(value: Any) -> str | None:
    """Return the text of a token that is given as a text or as an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _more_tokens(
    settings: Mapping[str, Any], backend: tokenizers.Tokenizer, where: str
) -> list[tokenizers.AddedToken]:
    """Return the added tokens that the companions add, or to which they give other flags."""
    there = backend.get_added_tokens_decoder().values()
    as_there, contents = {repr(token) for token in there}, {token.content for token in there}
    named = _named(settings, where)
    special = {name for name, _ in named.values()}
    more = []
    for token in _decoder(settings, where):
        if repr(token) not in as_there:
            token.special = token.special or token.content in special
            more.append(token)
    if changed := [token.content for token in more if token.content in contents]:
        log.info(
            "%s: %s gives other flags to %s than %s; as in transformers, they count",
            *(where, SETTINGS, ", ".join(changed[:3]), MAIN),
        )
    contents |= {token.content for token in more}
    for value in (*(value for _, value in named.values()), *_extra(settings)):
        name = _text(value)
        if name and name not in contents:
            flags = value if isinstance(value, dict) else {}
            more.append(_token({**flags, "content": name, "special": True}, where))
            contents.add(name)
    return more


def _decoder(settings: Mapping[str, Any], where: str) -> Iterator[tokenizers.AddedToken]:
    """Yield the tokens of `added_tokens_decoder`, by their ids."""
    decoder = settings.get("added_tokens_decoder")
    if decoder is None:
        return
    if not isinstance(decoder, dict) or not all(str(number).isdecimal() for number in decoder):
        raise InputError(
            f"{where}/{SETTINGS}: added_tokens_decoder is {decoder!r:.60}; expected an object "
            "{id: token}"
        )
    for number in sorted(decoder, key=int):
        yield _token(decoder[number], where)


def _token(entry: Any, where: str) -> tokenizers.AddedToken:
    flags = {key: entry[key] for key in _FLAGS if key in entry} if isinstance(entry, dict) else {}
    content = entry.get("content") if isinstance(entry, dict) else None
    if not content or not isinstance(content, str) or {*map(type, flags.values())} - {bool}:
        raise InputError(
            f"{where}/{SETTINGS}: names the added token {entry!r:.80}; expected an object with "
            f"content, and true or false for {', '.join(_FLAGS)}"
        )
    return tokenizers.AddedToken(content, **flags)


def _extra(settings: Mapping[str, Any]) -> list[Any]:
    """Return further special tokens: those of a list, and those with names of their own."""
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    known = {f"{role}_token" for role in (*ROLES, *_OTHER_ROLES)}
    own = [
        value
        for key, value in settings.items()
        if key.endswith("_token") and key not in known and isinstance(value, str)
    ]
    return own + list(listed.values() if isinstance(listed, dict) else listed)


def _check_roles(
    named: Mapping[str, str], known: Mapping[str, str], tokens: Mapping[str, int], where: str
) -> None:
    """Raise `InputError` unless there are a mask and padding, and the mask is no other token."""
    if not {"pad", "mask"} <= known.keys():
        names = ROLES | dict(named)
        missing = [role for role in ROLES if role not in known]
        keys = ", ".join(f"{role}_token" for role in missing)
        raise InputError(
            f"{where}: has no token {', '.join(names[role] for role in missing)}; expected a "
            f"tokenizer with {names['pad']} and {names['mask']}, or other names for them in "
            f"{SETTINGS} ({keys})"
        )
    if other := [role for role in ("pad", "cls", "sep") if known.get(role) == known["mask"]]:
        raise InputError(
            f"{where}: [MASK] and [{other[0].upper()}] are one token; expected different tokens, "
            f"found {known['mask']} for both"
        )
