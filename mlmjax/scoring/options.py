"""Score options by tokens that each row names for itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.scoring.engine import Advance
from mlmjax.scoring.scorers import RowScorer, check_finite, check_masked_lm
from mlmjax.text.prompts import Prompt, Template
from mlmjax.text.tokenizer import Tokenizer

TOKENS = "tokens"
"""The key of a row's token ids, one for each of its options."""


class OptionScorer(RowScorer):
    """Score rows that name their own tokens, at most `most` each, in one forward pass per row.

    A row holds the template's fields and `"tokens"`, a token id for each option. Its probabilities
    are the softmax over these tokens at the slot, and are the same to the last bit whatever other
    rows are scored. All rows share one program for each bucket.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        template: Template,
        most: int,
        **options: Any,
    ):
        check_masked_lm(model)
        labels = [str(number) for number in range(most)]
        super().__init__(model, tokenizer, template, labels, _AtTokens(), exact=True, **options)

    def score(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompts: Sequence[Prompt],
        progress: Advance | None = None,
    ) -> list[np.ndarray]:
        """Return the log probabilities of each row's options, given the prompts of the rows."""
        scores = self._score(rows, prompts, progress)
        self.scored += len(rows)
        found = [own[: len(row[TOKENS])] for own, row in zip(scores, rows, strict=True)]
        check_finite(np.concatenate(found))
        return found

    def _columns(
        self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]
    ) -> tuple[np.ndarray, ...]:
        tokens = np.zeros((len(rows), len(self.labels)), np.int32)
        for row, own in zip(rows, tokens, strict=True):
            own[: len(row[TOKENS])] = row[TOKENS]
        counts = [len(row[TOKENS]) for row in rows]
        slots = [prompt.slot for prompt in prompts]
        return np.array(slots, np.int32), tokens, np.array(counts, np.int32)


@dataclass(frozen=True)
class _AtTokens:
    """Read the log probabilities of each row's tokens at its slot."""

    def __call__(
        self,
        model: Any,
        ids: jax.Array,
        segment_ids: jax.Array,
        slots: jax.Array,
        tokens: jax.Array,
        counts: jax.Array,
    ) -> jax.Array:
        """Return log probabilities `[batch, options]` of ids `[batch, seq]`."""
        hidden = model.encode(ids, segment_ids)
        at_slot = jnp.take_along_axis(hidden, slots[:, None, None], axis=1)[:, 0]
        logits = model.mlm_logits(at_slot, tokens)
        is_own = jnp.arange(tokens.shape[1])[None, :] < counts[:, None]
        return jax.nn.log_softmax(jnp.where(is_own, logits, -jnp.inf))
