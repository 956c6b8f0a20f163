"""Entrants of a suite: models with their heads under every setting of the sweep, and TF-IDF."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from mlmjax.config.run import Head
from mlmjax.config.suite import Suite, Sweep
from mlmjax.config.task import Task
from mlmjax.data.contamination import read_training_manifest
from mlmjax.errors import InputError, RunError
from mlmjax.evaluation.evaluate import Answers, answer_questions, make_scorer
from mlmjax.evaluation.questions import Question
from mlmjax.model.modernbert import ModernBertForMaskedLM, with_classifier
from mlmjax.reporting.terminal import Progress
from mlmjax.storage import CONFIG, TOKENIZER_FILES, hash_file
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.finetune import fine_tune
from mlmjax.weights import hub
from mlmjax.weights.pretrained import load_pretrained
from mlmjax.weights.tensors.tensor_files import WEIGHTS, weight_map

MANY_PRODUCTS = 2 * 10**6
"""From so many labels times words of the texts on, logistic regression takes seconds to minutes.

A linear SVM takes a tenth of it, and was as accurate or more on held-out rows after 3,000 others:
0.600 to 0.563 on the 57 subjects of MMLU, 0.873 to 0.865 on 20 newsgroups, 0.748 to 0.685 on 300
labels of invented words.
"""

METHODS: Mapping[Head, str] = {"mlm": "MLM head", "classification": "classification head"}


class Setting(NamedTuple):
    """One point of a sweep."""

    epochs: int
    learning_rate: float


class DivergedError(RunError):
    """A training whose loss was no longer finite."""


class SuiteModel:
    """A model of the suite, loaded on first use; `identity` is what its results depend on."""

    def __init__(self, name: str, revision: str | None, dtype: str, batch_size: int | None):
        self.name, self.dtype, self.batch_size = name, dtype, batch_size
        self.folder = hub.fetch(name, revision=revision)
        self.training = read_training_manifest(self.folder)
        self._loaded: tuple[ModernBertForMaskedLM, Tokenizer] | None = None
        self.load()
        self.unload()
        weights = set((weight_map(self.folder) or {}).values()) or {WEIGHTS}
        files = [self.folder / name for name in (CONFIG, *TOKENIZER_FILES, *sorted(weights))]
        digest = hash_files([path for path in files if path.exists()])
        self.identity = {"model": digest, "dtype": dtype}

    def load(self) -> tuple[ModernBertForMaskedLM, Tokenizer]:
        """Load the model and its tokenizer; raise `InputError` for one without an MLM head."""
        if self._loaded is None:
            model, tokenizer = load_pretrained(self.folder, dtype=self.dtype)
            if not isinstance(model, ModernBertForMaskedLM):
                raise InputError(
                    f"{self.name}: is a {type(model).__name__}; a suite evaluates and fine-tunes "
                    "masked language models; give a model with an MLM head"
                )
            self._loaded = model, tokenizer
        return self._loaded

    def unload(self) -> None:
        """Free the model's memory; several models are not held at once."""
        self._loaded = None


@dataclass(frozen=True)
class Entrant:
    """A row of the fine-tuned table: a method on a model.

    `identity` is what its results depend on besides task, rows, setting and seed. `answer` takes
    the arguments of `answer_fine_tuned` after the head. `source` is a model of the suite. `cells`
    is the folder of results that were computed elsewhere; such an entrant computes nothing.
    """

    model: str
    method: str
    key: str
    identity: Mapping[str, Any]
    answer: Callable[..., Answers]
    source: SuiteModel | None = None
    cells: Path | None = None


def hash_files(paths: Sequence[Path]) -> str:
    """Return one hash of the names and contents of files."""
    lines = [f"{path.name} {hash_file(path)}" for path in paths]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def make_entrants(suite: Suite, models: Sequence[SuiteModel]) -> list[Entrant]:
    """Return every model with every head of the suite."""
    return [
        Entrant(
            model=model.name,
            method=METHODS[head],
            key=head,
            identity=model.identity,
            answer=partial(_answer, model, head),
            source=model,
        )
        for model in models
        for head in suite.heads
    ]


def _answer(model: SuiteModel, head: Head, task: Task, *arguments: Any, **options: Any) -> Answers:
    options["batch_size"] = model.batch_size
    return answer_fine_tuned(*model.load(), task, head, *arguments, **options)


def settings_of(sweep: Sweep) -> list[Setting]:
    """Return the points of a sweep in the order of preference among equals.

    >>> [tuple(one) for one in settings_of(Sweep(epochs=(2, 1), learning_rate=(5e-5, 2e-5)))]
    [(1, 2e-05), (1, 5e-05), (2, 2e-05), (2, 5e-05)]
    """
    return [Setting(e, rate) for e in sorted(sweep.epochs) for rate in sorted(sweep.learning_rate)]


