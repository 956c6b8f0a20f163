"""A classifier that answers and does not learn.

Apart from `classifier`, because scikit-learn takes longer to import than an answer takes.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
from flax import nnx

from mlmjax.classification.labels import label_numbers
from mlmjax.classification.prompter import Asking, Question, make_asking
from mlmjax.classification.rounds import in_rounds, together
from mlmjax.classification.settings import Answer, LongText, Settings, settle
from mlmjax.config.run import Head
from mlmjax.config.tables import decode
from mlmjax.errors import InputError
from mlmjax.model.modernbert import (
    Model,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
)
from mlmjax.reporting.terminal import bar
from mlmjax.statistics import label_sets
from mlmjax.statistics.calibration import (
    Calibration,
    batch_calibration,
    null_calibration,
    order_calibration,
    temperature_calibration,
)
from mlmjax.statistics.option_orders import shifted, shifts
from mlmjax.storage import CLASSIFIER, TRAINING, plain_file, read_json
from mlmjax.text.checks import check_list, check_share, check_texts
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.weights import hub
from mlmjax.weights.pretrained import load_pretrained

CHUNK_PROMPTS = 4096
"""Prompts, about, that are laid out together; texts are read as they are needed."""


Source = str | Path | tuple[Model, Tokenizer]


class Answering:
    """Loads a source and asks it; `classifier.Classifier` says what its arguments mean."""

    source: Source
    dtype: str
    batch_size: int | None
    revision: str | None
    local_files_only: bool
    progress: bool | None
    settings_: Settings
    asking_: Asking
    classes_: np.ndarray
    manifest_: str | None

    def __getstate__(self) -> dict[str, Any]:
        """Keep weights as plain arrays and leave out what is compiled, so that it can be copied."""
        state: dict[str, Any] = {**super().__getstate__()}  # type: ignore[dict-item]
        if (asking := state.pop("asking_", None)) is not None:
            graphdef, params = nnx.split(asking.scorer.model)
            state["copied_"] = graphdef, jax.device_get(params), asking.scorer.tokenizer
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put together again what `__getstate__` gave."""
        copied = state.pop("copied_", None)
        super().__setstate__(state)  # type: ignore[misc]
        if copied is not None:
            graphdef, params, tokenizer = copied
            model = nnx.merge(graphdef, jax.tree.map(jax.numpy.asarray, params))
            self.asking_ = make_asking(self.settings_, model, tokenizer, batch_size=self.batch_size)

    def _ready(self) -> Asking:
        """Load what is not loaded yet, and return how it asks."""
        if not hasattr(self, "asking_"):
            settings, model, tokenizer, manifest = self._read()
            asking = make_asking(settings, model, tokenizer, batch_size=self.batch_size)
            self._keep(settings, asking)
            self.manifest_ = manifest
        return self.asking_

    def _keep(self, settings: Settings, asking: Asking) -> None:
        self.settings_, self.asking_ = settings, asking
        self.classes_ = np.array(list(settings.labels))
        self.manifest_ = None

    def _read(
        self, seen: Sequence[Any] | None = None
    ) -> tuple[Settings, Model, Tokenizer, str | None]:
        """Read the source, and settle what was given and what was saved with it."""
        saved, manifest = None, None
        model: Any
        if isinstance(self.source, tuple) and len(self.source) == 2:
            model, tokenizer = self.source
        elif not isinstance(self.source, str | Path):
            raise InputError(
                f"source is {self.source!r:.60}; expected a folder, a hub id, or a pair "
                "(model, tokenizer)"
            )
        else:
            where: dict[str, Any] = {
                "revision": self.revision,
                "local_files_only": self.local_files_only,
            }
            folder = hub.fetch(self.source, **where)
            if (folder / CLASSIFIER).exists():
                values = read_json(folder, CLASSIFIER)
                saved = decode(Settings, values, str(folder / CLASSIFIER))
            if (folder / TRAINING).exists():
                manifest = plain_file(folder, TRAINING).read_text(encoding="utf-8")
            model, tokenizer = load_pretrained(self.source, dtype=self.dtype, **where)
        has_head = isinstance(model, ModernBertForSequenceClassification)
        settings = settle(vars(self), saved, model, tokenizer, seen)
        if settings.head == "classification" and not has_head and seen is None:
            raise InputError(
                f"a {ModernBertForMaskedLM.__name__} has no classification head; call fit, which "
                "trains one, or leave head out"
            )
        return settings, model, tokenizer, manifest

    def _raw(self, texts: Iterable[str], part: int = CHUNK_PROMPTS) -> Iterator[np.ndarray]:
        """Yield log probabilities before calibration: `[texts, labels]`, or `[questions, 2]`."""
        asking, names = self._ready(), list(self.settings_.labels)
        pending = iter(check_list(texts, "texts"))
        each = (len(names) if self.settings_.multi_label else 1) * (asking.shifts or len(names))
        first, size = 0, min(part, max(16, CHUNK_PROMPTS // each))
        total = len(texts) if isinstance(texts, Sized) else None
        with bar("texts", self.progress) as shown:
            while chunk := list(itertools.islice(pending, size)):
                yield self._answers(chunk, first)
                first += len(chunk)
                if shown and total:
                    shown(first, total)

    def _answers(self, texts: Sequence[str], first: int) -> np.ndarray:
        where = check_texts(texts, first)
        questions = [question for text in texts for question in self._questions(text)]
        named = [name for name in where for _ in range(len(questions) // len(texts))]
        if self.settings_.head == "classification":
            return np.array(self._ask(questions, named))
        return np.array(in_rounds(self._ask, questions, named, self._size()))

    def _size(self) -> int:
        """Return how many labels one prompt holds."""
        if self.settings_.multi_label:
            return 2
        return together(self.asking_, len(self.settings_.labels))

    def _questions(self, text: str) -> list[Question]:
        if not self.settings_.multi_label:
            return [Question(text, self._order())]
        shown = zip(self.settings_.labels, self.settings_.shown, strict=True)
        return [Question(text, (0, 1), {"label": said}, name) for name, said in shown]

    def _order(self) -> tuple[int, ...]:
        """Return the options in the order of `classes_`, which a head may have in another."""
        if self.settings_.head != "classification":
            return tuple(range(len(self.classes_)))
        return tuple(self.asking_.scorer.labels.index(str(name)) for name in self.classes_)

    def _ask(self, questions: Sequence[Question], where: Sequence[str]) -> list[np.ndarray]:
        return self.asking_.ask(questions, where)


NULL_TEXTS = ("N/A", "none", "...")
"""Texts without content, whose answers are what the prompt alone suggests."""


Method = Literal["batch", "null", "order", "temperature"]


class Trust(Answering):
    """The part of a classifier that deals with its probabilities once they are there.

    What is found here is saved with the classifier and used by its predictions.
    """

    @property
    def calibration_(self) -> Calibration | None:
        """What `calibrate` found, None before."""
        self._ready()
        return self.settings_.calibration

    @property
    def conformal_(self) -> label_sets.Conformal | None:
        """What `conform` found, None before."""
        self._ready()
        return self.settings_.conformal

    @property
    def threshold_(self) -> float | None:
        """The probability below which it abstains, given or found by `abstain`; None for none."""
        self._ready()
        return self.settings_.abstain_below

    def calibrate(
        self,
        texts: Iterable[str] | None = None,
        labels: Iterable[Any] | None = None,
        *,
        method: Method | None = None,
    ) -> Any:
        """Calibrate the probabilities on texts that were not trained on; returns the classifier.

        - "batch" (the default without labels): takes off what the model says of all these texts
          alike, which assumes that labels are about equally frequent in them.
        - "null" (the default without texts): takes off what it says of texts without content,
          those given or `NULL_TEXTS`; with {options} or without this is contextual calibration.
          Not for a fitted classifier, to which such texts are like none it has learned from.
        - "order": takes off its preference for option names, found under all cyclic orders of the
          options (up to 8) of these texts; predictions then take one pass as before.
        - "temperature" (the default with labels): how sure it is, without changing an answer.

        The first three start anew; "temperature" is put on top of what is there. Label sets and
        a threshold that were found before are dropped, since they no longer hold.
        """
        asking, given = self._ready(), None if texts is None else self._listed(texts)
        method = method or ("temperature" if labels is not None else "batch" if given else "null")
        if method not in ("batch", "null", "order", "temperature"):
            raise InputError(
                f"method is {method!r}; expected 'batch', 'null', 'order' or 'temperature'"
            )
        if (method == "temperature") != (labels is not None):
            raise InputError(
                f"method {method!r} takes {'' if labels is None else 'no '}labels; with labels the "
                "temperature is found, without them a bias"
            )
        if method == "null":
            given = given or list(NULL_TEXTS)
        if not given:
            raise InputError(f"method {method!r} needs texts; give some that were not trained on")
        found: Calibration
        if method == "order":
            found = order_calibration(self._by_name(asking, given))
        else:
            raw = np.concatenate(list(self._raw(given)))
            if method == "batch":
                found = batch_calibration(raw)
            elif method == "null":
                found = null_calibration(raw)
            else:
                truth = self._gold(labels if labels is not None else (), len(given))
                before = self.settings_.calibration
                found = temperature_calibration(self._calibrated(raw), truth)
                found = found if before is None else before.then(found)
        self._learned(calibration=found, conformal=None, abstain_below=None)
        return self

    def conform(
        self, texts: Iterable[str], labels: Iterable[Any], *, method: label_sets.Method = "lac"
    ) -> Any:
        """Learn label sets from texts that neither training nor `calibrate` has seen.

        `conformal.fit` has the methods; `predict_set` gives the sets. Returns the classifier.
        """
        raw, truth = self._labelled(texts, labels)
        self._learned(conformal=label_sets.fit(raw, truth, method=method))
        return self

    def predict_set(self, texts: Iterable[str], *, coverage: float = 0.9) -> np.ndarray:
        """Return a set of labels for each text, bool `[texts, labels]`.

        The share of texts whose right label is in its set is `coverage` or more, on average over
        texts drawn as those of `conform`. Raises `InputError` without `conform`, or where its
        texts are too few for this coverage.
        """
        self._ready()
        sets = self.settings_.conformal
        if sets is None:
            raise InputError("there are no label sets yet; call conform with labelled texts first")
        parts = [sets.sets(self._calibrated(raw), coverage) for raw in self._raw(texts)]
        return np.concatenate([np.zeros((0, len(self.classes_)), bool), *parts])

    def abstain(
        self, texts: Iterable[str], labels: Iterable[Any], *, accuracy: float, least: int = 10
    ) -> Any:
        """Answer only where these texts say that `accuracy` of the answers given are right.

        The threshold (`threshold_`) is the lowest probability from which on that is so here, for at
        least `least` of these texts; it is as good as they are many. `score` counts a text without
        an answer as wrong. Returns the classifier. Raises `InputError` where no threshold will do.
        """
        check_share(accuracy, "accuracy")
        if accuracy == 0 or least < 1:
            raise InputError(f"accuracy is {accuracy}, least {least}; expected more than 0")
        scores, truth = self._labelled(texts, labels)
        best = np.exp(scores.astype(np.float64).max(axis=1))
        order = np.argsort(-best, kind="stable")
        right = np.cumsum((scores.argmax(axis=1) == truth)[order]) / (np.arange(len(order)) + 1)
        # Texts of equal probability are answered together or not at all.
        last = np.append(best[order][1:] < best[order][:-1], True)
        enough = np.arange(len(order)) >= min(least, len(order)) - 1
        reached = np.flatnonzero((right >= accuracy) & last & enough)
        if not len(reached):
            raise InputError(
                f"no threshold reaches an accuracy of {accuracy} with {least} answers or more on "
                f"these {len(truth)} texts, but at most {right[last & enough].max():.3f}; ask for "
                "less, or give more texts"
            )
        self._learned(abstain_below=float(best[order][reached[-1]]))
        return self

    def _labelled(
        self, texts: Iterable[str], labels: Iterable[Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        self._ready()
        if self.settings_.multi_label:
            raise InputError(
                "label sets and abstaining are for one label per text; with multi_label every "
                "label has a probability of its own: take those above a limit of yours"
            )
        given = self._listed(texts)
        truth = self._gold(labels, len(given))
        return self._calibrated(np.concatenate(list(self._raw(given)))), truth

    def _listed(self, texts: Iterable[str]) -> list[str]:
        listed = list(check_list(texts, "texts"))
        if not listed:
            raise InputError("texts: there is none; give at least one")
        return listed

    def _gold(self, labels: Iterable[Any], texts: int) -> np.ndarray:
        """Return the right column of each row of `_raw`."""
        rows = label_numbers(labels, list(self.classes_), self.settings_.multi_label)
        if len(rows) != texts:
            raise InputError(f"{texts} texts and {len(rows)} labels; give one per text")
        if self.settings_.multi_label:
            return 1 - np.array(rows, int).reshape(-1)
        return np.array(rows)

    def _by_name(self, asking: Asking, texts: Sequence[str]) -> np.ndarray:
        """Ask texts under cyclic orders: `[questions, orders, option names]`."""
        count = 2 if self.settings_.multi_label else len(self.classes_)
        if asking.own_names or asking.shifts != 1 or self._size() < count:
            raise InputError(
                "method 'order' is for options named by letters, all of them in one prompt, asked "
                "in one order; leave it out"
            )
        moved = shifts(count, min(count, 8))
        scores = []
        for shift in moved:
            questions = [
                question._replace(choice=tuple(shifted(question.choice, shift)))
                for text in texts
                for question in self._questions(text)
            ]
            each = len(questions) // len(texts)
            where = [f"row {i + 1} (index {i})" for i in range(len(texts)) for _ in range(each)]
            scores.append(self._ask(questions, where))
        return np.array(scores).transpose(1, 0, 2)

    def _calibrated(self, raw: np.ndarray) -> np.ndarray:
        calibration = self.settings_.calibration
        return raw if calibration is None else calibration.apply(raw)

    def _learned(self, **values: Any) -> None:
        self.settings_ = self.settings_.model_copy(update=values)


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
        limit = check_share(limit, "abstain_below")
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
