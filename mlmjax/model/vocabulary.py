"""Add words to a model: ids in the tokenizer and rows in the embedding."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.errors import InputError, suggest_keywords
from mlmjax.model.modernbert import (
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    abstract_model,
    parameters,
    with_parameters,
)
from mlmjax.text.checks import check_list, check_text
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.words import add_words

Model = TypeVar("Model", ModernBertForMaskedLM, ModernBertForSequenceClassification)

# Parameters with one entry per token; a tied decoder has no matrix.
_PER_TOKEN = {"model.embeddings.tok_embeddings.weight", "decoder.weight", "decoder.bias"}


@suggest_keywords
def resize_token_embeddings(
    model: Model,
    tokenizer: Tokenizer,
    new_tokens: Sequence[str] | Mapping[str, str] = (),
    *,
    size: int | None = None,
    multiple: int = 64,
    start: Literal["pieces", "mean"] = "pieces",
    whole_words: bool = True,
) -> tuple[Model, Tokenizer]:
    """Return a new model and a new tokenizer that know `new_tokens`.

    Each new word becomes one token, alone and after a space. `words.add_words` explains
    `whole_words` and which words it rejects. New ids follow the tokenizer's last id, so rows of the
    embedding without a token are used first (ModernBERT's own has none).

    The row of a new word (in the embedding and in the decoder) starts

    - with `"pieces"`, the default, at the mean over the old tokens of `" " + word`.
    - with a mapping `{word: text}`, at the mean over the tokens of that text, taken as written.
    - with `"mean"`, at the mean over all ordinary tokens (neither special nor [unused*]).

    The embedding `[vocab, hidden]` gets `size` rows, or as many as it needs, rounded up to a
    multiple of `multiple` so that meshes can shard it. It shrinks only for a `size`, and never
    below the ids of the tokenizer. Spare rows hold the mean over all ordinary tokens, which bounds
    their share of the probability (Hewitt, "Initializing New Word Embeddings for Pretrained
    Language Models", 2021). Old ids keep their rows bit for bit, so logits of old words stay.

    Raises `InputError` for words that cannot be tokens, for a `size` below the ids in use, and for
    a tokenizer of another model.
    """
    old_rows = model.config.vocab_size
    check_rows(tokenizer, old_rows)
    if not isinstance(new_tokens, Mapping):
        new_tokens = list(check_list(new_tokens, "new_tokens", "words"))
    larger = add_words(tokenizer, list(new_tokens), whole_words=whole_words)
    rows = _rows(old_rows, larger.vocab_size, size, multiple)
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    sources = _sources(tokenizer, new_tokens, start)

    def resize(table: np.ndarray) -> np.ndarray:
        """Cut or extend `[vocab, ...]` and fill in the rows of the new words."""
        mean: np.ndarray = _mean(table, ordinary)
        spare = np.broadcast_to(mean, (max(rows - old_rows, 0), *mean.shape))
        result = np.concatenate([table[:rows], spare])
        for token, source in enumerate(sources, tokenizer.vocab_size):
            result[token] = mean if source is None else _mean(table, source)
        return result

    values = parameters(model)
    for name in _PER_TOKEN & values.keys():
        # A copy, because an array that shares numpy's memory cannot be donated to a step.
        values[name] = jnp.copy(jax.device_put(resize(np.asarray(values[name]))))
    config = replace(model.config, vocab_size=rows)
    abstract = abstract_model(type(model).__name__, config, model.options)
    return with_parameters(abstract, values), larger


def check_rows(tokenizer: Tokenizer, rows: int) -> None:
    """Raise `InputError` for a tokenizer with more ids than the model's embedding has rows."""
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {rows} rows; "
            "give the tokenizer the model was trained with"
        )


def _rows(old_rows: int, used: int, size: int | None, multiple: int) -> int:
    for name, value in (("size", used if size is None else size), ("multiple", multiple)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name}: is {value!r}; expected a whole number above 0")
    if size is None:
        return old_rows if used <= old_rows else -(-used // multiple) * multiple
    if size < used:
        raise InputError(
            f"size: {size} rows are too few for {used} ids of the tokenizer, new words included; "
            f"give at least {used}"
        )
    return -(-size // multiple) * multiple


def _sources(
    tokenizer: Tokenizer, new_tokens: Sequence[str] | Mapping[str, str], start: str
) -> list[list[int] | None]:
    """Return the ids whose mean each new word starts at; None means all ordinary ids."""
    if start not in ("pieces", "mean"):
        raise InputError(f"start: is {start!r}; expected 'pieces' or 'mean'")
    if isinstance(new_tokens, Mapping):
        for word, text in new_tokens.items():
            check_text(text, f"new word {word!r:.80}: its text")
        texts = list(new_tokens.values())
    elif start == "mean":
        return [None] * len(new_tokens)
    else:
        texts = [f" {word}" for word in new_tokens]
    sources: list[list[int] | None] = []
    for word, ids in zip(new_tokens, tokenizer.encode_plain_batch(texts), strict=True):
        known = [i for i in ids if i not in tokenizer.special_ids]
        if not known:
            raise InputError(
                f"new word {word!r:.80}: the tokenizer knows no part of the text it should start "
                "from; give a text it knows, or start='mean'"
            )
        sources.append(known)
    return sources


def _mean(table: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Return the mean of some rows, summed in float64."""
    return table[np.array(ids)].mean(axis=0, dtype=np.float64).astype(table.dtype)
