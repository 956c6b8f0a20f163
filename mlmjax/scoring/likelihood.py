"""Score texts by pseudo-log-likelihood: how probable a model finds each token.

Sources: Salazar et al. 2020, "Masked Language Model Scoring" (arXiv 1910.14659); Kauf and Ivanova
2023, "A Better Way to Do Masked Language Model Scoring" (arXiv 2305.10588); Kaneko and Bollegala
2022, "Unmasking the Mask" (arXiv 2104.07496).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.errors import InputError, suggest_keywords
from mlmjax.model.modernbert import ModernBertForMaskedLM
from mlmjax.scoring.engine import Advance, Engine
from mlmjax.scoring.scorers import check_finite, check_masked_lm
from mlmjax.text.checks import check_filled, check_list, for_each_row, name_rows, split_by_size
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.words import word_starts

Method = Literal["word_l2r", "original", "unmasked"]
CHUNK_CHARACTERS = 1 << 20
CHUNK_TOKENS = 1 << 22


class ScoredToken(NamedTuple):
    """A token and its log probability; `text` is U+FFFD for part of a character."""

    text: str
    id: int
    log_prob: float
    starts_word: bool


@dataclass(frozen=True)
class TextScore:
    """The pseudo-log-likelihood of a text in nats, token by token."""

    tokens: tuple[ScoredToken, ...]

    @property
    def total(self) -> float:
        """Return the sum over the tokens."""
        return sum(token.log_prob for token in self.tokens)

    @property
    def per_token(self) -> float:
        """Return the mean over the tokens."""
        return self.total / len(self.tokens)

    @property
    def per_word(self) -> float:
        """Return the mean over the words that `text.words.word_starts` finds."""
        return self.total / sum(token.starts_word for token in self.tokens)


@suggest_keywords
def perplexity(scores: Iterable[TextScore], *, per: Literal["token", "word"] = "token") -> float:
    """Return the pseudo-perplexity of texts: exp of the mean loss over all tokens or words.

    Raises `InputError` if there are no scores.

    >>> token = ScoredToken("a", 66, float(np.log(0.25)), True)
    >>> perplexity([TextScore((token, token)), TextScore((token,))])
    4.0
    """
    if per not in ("token", "word"):
        raise InputError(f"per is {per!r:.60}; expected 'token' or 'word'")
    tokens = [token for score in scores for token in score.tokens]
    count = sum(token.starts_word for token in tokens) if per == "word" else len(tokens)
    if not count:
        raise InputError("scores: the list is empty; give those of pseudo_log_likelihood")
    return float(np.exp(-sum(token.log_prob for token in tokens) / count))


@suggest_keywords
def pseudo_log_likelihood(
    model: ModernBertForMaskedLM,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    method: Method = "word_l2r",
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: Advance | None = None,
) -> list[TextScore]:
    """Return the pseudo-log-likelihood of each text, token by token, as `TextScorer` does.

    `progress` is called with the number of tokens scored since its last call.
    """
    scorer = TextScorer(
        model, tokenizer, method=method, batch_size=batch_size, max_length=max_length
    )
    return scorer.score(texts, progress=progress)


class TextScorer:
    """Score texts by pseudo-log-likelihood; keep one for many calls, since it compiles once.

    Every token is predicted from the rest of its text between the tokenizer's outer tokens ([CLS]
    and [SEP] in ModernBERT), under the softmax
    over the whole vocabulary, so a text takes one sequence through the model for each token. With
    `method="original"` (Salazar et al. 2020) only the token is masked. With `"word_l2r"` (Kauf and
    Ivanova 2023) the later tokens of its word are masked too, so that the end of a word does not
    give away its beginning. With `"unmasked"` (Kaneko and Bollegala 2022) nothing is masked: a text
    takes one sequence, but the model sees each token that it scores. Nothing in a text becomes a
    special token.

    A text of more than `max_length` tokens with the outer ones (default: the model's
    `max_position_embeddings`) is an error; it is never truncated. `options` are `batch_size` and
    `max_length`.
    """

    def __init__(
        self,
        model: ModernBertForMaskedLM,
        tokenizer: Tokenizer,
        *,
        method: Method = "word_l2r",
        **options: Any,
    ):
        if method not in get_args(Method):
            raise InputError(
                f"method is {method!r}; expected one of {', '.join(map(repr, get_args(Method)))}"
            )
        check_masked_lm(model)
        self.tokenizer, self.method = tokenizer, method
        forward = log_probs_of_tokens if method == "unmasked" else log_prob_of_target
        self.engine = Engine(model, tokenizer, forward, **options)

    def score(self, texts: Iterable[str], *, progress: Advance | None = None) -> list[TextScore]:
        """Score texts, any iterable of them, read in chunks.

        Raises `InputError` that lists each row that is blank, not text, or too long, and `RunError`
        for scores that are not finite.
        """
        results: list[TextScore] = []
        for chunk in encode_texts(texts, self._ids, self.tokenizer, self.engine.buckets[-1]):
            score = self._unmasked if self.method == "unmasked" else self._one_by_one
            log_probs = score(chunk, progress)
            check_finite(log_probs)
            values = iter(log_probs.tolist())
            results += [
                self._text_score(own, islice(values, len(own))) for own in map(self._own, chunk)
            ]
        return results

    def _one_by_one(self, chunk: Sequence[np.ndarray], progress: Advance | None) -> np.ndarray:
        """Return the log probability of each token of texts, masked in turn, `[tokens]`."""
        sequences = chain.from_iterable(map(self._masked, chunk))
        parts = []
        for part in split_by_size(sequences, lambda one: len(one[0]), CHUNK_TOKENS):
            slots, targets = np.array([one[1:] for one in part], np.int32).T
            ids = [one[0] for one in part]
            parts.append(self.engine.run(ids, slots, targets, progress=progress))
        return np.concatenate(parts)

    def _unmasked(self, chunk: Sequence[np.ndarray], progress: Advance | None) -> np.ndarray:
        """Return the log probability of each token of texts, none masked, `[tokens]`."""
        sequences: Any = chunk
        parts = list(map(self._own, self.engine.run_tokens(sequences)))
        if progress:
            progress(sum(map(len, parts)))
        return np.concatenate(parts)

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer.encode_plain(text)
        if not ids:
            raise InputError("has no tokens in this tokenizer; leave it out")
        return ids

    def _masked(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
        """Yield for each token the masked sequence, the slot to read and the token there."""
        first, own = len(self.tokenizer.prefix_ids), self._own(ids)
        ends = first + word_ends(word_starts(self.tokenizer)(own))
        for slot, end in enumerate(ends, first):
            masked = ids.copy()
            stop = end if self.method == "word_l2r" else slot + 1
            masked[slot:stop] = self.tokenizer.mask_id
            yield masked, slot, int(ids[slot])

    def _own(self, ids: np.ndarray) -> np.ndarray:
        """Return the tokens of a text, or values of them, without the outer ones."""
        first = len(self.tokenizer.prefix_ids)
        return ids[first : len(ids) - len(self.tokenizer.suffix_ids)]

    def _text_score(self, own: np.ndarray, log_probs: Iterable[float]) -> TextScore:
        texts = {i: self.tokenizer.decode([i]) for i in set(own.tolist())}
        starts = word_starts(self.tokenizer)(own).tolist()
        return TextScore(
            tuple(
                ScoredToken(texts[i], i, value, begins)
                for i, value, begins in zip(own.tolist(), log_probs, starts, strict=True)
            )
        )


def word_ends(starts: np.ndarray) -> np.ndarray:
    """Return the end of each token's word, from the tokens that start words, bool `[tokens]`.

    >>> word_ends(np.array([True, False, True])).tolist()
    [2, 2, 3]
    """
    return np.append(np.flatnonzero(starts)[1:], len(starts))[np.cumsum(starts) - 1]


def log_prob_of_target(
    model: Any, ids: jax.Array, segment_ids: jax.Array, slots: jax.Array, targets: jax.Array
) -> jax.Array:
    """Return the log probabilities `[batch]` of the targets at the slots of ids `[batch, seq]`."""
    hidden = model.encode(ids, segment_ids)
    at_slot = jnp.take_along_axis(hidden, slots[:, None, None], axis=1)[:, 0]
    log_probs = jax.nn.log_softmax(model.mlm_logits(at_slot))
    return jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]


def log_probs_of_tokens(model: Any, ids: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Return the log probability of each token at its own place, of ids `[batch, seq]`."""
    hidden = model.encode(ids, segment_ids)

    def at(place: tuple[jax.Array, jax.Array]) -> jax.Array:
        log_probs = jax.nn.log_softmax(model.mlm_logits(place[0]))
        return jnp.take_along_axis(log_probs, place[1][:, None], axis=1)[:, 0]

    # One place after the other: a row of logits is as wide as the vocabulary.
    return jax.lax.map(at, (hidden.swapaxes(0, 1), ids.T)).T


def encode_texts(
    texts: Iterable[str], ids_of: Callable[[str], list[int]], tokenizer: Tokenizer, longest: int
) -> Iterator[list[np.ndarray]]:
    """Yield chunks of encoded texts; an error lists every bad row."""

    def encode(text: str) -> np.ndarray:
        check_filled(text, "the text")
        ids = ids_of(text)
        if len(ids) + tokenizer.outer > longest:
            raise InputError(
                f"has {len(ids)} tokens and at most {longest - tokenizer.outer} fit; cut it into "
                "parts"
            )
        return np.array(tokenizer.wrap(ids), np.int32)

    def size(text: Any) -> int:
        return 1 + (len(text) if isinstance(text, str) else 0)

    first = 0
    for chunk in split_by_size(check_list(texts, "texts"), size, CHUNK_CHARACTERS):
        yield for_each_row(encode, name_rows(chunk, first))
        first += len(chunk)
