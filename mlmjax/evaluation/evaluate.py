"""Evaluate a model on a labelled table."""

import errno
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlmjax.config.suite import ORDER_ROWS
from mlmjax.config.task import Task, load_task
from mlmjax.data.contamination import NOTHING_KNOWN, Contamination
from mlmjax.errors import InputError, suggest_keywords
from mlmjax.evaluation.questions import Question, read_questions
from mlmjax.evaluation.words import Explained, explain_mistakes, write_words
from mlmjax.model.modernbert import Model, ModernBertForSequenceClassification
from mlmjax.reporting.terminal import Progress
from mlmjax.scoring.masks.ranking import TextRanker
from mlmjax.scoring.scorers import HeadScorer, RowScorer, Scorer
from mlmjax.statistics.levels import level_metrics
from mlmjax.statistics.metrics import accuracy_by_group, classification_metrics, js_of_rows
from mlmjax.statistics.option_orders import order_sensitivity
from mlmjax.statistics.reliability import calibration
from mlmjax.storage import write_json, write_whole
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import option_names


class Answers(NamedTuple):
    """Log probabilities `[questions, labels]`, truncated texts, and the mean loss per epoch.

    `order` is the result of `measure_order`, None if the order was not changed.
    """

    log_probs: np.ndarray
    shortened: int
    losses: Sequence[float] = ()
    order: dict[str, Any] | None = None


@suggest_keywords
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
    explain: int = 0,
) -> dict[str, Any]:
    """Answer the rows of a task and return the results.

    A masked language model answers at the slot of the task's prompt. A classification model reads
    `Task.for_head`; its labels must be those of the task, in any order. `data` replaces the task's
    own rows, `limit` keeps the first rows, and `progress` gets the rows done and all rows.

    The result holds `task, protocol, metric` (the headline's name), `n`, `accuracy, macro_f1, mcc`
    with `_ci95` (Wilson's for accuracy, else bootstrap), `macro_accuracy` (mean over groups),
    `per_group, majority, chance`, counts of rows `shortened` (truncated, because a prompt has at
    most `max_length` tokens), `dropped` (by the task's `drop_labels`) and `blank` (after cleaning),
    of fields that were `blanked` (null or absent, as `Task.blank` allows), `padding_share, seconds,
    calibration`, `levels` (those of `level_metrics` for an ordered task, else None), `likelihood`
    (that of `preference` for a task that ranks texts, else None),
    `order_sensitivity` (of at most `order_rows` rows; None unless answers are letters of
    `{options}`), and `contamination` and `trained_on` (from `known`). `out` gets the same as
    `results.json`, `list_predictions` as `predictions.jsonl`, and a report for people. `explain`
    adds `words.html` to it, with the words behind so many wrong answers, the surest ones.
    """
    task = (task if isinstance(task, Task) else load_task(task)).under(protocol)
    if order_rows < 0:
        raise InputError(f"order_rows is {order_rows}; expected 0 or more")
    if explain and task.scorer == "pll":
        raise InputError(f"task {task.name}: explains no words, because it has no prompt")
    if explain < 0 or (explain and out is None):
        raise InputError(
            f"explain is {explain}; expected 0 or more, and out for the folder of the page"
        )
    if isinstance(model, ModernBertForSequenceClassification):
        task = task.for_head()
    questions, left_out = read_questions(task, data, limit)
    folder = None if out is None else make_folder(out)
    scorer = make_scorer(model, tokenizer, task, questions, batch_size=batch_size)
    labels = task.label_names or scorer.labels
    gold, started = [question.gold for question in questions], time.perf_counter()
    log_probs = score_questions(scorer, questions, progress)
    seconds = time.perf_counter() - started
    log_probs = log_probs[:, [scorer.labels.index(label) for label in labels]]
    results = {
        "task": task.name,
        "protocol": protocol,
        "metric": task.metric,
        **_metrics(task, questions, labels, log_probs),
        "shortened": scorer.shortened,
        "max_length": scorer.max_length,
        **left_out,
        "padding_share": scorer.padding_share,
        "seconds": seconds,
        "calibration": calibration(log_probs, gold),
        "levels": level_metrics(log_probs, gold) if task.ordered else None,
        "likelihood": preference(scorer, gold) if isinstance(scorer, TextRanker) else None,
        "order_sensitivity": measure_order(scorer, task, questions, log_probs, order_rows),
        "contamination": known.status,
        "trained_on": known.trained_on,
    }
    if folder is not None:
        mistakes = explain_mistakes(scorer, questions, labels, log_probs, explain)
        _write_results(folder, task, results, questions, labels, log_probs, known, mistakes)
    return results


