"""Fine-tuning one head on one task under one setting, and the choice among settings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlmjax.config.run import Head
from mlmjax.config.suite import Sweep
from mlmjax.config.task import Task
from mlmjax.errors import InputError, RunError
from mlmjax.evaluation.questions import Question
from mlmjax.model.modernbert import ModernBertForMaskedLM, with_classifier
from mlmjax.scoring.scorers import HeadScorer, RowScorer, Scorer
from mlmjax.statistics.option_orders import order_sensitivity
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.finetune import fine_tune

Progress = Callable[[int, int], None]


class Setting(NamedTuple):
    """One point of a sweep."""

    epochs: int
    learning_rate: float


class DivergedError(RunError):
    """A training whose loss was no longer finite."""


class Answers(NamedTuple):
    """Log probabilities `[questions, labels]`, how many texts were cut, mean loss per epoch.

    `order` is what `orders.sensitivity` says of them, None where the order was not changed.
    """

    log_probs: np.ndarray
    shortened: int
    losses: list[float]
    order: dict[str, Any] | None = None


def settings_of(sweep: Sweep) -> list[Setting]:
    """Return the points of a sweep, in the order in which equally good ones are preferred.

    >>> settings_of(Sweep(epochs=(2, 1), learning_rate=(5e-5, 2e-5)))[:2]
    [Setting(epochs=1, learning_rate=2e-05), Setting(epochs=1, learning_rate=5e-05)]
    """
    return [Setting(e, rate) for e in sorted(sweep.epochs) for rate in sorted(sweep.learning_rate)]


def choose(scores: Mapping[Setting, float | None]) -> Setting | None:
    """Return the setting with the best score on validation rows; None if all have diverged.

    Of equal ones it is the one with fewer epochs, then the one with the lower learning rate.

    >>> choose({Setting(2, 2e-5): 0.5, Setting(1, 5e-5): 0.5, Setting(1, 3e-5): None})
    Setting(epochs=1, learning_rate=5e-05)
    """
    known = [(setting, score) for setting, score in scores.items() if score is not None]
    return min(known, key=lambda one: (-one[1], one[0]), default=(None, 0.0))[0]


def read_template(task: Task) -> Template:
    """Return what a classification head reads of a row, as `evaluate` asks one (`Task.for_head`).

    By default these are the prompt's fields, a line for each: instructions, options and slot are
    the same for all rows.
    """
    return task.for_head().head_template()


def read_texts(task: Task, questions: Sequence[Question]) -> list[str]:
    """Return what TF-IDF and the models of transformers read: those fields, a line for each."""
    fields = read_template(task).fields
    return ["\n".join(question.row[name] for name in fields) for question in questions]


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
    """Fine-tune a copy of the model with one head on `train`, and let it answer `asked`.

    The head `mlm` is trained on the task's prompt to give the answer's token at the slot;
    `classification` puts a new linear layer, drawn by `seed`, over the pooled text of
    `read_template`. Equal seeds give equal answers. Raises `DivergedError`.
    """
    longest = min(sweep.max_length, model.config.max_position_embeddings)
    scorer = _scorer(model, tokenizer, task, head, seed, longest, batch_size)
    prompts = scorer.prompts([q.row for q in train], where=[q.where for q in train])
    scorer.shortened = 0
    numbers = np.array([question.gold for question in train])
    if isinstance(scorer, Scorer):
        forms = scorer.verbalizer.ids(tokenizer)
        numbers = np.array([ids[0] for ids in forms])[numbers]
    losses: list[float] = []

    def keep(_: object, loss: float) -> None:
        losses.append(loss)

    try:
        scorer.model = fine_tune(
            scorer.model,
            prompts,
            numbers,
            epochs=setting.epochs,
            learning_rate=setting.learning_rate,
            batch_size=sweep.batch_size,
            weight_decay=sweep.weight_decay,
            warmup=sweep.warmup,
            seed=seed,
            pad_id=tokenizer.pad_id,
            after_epoch=keep,
            progress=progress,
        )
    except RunError as error:
        raise DivergedError(str(error)) from error
    log_probs = scorer.log_probs([q.row for q in asked], where=[q.where for q in asked])
    shortened = scorer.shortened
    order = asked_in_orders(scorer, task, asked, log_probs, order_rows)
    return Answers(log_probs, shortened, losses, order)


def asked_in_orders(
    scorer: RowScorer,
    task: Task,
    asked: Sequence[Question],
    log_probs: np.ndarray,
    order_rows: int,
) -> dict[str, Any] | None:
    """Tell how the answers depend on the order of options; None where they are no letters."""
    letters = isinstance(scorer, Scorer) and task.verbalizer == "letters"
    if not letters or "options" not in scorer.template.fields:
        return None
    rows, gold = [question.row for question in asked], [question.gold for question in asked]
    return order_sensitivity(scorer.log_probs, rows, log_probs, gold, order_rows=order_rows)


def _scorer(
    model: ModernBertForMaskedLM,
    tokenizer: Tokenizer,
    task: Task,
    head: Head,
    seed: int,
    max_length: int,
    batch_size: int | None,
) -> RowScorer:
    if not isinstance(model, ModernBertForMaskedLM):
        raise InputError(
            f"the model is a {type(model).__name__}; a suite fine-tunes masked language models"
        )
    if head == "classification":
        return HeadScorer(
            with_classifier(model, task.label_names, seed=seed),
            tokenizer,
            read_template(task),
            batch_size=batch_size,
            max_length=max_length,
        )
    return Scorer(
        model,
        tokenizer,
        Template(task.prompt, shorten=dict(task.shorten)),
        task.verbalizer_for(len(task.label_names)),
        normalize=task.normalize,
        batch_size=batch_size,
        max_length=max_length,
    )
