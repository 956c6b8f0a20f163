"""What a masked language model says of plain text: how probable it is, and what a mask stands for.

Sources: Salazar et al. 2020, "Masked Language Model Scoring" (arXiv 1910.14659); Kauf and Ivanova
2023, "A Better Way to Do Masked Language Model Scoring" (arXiv 2305.10588).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.errors import InputError, RunError
from mlmjax.model.modernbert import ModernBertForMaskedLM
from mlmjax.scoring.engine import Engine, Forward, Progress
from mlmjax.scoring.scorers import make_engine
from mlmjax.text.checks import check_filled, check_list, for_each_row, name_rows
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.words import word_starts

Method = Literal["word_l2r", "original"]
CHUNK_CHARACTERS = 1 << 20
CHUNK_TOKENS = 1 << 22


class ScoredToken(NamedTuple):
    """One token of a text: how it reads, its id, its log probability, if it begins a word.

    Where a token is a part of a character, `text` is U+FFFD.
    """

    text: str
    id: int
    log_prob: float
    starts_word: bool


@dataclass(frozen=True)
class TextScore:
    """The pseudo-log-likelihood of a text in nats: of each token, and their sum."""

    tokens: tuple[ScoredToken, ...]

    @property
    def total(self) -> float:
        """The sum over the tokens."""
        return sum(token.log_prob for token in self.tokens)

    @property
    def per_token(self) -> float:
        """The mean over the tokens."""
        return self.total / len(self.tokens)

    @property
    def per_word(self) -> float:
        """The mean over the words, as `data.pieces.word_starts` counts them."""
        return self.total / sum(token.starts_word for token in self.tokens)


def pseudo_log_likelihood(
    model: ModernBertForMaskedLM,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    method: Method = "word_l2r",
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> list[TextScore]:
    """Return how probable each text is to the model, token by token; see `TextScorer`.

    `progress` is called with the number of tokens scored since its last call.
    """
    scorer = TextScorer(
        model, tokenizer, method=method, batch_size=batch_size, max_length=max_length
    )
    return scorer.score(texts, progress=progress)


class TextScorer:
    """Scores texts by pseudo-log-likelihood; kept, it compiles nothing twice.

    Every token is predicted from the rest of its text between [CLS] and [SEP], under the softmax
    over the whole vocabulary: one sequence through the model for each token. With
    `method="original"` (Salazar et al. 2020) the token alone is masked; with `"word_l2r"` (Kauf and
    Ivanova 2023) also the later tokens of its word, so that the end of a word does not give away
    its beginning. Nothing in a text becomes a special token.

    A text that does not fit `max_length` tokens with [CLS] and [SEP] (default: the model's
    `max_position_embeddings`) is refused, not cut.
    """

    def __init__(
        self,
        model: ModernBertForMaskedLM,
        tokenizer: Tokenizer,
        *,
        method: Method = "word_l2r",
        batch_size: int | None = None,
        max_length: int | None = None,
    ):
        if method not in get_args(Method):
            raise InputError(
                f"method is {method!r}; expected one of {', '.join(map(repr, get_args(Method)))}"
            )
        self.tokenizer, self.method = tokenizer, method
        self.engine = _engine(model, tokenizer, log_prob_of_target, batch_size, max_length)

    def score(self, texts: Iterable[str], *, progress: Progress | None = None) -> list[TextScore]:
        """Score texts, any iterable of them; it is read in chunks.

        Raises `InputError` naming each row that is blank, no text, or too long; `RunError` for
        scores that are not finite.
        """
        results = []
        for chunk in _encoded(texts, self._ids, self.tokenizer, self.engine.buckets[-1]):
            log_probs = np.concatenate(
                [
                    self.engine.run(
                        [s.ids for s in part],
                        np.array([s.slot for s in part], np.int32),
                        np.array([s.target for s in part], np.int32),
                        progress=progress,
                    )
                    for part in _chunks(
                        (s for ids in chunk for s in self._masked(ids)),
                        lambda s: len(s.ids),
                        CHUNK_TOKENS,
                    )
                ]
            )
            _check_finite(log_probs)
            values = iter(log_probs.tolist())
            results += [self._text_score(ids, islice(values, len(ids) - 2)) for ids in chunk]
        return results

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer.encode_plain(text)
        if not ids:
            raise InputError("has no tokens in this tokenizer; leave it out")
        return ids

    def _masked(self, ids: np.ndarray) -> Iterator["_Masked"]:
        """Yield the sequence that predicts each token, one after the other."""
        ends = word_ends(word_starts(self.tokenizer)(ids[1:-1])) + 1
        for slot in range(1, len(ids) - 1):
            masked = ids.copy()
            stop = ends[slot - 1] if self.method == "word_l2r" else slot + 1
            masked[slot:stop] = self.tokenizer.mask_id
            yield _Masked(masked, slot, int(ids[slot]))

    def _text_score(self, ids: np.ndarray, log_probs: Iterable[float]) -> TextScore:
        own = ids[1:-1]
        texts = {i: self.tokenizer.decode([i]) for i in set(own.tolist())}
        starts = word_starts(self.tokenizer)(own).tolist()
        return TextScore(
            tuple(
                ScoredToken(texts[i], i, value, begins)
                for i, value, begins in zip(own.tolist(), log_probs, starts, strict=True)
            )
        )


def word_ends(starts: np.ndarray) -> np.ndarray:
    """Return, from bool `[tokens]`, where the word that each token belongs to ends.

    >>> word_ends(np.array([True, False, True])).tolist()
    [2, 2, 3]
    """
    return np.append(np.flatnonzero(starts)[1:], len(starts))[np.cumsum(starts) - 1]


class _Masked(NamedTuple):
    """A sequence with masks, the slot that is read, and the token that stood there."""

    ids: np.ndarray
    slot: int
    target: int


def log_prob_of_target(
    model: Any, ids: jax.Array, segment_ids: jax.Array, slots: jax.Array, targets: jax.Array
) -> jax.Array:
    """[batch, seq] ids -> [batch] log probabilities of the targets at the slots."""
    hidden = model.encode(ids, segment_ids)
    at_slot = jnp.take_along_axis(hidden, slots[:, None, None], axis=1)[:, 0]
    log_probs = jax.nn.log_softmax(model.mlm_logits(at_slot).astype(jnp.float32))
    return jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]


def _engine(
    model: ModernBertForMaskedLM,
    tokenizer: Tokenizer,
    forward: Forward,
    batch_size: int | None,
    max_length: int | None,
) -> Engine:
    if not isinstance(model, ModernBertForMaskedLM):
        raise InputError(
            f"a {type(model).__name__} has no masked-language-model head to read; "
            "expected a ModernBertForMaskedLM"
        )
    return make_engine(model, tokenizer, forward, batch_size, max_length)


def _encoded(
    texts: Iterable[str], ids_of: Callable[[str], list[int]], tokenizer: Tokenizer, longest: int
) -> Iterator[list[np.ndarray]]:
    """Yield texts chunk by chunk as ids between [CLS] and [SEP]; an error names every bad row."""

    def encode(text: str) -> np.ndarray:
        check_filled(text, "the text")
        ids = ids_of(text)
        if len(ids) + 2 > longest:
            raise InputError(
                f"has {len(ids)} tokens and at most {longest - 2} fit; cut it into parts"
            )
        return np.array([tokenizer.cls_id, *ids, tokenizer.sep_id], np.int32)

    first = 0
    for chunk in _chunks(check_list(texts, "texts"), _characters, CHUNK_CHARACTERS):
        yield for_each_row(encode, name_rows(chunk, first))
        first += len(chunk)


def _characters(text: Any) -> int:
    return 1 + (len(text) if isinstance(text, str) else 0)


def _chunks(items: Iterable[Any], size: Callable[[Any], int], limit: int) -> Iterator[list[Any]]:
    """Yield runs of items, each closed by the item with which its size reaches the limit.

    >>> list(_chunks(["ab", "c", "defg", "h"], len, 3))
    [['ab', 'c'], ['defg'], ['h']]
    """
    chunk: list[Any] = []
    total = 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if total >= limit:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def _check_finite(log_probs: np.ndarray) -> None:
    if not np.isfinite(log_probs).all():
        raise RunError("the model's scores are not finite; its weights are broken")
