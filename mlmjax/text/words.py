"""Add words to a tokenizer, and find where words begin."""

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from mlmjax.errors import InputError
from mlmjax.text.checks import check_text
from mlmjax.text.tokenizer import UNUSED, Tokenizer


def add_words(tokenizer: Tokenizer, words: Sequence[str], *, whole_words: bool = True) -> Tokenizer:
    """Return a tokenizer with each new word as one token, with the next free ids.

    A word may contain spaces and hyphens. Its token includes the white space before it (line ends
    too), so "word" and " word" have the same id. It is found only between word boundaries, or
    anywhere with `whole_words=False` (for scripts without spaces). Text without new words keeps
    its ids.

    Raises `InputError` that lists every word that is blank, has outer white space, control
    characters or the text of a special token, is repeated, or is one token already.

    >>> larger = add_words(Tokenizer.from_pretrained(), ["angioplasty"])
    >>> larger.encode_plain("an angioplasty"), larger.encode_plain("angioplasty")
    ([266, 50368], [50368])
    """
    if not words:
        return tokenizer
    problems = list(_problems(tokenizer, words))
    if problems:
        raise InputError(problems[0], problems[1:])
    # An added token of the library: the tokenizer processes the text around it.
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
    for table in tables.values():  # transformers keeps a second copy of the list.
        if isinstance(table.get("added_tokens_decoder"), dict):
            for number, word in numbered.items():
                table["added_tokens_decoder"][str(number)] = {"content": word, **flags}
    files = {name: json.dumps(t, indent=2, ensure_ascii=False) for name, t in tables.items()}
    larger = Tokenizer({name: text.encode() for name, text in files.items()}, tokenizer.where)
    for number, word in numbered.items():
        if larger.encode_plain_batch([word, f" {word}"]) != [[number]] * 2:
            raise InputError(
                f"new word {word!r:.80}: another added token or the normalizer of this tokenizer "
                "splits it; leave it out"
            )
    return larger


def _problems(tokenizer: Tokenizer, words: Sequence[str]) -> Iterator[str]:
    """Yield why a word cannot be a new token, for each such word."""
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
            problem = f"has outer white space; write {word.strip()!r}, which includes it"
        elif any(map(_is_odd, word)) or "  " in word:
            problem = "has control characters, or white space other than single spaces; expected "
            problem += "ordinary text"
        elif inside:
            problem = f"holds the text of the special token {inside[0]}; choose another word"
        elif plain in seen:
            problem = "is repeated; list every word once"
        elif _is_known(tokenizer, word):
            problem = "is one token already; leave it out"
        else:
            seen.add(plain)
            continue
        yield f"new word {word!r:.80}: {problem}"


def _is_known(tokenizer: Tokenizer, word: str) -> bool:
    """Tell whether a word is an ordinary token already, bare or after a space."""
    encoded = tokenizer.encode_plain_batch([word, f" {word}"])
    known = any(len(ids) == 1 and ids[0] not in tokenizer.special_ids for ids in encoded)
    return known or tokenizer.backend.token_to_id(word) is not None


def _is_odd(character: str) -> bool:
    """Tell whether a character is a control, a line end or an unusual space.

    Joiners (U+200C, U+200D) are format characters, but occur inside words of some languages.
    """
    return unicodedata.category(character)[0] in "CZ" and character not in " \u200c\u200d"


_SPACE, _LETTER, _DIGIT, _OTHER = range(4)


@lru_cache(maxsize=1)
def word_starts(tokenizer: Tokenizer) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from ids `[tokens]` to bool `[tokens]`: True where a word begins.

    A piece begins a word if it starts with white space, or if its first character is of another
    kind (letter, digit, other) than the last one before it. Each special token and each run of
    white space is a word. In scripts without spaces a run of letters is one word. The kinds are
    computed once for a vocabulary.

    >>> tokenizer = Tokenizer.from_pretrained()
    >>> ids = tokenizer.encode_plain("An untokenizable (sub)word, 3.14")
    >>> [tokenizer.decode([i]) for i in ids]
    ['An', ' un', 'token', 'izable', ' (', 'sub', ')', 'word', ',', ' 3', '.', '14']
    >>> word_starts(tokenizer)(np.array(ids)).astype(int).tolist()
    [1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    texts = _texts(tokenizer)
    first = np.array([_kind(text[:1]) for text in texts], np.int8)
    last = np.array([_kind(text[-1:]) for text in texts], np.int8)
    first[list(tokenizer.lstrip_ids | tokenizer.special_ids)] = _SPACE
    last[list(tokenizer.special_ids)] = _SPACE

    def starts(ids: np.ndarray) -> np.ndarray:
        kinds = first[ids]
        begins = kinds == _SPACE
        begins[:1] = True
        begins[1:] |= kinds[1:] != last[ids[:-1]]
        return begins

    return starts


def word_spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """Return the span `[start, end)` of each word of a text; together they are the whole text.

    Words are those of `word_starts`, in the tokens of the text by itself. The white space between
    two words belongs to one of them.

    >>> text = "An untokenizable (sub)word"
    >>> [text[start:end] for start, end in word_spans(Tokenizer.from_pretrained(), text)]
    ['An', ' untokenizable', ' (', 'sub', ')', 'word']
    """
    offsets, ids = tokenizer.plain_offsets(text), tokenizer.encode_plain(text)
    begins = word_starts(tokenizer)(np.array(ids, np.int64))
    # Tokens that share a character cannot be in two words.
    starts = [start for (start, _), begin in zip(offsets, begins, strict=True) if begin and start]
    edges = [0, *sorted(set(starts)), len(text)]
    return [(start, end) for start, end in pairwise(edges) if start < end]


def _texts(tokenizer: Tokenizer) -> list[str]:
    """Return the text of every token after a letter, whatever marks a word."""
    backend = tokenizer.backend
    stem = tokenizer.encode_plain("a")[-1:]
    before = backend.decode(stem, skip_special_tokens=False)
    pairs = [[*stem, token] for token in range(tokenizer.vocab_size)]
    texts = backend.decode_batch(pairs, skip_special_tokens=False)
    texts = [text.removeprefix(before) for text in texts]
    for token, added in backend.get_added_tokens_decoder().items():
        texts[token] = added.content
    return texts


def _kind(character: str) -> int:
    """Return the kind of a character; U+FFFD and combining marks are letters."""
    if character.isspace():
        return _SPACE
    if character.isnumeric():
        return _DIGIT
    is_mark = character and unicodedata.category(character).startswith("M")
    return _LETTER if is_mark or character.isalpha() or character in "\ufffd" else _OTHER
