"""Generate text: fill any number of masks step by step.

Sources: Ghazvininejad et al. 2019, "Mask-Predict" (arXiv 1904.09324); Chang et al. 2022, "MaskGIT"
(arXiv 2202.04200), whose order of filling by confidence masked diffusion models use, too.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.errors import InputError, suggest_keywords
from mlmjax.model.modernbert import ModernBertForMaskedLM
from mlmjax.scoring.engine import Advance, Engine
from mlmjax.scoring.fill_mask import ids_with_masks
from mlmjax.scoring.likelihood import encode_texts
from mlmjax.scoring.scorers import check_finite, check_masked_lm
from mlmjax.text.checks import check_list, check_text, for_each_row, name_rows
from mlmjax.text.tokenizer import Tokenizer

Order = Literal["confidence", "left", "random"]
Allowed = Sequence[Sequence[Sequence[str] | None] | None]
"""For each text and each of its masks the texts of the tokens that may fill it; None for any."""

FEWEST_SLOTS = 8
"""A pass has room for this many masks of a text, or four times as many, and so on."""


class GeneratedToken(NamedTuple):
    """A token that filled a mask: its log probability when it was chosen, and in which step."""

    text: str
    id: int
    log_prob: float
    step: int


class GeneratedText(NamedTuple):
    """A text whose masks are filled, and the tokens that filled them, from left to right."""

    text: str
    tokens: tuple[GeneratedToken, ...]


@suggest_keywords
def generate(
    model: ModernBertForMaskedLM,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    steps: int | None = None,
    temperature: float = 0.0,
    order: Order = "confidence",
    allowed: Allowed | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: Advance | None = None,
) -> list[GeneratedText]:
    """Return each text with its `[MASK]`s filled step by step, as `Generator` does.

    `allowed` has an entry for each text, with one entry for each of its masks: the texts of the
    tokens that may fill it, such as `[" cat", " dog"]`, or None. `progress` is called with the
    number of masks filled since its last call.
    """
    options: Any = {"batch_size": batch_size, "max_length": max_length}
    generator = Generator(
        model, tokenizer, steps=steps, temperature=temperature, order=order, **options
    )
    return generator.generate(texts, allowed=allowed, seed=seed, progress=progress)


class Generator:
    """Fill the masks of texts step by step; keep one for many calls, since it compiles once.

    Every step predicts all masks that are left, and fills some of them for good. `steps` is the
    number of steps in which the masks of a text are filled, as evenly as possible (None: one mask
    in each step). `order` says which masks are filled first: those whose token is most probable
    ("confidence"), the leftmost ones, or random ones. With `temperature` 0 a mask gets its most
    probable token. Otherwise its token is drawn from the probabilities to the power of
    1 / temperature.

    What is drawn depends on the seed, the number of the text, the step and the mask, not on the
    texts beside it. Text outside masks keeps its tokens. Special and `[unused*]` tokens never fill
    a mask. `options` are `batch_size` and `max_length`.
    """

    def __init__(
        self,
        model: ModernBertForMaskedLM,
        tokenizer: Tokenizer,
        *,
        steps: int | None = None,
        temperature: float = 0.0,
        order: Order = "confidence",
        **options: Any,
    ):
        if order not in get_args(Order):
            known = ", ".join(map(repr, get_args(Order)))
            raise InputError(f"order is {order!r:.60}; expected one of {known}")
        if steps is not None and (type(steps) is not int or steps < 1):
            raise InputError(f"steps is {steps!r:.60}; expected 1 or more, or None")
        is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if not is_number or not 0 <= temperature < float("inf"):
            raise InputError(f"temperature is {temperature!r:.60}; expected a number from 0 up")
        check_masked_lm(model)
        self.tokenizer, self.steps, self.order = tokenizer, steps, order
        self.temperature = float(temperature)
        choose = _Choose(tokenizer.special_ids, tokenizer.vocab_size, temperature > 0)
        self.engine = Engine(model, tokenizer, choose, **options)

    def generate(
        self,
        texts: Iterable[str],
        *,
        allowed: Allowed | None = None,
        seed: int = 0,
        progress: Advance | None = None,
    ) -> list[GeneratedText]:
        """Fill the masks of texts, any iterable of them, read in chunks.

        Raises `InputError` that lists each row that is not text, has no mask, is too long, or whose
        `allowed` tokens are not one token each, and `RunError` for scores that are not finite.
        """
        if type(seed) is not int or not 0 <= seed < 2**31:
            raise InputError(f"seed is {seed!r:.60}; expected 0 to {2**31 - 1}")
        listed = None if allowed is None else list(check_list(allowed, "allowed", "lists"))
        longest, results = self.engine.buckets[-1], list[GeneratedText]()
        for chunk in encode_texts(texts, self._ids, self.tokenizer, longest):
            first = len(results)
            own = [None] * len(chunk) if listed is None else listed[first : first + len(chunk)]
            if len(own) < len(chunk):
                raise InputError(
                    f"allowed has {len(own) + first} entries and there are more texts; give one "
                    "for each text"
                )
            started = [_Text(ids, number) for number, ids in enumerate(chunk, first)]
            for text in started:
                text.slots = np.flatnonzero(text.ids == self.tokenizer.mask_id)
            named = name_rows(zip(started, own, strict=True), first)
            for_each_row(lambda pair: self._limit(*pair), named)
            self._fill(started, seed, progress)
            results += map(self._finished, started)
        if listed is not None and len(listed) > len(results):
            raise InputError(
                f"allowed has {len(listed)} entries for {len(results)} texts; give one for each"
            )
        return results

    def _ids(self, text: str) -> list[int]:
        return ids_with_masks(self.tokenizer, text)

    def _limit(self, text: "_Text", allowed: Sequence[Sequence[str] | None] | None) -> None:
        """Note the token ids that may fill each mask of a text."""
        if allowed is None:
            return
        check_list(allowed, "allowed", "lists")
        if len(allowed) != len(text.slots):
            raise InputError(
                f"has {len(text.slots)} masks and {len(allowed)} entries in allowed; give one for "
                "each mask"
            )
        for slot, tokens in zip(text.slots.tolist(), allowed, strict=True):
            if tokens is not None:
                ids = [self._token(token) for token in check_list(tokens, "allowed", "tokens")]
                if not ids:
                    raise InputError("an entry of allowed is empty; give tokens, or None for any")
                text.allowed[slot] = ids

    def _token(self, token: str) -> int:
        check_text(token, "a token of allowed")
        ids = self.tokenizer.encode_plain(token)
        if len(ids) != 1:
            raise InputError(
                f"allowed has {token!r:.60}, which is {len(ids)} tokens; expected one, with its "
                "leading space if a word begins"
            )
        return ids[0]

    def _fill(self, texts: Sequence["_Text"], seed: int, progress: Advance | None) -> None:
        """Fill all masks of texts."""
        width, widest = FEWEST_SLOTS, max((len(text.slots) for text in texts), default=0)
        while width < widest:
            width *= 4
        step = 0
        while left := [text for text in texts if len(text.slots) > len(text.filled)]:
            slots = [text.open_slots() for text in left]
            found = self._predict(left, slots, width, seed, step)
            for text, own, (tokens, log_probs) in zip(left, slots, found, strict=True):
                steps = len(text.slots) if self.steps is None else self.steps
                count = -(-len(own) // max(1, steps - step))
                for at in self._first(own, log_probs, text.number, seed)[:count]:
                    text.fill(own[at], tokens[at], log_probs[at], step)
                if progress:
                    progress(count)
            step += 1

    def _first(self, slots: np.ndarray, log_probs: np.ndarray, number: int, seed: int) -> Any:
        """Return the places of open slots in the order in which they are to be filled."""
        if self.order == "left":
            return range(len(slots))
        if self.order == "confidence":
            return np.argsort(-log_probs, kind="stable")
        # Drawn for each slot of the text once, so that the steps do not change the order.
        drawn = np.random.default_rng([seed, number]).random(slots.max() + 1)
        return np.argsort(drawn[slots], kind="stable")

    def _predict(
        self,
        texts: Sequence["_Text"],
        slots: Sequence[np.ndarray],
        width: int,
        seed: int,
        step: int,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield tokens and log probabilities of the slots of each text."""
        counts = np.array([len(own) for own in slots], np.int32)
        most = max([len(ids) for text in texts for ids in text.allowed.values()], default=0)
        # A power of two, so that few programs are compiled.
        allowed = np.full((len(texts), width, 1 << max(0, most - 1).bit_length()), -1, np.int32)
        for row, (text, own) in enumerate(zip(texts, slots, strict=True)):
            for place, slot in enumerate(own.tolist()):
                ids = text.allowed.get(slot, [])
                allowed[row, place, : len(ids)] = ids
        padded = np.array([np.resize(own, width) for own in slots], np.int32)
        draws = np.zeros((len(texts), width), np.float32)
        for row, (text, own) in enumerate(zip(texts, slots, strict=True)):
            draws[row, : len(own)] = np.random.default_rng([seed, text.number, step]).random(
                len(own)
            )
        heat = np.full(len(texts), self.temperature, np.float32)
        sequences: Any = [text.ids for text in texts]
        tokens, log_probs = self.engine.run(sequences, padded, counts, allowed, draws, heat)
        for row, count in enumerate(counts):
            check_finite(log_probs[row, :count])
            yield tokens[row, :count], log_probs[row, :count]

    def _finished(self, text: "_Text") -> GeneratedText:
        first, last = len(self.tokenizer.prefix_ids), len(self.tokenizer.suffix_ids)
        tokens = tuple(
            GeneratedToken(self.tokenizer.decode([id]), id, log_prob, step)
            for _, (id, log_prob, step) in sorted(text.filled.items())
        )
        return GeneratedText(self.tokenizer.decode(text.ids[first : len(text.ids) - last]), tokens)


