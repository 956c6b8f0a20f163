"""A text classifier in the shape of scikit-learn: zero-shot through the mask, or fine-tuned."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score

from mlmjax import hub
from mlmjax.config import ShortenSide, StrictTable, decode
from mlmjax.errors import InputError
from mlmjax.finetune import fine_tune
from mlmjax.hf import Model, load_pretrained, save_pretrained
from mlmjax.modernbert import ModernBertForMaskedLM
from mlmjax.prompts import Prompt, Template, Verbalizer
from mlmjax.score import Scorer
from mlmjax.tokenizer import Tokenizer, check_text

DEFAULT_PROMPT = (
    "You will be given a text as well as a list of labels. "
    "Read the text carefully and select the right label from the list.\n"
    "TEXT:\n{text}\nCHOICES:\n{options}\nANSWER:\nAnswer: [unused0] [MASK]"
)

Labels = Sequence[str] | Mapping[str, str]
Source = str | Path | tuple[ModernBertForMaskedLM, Tokenizer]


class Settings(StrictTable):
    """What `save_pretrained` writes beside the model; `labels` maps each name to a description."""

    format: Annotated[int, Field(ge=1, le=1)] = 1
    labels: Mapping[str, str]
    template: str
    shorten: Mapping[str, ShortenSide] = {}
    max_length: Annotated[int, Field(gt=0)] | None = None


class Classifier(ClassifierMixin, BaseEstimator):
    """Assigns each text one of the labels by one forward pass, and the answer at the slot.

    `source` is a folder, a hub id, or a `(model, tokenizer)` pair. `labels` is a list of names or a
    table `{name: description}`, at least two; None takes those a saved classifier has, else those
    that `fit` sees, sorted. `template` (a `Template`, or its text; a text that is too long loses
    its end) has the field `{text}` and, as a rule, `{options}`, which are the labels; a template
    without them is answered by the label itself, which then has to be one token. Without `fit` the
    answers are zero-shot.

    As in scikit-learn the constructor only stores its arguments, and nothing is read before it is
    needed; `classes_` holds the labels in the order given, `history_` an entry per epoch of `fit`.
    """

    def __init__(
        self,
        source: Source,
        labels: Labels | None = None,
        *,
        template: Template | str | None = None,
        dtype: str = "float32",
        batch_size: int | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ):
        self.source = source
        self.labels = labels
        self.template = template
        self.dtype = dtype
        self.batch_size = batch_size
        self.max_length = max_length
        self.revision = revision
        self.local_files_only = local_files_only

    @classmethod
    def from_pretrained(
        cls, source: Source, labels: Labels | None = None, **options: Any
    ) -> "Classifier":
        """Construct and load at once; a folder of `save_pretrained` brings its own labels.

        Raises `InputError` for a source that cannot be loaded, and where there are no labels.
        """
        classifier = cls(source, labels, **options)
        classifier._scorer()
        return classifier

    def set_params(self, **params: Any) -> "Classifier":
        """Set constructor arguments; what was loaded or fitted under others is dropped."""
        super().set_params(**params)
        for name in [name for name in vars(self) if name.endswith("_")]:
            delattr(self, name)
        return self

    @property
    def shortened(self) -> int:
        """How many texts have been cut so far, because their prompt was too long."""
        return self._scorer().shortened

    def predict(self, texts: Iterable[str]) -> np.ndarray:
        """Return the most probable label of each text, str `[texts]`."""
        best = self.predict_proba(texts).argmax(axis=1)
        return self.classes_[best]

    def predict_proba(self, texts: Iterable[str]) -> np.ndarray:
        """Return the probability of each label for each text, `[texts, labels]`; rows sum to 1.

        Any iterable of texts will do. Raises `InputError` that names, by its row, each text that is
        blank or no text.
        """
        scorer = self._scorer()
        rows = (self._row(text) for text in _one_dimensional(texts, "texts"))
        return np.exp(scorer.log_probs(rows).astype(np.float64))

    def score(
        self, texts: Iterable[str], labels: Iterable[str], sample_weight: Any = None
    ) -> float:
        """Return the accuracy on labelled texts."""
        truth = _label_list(labels)
        return float(accuracy_score(truth, self.predict(texts), sample_weight=sample_weight))

    def fit(
        self,
        texts: Iterable[str],
        labels: Iterable[str],
        *,
        epochs: int = 3,
        learning_rate: float = 3e-5,
        batch_size: int = 32,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        seed: int = 0,
        validation: tuple[Iterable[str], Iterable[str]] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Classifier":
        """Fine-tune on labelled texts by answer token prediction, always from the source's weights.

        The defaults are from the middle of the paper's sweep (arXiv 2502.03793). Equal seeds give
        equal weights. `validation` is a pair of texts and labels, whose accuracy after each epoch
        stands in `history_`; `progress` is called with updates done and updates in all.

        Raises `InputError` for blank texts, labels that are not among `classes_`, fewer than two
        distinct labels, and lengths that differ; `RunError` when the loss is no longer finite.
        """
        if epochs < 1 or batch_size < 1:
            raise InputError(f"fit: epochs {epochs}, batch_size {batch_size}; expected 1 or more")
        texts, labels = list(_one_dimensional(texts, "texts")), _label_list(labels)
        if len(set(labels)) < 2:
            found = ", ".join(map(repr, sorted(set(labels)))) or "none"
            raise InputError(f"fit: the distinct labels are {found}; expected at least two")
        scorer = self._load(seen=sorted(set(labels)))
        prompts, answers = self._examples(scorer, texts, labels)
        held_out = None if validation is None else self._held_out(scorer, *validation)

        letters = np.array([ids[0] for ids in scorer.verbalizer.ids(scorer.tokenizer)])
        history: list[dict[str, float]] = []

        def after_epoch(model: Model, loss: float) -> None:
            history.append({"epoch": len(history) + 1, "loss": loss})
            if held_out is not None:
                rows, truth = held_out
                scorer.model = model
                guess = scorer.log_probs(rows).argmax(axis=1)
                history[-1]["validation_accuracy"] = float(np.mean(guess == truth))

        scorer.model = fine_tune(
            scorer.model,
            prompts,
            letters[answers],
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            weight_decay=weight_decay,
            warmup=warmup,
            seed=seed,
            buckets=scorer.engine.buckets,
            pad_id=scorer.tokenizer.pad_id,
            after_epoch=after_epoch,
            progress=progress,
        )
        self._keep(scorer)
        self.history_ = history
        return self

    def save_pretrained(self, path: str | Path, *, dtype: str = "float32") -> None:
        """Write the model as a Hugging Face folder, with the labels and the template beside it.

        `Classifier.from_pretrained(path)` brings all of it back; raises as `hf.save_pretrained`.
        """
        scorer = self._scorer()
        settings = Settings(
            labels=self._descriptions_,
            template=scorer.template.text,
            shorten=dict(scorer.template.shorten),  # type: ignore[arg-type]
            max_length=self.max_length,
        )
        text = json.dumps(settings.model_dump(), ensure_ascii=False, indent=2) + "\n"
        save_pretrained(
            scorer.model, scorer.tokenizer, path, dtype=dtype, more_files={hub.CLASSIFIER: text}
        )

    def _scorer(self) -> Scorer:
        if not hasattr(self, "scorer_"):
            self._keep(self._load())
        return self.scorer_

    def _keep(self, scorer: Scorer) -> None:
        self.scorer_ = scorer
        self.classes_ = np.array(scorer.labels)

    def _load(self, seen: Sequence[str] | None = None) -> Scorer:
        """Read the source; labels are the given ones, else the saved ones, else those `seen`."""
        saved = None
        model: Any
        if isinstance(self.source, tuple):
            model, tokenizer = self.source
        else:
            where: dict[str, Any] = {
                "revision": self.revision,
                "local_files_only": self.local_files_only,
            }
            folder = hub.fetch(self.source, **where)
            if (folder / hub.CLASSIFIER).exists():
                values = hub.read_json(folder, hub.CLASSIFIER)
                saved = decode(Settings, values, str(folder / hub.CLASSIFIER))
            model, tokenizer = load_pretrained(self.source, dtype=self.dtype, **where)
        labels = self.labels if self.labels is not None else saved.labels if saved else seen
        if labels is None:
            raise InputError("the classifier has no labels; give labels, or call fit first")
        self._descriptions_ = _described(labels)
        template = self.template
        if template is None and saved is not None:
            template = Template(saved.template, shorten=dict(saved.shorten))
        if not isinstance(template, Template):
            template = Template(template or DEFAULT_PROMPT, shorten={"text": "tail"})
        if "text" not in template.fields or set(template.fields) - {"text", "options"}:
            raise InputError(
                f"template: its fields are {', '.join(template.fields) or 'none'}; expected "
                "{text} and, as a rule, {options}"
            )
        # As in training: without the options before its eyes a model cannot know what B stands for.
        name = Verbalizer.letters if "options" in template.fields else Verbalizer.words
        return Scorer(
            model,
            tokenizer,
            template,
            name(list(self._descriptions_)),
            batch_size=self.batch_size,
            max_length=self.max_length or (saved.max_length if saved else None),
        )

    def _row(self, text: str) -> dict[str, Any]:
        options = [f"{name}: {d}" if d else name for name, d in self._descriptions_.items()]
        return {"text": text, "options": options}

    def _held_out(
        self, scorer: Scorer, texts: Iterable[str], labels: Iterable[str]
    ) -> tuple[list[dict[str, Any]], np.ndarray]:
        texts = list(_one_dimensional(texts, "validation texts"))
        _, truth = self._examples(scorer, texts, _label_list(labels))
        return [self._row(text) for text in texts], truth

    def _examples(
        self, scorer: Scorer, texts: Sequence[str], labels: Sequence[str]
    ) -> tuple[list[Prompt], np.ndarray]:
        """Check labelled texts: the prompt of each, and the index of its label."""
        if len(texts) != len(labels):
            raise InputError(f"fit: {len(texts)} texts and {len(labels)} labels; give one per text")
        index = {label: i for i, label in enumerate(scorer.labels)}
        problems = [
            f"row {i + 1} (index {i}): label {label!r} is none of {', '.join(index)}"
            for i, label in enumerate(labels)
            if label not in index
        ]
        if problems:
            raise InputError(problems[0], problems[1:])
        prompts = scorer.prompts([self._row(text) for text in texts])
        return prompts, np.array([index[label] for label in labels])


def _one_dimensional(values: Iterable[Any], what: str) -> Iterable[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InputError(f"{what}: is one {type(values).__name__}; expected a list of texts")
    if getattr(values, "ndim", 1) != 1:
        raise InputError(f"{what}: is a table; expected one column of texts")
    return values


def _label_list(labels: Iterable[str]) -> list[str]:
    listed = list(_one_dimensional(labels, "labels"))
    for i, label in enumerate(listed):
        check_text(label, f"row {i + 1} (index {i}): label")
    return [str(label) for label in listed]


def _described(labels: Labels) -> dict[str, str]:
    """Return `{name: description}`; raises `InputError` for blank, repeated or too few names."""
    if isinstance(labels, Mapping):
        described = dict(labels)
    else:
        names = list(_one_dimensional(labels, "labels"))
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        if twice:
            raise InputError(f"labels: {twice[0]!r} stands there twice; expected distinct names")
        described = dict.fromkeys(names, "")
    for name, description in described.items():
        check_text(name, f"labels: name {name!r}")
        check_text(description, f"labels: the description of {name!r}")
        if not name.strip():
            raise InputError(f"labels: {name!r} is blank; expected a name")
    if len(described) < 2:
        raise InputError(
            f"labels: found {', '.join(described) or 'none'}; expected at least two distinct names"
        )
    return {str(name): description.strip() for name, description in described.items()}
