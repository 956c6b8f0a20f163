"""A classifier that answers and does not learn.

Apart from `classifier`, because scikit-learn takes longer to import than an answer takes.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np

from mlmjax.classification.answering import Source
from mlmjax.classification.prompter import LongText
from mlmjax.classification.settings import Answer, Head, share
from mlmjax.classification.trust import Trust
from mlmjax.text.prompts import Template

PART = 4096
"""Texts that `predict_proba` lays out together."""
APPLIES = 0.5
"""From this probability on one of several labels applies."""

Labels = Sequence[str] | Mapping[str, str]


class Predictor(Trust):
    """Loads a source and answers texts; `classifier.Classifier` says what its arguments mean."""

    def __init__(
        self,
        source: Source,
        labels: Labels | None = None,
        *,
        head: Head | None = None,
        answer: Answer | None = None,
        template: Template | str | None = None,
        instruction: str | None = None,
        examples: Sequence[tuple[str, Any]] | None = None,
        orders: int | Literal["all"] | None = None,
        long_text: LongText | None = None,
        multi_label: bool | None = None,
        abstain_below: float | None = None,
        dtype: str = "float32",
        batch_size: int | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        epochs: int = 3,
        learning_rate: float = 3e-5,
        train_batch_size: int = 32,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        seed: int = 0,
        validation_share: float = 0.0,
        patience: int | None = None,
        progress: bool | None = None,
    ):
        self.source = source
        self.labels = labels
        self.head = head
        self.answer = answer
        self.template = template
        self.instruction = instruction
        self.examples = examples
        self.orders = orders
        self.long_text = long_text
        self.multi_label = multi_label
        self.abstain_below = abstain_below
        self.dtype = dtype
        self.batch_size = batch_size
        self.max_length = max_length
        self.revision = revision
        self.local_files_only = local_files_only
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.train_batch_size = train_batch_size
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.seed = seed
        self.validation_share = validation_share
        self.patience = patience
        self.progress = progress

    @classmethod
    def from_pretrained(cls, source: Source, labels: Labels | None = None, **options: Any) -> Self:
        """Construct and load at once; a folder of `save_pretrained` brings its own labels.

        Raises `InputError` for a source that cannot be loaded, and where there are no labels.
        """
        predictor = cls(source, labels, **options)
        predictor._ready()
        return predictor

    @property
    def shortened(self) -> int:
        """How many prompts have been cut so far, because their text was too long."""
        return self._ready().scorer.shortened

    @property
    def prompts(self) -> int:
        """How many prompts have been asked so far, a forward pass each but for continuations."""
        return self._ready().scorer.scored

    @property
    def examples_shown(self) -> dict[int, int]:
        """How many prompts so far had how many few-shot examples, `{examples: prompts}`."""
        shots = self._ready().shots
        return {} if shots is None else dict(sorted(shots.counts.items()))

    def predict(self, texts: Iterable[str], *, abstain_below: float | None = None) -> np.ndarray:
        """Return the most probable label of each text, str `[texts]`.

        Where its probability is below `abstain_below` (None: the classifier's own) the answer is
        the empty string. With several labels per text: 0 or 1 for each, int `[texts, labels]`.
        """
        probabilities = self.predict_proba(texts)
        if self.settings_.multi_label:
            return (probabilities >= APPLIES).astype(int)
        names = self.classes_[probabilities.argmax(axis=1)]
        limit = self.settings_.abstain_below if abstain_below is None else abstain_below
        if limit is None:
            return names
        limit = share(limit, "abstain_below")
        return np.where(probabilities.max(axis=1) < limit, "", names)

    def predict_proba(self, texts: Iterable[str]) -> np.ndarray:
        """Return the probability of each label for each text, `[texts, labels]`; rows sum to 1.

        With several labels per text each is the probability that the label applies. Any iterable
        of texts will do. Raises `InputError` that names, by its row, each text that is blank or no
        text.
        """
        self._ready()
        return np.concatenate([np.zeros((0, len(self.classes_))), *self.stream(texts, part=PART)])

    def stream(self, texts: Iterable[str], *, part: int = 256) -> Iterator[np.ndarray]:
        """Yield what `predict_proba` returns, `[part, labels]` at a time.

        No more texts are read than the next part has; larger parts have less padding.
        """
        for raw in self._raw(texts, part):
            log_probs = raw if self.settings_.calibration is None else self._calibrated(raw)
            if self.settings_.multi_label:
                log_probs = log_probs[:, 0].reshape(-1, len(self.classes_))
            yield np.exp(log_probs.astype(np.float64))

    def answers(self, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Yield an object per text: `label`, `probability`, `probabilities` by label.

        `label` is the most probable one, None where the classifier abstains; with several labels
        per text, `labels` are those that apply.
        """
        self._ready()
        limit = self.settings_.abstain_below or 0.0
        names = [str(name) for name in self.classes_]
        for row in itertools.chain.from_iterable(self.stream(texts)):
            best = int(row.argmax())
            answer: dict[str, Any] = {
                "label": names[best] if row[best] >= limit else None,
                "probability": float(row[best]),
                "probabilities": dict(zip(names, map(float, row), strict=True)),
            }
            if self.settings_.multi_label:
                chosen = zip(names, row, strict=True)
                answer["labels"] = [name for name, share in chosen if share >= APPLIES]
            yield answer
