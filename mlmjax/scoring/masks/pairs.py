"""How two masks of a text depend on each other: conditionals of both, in both directions.

A masked language model has no joint distribution of two masks, only conditionals, which may
contradict each other (Young and You 2022, arXiv 2301.00068; Torroba Hennigen and Kim 2023, arXiv
2305.15501).
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.errors import InputError, suggest_keywords
from mlmjax.model.modernbert import ModernBertForMaskedLM
from mlmjax.scoring.engine import Advance, Engine
from mlmjax.scoring.fill_mask import ids_with_masks
from mlmjax.scoring.likelihood import encode_texts
from mlmjax.scoring.scorers import check_finite, check_masked_lm
from mlmjax.text.checks import check_list, check_text
from mlmjax.text.tokenizer import Tokenizer


class PairLogProbs(NamedTuple):
    """Log probabilities of `first` and `second` tokens at the two masks of a text.

    `first` `[a]` and `second` `[b]` are those with both masked. `first_given_second` `[a, b]` and
    `second_given_first` `[a, b]` are those with the other mask filled.
    """

    first: np.ndarray
    second: np.ndarray
    first_given_second: np.ndarray
    second_given_first: np.ndarray

    @property
    def log_odds(self) -> np.ndarray:
        """Return how the two orders of filling both masks differ, `[a, b]` in nats.

        It is log p(first) p(second | first) less log p(second) p(first | second), and 0 if the
        conditionals are those of one joint distribution.
        """
        forward = self.first[:, None] + self.second_given_first
        return forward - self.second[None] - self.first_given_second


@suggest_keywords
def pair_log_probs(
    model: ModernBertForMaskedLM,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    first: Sequence[str],
    second: Sequence[str],
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: Advance | None = None,
) -> list[PairLogProbs]:
    """Return the log probabilities of tokens at the two `[MASK]`s of each text, float32.

    `first` and `second` are the texts of single tokens, with their leading space if a word begins.
    Probabilities are over the whole vocabulary. A text takes one sequence, and one more for each
    token. `progress` is called with the number of texts done since its last call.

    Raises `InputError` that lists each row that is not text, has not two masks, or is too long, and
    for a text of `first` or `second` that is not one token.
    """
    check_masked_lm(model)
    tokens = [
        _tokens(tokenizer, names, what) for names, what in ((first, "first"), (second, "second"))
    ]
    options: Any = {"batch_size": batch_size, "max_length": max_length}
    engine = Engine(model, tokenizer, _at_both, **options)
    columns = max(map(len, tokens))
    asked = np.array([np.resize(own, columns) for own in tokens], np.int32)

    def ids_of(text: str) -> list[int]:
        ids = ids_with_masks(tokenizer, text)
        if (count := ids.count(tokenizer.mask_id)) != 2:
            raise InputError(f"has {count} masks; expected two")
        return ids

    results: list[PairLogProbs] = []
    for chunk in encode_texts(texts, ids_of, tokenizer, engine.buckets[-1]):
        for ids in chunk:
            slots = np.flatnonzero(ids == tokenizer.mask_id).astype(np.int32)
            sequences: list[Any] = [ids]
            for slot, own in zip(slots, tokens, strict=True):
                for token in own:
                    sequences.append(ids.copy())
                    sequences[-1][slot] = token
            repeat = [len(sequences)]
            found = engine.run(
                sequences, np.tile(slots, (*repeat, 1)), np.tile(asked, (*repeat, 1, 1))
            )
            check_finite(found)
            a, b = map(len, tokens)
            results.append(
                PairLogProbs(
                    found[0, 0, :a],
                    found[0, 1, :b],
                    found[1 + a :, 0, :a].T,
                    found[1 : 1 + a, 1, :b],
                )
            )
            if progress:
                progress(1)
    return results


def _tokens(tokenizer: Tokenizer, names: Sequence[str], what: str) -> list[int]:
    """Return the ids of texts that are one token each."""
    found = []
    for name in check_list(names, what, "tokens"):
        check_text(name, what)
        ids = tokenizer.encode_plain(name)
        if len(ids) != 1:
            raise InputError(f"{what}: {name!r:.60} is {len(ids)} tokens; expected one")
        found += ids
    if not found:
        raise InputError(f"{what}: the list is empty; give at least one token")
    return found


def _at_both(
    model: Any, ids: jax.Array, segment_ids: jax.Array, slots: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Return the log probabilities `[batch, 2, tokens]` at two slots of ids `[batch, seq]`."""
    hidden = model.encode(ids, segment_ids)
    at_slots = jnp.take_along_axis(hidden, slots[:, :, None], axis=1)
    log_probs = jax.nn.log_softmax(model.mlm_logits(at_slots).astype(jnp.float32))
    return jnp.take_along_axis(log_probs, tokens, axis=2)