def _write_results(
    folder: Path,
    task: Task,
    results: dict[str, Any],
    questions: Sequence[Question],
    labels: Sequence[str],
    log_probs: np.ndarray,
    known: Contamination,
    mistakes: Sequence[Explained],
) -> None:
    """Write `out` of `run_evaluation`."""
    from mlmjax.evaluation.report import write_evaluation_report  # loads matplotlib

    predictions = list_predictions(questions, labels, log_probs)
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in predictions]
    write_whole(folder / "predictions.jsonl", "".join(lines).encode())
    write_json(folder / "results.json", results)
    gold = [question.gold for question in questions]
    if mistakes:
        write_words(folder, task, mistakes)
    write_evaluation_report(folder, task, results, log_probs, gold, known, has_words=bool(mistakes))


def make_scorer(
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    questions: Sequence[Question],
    *,
    batch_size: int | None,
    max_length: int | None = None,
) -> RowScorer:
    """Return the scorer of a model for the questions of a task.

    Raises `InputError` for a classification model with other labels than the task's.
    """
    options: Any = {"batch_size": batch_size, "max_length": max_length}
    if isinstance(model, ModernBertForSequenceClassification):
        options["optional"] = task.blank
        head = HeadScorer(model, tokenizer, task.for_head().head_template(), **options)
        head.check_labels(task.label_names, f"task {task.name}")
        return head
    if task.scorer == "pll":
        most = max(len(question.row["options"]) for question in questions)
        names = task.label_names or option_names(most)
        ranked: Any = {"method": task.method, "average": task.average, "optional": task.blank}
        return TextRanker(model, tokenizer, task.template(), names, **options, **ranked)
    label_count = len(task.label_names) or max(len(q.row["options"]) for q in questions)
    template = task.template()
    verbalizer = task.verbalizer_for(label_count, tokenizer)
    options |= {"normalize": task.scored_over, "optional": task.blank}
    return Scorer(model, tokenizer, template, verbalizer, **options)


def score_questions(
    scorer: RowScorer, questions: Sequence[Question], progress: Progress | None = None
) -> np.ndarray:
    """Return the log probabilities of the labels, `[questions, labels]`."""
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        if progress:
            progress(done, len(questions))

    rows, where = [q.row for q in questions], [q.where for q in questions]
    return scorer.log_probs(rows, where=where, progress=count)


def answer_questions(
    scorer: RowScorer,
    task: Task,
    questions: Sequence[Question],
    order_rows: int,
    progress: Progress | None = None,
) -> Answers:
    """Score questions, then a sample of them under other orders of their options."""
    log_probs = score_questions(scorer, questions, progress)
    shortened = scorer.shortened
    order = measure_order(scorer, task, questions, log_probs, order_rows)
    return Answers(log_probs, shortened, order=order)


def preference(scorer: TextRanker, gold: Sequence[int]) -> dict[str, Any]:
    """Return how texts were ranked, and how the scores of right texts differ from the others'.

    `js_divergence` is that of two normal distributions fitted to the scores, in bits from 0 to 1,
    with its 95 % bootstrap interval (Liu 2024, arXiv 2401.11601); None if they do not vary.
    """
    is_gold = np.arange(scorer.scores.shape[1]) == np.array(gold)[:, None]
    is_other = ~is_gold & np.isfinite(scorer.scores)
    found = js_of_rows(scorer.scores, is_gold, is_other)
    value, interval = (None, None) if found is None else found
    return {
        "method": scorer.method,
        "average": scorer.average,
        "js_divergence": value,
        "js_divergence_ci95": interval,
    }


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


def _metrics(
    task: Task, questions: Sequence[Question], labels: Sequence[str], log_probs: np.ndarray
) -> dict[str, Any]:
    gold = [labels[question.gold] for question in questions]
    predicted = [labels[best] for best in log_probs.argmax(axis=1)]
    groups = [question.group for question in questions]
    per_group = accuracy_by_group(gold, predicted, groups) if task.group else {}
    accuracies = [group["accuracy"] for group in per_group.values()]
    return {
        "n": len(questions),
        **classification_metrics(gold, predicted),
        "macro_accuracy": float(np.mean(accuracies)) if accuracies else None,
        "chance": float(np.mean([1 / np.isfinite(row).sum() for row in log_probs])),
        "per_group": per_group,
    }


def list_predictions(
    questions: Sequence[Question], labels: Sequence[str], log_probs: np.ndarray
) -> list[dict[str, Any]]:
    """Return `index, gold, prediction, probabilities` of each row of `[questions, labels]`.

    The probabilities are by label, without labels that the row does not have.
    """
    return [
        {
            "index": question.index,
            "gold": labels[question.gold],
            "prediction": labels[row.argmax()],
            "probabilities": {
                label: float(np.exp(value))
                for label, value in zip(labels, row, strict=True)
                if np.isfinite(value)
            },
        }
        for question, row in zip(questions, log_probs, strict=True)
    ]


def make_folder(out: str | Path) -> Path:
    """Make the folder of the results; raise `InputError` before anything is computed for it."""
    folder = Path(out)
    try:
        if not str(out).strip():
            raise InputError("out is blank; give a folder for the results")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be used as the folder for the results ({error.strerror}); "
            "give another out"
        ) from error
    return folder