def choose(scores: Mapping[Setting, float | None]) -> Setting | None:
    """Return the setting with the best score on validation rows; None if all have diverged.

    Ties go to fewer epochs, then to the lower learning rate.

    >>> choose({Setting(2, 2e-5): 0.5, Setting(1, 5e-5): 0.5, Setting(1, 3e-5): None})
    Setting(epochs=1, learning_rate=5e-05)
    >>> choose({Setting(2, 2e-5): 0.6, Setting(1, 5e-5): 0.5}).epochs, choose({Setting(1, 1): None})
    (2, None)
    """
    known = [(setting, score) for setting, score in scores.items() if score is not None]
    return min(known, key=lambda one: (-one[1], one[0]), default=(None, 0.0))[0]


def answer_fine_tuned(
    model: ModernBertForMaskedLM,
    tokenizer: Tokenizer,
    task: Task,
    head: Head,
    train: Sequence[Question],
    asked: Sequence[Question],
    setting: Setting,
    sweep: Sweep,
    *,
    seed: int,
    batch_size: int | None = None,
    order_rows: int = 0,
    progress: Progress | None = None,
) -> Answers:
    """Fine-tune a copy of the model with one head and let it answer.

    It is trained on `train` and answers `asked`. The head `mlm` learns to give the answer's token
    at the slot of the task's prompt; `classification` puts a new linear layer, drawn by `seed`,
    over the pooled text of `Task.for_head`. Equal seeds give equal answers. Raises `DivergedError`.
    """
    longest = min(sweep.max_length, model.config.max_position_embeddings)
    tuned = with_classifier(model, task.label_names, seed=seed) if head != "mlm" else model
    options: Any = {"batch_size": batch_size, "max_length": longest}
    scorer = make_scorer(tuned, tokenizer, task, train, **options)
    prompts = scorer.prompts([q.row for q in train], where=[q.where for q in train])
    scorer.shortened = 0
    losses: list[float] = []
    try:
        scorer.model = fine_tune(
            scorer.model,
            prompts,
            scorer.targets([question.gold for question in train]),
            **setting._asdict(),
            **sweep.model_dump(include={"batch_size", "weight_decay", "warmup"}),
            seed=seed,
            pad_id=tokenizer.pad_id,
            after_epoch=lambda _, epoch: losses.append(epoch.loss),
            progress=progress,
        )
    except RunError as error:
        raise DivergedError(str(error)) from error
    return answer_questions(scorer, task, asked, order_rows)._replace(losses=losses)


def read_texts(task: Task, questions: Sequence[Question]) -> list[str]:
    """Return the text that TF-IDF and baselines read: the fields of `Task.for_head`, by line."""
    fields = task.for_head().head_template().fields
    return ["\n".join(question.row[name] for name in fields) for question in questions]


def tfidf_regression(
    texts: Sequence[str], labels: Sequence[str], asked: Sequence[str]
) -> list[str]:
    """Fit TF-IDF and logistic regression on labelled texts; return the labels of `asked`."""
    words = make_pipeline(
        TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
    )
    words.fit(texts, labels)
    return [str(label) for label in words.predict(asked)]


def tfidf_linear(
    texts: Sequence[str],
    labels: Sequence[str],
    asked: Sequence[str],
    progress: Progress | None = None,
) -> tuple[str, list[str]]:
    """Fit TF-IDF and a linear model on labelled texts; return its name and the labels of `asked`.

    It is logistic regression, and above `MANY_PRODUCTS` a linear support vector machine, fitted to
    one label after another. `progress` gets the labels done and all labels. Raises `ValueError` if
    no text has a word.
    """
    words = TfidfVectorizer(sublinear_tf=True)
    rows = words.fit_transform(texts)
    names = sorted(set(labels))
    if len(names) * rows.nnz <= MANY_PRODUCTS:
        return "TF-IDF + logistic regression", tfidf_regression(texts, labels, asked)
    wanted, gold = words.transform(asked), np.array(labels)
    scores = np.empty((len(asked), len(names)))
    for done, name in enumerate(names):
        machine = LinearSVC(random_state=0).fit(rows, gold == name)
        scores[:, done] = machine.decision_function(wanted)
        if progress:
            progress(done + 1, len(names))
    return "TF-IDF + linear SVM", [names[best] for best in scores.argmax(axis=1)]


def answer_by_tfidf(task: Task, train: Sequence[Question], asked: Sequence[Question]) -> Answers:
    """Answer by TF-IDF and logistic regression: the predicted label gets all probability."""
    names = task.label_names
    gold = [names[question.gold] for question in train]
    try:
        found = tfidf_regression(read_texts(task, train), gold, read_texts(task, asked))
    except ValueError as error:  # no word is left of any text
        raise InputError(f"task {task.name}: TF-IDF cannot read the rows: {error}") from error
    log_probs = np.full((len(asked), len(names)), -np.inf, np.float32)
    log_probs[np.arange(len(asked)), [names.index(name) for name in found]] = 0.0
    return Answers(log_probs, 0)
