"""Turn rows into prompts, and prompts into probabilities of labels."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.errors import InputError, RunError, suggest_keywords
from mlmjax.model.modernbert import (
    SINGLE_LABEL,
    Model,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
)
from mlmjax.scoring.engine import Advance, Engine, Forward
from mlmjax.text.checks import check_list, check_row, for_each_row, name_rows
from mlmjax.text.prompts import Prompt, Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import Verbalizer

CHUNK_ROWS = 8192


def check_masked_lm(model: Any) -> None:
    """Raise `InputError` for a model that cannot predict masked tokens."""
    if not isinstance(model, ModernBertForMaskedLM):
        kind = type(model).__name__
        able = "; it can be given a classification head, which fit or train then trains"
        raise InputError(
            f"a {kind} has no masked-language-model head; give ModernBertForMaskedLM"
            + (able if kind == "ModernBertModel" else "")
        )


def check_finite(log_probs: np.ndarray) -> None:
    """Raise `RunError` for scores that are not finite."""
    if not np.isfinite(log_probs).all():
        raise RunError("the model's scores are not finite; its weights are broken")


@suggest_keywords
class RowScorer:
    """Turn rows into prompts, and prompts into log probabilities of the labels.

    `Engine` explains buckets and `batch_size`. The template shortens texts that make a prompt
    longer than `max_length` (default: the model's `max_position_embeddings`). `shortened` counts
    such rows, `scored` all rows. Only fields named in `optional` may be blank.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: Template,
        labels: Sequence[str],
        forward: Forward,
        *,
        batch_size: int | None = None,
        max_length: int | None = None,
        optional: Sequence[str] = (),
        exact: bool = False,
    ):
        self.tokenizer, self.template, self.labels = tokenizer, template, tuple(labels)
        self.optional = tuple(optional)
        self.scored = self.shortened = 0
        self.engine = Engine(
            model, tokenizer, forward, max_length=max_length, batch_size=batch_size, exact=exact
        )
        self.max_length = self.engine.buckets[-1]

    @property
    def model(self) -> Model:
        """Return the model that answers; another of the same shapes may be set."""
        return self.engine.model

    @model.setter
    def model(self, model: Model) -> None:
        self.engine.model = model

    @property
    def buckets(self) -> tuple[int, ...]:
        """Return the lengths that prompts are padded to."""
        return self.engine.buckets

    @property
    def compilations(self) -> int:
        """Return the number of batch shapes so far, each of which is one program."""
        return self.engine.compilations

    @property
    def padding_share(self) -> float:
        """Return the share of padding among all tokens that the model has read."""
        return self.engine.padding_share

    def log_probs(
        self,
        rows: Iterable[Mapping[str, Any]],
        *,
        where: Sequence[str] | None = None,
        progress: Advance | None = None,
    ) -> np.ndarray:
        """Return the log probabilities of rows of `{field: text}`, float32 `[rows, labels]`.

        A row may hold `"options"`, a list of texts; its columns past their number are -inf. `rows`
        is any iterable, read in chunks. `where` names each row in messages (default: its number).
        `progress` is called with the number of rows scored since its last call. Raises `InputError`
        that lists each row that cannot be scored, and `RunError` for scores that are not finite.
        """
        results = [np.zeros((0, len(self.labels)), np.float32)]
        first, pending = 0, iter(check_list(rows, "rows", "rows"))
        while chunk := list(itertools.islice(pending, CHUNK_ROWS)):
            stop = first + len(chunk)
            prompts = self.prompts(chunk, where=where and where[first:stop], first=first)
            results.append(self._score(chunk, prompts, progress))
            first = stop
            self.scored += len(chunk)
        scores = np.concatenate(results)
        check_finite(scores[~np.isneginf(scores)])
        return scores

    def prompts(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        where: Sequence[str] | None = None,
        first: int = 0,
    ) -> list[Prompt]:
        """Check rows and turn them into prompts; `first` is the index of the first row.

        Raises `InputError` that lists each bad row by its name in `where`, or by its number.
        """
        names = where or [name for name, _ in name_rows(rows, first)]
        fields, count = self.template.fields, len(self.labels)
        for_each_row(
            lambda row: check_row(row, fields, count, self.optional), zip(names, rows, strict=True)
        )
        prompts = self.template.render_batch(self.tokenizer, rows, self.max_length, names)
        self.shortened += sum(bool(prompt.shortened) for prompt in prompts)
        return prompts

    def targets(self, columns: Any) -> np.ndarray:
        """Return what is learned by rows whose right answers are in these columns, same shape."""
        raise InputError(
            "fit: labels of several tokens cannot be learned as one answer; fit with "
            "answer='letters', which works for any labels"
        )

    def _score(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompts: Sequence[Prompt],
        progress: Advance | None,
    ) -> np.ndarray:
        """Return the log probabilities of prompts, `[rows, labels]`."""
        ids = [prompt.ids for prompt in prompts]
        return np.asarray(self.engine.run(ids, *self._columns(rows, prompts), progress=progress))

    def _columns(
        self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]
    ) -> tuple[np.ndarray, ...]:
        """Return what `forward` needs besides the prompts' tokens."""
        return ()


