"""Which tokens begin a word, from the text of a vocabulary's pieces."""

import unicodedata
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from mlmjax.text.tokenizer import Tokenizer

_SPACE, _LETTER, _DIGIT, _OTHER = range(4)


@lru_cache(maxsize=1)
def word_starts(tokenizer: Tokenizer) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from ids `[tokens]` to bool `[tokens]`: which of them begin a word.

    A piece begins a word if white space opens it, or if its first character is of another kind
    (letter, digit, anything else) than the last one before it. Special tokens and runs of white
    space are words of their own. In scripts written without spaces a run of letters is one word.
    The kinds are found once for a vocabulary.

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


def _texts(tokenizer: Tokenizer) -> list[str]:
    """Return the text of every token as it stands after a letter, whatever marks a word."""
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
    """Tell the kind of a character; a part of one (U+FFFD) and a combining mark are letters."""
    if character.isspace():
        return _SPACE
    if character.isnumeric():
        return _DIGIT
    is_mark = character and unicodedata.category(character).startswith("M")
    return _LETTER if is_mark or character.isalpha() or character in "\ufffd" else _OTHER
