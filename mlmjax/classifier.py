"""A text classifier in the shape of scikit-learn: zero-shot through the mask, or fine-tuned."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score

from mlmjax import hub
from mlmjax.asking import LongText, Question
from mlmjax.classifier_card import classifier_card
from mlmjax.errors import InputError
from mlmjax.heads import with_classifier
from mlmjax.hf import Model, save_pretrained
from mlmjax.learning import Recipe, held_out, learn, shown_with
from mlmjax.log import bar
from mlmjax.prompts import Template
from mlmjax.score import check_texts
from mlmjax.settings import Answer, Head, make_asking, one_dimensional, share
from mlmjax.tables import decode
from mlmjax.tokenizer import Tokenizer
from mlmjax.trust import Trust
from mlmjax.truth import label_numbers

CHUNK_PROMPTS = 4096
"""Prompts, about, that are laid out together; texts are read as they are needed."""

PART = 4096
"""Texts that `predict_proba` lays out together."""
APPLIES = 0.5
"""From this probability on one of several labels applies."""

Labels = Sequence[str] | Mapping[str, str]
Source = str | Path | tuple[Model, Tokenizer]


class Classifier(Trust, ClassifierMixin, BaseEstimator):
    """Assigns each text one of the labels, or several, by the answer at the slot.

    `source` is a folder, a hub id, or a `(model, tokenizer)` pair. `labels` is a list of names or a
    table `{name: description}`, at least two; None takes those a saved classifier has, else those
    that `fit` sees, sorted. Without `fit` the answers are zero-shot. As in scikit-learn the
    constructor only stores its arguments, and nothing is read before it is needed.

    How it asks (None: as a saved classifier does, else the first named):

    - `head`: "mlm", the answer at the slot, or "classification", a last layer that `fit` trains.
    - `answer`: "letters", options in the prompt named A, B, ... (past 457 of them 1, 2, ...);
      "words", the label itself, which has to be one token; "continuation", a label of any number of
      tokens by its pseudo-log-likelihood at the slot, one forward pass for each of its tokens.
    - More labels than one prompt holds are asked in rounds (`shortlist.in_rounds`).
    - `instruction` replaces the first sentence of the prompt; `template` (a `Template`, or its
      text) the whole of it. It has the field `{text}`, as a rule `{options}`, and `{examples}`
      and `{label}` where these are used.
    - `examples`: pairs of text and label to stand in the prompt, as many as fit, by turns of label.
    - `orders`: 1, the options as given; k or "all" evenly spaced cyclic orders, their
      probabilities averaged, at that many forward passes. `fit` shows each example in one of these
      orders, and a fitted classifier is to be asked in those it was fitted in.
    - `long_text`: "shorten" a text that is too long at its end (counted in `shortened`), or ask
      windows of it and take the "mean" of their probabilities, or each label's "max".
    - `multi_label`: each label is a question of yes or no; labels are lists of names, answers
      columns of 0 and 1, probabilities do not sum to 1.
    - `abstain_below`: a text whose best probability is lower is answered by "".

    `epochs` to `patience` are those of `fit` (`learning.Recipe`). `progress` shows a bar: None on a
    terminal when it takes long. `classes_` has the labels in the order given, `history_` an entry
    per epoch of `fit`.
    """

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
    def from_pretrained(
        cls, source: Source, labels: Labels | None = None, **options: Any
    ) -> "Classifier":
        """Construct and load at once; a folder of `save_pretrained` brings its own labels.

        Raises `InputError` for a source that cannot be loaded, and where there are no labels.
        """
        classifier = cls(source, labels, **options)
        classifier._ready()
        return classifier

    def set_params(self, **params: Any) -> "Classifier":
        """Set constructor arguments; what was loaded or fitted under others is dropped."""
        super().set_params(**params)
        for name in [name for name in vars(self) if name.endswith("_")]:
            delattr(self, name)
        return self

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that this takes a list of texts."""
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.requires_fit = False
        tags.classifier_tags.multi_label = bool(self.multi_label)
        return tags

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

    def score(
        self, texts: Iterable[str], labels: Iterable[Any], sample_weight: Any = None
    ) -> float:
        """Return the accuracy on labelled texts; of several labels all have to be right."""
        predicted = self.predict(texts)
        truth = label_numbers(labels, list(self.classes_), self.settings_.multi_label, known=False)
        if self.settings_.multi_label:
            return float(accuracy_score(truth, predicted, sample_weight=sample_weight))
        names = [*self.classes_, ""]
        right = [names[number] for number in truth]
        return float(accuracy_score(right, predicted, sample_weight=sample_weight))

    def fit(
        self,
        texts: Iterable[str],
        labels: Iterable[Any],
        *,
        validation: tuple[Iterable[str], Iterable[Any]] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **recipe: Any,
    ) -> "Classifier":
        """Fine-tune on labelled texts, always from the source's weights.

        `recipe` replaces the constructor's `epochs`, `learning_rate`, `batch_size` (there
        `train_batch_size`), `weight_decay`, `warmup`, `seed`, `validation_share`, `patience`. Equal
        seeds give equal weights. `validation` is a pair of texts and labels, else
        `validation_share` of the rows is held out; their accuracy and loss after each epoch stand
        in `history_`. `progress` is called with updates done and updates in all.

        Raises `InputError` for blank texts, labels that are not among `classes_`, fewer than two
        distinct labels, and lengths that differ; `RunError` when the loss is no longer finite.
        """
        how = self._recipe(recipe)
        texts, labels = list(one_dimensional(texts, "texts")), _rows(labels, "labels")
        settings, model, tokenizer, _ = self._read(seen=labels)
        several, names = settings.multi_label, list(settings.labels)
        if how.patience is not None and validation is None and not how.validation_share:
            raise InputError(
                f"fit: patience is {how.patience}, but no texts are held out to be patient about; "
                "give validation or validation_share, or leave patience out"
            )
        truth = label_numbers(labels, names, several)
        if len({str(one) for one in truth}) < 2:
            found = ", ".join(sorted({repr(one) for one in labels})) or "none"
            raise InputError(f"fit: the distinct labels are {found}; expected at least two")
        if len(texts) != len(truth):
            raise InputError(f"fit: {len(texts)} texts and {len(truth)} labels; give one per text")
        if settings.head == "classification":
            model = with_classifier(model, names, seed=how.seed)
        asking = make_asking(settings, model, tokenizer, batch_size=self.batch_size)
        # What was learned of the probabilities of other weights does not hold for these.
        fresh = {"calibration": None, "conformal": None, "abstain_below": self.abstain_below}
        other = type(self)(**self.get_params(deep=False))
        other._keep(settings.model_copy(update=fresh), asking)
        train: Sequence[int] = range(len(texts))
        out = None
        if validation is not None:
            if not isinstance(validation, Sequence) or len(validation) != 2:
                raise InputError("validation: expected a pair of texts and their labels")
            out = (
                list(one_dimensional(validation[0], "validation texts")),
                _rows(validation[1], "validation labels"),
            )
        elif how.validation_share:
            train, rows = held_out([str(one) for one in truth], how.validation_share, how.seed)
            out = [texts[i] for i in rows], [labels[i] for i in rows]
        if out is not None and not out[0]:
            raise InputError("validation: there is no text to hold out; give more rows")
        examples = other._examples(train, texts, truth, how.seed)
        judge = None if out is None else other._judge(*out)
        with bar("fine-tuning", self.progress) as shown:
            model, history = learn(asking, examples, how, judge=judge, progress=progress or shown)
        asking.scorer.model = model
        self._keep(other.settings_, asking)
        self.history_ = history
        return self

    def save_pretrained(self, path: str | Path, *, dtype: str = "float32") -> None:
        """Write the model as a Hugging Face folder, and all else of the classifier beside it.

        `Classifier.from_pretrained(path)` brings all of it back; raises as `hf.save_pretrained`.
        """
        scorer = self._ready().scorer
        values = self.settings_.model_dump(mode="json", exclude_none=True)
        files = {hub.CLASSIFIER: json.dumps(values, ensure_ascii=False, indent=2) + "\n"}
        if self.manifest_ is not None and not hasattr(self, "history_"):
            files[hub.TRAINING] = self.manifest_
        card = classifier_card(scorer.model, self.settings_)
        save_pretrained(
            scorer.model, scorer.tokenizer, path, dtype=dtype, card=card, more_files=files
        )

    def _recipe(self, given: Mapping[str, Any]) -> Recipe:
        own = {name: getattr(self, name) for name in Recipe.model_fields}
        own["batch_size"] = self.train_batch_size
        values = {**own, **given}
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
        return decode(Recipe, plain, "fit")

    def _examples(
        self, rows: Sequence[int], texts: Sequence[str], truth: Sequence[Any], seed: int
    ) -> tuple[list[Any], list[int]]:
        """Return prompts to learn from, and the columns of their answers."""
        names = check_texts(texts)
        questions: list[Question] = []
        answers: list[int] = []
        where: list[str] = []
        size, labels = self._size(), len(self.classes_)
        for row in rows:
            asked = self._questions(texts[row])
            if self.settings_.multi_label:
                golds = [0 if has else 1 for has in truth[row]]
            else:
                golds = [self._order()[truth[row]]]
                if self.settings_.head == "mlm":
                    drawn = shown_with(truth[row], labels, size, np.random.default_rng([seed, row]))
                    asked = [asked[0]._replace(choice=drawn)]
            questions += asked
            answers += golds
            where += [names[row]] * len(asked)
        return self.asking_.examples(questions, answers, where, seed=seed)

    def _judge(self, texts: Sequence[str], labels: Sequence[Any]) -> Callable[[Model], Any]:
        """Return the function from a model to its accuracy and loss on these texts."""
        check_texts(texts)
        truth = self._gold(labels, len(texts))

        def judge(model: Model) -> tuple[float, float]:
            self.asking_.scorer.model = model
            raw = np.concatenate(list(self._raw(texts)))
            right = raw.argmax(axis=1) == truth
            return float(right.mean()), float(-raw[np.arange(len(truth)), truth].mean())

        return judge


def _rows(labels: Any, what: str) -> list[Any]:
    """Return right answers as a list, whatever is in its rows; raises `InputError` for no list."""
    if isinstance(labels, str | bytes | Mapping | Set) or not isinstance(labels, Iterable):
        raise InputError(f"{what}: is one {type(labels).__name__}; expected a list, one per text")
    return list(labels)
