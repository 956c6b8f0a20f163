"""Hidden states of the layers of a model, in memory or streamed to a file."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.errors import InputError, suggest_keywords
from mlmjax.model.modernbert import Model, ModernBertModel, encoder_of
from mlmjax.scoring.engine import Advance, Engine
from mlmjax.scoring.fill_mask import ids_with_masks
from mlmjax.scoring.likelihood import encode_texts
from mlmjax.scoring.scorers import check_finite
from mlmjax.storage import write_to
from mlmjax.text.checks import split_by_size
from mlmjax.text.prompts import MASK
from mlmjax.text.tokenizer import Tokenizer

At = Literal["slot", "mean", "tokens"]
CHUNK_NUMBERS = 1 << 26
"""Numbers of hidden states that are in memory together, about: a quarter of a GiB."""


class HiddenStates(NamedTuple):
    """Hidden states, one row for each text or token.

    `texts` `[rows]` are the numbers of the texts, `tokens` `[rows]` the ids of the tokens (-1 for
    a mean), `vectors` float32 `[rows, layers, hidden]`.
    """

    texts: np.ndarray
    tokens: np.ndarray
    vectors: np.ndarray


@suggest_keywords
def hidden_states(
    model: Model, tokenizer: Tokenizer, texts: Iterable[str], **options: Any
) -> HiddenStates:
    """Return hidden states of texts, all in memory; `options` are those of `stream_hidden_states`.

    `save_hidden_states` needs memory for a part of them only.
    """
    parts = list(stream_hidden_states(model, tokenizer, texts, **options))
    if not parts:
        raise InputError("texts: the list is empty; give at least one text")
    return HiddenStates(*map(np.concatenate, zip(*parts, strict=True)))


@suggest_keywords
def save_hidden_states(
    path: str | Path, model: Model, tokenizer: Tokenizer, texts: Iterable[str], **options: Any
) -> int:
    """Write hidden states of texts to a parquet file, part by part; return the number of rows.

    It has the columns `text`, `token` and one for each layer, such as `layer_12`, with lists of
    float32. The file is there only when it is complete. `options` are those of
    `stream_hidden_states`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if path.suffix != ".parquet":
        raise InputError(f"{path}: hidden states are written as .parquet; give such a name")
    layers = check_layers(options.get("layers"), model.config.num_hidden_layers)
    size, rows = model.config.hidden_size, 0
    vector = pa.list_(pa.float32(), size)
    fields = [("text", pa.int64()), ("token", pa.int32())]
    schema = pa.schema([*fields, *((f"layer_{layer}", vector) for layer in layers)])
    with write_to(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for part in stream_hidden_states(model, tokenizer, texts, **options):
            columns = [
                pa.FixedSizeListArray.from_arrays(part.vectors[:, at].ravel(), size)
                for at in range(len(layers))
            ]
            writer.write_table(pa.table([part.texts, part.tokens, *columns], schema=schema))
            rows += len(part.texts)
    return rows


@suggest_keywords
def stream_hidden_states(
    model: Model,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    layers: Sequence[int] | None = None,
    at: At = "mean",
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: Advance | None = None,
) -> Iterator[HiddenStates]:
    """Yield hidden states of texts, any iterable of them, part by part.

    Layer 0 are the embeddings, layer i the output of the i-th layer, the last one after the final
    norm; -1 is the last layer (None: only that one). `at` says what a row is: the `[MASK]` of a
    text, which must have one ("slot"), the mean over its tokens with those around it ("mean"), or
    each token with those around the text ("tokens"). `progress` is called with the number of texts
    done since its last call.

    Raises `InputError` for unknown layers, and one that lists each row that is not text, has not
    one mask, or is too long; `RunError` for hidden states that are not finite.
    """
    if at not in get_args(At):
        raise InputError(f"at is {at!r:.60}; expected one of {', '.join(map(repr, get_args(At)))}")
    encoder = encoder_of(model)
    chosen = check_layers(layers, model.config.num_hidden_layers)
    options: Any = {"batch_size": batch_size, "max_length": max_length}
    engine = Engine(encoder, tokenizer, _States(tuple(chosen), at), **options)

    def ids_of(text: str) -> list[int]:
        if at != "slot":
            return tokenizer.encode_plain(text)
        ids = ids_with_masks(tokenizer, text)
        if (count := ids.count(tokenizer.mask_id)) != 1:
            raise InputError(f"has {count} masks; expected one {MASK}, whose states are wanted")
        return ids

    first, width = 0, len(chosen) * model.config.hidden_size
    for chunk in encode_texts(texts, ids_of, tokenizer, engine.buckets[-1]):
        for part in split_by_size(
            chunk, lambda ids: width * (len(ids) if at == "tokens" else 1), CHUNK_NUMBERS
        ):
            yield _states_of(engine, part, at, first, tokenizer.mask_id)
            first += len(part)
            if progress:
                progress(len(part))


def check_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    """Return the numbers of layers, from 0 up; raise `InputError` for a layer that is not there.

    >>> check_layers([0, -1], 22)
    [0, 22]
    """
    found = []
    for layer in [-1] if layers is None else layers:
        is_number = isinstance(layer, int | np.integer) and not isinstance(layer, bool)
        if not is_number or not -count - 1 <= layer <= count:
            raise InputError(f"layers has {layer!r:.60}; expected 0 to {count}, or -1 for the last")
        found.append(int(layer) % (count + 1))
    if not found or len(set(found)) < len(found):
        raise InputError(f"layers is {layers!r:.60}; expected at least one, each once")
    return found


def _states_of(
    engine: Engine, chunk: Sequence[np.ndarray], at: At, first: int, mask_id: int
) -> HiddenStates:
    """Return the hidden states of encoded texts, the first of which is number `first`."""
    sequences: Any = chunk
    counts = [len(ids) if at == "tokens" else 1 for ids in chunk]
    if at == "tokens":
        vectors = np.concatenate(engine.run_tokens(sequences))
        tokens = np.concatenate(chunk)
    else:
        slots = [int((ids == mask_id).argmax()) for ids in chunk]
        vectors = engine.run(sequences, np.array(slots, np.int32))
        tokens = np.full(len(chunk), mask_id if at == "slot" else -1)
    check_finite(vectors)
    texts = np.repeat(np.arange(first, first + len(chunk)), counts)
    return HiddenStates(texts, tokens.astype(np.int32), vectors)


@dataclass(frozen=True)
class _States:
    """Read the hidden states of some layers."""

    layers: tuple[int, ...]
    at: At

    def __call__(
        self, model: ModernBertModel, ids: jax.Array, segment_ids: jax.Array, *slots: jax.Array
    ) -> jax.Array:
        """Return float32 `[batch, layers, hidden]`, or `[batch, seq, layers, hidden]` of tokens."""
        _, states = model.encode(ids, segment_ids, output_hidden_states=True)
        chosen = jnp.stack([states[layer] for layer in self.layers], axis=2).astype(jnp.float32)
        if self.at == "tokens":
            return chosen
        if self.at == "slot":
            return jnp.take_along_axis(chosen, slots[0][:, None, None, None], axis=1)[:, 0]
        is_text = (segment_ids > 0)[:, :, None, None]
        return jnp.where(is_text, chosen, 0.0).sum(axis=1) / is_text.sum(axis=1)
