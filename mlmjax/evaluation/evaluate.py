"""Evaluation on a labelled table: rows become questions, the scorer answers, metrics count."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlmjax.config.suite import ORDER_ROWS
from mlmjax.config.task import Task, load_task
from mlmjax.data.contamination import NOTHING_KNOWN, Contamination
from mlmjax.errors import InputError
from mlmjax.evaluation.questions import Question, read_questions
from mlmjax.evaluation.report import write_evaluation_report
from mlmjax.model.modernbert import Model, ModernBertForSequenceClassification
from mlmjax.scoring.scorers import HeadScorer, RowScorer, Scorer
from mlmjax.statistics.metrics import accuracy_by_group, classification_metrics
from mlmjax.statistics.option_orders import check_order_rows, order_sensitivity
from mlmjax.statistics.reliability import calibration
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
    progress: Callable[[int, int], None] | None = None,
    known: Contamination = NOTHING_KNOWN,
    order_rows: int = ORDER_ROWS,
) -> dict[str, Any]:
    """Answer the rows of a task and return the results.

    A masked language model answers at the slot of the task's prompt. A classification model reads
    `Task.for_head`, and its labels have to be those of the task, by name, in any order.
    `data` is read instead of the task's own file or hub dataset; `limit` keeps its first rows;
    `progress` is called with rows done and rows in all. The dictionary holds `task, protocol,
    metric` (the name of the task's headline), `n, accuracy` (micro), `accuracy_ci95` (Wilson),
    `macro_f1, mcc` with `macro_f1_ci95, mcc_ci95` (bootstrap), `macro_accuracy` (mean over groups),
    `per_group, majority, chance, shortened` (rows whose text was cut), `dropped` (rows with one of
    the task's `drop_labels`), `blank` (rows of which the task's cleaning left nothing, not asked),
    `padding_share`, `seconds`, `calibration` (`reliability.calibration`), `order_sensitivity` (of
    at most `order_rows` rows, asked up to 3 times again: `order_sensitivity`; None where
    the answers are no letters of `{options}`), `contamination` and `trained_on` (from `known`,
    which is what the model's folder tells of its training: `contamination.contamination`). With
    `out`, `results.json` holds the same and `predictions.jsonl` one object per row: `index, gold,
    prediction, probabilities`; `report.md` and `reliability.png` are for people.
    """
    task = (task if isinstance(task, Task) else load_task(task)).under(protocol)
    check_order_rows(order_rows)
    has_head = isinstance(model, ModernBertForSequenceClassification)
    task = task.for_head() if has_head else task
    questions, left_out = read_questions(task, data, limit)
    folder = None if out is None else _result_folder(out)
    make_scorer = _head_scorer if has_head else _slot_scorer
    scorer, columns = make_scorer(model, tokenizer, task, questions, batch_size)
    started = time.perf_counter()
    log_probs = scorer.log_probs(
        [question.row for question in questions],
        where=[question.where for question in questions],
        progress=progress and _counting(progress, len(questions)),
    )
    seconds = time.perf_counter() - started
    log_probs, labels = log_probs[:, columns], [scorer.labels[column] for column in columns]
    gold = [labels[question.gold] for question in questions]
    predicted = [labels[best] for best in log_probs.argmax(axis=1)]
    groups = [question.group for question in questions]
    per_group = accuracy_by_group(gold, predicted, groups) if task.group else {}
    truth = [question.gold for question in questions]
    results = {
        "task": task.name,
        "protocol": protocol,
        "metric": task.metric,
        "n": len(questions),
        **classification_metrics(gold, predicted),
        "macro_accuracy": _mean([g["accuracy"] for g in per_group.values()]),
        "chance": _mean([1 / np.isfinite(row).sum() for row in log_probs]),
        "per_group": per_group,
        "shortened": scorer.shortened,
        "dropped": left_out["dropped"],
        "blank": left_out["blank"],
        "padding_share": scorer.padding_share,
        "seconds": seconds,
        "calibration": calibration(log_probs, truth),
        "order_sensitivity": None,
        "contamination": known.status,
        "trained_on": known.trained_on,
    }
    if not has_head and task.verbalizer == "letters" and "options" in scorer.template.fields:
        rows = [question.row for question in questions]
        results["order_sensitivity"] = order_sensitivity(
            scorer.log_probs, rows, log_probs, truth, order_rows=order_rows
        )
    if folder is not None:
        _write(folder, results, questions, gold, predicted, labels, log_probs)
        write_evaluation_report(folder, task, results, log_probs, truth, known)
    return results


def _slot_scorer(
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    questions: Sequence[Question],
    batch_size: int | None,
) -> tuple[RowScorer, list[int]]:
    """Return the scorer at the slot, and its columns in the order of the task's labels."""
    label_count = len(task.label_names) or max(len(q.row["options"]) for q in questions)
    scorer = Scorer(
        model,
        tokenizer,
        Template(task.prompt, shorten=dict(task.shorten)),
        task.verbalizer_for(label_count),
        batch_size=batch_size,
        normalize=task.normalize,
    )
    return scorer, list(range(label_count))


def _head_scorer(
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    questions: Sequence[Question],
    batch_size: int | None,
) -> tuple[RowScorer, list[int]]:
    """Return the scorer by the head, and its columns in the order of the task's labels."""
    scorer = HeadScorer(model, tokenizer, task.head_template(), batch_size=batch_size)
    if sorted(scorer.labels) != sorted(task.label_names):
        wanted = ", ".join(map(repr, task.label_names)) or "each row's own options"
        raise InputError(
            f"the classification head has the labels {', '.join(map(repr, scorer.labels)):.400}; "
            f"task {task.name} asks for {wanted:.400}; give a model of just the task's labels, or "
            "name the labels in the task file as the model does"
        )
    return scorer, [scorer.labels.index(name) for name in task.label_names]


def _counting(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """Turn `(done, total)` reports into reports of what was done since the last."""
    done = 0

    def report(rows: int) -> None:
        nonlocal done
        done += rows
        progress(done, total)

    return report


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _result_folder(out: str | Path) -> Path:
    """Make the folder of the results before anything is computed for it; raises `InputError`."""
    folder = Path(out)
    try:
        if not str(out).strip():
            raise InputError("out: is blank; give a folder for the results")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be a folder for the results ({error.strerror}); give another out"
        ) from error
    return folder


def _write(
    folder: Path,
    results: Mapping[str, Any],
    questions: Sequence[Question],
    gold: Sequence[str],
    predicted: Sequence[str],
    labels: Sequence[str],
    log_probs: np.ndarray,
) -> None:
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for question, truth, guess, row in zip(questions, gold, predicted, log_probs, strict=True):
            probabilities = {
                label: float(np.exp(value))
                for label, value in zip(labels, row, strict=True)
                if np.isfinite(value)
            }
            line = {
                "index": question.index,
                "gold": truth,
                "prediction": guess,
                "probabilities": probabilities,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    text = json.dumps(results, ensure_ascii=False, indent=2)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
