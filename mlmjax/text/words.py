"""New words for a tokenizer: each one token, wherever it stands in text."""

import json
import unicodedata
from collections.abc import Iterator, Sequence

from mlmjax.errors import InputError
from mlmjax.text.tokenizer import UNUSED, Tokenizer, check_text


def add_words(tokenizer: Tokenizer, words: Sequence[str], *, whole_words: bool = True) -> Tokenizer:
    """Return a tokenizer that knows each new word as one token, with the next free ids.

    A word may have spaces and hyphens inside. Its token takes the white space before it along
    (line ends too), so that "word" and " word" are the same id. It is found between word boundaries
    only, or anywhere with `whole_words=False` (for scripts without spaces). Text without new words
    has the ids it had.

    Raises `InputError` that lists every word that is blank, has outer white space, control
    characters or the text of a special token, stands twice, or is one token already.

    >>> larger = add_words(Tokenizer.from_pretrained(), ["angioplasty"])
    >>> larger.encode_plain("an angioplasty"), larger.encode_plain("angioplasty")
    ([266, 50368], [50368])
    """
    if not words:
        return tokenizer
    problems = list(_problems(tokenizer, words))
    if problems:
        raise InputError(problems[0], problems[1:])
    # As an added token of the library: whatever the tokenizer does to text, it does around these.
    flags = {
        "single_word": whole_words,
        "lstrip": True,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }
    numbered = dict(enumerate(words, tokenizer.vocab_size))
    tables = {name: json.loads(data) for name, data in tokenizer.files.items()}
    table = tables["tokenizer.json"]
    added = [{"id": number, "content": word, **flags} for number, word in numbered.items()]
    table["added_tokens"] = [*(table.get("added_tokens") or []), *added]
    for table in tables.values():  # transformers keeps the same list once more
        if isinstance(table.get("added_tokens_decoder"), dict):
            for number, word in numbered.items():
                table["added_tokens_decoder"][str(number)] = {"content": word, **flags}
    files = {name: json.dumps(t, indent=2, ensure_ascii=False) for name, t in tables.items()}
    larger = Tokenizer({name: text.encode() for name, text in files.items()}, tokenizer.where)
    for number, word in numbered.items():
        if larger.encode_plain_batch([word, f" {word}"]) != [[number]] * 2:
            raise InputError(
                f"new word {word!r:.80}: this tokenizer cuts it up before it is found (by another "
                "added token, or by its normalizer); leave it out"
            )
    return larger


def _problems(tokenizer: Tokenizer, words: Sequence[str]) -> Iterator[str]:
    """Say of each word why it cannot be a new token, if it cannot."""
    normalizer = tokenizer.backend.normalizer
    specials = [tokenizer.backend.id_to_token(i) or "" for i in sorted(tokenizer.special_ids)]
    seen: set[str] = set()
    for word in words:
        check_text(word, "new word")
        plain = normalizer.normalize_str(word) if normalizer else word
        inside = [name for name in specials if name in plain or name in word]
        inside += UNUSED.findall(f"{word} {plain}")
        if not plain.strip():
            problem = "is blank; expected some text"
        elif word != word.strip():
            problem = f"has outer white space; write {word.strip()!r}, which takes it along"
        elif any(map(_is_odd, word)) or "  " in word:
            problem = "has control characters, or white space other than single spaces; expected "
            problem += "ordinary text"
        elif inside:
            problem = f"holds the text of the special token {inside[0]}; choose another word"
        elif plain in seen:
            problem = "stands twice; expected every word once"
        elif _is_known(tokenizer, word):
            problem = "is one token already; leave it out"
        else:
            seen.add(plain)
            continue
        yield f"new word {word!r:.80}: {problem}"


def _is_known(tokenizer: Tokenizer, word: str) -> bool:
    """Tell whether a word is an ordinary token already, alone or after a space."""
    encoded = tokenizer.encode_plain_batch([word, f" {word}"])
    known = any(len(ids) == 1 and ids[0] not in tokenizer.special_ids for ids in encoded)
    return known or tokenizer.backend.token_to_id(word) is not None


def _is_odd(character: str) -> bool:
    """Tell controls, line ends and unusual spaces from what words are made of.

    Joiners (U+200C, U+200D) are format characters, but stand inside words of some languages.
    """
    return unicodedata.category(character)[0] in "CZ" and character not in " \u200c\u200d"
