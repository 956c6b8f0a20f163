"""Evaluate a model on a labelled table."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlmjax.config.suite import ORDER_ROWS
from mlmjax.config.task import Task, load_task
from mlmjax.data.contamination import NOTHING_KNOWN, Contamination
from mlmjax.errors import InputError
from mlmjax.evaluation.questions import Question, read_questions
from mlmjax.model.modernbert import Model, ModernBertForSequenceClassification
from mlmjax.scoring.engine import Progress
from mlmjax.scoring.scorers import HeadScorer, RowScorer, Scorer
from mlmjax.statistics.metrics import accuracy_by_group, classification_metrics
from mlmjax.statistics.option_orders import order_sensitivity
from mlmjax.statistics.reliability import calibration
from mlmjax.storage import write_json, write_whole
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer


def run_evaluation(
    model: Model,
    tokenizer: Tokenizer,
    task: Task | str | Path,
    *,
    data: str | Path | None = None,
    protocol: str = "default",
    limit: int | None = None,
    out: str | Path | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    known: Contamination = NOTHING_KNOWN,
    order_rows: int = ORDER_ROWS,
) -> dict[str, Any]:
    """Answer the rows of a task and return the results.

    A masked language model answers at the slot of the task's prompt. A classification model reads
    `Task.for_head`; its labels must be those of the task, by name, in any order. `data` replaces
    the task's own file or hub dataset, `limit` keeps the first rows, and `progress` is called with
    the rows done and all rows.

    The result holds `task, protocol, metric` (the headline metric's name), `n, accuracy` (micro),
    `accuracy_ci95` (Wilson), `macro_f1, mcc` with `macro_f1_ci95, mcc_ci95` (bootstrap),
    `macro_accuracy` (mean over groups), `per_group, majority, chance, shortened` (rows whose text
    was truncated), `dropped` (rows with one of the task's `drop_labels`), `blank` (rows that
    cleaning left blank), `padding_share, seconds, calibration` (`reliability.calibration`),
    `order_sensitivity` (`option_orders.order_sensitivity` of at most `order_rows` rows; None unless
    the answers are letters of `{options}`), `contamination` and `trained_on` (from `known`, see
    `data/contamination.py`). With `out`, `results.json` holds the same, `predictions.jsonl` one
    object per row (`index, gold, prediction, probabilities`), and `report.md` with
    `reliability.png` is for people.
    """
    task = (task if isinstance(task, Task) else load_task(task)).under(protocol)
    if order_rows < 0:
        raise InputError(f"order_rows is {order_rows}; expected a number of rows, or 0 for none")
    has_head = isinstance(model, ModernBertForSequenceClassification)
    task = task.for_head() if has_head else task
    questions, left_out = read_questions(task, data, limit)
    folder = None if out is None else _make_folder(out)
    make_scorer = _head_scorer if has_head else slot_scorer
    scorer = make_scorer(model, tokenizer, task, questions, batch_size)
    labels = task.label_names or scorer.labels
    started = time.perf_counter()
    log_probs = score_questions(scorer, questions, progress)
    seconds = time.perf_counter() - started
    log_probs = log_probs[:, [scorer.labels.index(label) for label in labels]]
    truth = [question.gold for question in questions]
    results = {
        "task": task.name,
        "protocol": protocol,
        "metric": task.metric,
        "n": len(questions),
        **_metrics(task, questions, labels, log_probs),
        "shortened": scorer.shortened,
        "dropped": left_out["dropped"],
        "blank": left_out["blank"],
        "padding_share": scorer.padding_share,
        "seconds": seconds,
        "calibration": calibration(log_probs, truth),
        "order_sensitivity": measure_order(scorer, task, questions, log_probs, order_rows),
        "contamination": known.status,
        "trained_on": known.trained_on,
    }
    if folder is not None:
        from mlmjax.evaluation.report import write_evaluation_report  # loads matplotlib

        write_whole(folder / "predictions.jsonl", _predictions(questions, labels, log_probs))
        write_json(folder / "results.json", results)
        write_evaluation_report(folder, task, results, log_probs, truth, known)
    return results


def slot_scorer(
    model: Any,
    tokenizer: Tokenizer,
    task: Task,
    questions: Sequence[Question],
    batch_size: int | None,
    max_length: int | None = None,
) -> RowScorer:
    """Return the scorer of a masked language model for the questions of a task."""
    label_count = len(task.label_names) or max(len(q.row["options"]) for q in questions)
    return Scorer(
        model,
        tokenizer,
        Template(task.prompt, shorten=dict(task.shorten)),
        task.verbalizer_for(label_count),
        normalize=task.normalize,
        batch_size=batch_size,
        max_length=max_length,
    )


def _head_scorer(
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    questions: Sequence[Question],
    batch_size: int | None,
) -> RowScorer:
    """Return the scorer of a classification model; raise `InputError` for other labels."""
    scorer = HeadScorer(model, tokenizer, task.head_template(), batch_size=batch_size)
    if sorted(scorer.labels) != sorted(task.label_names):
        wanted = ", ".join(map(repr, task.label_names)) or "each row's own options"
        raise InputError(
            f"the classification head has the labels {', '.join(map(repr, scorer.labels)):.400}; "
            f"task {task.name} asks for {wanted:.400}; give a model with exactly the task's "
            "labels, or name the labels in the task file as the model does"
        )
    return scorer


def score_questions(
    scorer: RowScorer, questions: Sequence[Question], progress: Progress | None = None
) -> np.ndarray:
    """Return the log probabilities of the labels, `[questions, labels]`."""
    return scorer.log_probs(
        [question.row for question in questions],
        where=[question.where for question in questions],
        progress=progress,
    )


def measure_order(
    scorer: RowScorer,
    task: Task,
    questions: Sequence[Question],
    log_probs: np.ndarray,
    order_rows: int,
) -> dict[str, Any] | None:
    """Measure how answers depend on the order of options; None unless they are letters."""
    is_lettered = isinstance(scorer, Scorer) and task.verbalizer == "letters"
    if not is_lettered or "options" not in scorer.template.fields:
        return None
    rows, gold = [question.row for question in questions], [q.gold for q in questions]
    return order_sensitivity(scorer.log_probs, rows, log_probs, gold, order_rows=order_rows)


def probabilities_by_label(labels: Sequence[str], log_probs: np.ndarray) -> dict[str, float]:
    """Return the probabilities of one row `[labels]`, without labels that the row does not have."""
    pairs = zip(labels, log_probs, strict=True)
    return {label: float(np.exp(value)) for label, value in pairs if np.isfinite(value)}


def _metrics(
    task: Task, questions: Sequence[Question], labels: Sequence[str], log_probs: np.ndarray
) -> dict[str, Any]:
    gold = [labels[question.gold] for question in questions]
    predicted = [labels[best] for best in log_probs.argmax(axis=1)]
    groups = [question.group for question in questions]
    per_group = accuracy_by_group(gold, predicted, groups) if task.group else {}
    accuracies = [group["accuracy"] for group in per_group.values()]
    return {
        **classification_metrics(gold, predicted),
        "macro_accuracy": float(np.mean(accuracies)) if accuracies else None,
        "chance": float(np.mean([1 / np.isfinite(row).sum() for row in log_probs])),
        "per_group": per_group,
    }


def _predictions(
    questions: Sequence[Question], labels: Sequence[str], log_probs: np.ndarray
) -> bytes:
    lines = [
        {
            "index": question.index,
            "gold": labels[question.gold],
            "prediction": labels[row.argmax()],
            "probabilities": probabilities_by_label(labels, row),
        }
        for question, row in zip(questions, log_probs, strict=True)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _make_folder(out: str | Path) -> Path:
    """Make the folder of the results; raise `InputError` before anything is computed for it."""
    folder = Path(out)
    try:
        if not str(out).strip():
            raise InputError("out: is blank; give a folder for the results")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be used as the folder for the results ({error.strerror}); "
            "give another out"
        ) from error
    return folder