@suggest_keywords
class Scorer(RowScorer):
    """Score the labels of a verbalizer at the slot, in one forward pass per row.

    The encoder runs in the model's compute dtype, the head only at the slot, and the log-softmax in
    float32. A row's result does not depend on its neighbours or its bucket.

    `normalize="labels"` is the softmax over the verbalizer's labels (over the first
    `len(row["options"])` of them if the row has options); the probabilities of a label's surface
    forms are summed. `normalize="vocabulary"` is that sum under the softmax over the whole
    vocabulary, as in the published MMLU figures. `anchor` names the token before the mask, or
    "none" for no token; it replaces that of the template.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: Template,
        verbalizer: Verbalizer,
        *,
        batch_size: int | None = None,
        normalize: Literal["labels", "vocabulary"] = "labels",
        max_length: int | None = None,
        optional: Sequence[str] = (),
        anchor: str | None = None,
    ):
        check_masked_lm(model)
        if anchor is not None:
            template = replace(template, anchor=anchor)
        if normalize not in ("labels", "vocabulary"):
            raise InputError(f"normalize is {normalize!r}; expected 'labels' or 'vocabulary'")
        self.verbalizer, self.normalize = verbalizer, normalize
        options: Any = {"batch_size": batch_size, "max_length": max_length, "optional": optional}
        forward = _AtSlot(tuple(verbalizer.ids(tokenizer)), normalize == "vocabulary")
        super().__init__(model, tokenizer, template, verbalizer.labels, forward, **options)

    def _columns(
        self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]
    ) -> tuple[np.ndarray, ...]:
        own = [row.get("options") for row in rows]
        counts = [len(self.labels if options is None else options) for options in own]
        slots = [prompt.slot for prompt in prompts]
        return np.array(slots, np.int32), np.array(counts, np.int32)

    def targets(self, columns: Any) -> np.ndarray:
        """Return the token of the first form of the labels in these columns, same shape."""
        forms = np.array([ids[0] for ids in self.verbalizer.ids(self.tokenizer)], np.int32)
        return forms[np.asarray(columns, int)]


@dataclass(frozen=True)
class _AtSlot:
    """Read log probabilities of labels at the slots; `forms` are their tokens."""

    forms: tuple[tuple[int, ...], ...]
    over_vocabulary: bool

    def __call__(
        self,
        model: Any,
        ids: jax.Array,
        segment_ids: jax.Array,
        slots: jax.Array,
        own_labels: jax.Array,
    ) -> jax.Array:
        """Return log probabilities `[batch, labels]` of ids `[batch, seq]`."""
        widest = max(map(len, self.forms))
        form_ids = np.array([[*ids, *[ids[0]] * (widest - len(ids))] for ids in self.forms])
        is_form = np.array([[i < len(ids) for i in range(widest)] for ids in self.forms])
        hidden = model.encode(ids, segment_ids)
        at_slot = jnp.take_along_axis(hidden, slots[:, None, None], axis=1)[:, 0]
        if self.over_vocabulary:
            logits = jax.nn.log_softmax(model.mlm_logits(at_slot))[:, form_ids]
        else:
            logits = model.mlm_logits(at_slot, jnp.asarray(form_ids.ravel()))
            logits = logits.reshape(-1, *form_ids.shape)
        logits = jax.nn.logsumexp(jnp.where(is_form[None], logits, -jnp.inf), axis=-1)
        is_own = jnp.arange(len(self.forms))[None, :] < own_labels[:, None]
        logits = jnp.where(is_own, logits, -jnp.inf)
        return logits if self.over_vocabulary else jax.nn.log_softmax(logits)


class HeadScorer(RowScorer):
    """Score the labels of a classification head, in one forward pass per row.

    The template needs `slot=False`. The labels are those of the model's `id2label`. Raises
    `InputError` for a model without such a head, and for a head with fewer than two classes.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, template: Template, **options: Any):
        if not isinstance(model, ModernBertForSequenceClassification):
            raise InputError(
                f"a {type(model).__name__} has no classification head; "
                "expected a ModernBertForSequenceClassification"
            )
        kind, count = model.config.problem_type or SINGLE_LABEL, model.config.num_labels
        if kind != SINGLE_LABEL or count < 2:
            raise InputError(
                f"the head is for {kind} with {count} outputs; expected one class of two or more"
            )
        labels = list(model.config.id2label.values())
        super().__init__(model, tokenizer, template, labels, _head_scores, **options)

    def targets(self, columns: Any) -> np.ndarray:
        """Return the numbers of the labels in these columns, same shape."""
        return np.array(columns)

    def check_labels(self, wanted: Sequence[str], what: str) -> None:
        """Raise `InputError` unless the head has exactly the labels of `what`, in any order."""
        if sorted(self.labels) != sorted(wanted):
            own, other = (", ".join(map(repr, names)) for names in (self.labels, wanted))
            raise InputError(
                f"the classification head has the labels {own:.400}; {what} has "
                f"{other or 'other options in each row':.400}; give both the same labels"
            )


def _head_scores(model: Any, ids: jax.Array, segment_ids: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(model(ids, segment_ids))
