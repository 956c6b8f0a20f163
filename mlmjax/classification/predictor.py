"""Answer texts with a classifier that does not learn.

It is apart from `classifier` because importing scikit-learn takes longer than an answer.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
from flax import nnx

from mlmjax.classification.labels import pair_labels, right_columns
from mlmjax.classification.prompter import CHUNK_PROMPTS, Prompter
from mlmjax.classification.settings import Answer, LongText, Settings, settle, upgrade
from mlmjax.config.run import AdapterConfig, Head
from mlmjax.config.tables import decode
from mlmjax.errors import InputError, suggest_keywords
from mlmjax.model.modernbert import Model, ModernBertForSequenceClassification
from mlmjax.parallel.processes import check_not_forked, is_forked
from mlmjax.reporting.terminal import progress_bar
from mlmjax.scoring.engine import describe_forward_compiling
from mlmjax.statistics import label_sets
from mlmjax.statistics.calibration import (
    Calibration,
    abstention_threshold,
    batch_calibration,
    null_calibration,
    order_calibration,
    temperature_calibration,
)
from mlmjax.storage import CLASSIFIER, TRAINING, plain_file, read_json
from mlmjax.text.checks import check_list, check_share
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.weights import hub
from mlmjax.weights.pretrained import load_pretrained

NULL_TEXTS = ("N/A", "none", "...")
"""Texts without content, whose answers show what the prompt suggests by itself."""

PART = 4096
"""Texts that `predict_proba` lays out together."""

APPLIES = 0.5
"""From this probability on, one of several labels applies."""

Source = str | Path | tuple[Model, Tokenizer]
Labels = Sequence[str] | Mapping[str, str]
CalibrationMethod = Literal["batch", "null", "order", "temperature"]


@suggest_keywords
@dataclass(eq=False, repr=False)
class Predictor:
    """Load a model and classify texts; `Classifier` explains the arguments and can learn."""

    source: Source
    labels: Labels | None = None
    _: KW_ONLY
    head: Head | None = None
    answer: Answer | None = None
    template: Template | str | None = None
    instruction: str | None = None
    anchor: str | None = None
    examples: Sequence[tuple[str, Any]] | None = None
    orders: int | Literal["all"] | None = None
    shortlist: int | None = None
    shortlist_model: str | None = None
    long_text: LongText | None = None
    multi_label: bool | None = None
    ordered: bool | None = None
    abstain_below: float | None = None
    dtype: str = "float32"
    batch_size: int | None = None
    max_length: int | None = None
    revision: str | None = None
    local_files_only: bool = False
    epochs: int = 3
    learning_rate: float | Literal["auto"] | None = None
    train_batch_size: int = 32
    weight_decay: float = 0.01
    warmup: float = 0.05
    seed: int = 0
    accumulate: int = 1
    layer_decay: float = 1.0
    ema: float = 0.0
    validation_share: float = 0.0
    patience: int | None = None
    restarts: int = 0
    label_smoothing: float = 0.0
    mask_share: float = 0.0
    normalize: Literal["vocabulary", "labels"] = "vocabulary"
    adapter: AdapterConfig | Mapping[str, Any] | str | None = None
    train: Sequence[str] | None = None
    progress: bool | None = None

    settings_: Settings = field(init=False)
    asking_: Prompter = field(init=False)
    classes_: np.ndarray = field(init=False)
    manifest_: str | None = field(init=False)

    @classmethod
    def from_pretrained(cls, source: Source, labels: Labels | None = None, **options: Any) -> Self:
        """Construct and load in one call; a folder of `save_pretrained` has its own labels.

        Raises `InputError` for a source that cannot be loaded, and if there are no labels.
        """
        predictor = cls(source, labels, **options)
        predictor._load()
        return predictor

    @property
    def shortened(self) -> int:
        """Return the number of prompts so far whose text was too long and was shortened."""
        return self._load().scorer.shortened

    @property
    def layers(self) -> int:
        """Return the number of layers of the model."""
        return int(self._load().scorer.model.config.num_hidden_layers)

    @property
    def answer_(self) -> str:
        """Return how it answers: "words", "letters", "continuation" or "head"."""
        return self._load().answer

    @property
    def answer_reason_(self) -> str:
        """Return why it answers so."""
        self._load()
        return self.settings_.reason or "the arguments, the prompt or the model set it"

    @property
    def prompts(self) -> int:
        """Return the number of prompts so far: a forward pass each, except for continuations."""
        return self._load().scorer.scored

    @property
    def examples_shown(self) -> dict[int, int]:
        """Return the number of prompts so far by the number of their few-shot examples."""
        shots = self._load().shots
        return {} if shots is None else dict(sorted(shots.counts.items()))

    @property
    def calibration_(self) -> Calibration | None:
        """Return the result of `calibrate`, or None before it."""
        self._load()
        return self.settings_.calibration

    @property
    def conformal_(self) -> label_sets.Conformal | None:
        """Return the result of `conform`, or None before it."""
        self._load()
        return self.settings_.conformal

    @property
    def threshold_(self) -> float | None:
        """Return the probability below which it abstains, if there is one."""
        self._load()
        return self.settings_.abstain_below

    def predict(self, texts: Iterable[str], *, abstain_below: float | None = None) -> np.ndarray:
        """Return the most probable label of each text, str `[texts]`.

        The answer is the empty string if its probability is below `abstain_below` (None: the
        classifier's own). With several labels per text: 0 or 1 for each, int `[texts, labels]`.
        """
        probabilities = self.predict_proba(texts)
        if self.settings_.multi_label:
            return (probabilities >= APPLIES).astype(int)
        names = self.classes_[probabilities.argmax(axis=1)]
        limit = self.settings_.abstain_below if abstain_below is None else abstain_below
        if limit is None:
            return names
        limit = check_share(limit, "abstain_below")
        return np.where(probabilities.max(axis=1) < limit, "", names)

    def predict_proba(self, texts: Iterable[str]) -> np.ndarray:
        """Return the probability of each label for each text, `[texts, labels]`; rows sum to 1.

        With several labels per text, each is the probability that the label applies. `texts` is
        any iterable. Raises `InputError` that lists each row that is blank or not text.
        """
        self._load()
        return np.concatenate([np.zeros((0, len(self.classes_))), *self.stream(texts, part=PART)])

    def stream(self, texts: Iterable[str], *, part: int = 256) -> Iterator[np.ndarray]:
        """Yield what `predict_proba` returns, at most `[part, labels]` at a time.

        It reads only the texts of the next part. Larger parts have less padding.
        """
        for raw in self._raw(texts, part):
            log_probs = self._calibrated(raw)
            if self.settings_.multi_label:
                log_probs = log_probs[:, 0].reshape(-1, len(self.classes_))
            yield np.exp(log_probs.astype(np.float64))

    def answers(self, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Yield a dictionary per text: `label`, `probability`, and `probabilities` by label.

        `label` is the most probable one, or None if the classifier abstains. With several labels
        per text, `labels` lists those that apply.
        """
        self._load()
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

    def calibrate(
        self,
        texts: Iterable[str] | None = None,
        labels: Iterable[Any] | None = None,
        *,
        method: CalibrationMethod | None = None,
    ) -> Self:
        """Calibrate the probabilities on texts that were not trained on; returns the classifier.

        - "batch" (the default without labels) removes what the model says of all these texts alike.
          It assumes that the labels are about equally frequent in them.
        - "null" (the default without texts) removes what the model says of texts without content,
          those given or `NULL_TEXTS` (contextual calibration). It does not suit a fitted
          classifier, which has learned from no such texts.
        - "order" removes the preference for option names, measured under up to 8 cyclic orders of
          the options. Predictions still take one pass.
        - "temperature" (the default with labels) changes how sure the model is, but no answer.

        The first three replace an earlier calibration; "temperature" is added to it. Earlier label
        sets and thresholds are dropped, since they no longer hold.
        """
        prompter, listed = self._load(), None if texts is None else _listed(texts)
        method = method or ("temperature" if labels is not None else "batch" if listed else "null")
        if method not in ("batch", "null", "order", "temperature"):
            raise InputError(
                f"method is {method!r}; expected 'batch', 'null', 'order' or 'temperature'"
            )
        if (method == "temperature") != (labels is not None):
            raise InputError(
                f"method {method!r} takes {'' if labels is None else 'no '}labels; labels are for "
                "'temperature', the other methods find a bias without them"
            )
        if method == "null":
            listed = listed or list(NULL_TEXTS)
        if not listed:
            raise InputError(f"method {method!r} needs texts; give some that were not trained on")
        if method == "order":
            found = order_calibration(prompter.log_probs_by_name(listed))
        else:
            raw = np.concatenate(list(self._raw(listed)))
            if labels is not None:
                before = self.settings_.calibration
                truth = self._right_columns(labels, listed)
                found = temperature_calibration(self._calibrated(raw), truth)
                found = found if before is None else before.then(found)
            else:
                found = (batch_calibration if method == "batch" else null_calibration)(raw)
        self._learn(calibration=found, conformal=None, abstain_below=None)
        return self

    def conform(
        self, texts: Iterable[str], labels: Iterable[Any], *, method: label_sets.Method = "lac"
    ) -> Self:
        """Learn label sets from texts that neither `fit` nor `calibrate` has seen.

        `method` is "lac" or "aps", as in `statistics.label_sets`; `predict_set` returns the sets.
        Returns the classifier.
        """
        scores, truth = self._labelled(texts, labels)
        self._learn(conformal=label_sets.fit(scores, truth, method=method))
        return self

    def predict_set(self, texts: Iterable[str], *, coverage: float = 0.9) -> np.ndarray:
        """Return a set of labels for each text, bool `[texts, labels]`.

        A share of at least `coverage` of the texts has the right label in its set, on average over
        texts drawn like those of `conform`. Raises `InputError` without `conform`, and if it had
        too few texts for this coverage.
        """
        self._load()
        sets = self.settings_.conformal
        if sets is None:
            raise InputError("there are no label sets yet; call conform with labelled texts first")
        parts = [sets.sets(self._calibrated(raw), coverage) for raw in self._raw(texts)]
        return np.concatenate([np.zeros((0, len(self.classes_)), bool), *parts])

    def abstain(
        self, texts: Iterable[str], labels: Iterable[Any], *, accuracy: float, least: int = 10
    ) -> Self:
        """Abstain from answers less probable than a threshold found on labelled texts.

        The threshold (`threshold_`) is the lowest with which a share `accuracy` of the answers to
        these texts is right, and at least `least` are answered. Its reliability grows with the
        number of texts. `score` counts a text without an answer as wrong. Returns the classifier.
        Raises `InputError` if there is no such threshold.
        """
        check_share(accuracy, "accuracy")
        if accuracy == 0 or least < 1:
            raise InputError(f"accuracy is {accuracy}, least {least}; expected more than 0")
        scores, truth = self._labelled(texts, labels)
        confidences = np.exp(scores.astype(np.float64).max(axis=1))
        is_right = scores.argmax(axis=1) == truth
        threshold = abstention_threshold(confidences, is_right, accuracy=accuracy, least=least)
        self._learn(abstain_below=threshold)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle: weights as NumPy arrays, nothing compiled."""
        state = vars(self).copy()
        if (prompter := state.pop("asking_", None)) is not None:
            graphdef, params = nnx.split(prompter.scorer.model)
            state["copied_"] = graphdef, jax.device_get(params), prompter.scorer.tokenizer
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what `__getstate__` returned."""
        copied = state.pop("copied_", None)
        vars(self).update(state)
        if copied is not None and is_forked():
            self.copied_ = copied  # `_load` raises the error, which a pool cannot report here.
        elif copied is not None:
            graphdef, params, tokenizer = copied
            model = nnx.merge(graphdef, jax.device_put(params))
            self.asking_ = Prompter(self.settings_, model, tokenizer, self.batch_size)

    def _load(self) -> Prompter:
        """Load what is not loaded yet, and return the prompter."""
        check_not_forked()
        if not hasattr(self, "asking_"):
            settings, model, tokenizer, manifest = self._read()
            self._keep(settings, Prompter(settings, model, tokenizer, self.batch_size))
            self.manifest_ = manifest
        return self.asking_

    def _keep(self, settings: Settings, prompter: Prompter) -> None:
        self.settings_, self.asking_ = settings, prompter
        self.classes_ = np.array(list(settings.labels))
        self.manifest_ = None

    def _read(
        self, seen: Sequence[Any] | None = None
    ) -> tuple[Settings, Model, Tokenizer, str | None]:
        """Read the source, and settle the settings; `seen` are the answers of a training."""
        saved, manifest = None, None
        model: Any
        if isinstance(self.source, tuple) and len(self.source) == 2:
            model, tokenizer = self.source
        elif isinstance(self.source, str | Path):
            where: Any = {"revision": self.revision, "local_files_only": self.local_files_only}
            folder = hub.fetch(self.source, **where)
            if (folder / CLASSIFIER).exists():
                values = read_json(folder, CLASSIFIER)
                saved = decode(Settings, values, str(folder / CLASSIFIER))
            if (folder / TRAINING).exists():
                manifest = plain_file(folder, TRAINING).read_text(encoding="utf-8")
            model, tokenizer = load_pretrained(self.source, dtype=self.dtype, **where)
            if saved is not None:
                saved, tokenizer = upgrade(saved, tokenizer)
        else:
            raise InputError(
                f"source is {self.source!r:.60}; expected a folder, a hub id, or a pair "
                "(model, tokenizer)"
            )
        anchor = self.anchor or (None if saved is None else saved.anchor)
        if anchor is not None:
            tokenizer = tokenizer.with_anchor(anchor)
        settings = settle(vars(self), saved, model, tokenizer, seen=seen)
        has_head = isinstance(model, ModernBertForSequenceClassification)
        if settings.head == "classification" and not has_head and seen is None:
            raise InputError(
                f"a {type(model).__name__} has no classification head; call fit, which trains one, "
                "or leave head out"
            )
        return settings, model, tokenizer, manifest

    def _raw(self, texts: Iterable[str], part: int = CHUNK_PROMPTS) -> Iterator[np.ndarray]:
        """Yield log probabilities before calibration, as `Prompter.stream` does, with a bar."""
        prompter, done = self._load(), 0
        each = len(self.settings_.labels) if self.settings_.multi_label else 1
        total = len(texts) if isinstance(texts, Sized) else None
        compiling = describe_forward_compiling(prompter.scorer.model.config.num_hidden_layers)
        with progress_bar("texts", self.progress, first=compiling) as show:
            for raw in prompter.stream(texts, part):
                yield raw
                done += len(raw) // each
                if show and total:
                    show(done, total)

    def _calibrated(self, raw: np.ndarray) -> np.ndarray:
        calibration = self.settings_.calibration
        return raw if calibration is None else calibration.apply(raw)

    def _labelled(
        self, texts: Iterable[str], labels: Iterable[Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return calibrated log probabilities of labelled texts, and their right columns."""
        self._load()
        if self.settings_.multi_label:
            raise InputError(
                "label sets and abstaining need one label per text; with multi_label every label "
                "has its own probability: apply a limit of your own to it"
            )
        listed = _listed(texts)
        truth = self._right_columns(labels, listed)
        return self._calibrated(np.concatenate(list(self._raw(listed)))), truth

    def _right_columns(self, labels: Iterable[Any], texts: Sequence[str]) -> np.ndarray:
        """Return the right column of each row of `_raw`."""
        multi_label = self.settings_.multi_label
        return right_columns(
            pair_labels(texts, labels, list(self.classes_), multi_label), multi_label
        )

    def _learn(self, **values: Any) -> None:
        self.settings_ = self.settings_.model_copy(update=values)


def _listed(texts: Iterable[str]) -> list[str]:
    listed = list(check_list(texts, "texts"))
    if not listed:
        raise InputError("texts: the list is empty; give at least one text")
    return listed