class _Text:
    """A text that is being filled: its ids, its masks, and what has filled them."""

    def __init__(self, ids: np.ndarray, number: int):
        self.ids, self.number = ids, number
        self.slots = np.empty(0, np.int64)
        self.allowed: dict[int, list[int]] = {}
        self.filled: dict[int, tuple[int, float, int]] = {}

    def open_slots(self) -> np.ndarray:
        return np.setdiff1d(self.slots, list(self.filled))

    def fill(self, slot: int, token: int, log_prob: float, step: int) -> None:
        self.ids[slot] = token
        self.filled[int(slot)] = int(token), float(log_prob), step


@dataclass(frozen=True)
class _Choose:
    """Choose a token for each slot: the most probable one, or one that is drawn."""

    special: frozenset[int]
    vocab_size: int
    is_drawn: bool

    def __call__(
        self,
        model: Any,
        ids: jax.Array,
        segment_ids: jax.Array,
        slots: jax.Array,
        counts: jax.Array,
        allowed: jax.Array,
        draws: jax.Array,
        heat: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Return tokens and their log probabilities, both `[batch, slots]`.

        `allowed` `[batch, slots, tokens]` has the ids that may fill a slot, then -1; a slot with
        only -1 may be filled by any. Probabilities are those among the tokens that may fill it.
        `draws` `[batch, slots]` are numbers from 0 to 1, `heat` `[batch]` are temperatures.
        """
        size = model.config.vocab_size
        can_fill = np.isin(np.arange(size), list(self.special), invert=True)
        can_fill[self.vocab_size :] = False
        hidden = model.encode(ids, segment_ids)
        at_slots = jnp.take_along_axis(hidden, slots[:, :, None], axis=1)

        def fill(at: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            named = jax.vmap(lambda own: jnp.zeros(size, bool).at[own].set(True, mode="drop"))(
                jnp.where(allowed[:, at] < 0, size, allowed[:, at])
            )
            is_free = (allowed[:, at, :1] < 0) & jnp.asarray(can_fill)[None]
            logits = model.mlm_logits(at_slots[:, at]).astype(jnp.float32)
            log_probs = jax.nn.log_softmax(jnp.where(named | is_free, logits, -jnp.inf))
            chosen = jnp.argmax(log_probs, axis=-1)
            if self.is_drawn:
                shares = jnp.cumsum(jax.nn.softmax(log_probs / heat[:, None]), axis=-1)
                # Rounding may leave the last sum below 1; no draw is beyond it.
                chosen = jnp.argmax(shares > (draws[:, at] * shares[:, -1])[:, None], axis=-1)
            own = jnp.take_along_axis(log_probs, chosen[:, None], axis=-1)[:, 0]
            return found[0].at[at].set(chosen), found[1].at[at].set(own)

        # One slot after the other: a row of logits is as wide as the vocabulary.
        shape = slots.shape[::-1]
        empty = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        tokens, log_probs = jax.lax.fori_loop(0, counts.max(), fill, empty)
        return tokens.T, log_probs.T
