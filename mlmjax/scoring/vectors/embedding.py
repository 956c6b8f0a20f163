"""Embed texts: one vector per text, pooled from the encoder's vectors of its tokens."""

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.errors import InputError, suggest_keywords
from mlmjax.model.modernbert import Model, ModernBertModel, encoder_of
from mlmjax.scoring.engine import Advance, Engine, describe_limit
from mlmjax.scoring.scorers import check_finite
from mlmjax.scoring.vectors.embedding_files import (
    EmbeddingSettings,
    Pooling,
    read_settings,
    settings_files,
)
from mlmjax.text.checks import check_list, check_text, for_each_row, name_rows, split_by_size
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.weights import hub
from mlmjax.weights.pretrained import load_pretrained, save_pretrained

log = logging.getLogger(__name__)
CHUNK_CHARACTERS = 1 << 20
SMALLEST_NORM = 1e-12


@suggest_keywords
def embed(
    model: Model,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    pooling: Pooling = "mean",
    normalize: bool = False,
    truncate: bool = False,
    max_length: int | None = None,
    batch_size: int | None = None,
    progress: Advance | None = None,
) -> np.ndarray:
    """Return a float32 vector for each text, `[texts, hidden]`, as `Embedder` does.

    `progress` is called with the number of texts embedded since its last call.
    """
    settings: Any = {"pooling": pooling, "normalize": normalize, "max_length": max_length}
    embedder = Embedder(model, tokenizer, truncate=truncate, batch_size=batch_size, **settings)
    return embedder.embed(texts, progress=progress)


@suggest_keywords
class Embedder:
    """Embed texts with the encoder of a model; keep one for many calls, since it compiles once.

    `settings` are those of `EmbeddingSettings`: pooling, normalize, max_length and prompts.

    The vector of a text is pooled from the vectors of its tokens, those around it included: their
    mean, the first one ("cls"), or the largest value of each dimension ("max"). It does not depend
    on the texts beside it, except for rounding. An empty text has the vector of the tokens around
    it. Nothing in a text becomes a special token.

    A text of more than `max_length` tokens (default: the model's `max_position_embeddings`) is an
    error, or with `truncate` only its beginning counts; `truncated` is the number of such texts.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        truncate: bool = False,
        batch_size: int | None = None,
        **settings: Any,
    ):
        self.settings = EmbeddingSettings(**settings)
        self.model, self.tokenizer, self.truncate = encoder_of(model), tokenizer, truncate
        forward = _Pooled(self.settings.pooling, self.settings.normalize)
        options: Any = {"max_length": self.settings.max_length, "batch_size": batch_size}
        self.engine = Engine(self.model, tokenizer, forward, **options)
        self.truncated = 0
        self._room = self.engine.buckets[-1] - tokenizer.outer
        if self._room < 1:
            raise InputError(
                f"max_length is {self.engine.buckets[-1]}; expected more than {tokenizer.outer}, "
                "the tokens that the tokenizer puts around a text"
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        dtype: str = "float32",
        truncate: bool = False,
        batch_size: int | None = None,
        **settings: Any,
    ) -> "Embedder":
        """Load a model with the settings that sentence_transformers reads from its folder.

        `settings` replace some of them; a folder without any has the defaults. Raises `InputError`
        for a folder whose vectors take more than pooling and normalization.
        """
        where: Any = {"revision": revision, "local_files_only": local_files_only}
        model, tokenizer = load_pretrained(source, dtype=dtype, **where)
        folder = hub.fetch(source, **where)
        found = read_settings(folder, tokenizer, model.config.max_position_embeddings)
        settings = {**vars(found), **settings}
        return cls(model, tokenizer, truncate=truncate, batch_size=batch_size, **settings)

    def embed(
        self,
        texts: Iterable[str],
        *,
        prompt: str | None = None,
        progress: Advance | None = None,
    ) -> np.ndarray:
        """Return a float32 vector for each text, `[texts, hidden]`.

        `prompt` names one of `settings.prompts`, which is put before each text; None is the default
        one, if there is one. Raises `InputError` that lists each row that is not text or too long,
        and `RunError` for vectors that are not finite.
        """
        before = self.settings.prompt(prompt)
        parts = [np.empty((0, self.model.config.hidden_size), np.float32)]
        for chunk in self._encode(texts, before):
            parts.append(self.engine.run(chunk, progress=progress))
        vectors = np.concatenate(parts)
        check_finite(vectors)
        return vectors

    @property
    def limit(self) -> str:
        """Say the most tokens of a text with those around it, and what sets this number."""
        longest = self.model.config.max_position_embeddings
        return describe_limit(self.engine.buckets[-1], longest, "the embedder")

    def save_pretrained(self, path: str | os.PathLike[str], *, dtype: str = "float32") -> None:
        """Write the encoder as a folder that sentence_transformers and transformers load unchanged.

        Raises what `mlmjax.save_pretrained` raises.
        """
        config = self.model.config
        files = settings_files(self.settings, config.hidden_size, self.engine.buckets[-1])
        save_pretrained(self.model, self.tokenizer, path, dtype=dtype, more_files=files)

    def _encode(self, texts: Iterable[str], before: str) -> Iterator[list[list[int]]]:
        """Yield chunks of encoded texts, each with the tokens around it."""
        first = 0
        for chunk in split_by_size(check_list(texts, "texts"), _size, CHUNK_CHARACTERS):
            for_each_row(lambda text: check_text(text, "the text"), name_rows(chunk, first))
            encoded = self.tokenizer.encode_plain_batch([before + text for text in chunk])
            yield for_each_row(self._fitted, name_rows(encoded, first))
            first += len(chunk)

    def _fitted(self, ids: list[int]) -> list[int]:
        """Return the tokens of a text with those around it; raise `InputError` for too many."""
        if len(ids) > self._room:
            if not self.truncate:
                raise InputError(
                    f"has {len(ids) + self.tokenizer.outer} tokens with those around it, and at "
                    f"most {self.limit}, fit; cut it into parts, or give truncate=True (--truncate "
                    "of mlmjax embed) to embed the beginning"
                )
            self.truncated += 1
        wrapped = self.tokenizer.wrap(ids[: self._room])
        if not wrapped:
            raise InputError(
                "has no tokens, and this tokenizer puts none around a text; leave it out"
            )
        return wrapped


def _size(text: Any) -> int:
    return 1 + (len(text) if isinstance(text, str) else 0)


@dataclass(frozen=True)
class _Pooled:
    """Pool the encoder's vectors of each row."""

    pooling: Pooling
    normalize: bool

    def __call__(self, model: ModernBertModel, ids: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Return float32 vectors `[batch, hidden]` of ids `[batch, seq]`."""
        hidden = model.encode(ids, segment_ids).astype(jnp.float32)
        is_text = (segment_ids > 0)[..., None]
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "max":
            pooled = jnp.max(jnp.where(is_text, hidden, -jnp.inf), axis=1)
        else:
            total = jnp.sum(jnp.where(is_text, hidden, 0.0), axis=1)
            pooled = total / jnp.maximum(jnp.sum(is_text, axis=1), 1)
        if not self.normalize:
            return pooled
        norm = jnp.linalg.norm(pooled, axis=-1, keepdims=True)
        return pooled / jnp.maximum(norm, SMALLEST_NORM)
