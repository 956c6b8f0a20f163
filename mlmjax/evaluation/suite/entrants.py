"""Who takes part in a suite: models with their heads, and what they are measured against."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from mlmjax.config.run import Head
from mlmjax.config.suite import Suite
from mlmjax.config.task import Task
from mlmjax.data.contamination import read_training_manifest
from mlmjax.errors import InputError
from mlmjax.evaluation.questions import Question
from mlmjax.evaluation.suite.sweep import Answers, answer_fine_tuned, read_texts
from mlmjax.evaluation.suite.torch_baseline import answer_by_transformers, fingerprint
from mlmjax.model.modernbert import Model, ModernBertForMaskedLM
from mlmjax.storage import CONFIG, TOKENIZER_FILES, hash_file
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.weights import hub
from mlmjax.weights.pretrained import load_pretrained
from mlmjax.weights.tensor_files import WEIGHTS, weight_map

Rows = Sequence[Mapping[str, str]]


def tfidf_regression(train: Rows, test: Rows) -> list[str]:
    """Fit TF-IDF and logistic regression on `text` and `label`; return the labels of `test`."""
    words = make_pipeline(
        TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
    )
    words.fit([row["text"] for row in train], [row["label"] for row in train])
    return [str(label) for label in words.predict([row["text"] for row in test])]


METHODS: Mapping[Head, str] = {"mlm": "MLM head", "classification": "classification head"}


class Contender:
    """A model of the suite, loaded when it is first asked; `digest` is the hash of its files."""

    def __init__(self, name: str, revision: str | None, dtype: str, batch_size: int | None):
        self.name, self.dtype, self.batch_size = name, dtype, batch_size
        self.folder = hub.fetch(name, revision=revision)
        self.training = read_training_manifest(self.folder)
        self._loaded: tuple[Model, Tokenizer] | None = None
        self.load()
        self.rest()
        names = set((weight_map(self.folder) or {}).values()) or {WEIGHTS}
        files = [self.folder / name for name in (CONFIG, *TOKENIZER_FILES, *sorted(names))]
        lines = [f"{path.name} {hash_file(path)}" for path in files if path.exists()]
        self.digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """What a result depends on of the model."""
        return {"model": self.digest, "dtype": self.dtype}

    def load(self) -> tuple[Any, Tokenizer]:
        """Load the model unless it is; raises `InputError` for one without an MLM head."""
        if self._loaded is None:
            self._loaded = load_pretrained(self.folder, dtype=self.dtype)
            if not isinstance(self._loaded[0], ModernBertForMaskedLM):
                raise InputError(
                    f"{self.name}: is a {type(self._loaded[0]).__name__}; a suite asks and "
                    "fine-tunes masked language models (give others as --baseline transformers:)"
                )
        return self._loaded

    def rest(self) -> None:
        """Give its memory back; several models are not held at once."""
        self._loaded = None


@dataclass(frozen=True)
class Contestant:
    """A row of the fine-tuned table: a method on a model.

    `identity` is what its results depend on besides task, rows, setting and seed; `answer` takes
    what `answer_fine_tuned` takes after the tokenizer and the head.
    """

    model: str
    method: str
    key: str
    identity: Mapping[str, Any]
    answer: Callable[..., Answers]


def contestants(
    suite: Suite, contenders: Sequence[Contender], baselines: Mapping[str, Path]
) -> Iterator[Contestant]:
    """Yield every model with every head of the suite, then the baselines."""
    for contender in contenders:
        for head in suite.heads:
            yield Contestant(
                contender.name, METHODS[head], head, contender.identity, _with_head(contender, head)
            )
    for name, folder in baselines.items():
        identity = {
            "model": fingerprint(folder),
            "libraries": {library: version(library) for library in ("torch", "transformers")},
        }
        yield Contestant(name, "transformers", "transformers", identity, _by_torch(folder))


def _with_head(contender: Contender, head: Head) -> Callable[..., Answers]:
    def answer(task: Task, *arguments: Any, **options: Any) -> Answers:
        model, tokenizer = contender.load()
        options["batch_size"] = contender.batch_size
        return answer_fine_tuned(model, tokenizer, task, head, *arguments, **options)

    return answer


def _by_torch(folder: Path) -> Callable[..., Answers]:
    return lambda *arguments, **options: answer_by_transformers(folder, *arguments, **options)


def answer_by_tfidf(task: Task, train: Sequence[Question], asked: Sequence[Question]) -> Answers:
    """Answer by TF-IDF and logistic regression: all probability on the predicted label."""
    names = task.label_names
    texts = [
        [
            {"text": text, "label": names[question.gold]}
            for text, question in zip(read_texts(task, part), part, strict=True)
        ]
        for part in (train, asked)
    ]
    try:
        found = tfidf_regression(*texts)
    except ValueError as error:  # no word is left of any text
        raise InputError(f"task {task.name}: TF-IDF cannot read the rows: {error}") from error
    log_probs = np.full((len(asked), len(names)), -np.inf, np.float32)
    log_probs[np.arange(len(asked)), [names.index(name) for name in found]] = 0.0
    return Answers(log_probs, 0, [])
