"""Fill the masks of a text with the likeliest tokens."""

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.errors import InputError, suggest_keywords
from mlmjax.model.modernbert import ModernBertForMaskedLM
from mlmjax.scoring.engine import Advance, Engine
from mlmjax.scoring.likelihood import encode_texts
from mlmjax.scoring.scorers import check_finite, check_masked_lm
from mlmjax.text.prompts import MASK
from mlmjax.text.tokenizer import Tokenizer

MASKS_AT_ONCE = 8


class Filled(NamedTuple):
    """A token for a mask, with its probability among the whole vocabulary."""

    token: str
    id: int
    probability: float


@suggest_keywords
def fill_mask(
    model: ModernBertForMaskedLM,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    top_k: int = 5,
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: Advance | None = None,
) -> list[list[list[Filled]]]:
    """Return the likeliest tokens for each `[MASK]` of each text, as `MaskFiller` does.

    `progress` is called with the number of masks filled since its last call.
    """
    filler = MaskFiller(model, tokenizer, top_k=top_k, batch_size=batch_size, max_length=max_length)
    return filler.fill(texts, progress=progress)


class MaskFiller:
    """Predict the likeliest tokens for every `[MASK]` of a text.

    Here `[MASK]`, or the tokenizer's own name for it, in a text means the mask; names of
    other special tokens stay text. White space before a mask belongs to the answer if the tokenizer
    says so. The masks of a text are
    predicted in one pass, each without knowing the answers to the others.

    Special and `[unused*]` tokens are never answers. Probabilities are those of the softmax over
    the whole vocabulary, so they do not sum to 1 even for the largest `top_k`. `options` are
    `batch_size` and `max_length`.
    """

    def __init__(
        self,
        model: ModernBertForMaskedLM,
        tokenizer: Tokenizer,
        *,
        top_k: int = 5,
        **options: Any,
    ):
        answers = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.special_ids))
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= len(answers):
            raise InputError(
                f"top_k is {top_k!r}; expected 1 to {len(answers)}, the tokens that can answer"
            )
        check_masked_lm(model)
        self.tokenizer, self.top_k = tokenizer, top_k
        is_answer = np.isin(np.arange(model.config.vocab_size), answers)
        forward = partial(_likeliest, is_answer, top_k)
        self.engine = Engine(model, tokenizer, forward, **options)

    def fill(
        self, texts: Iterable[str], *, progress: Advance | None = None
    ) -> list[list[list[Filled]]]:
        """Fill the masks of texts, any iterable of them, read in chunks.

        Raises `InputError` that lists each row that is not text, has no mask, or is too long, and
        `RunError` for probabilities that are not finite.
        """
        results: list[list[list[Filled]]] = []
        for chunk in encode_texts(texts, self._ids, self.tokenizer, self.engine.buckets[-1]):
            slots = [np.flatnonzero(ids == self.tokenizer.mask_id) for ids in chunk]
            passes: list[tuple[Any, np.ndarray]] = [
                (ids, group)
                for ids, own in zip(chunk, slots, strict=True)
                for group in np.split(own, range(MASKS_AT_ONCE, len(own), MASKS_AT_ONCE))
            ]
            counts = np.array([len(group) for _, group in passes], np.int32)
            padded = [np.resize(group, MASKS_AT_ONCE) for _, group in passes]
            log_probs, tokens = self.engine.run(
                [ids for ids, _ in passes], np.array(padded, np.int32), counts
            )
            is_used = np.arange(MASKS_AT_ONCE) < counts[:, None]
            log_probs, tokens = log_probs[is_used], tokens[is_used]
            check_finite(log_probs)
            filled = zip(
                np.exp(log_probs.astype(np.float64)).tolist(), tokens.tolist(), strict=True
            )
            answers = map(self._filled, filled)
            results += [list(islice(answers, len(own))) for own in slots]
            if progress:
                progress(len(tokens))
        return results

    def _ids(self, text: str) -> list[int]:
        return ids_with_masks(self.tokenizer, text)

    def _filled(self, scored: tuple[list[float], list[int]]) -> list[Filled]:
        return [Filled(self.tokenizer.decode([i]), i, p) for p, i in zip(*scored, strict=True)]


def ids_with_masks(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text whose `[MASK]`s are masks, without the outer tokens.

    Raises `InputError` for a text without any.

    >>> ids_with_masks(Tokenizer.from_pretrained(), "a [MASK]")
    [66, 50284]
    """
    text = text.replace(tokenizer.names["mask"], MASK)
    if MASK not in text:
        raise InputError(f"has no {MASK}; write {MASK} where the model is to fill in")
    first, *rest = text.split(MASK)
    parts: list[str | int] = [first]
    for stretch in rest:
        parts += [tokenizer.mask_id, stretch]
    return tokenizer.encode_parts_batch([parts])[0]


def _likeliest(
    is_answer: np.ndarray,
    top_k: int,
    model: Any,
    ids: jax.Array,
    segment_ids: jax.Array,
    slots: jax.Array,
    counts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return log probabilities and tokens, `[batch, slots, top_k]`, of slots `[batch, slots]`."""
    hidden = model.encode(ids, segment_ids)
    at_slots = jnp.take_along_axis(hidden, slots[:, :, None], axis=1)
    shape = (slots.shape[1], slots.shape[0], top_k)

    def fill(at: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = model.mlm_logits(at_slots[:, at])
        log_probs = jnp.where(is_answer[None], jax.nn.log_softmax(logits), -jnp.inf)
        best, tokens = jax.lax.top_k(log_probs, top_k)
        return found[0].at[at].set(best), found[1].at[at].set(tokens)

    # One slot after the other: a row of logits is as wide as the vocabulary.
    empty = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
    log_probs, tokens = jax.lax.fori_loop(0, counts.max(), fill, empty)
    return log_probs.swapaxes(0, 1), tokens.swapaxes(0, 1)
