"""Evaluate a model on a table with several questions about each row."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlmjax.config.columns import as_written, is_missing, look_up, look_up_or_none
from mlmjax.config.decisions import DecisionTask, TaskQuestion
from mlmjax.config.suite import ORDER_ROWS, SHIFTS
from mlmjax.data.contamination import NOTHING_KNOWN, Contamination
from mlmjax.data.reading.sources import read_source
from mlmjax.decisions.answers import ChoiceAnswer, YesNoAnswer, answer_json
from mlmjax.decisions.decider import AnyAnswer, Decider
from mlmjax.decisions.questions import SCORE, Question, read_question
from mlmjax.errors import InputError, named_place
from mlmjax.evaluation.evaluate import make_folder
from mlmjax.reporting.markdown import score, visible
from mlmjax.reporting.terminal import Progress
from mlmjax.statistics.calibration import log_softmax
from mlmjax.statistics.levels import level_metrics
from mlmjax.statistics.metrics import wilson_interval
from mlmjax.statistics.option_orders import sensitivity
from mlmjax.statistics.reliability import calibration
from mlmjax.storage import write_json, write_whole
from mlmjax.text.checks import for_each_row

CHUNK = 256


class Row(NamedTuple):
    """A state, and the number of the right answer to each question that has one."""

    number: int
    state: Any
    gold: Mapping[str, int]


def evaluate_decisions(
    decider: Decider,
    task: DecisionTask,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    known: Contamination = NOTHING_KNOWN,
    order_rows: int = ORDER_ROWS,
) -> dict[str, Any]:
    """Answer the questions about each row, and return figures by question and by type.

    The result has `task`, `n` rows, `shortened` states, `questions` and `types`, each a table of
    figures: `n`, `accuracy` with `accuracy_ci95` (Wilson), `nll`, `brier`, `ece`, `confidence`, and
    for scores `mae`, `within_one`, `rps` and `quadratic_kappa`. Those of a type are means over its
    questions, weighted by their rows. A question also has `order_sensitivity`, measured on at most
    `order_rows` rows (None where answers have no one order). `contamination` and `trained_on` are
    those of `known`. `out` gets `results.json`, `predictions.jsonl` and a report for people. Raises
    `InputError` that names each row with a bad state or answer.
    """
    if order_rows < 0:
        raise InputError(f"order_rows is {order_rows}; expected 0 or more")
    questions = _questions(task)
    rows = _read_rows(task, questions, data, limit)
    folder = None if out is None else make_folder(out)
    found: list[dict[str, AnyAnswer]] = []
    for start in range(0, len(rows), CHUNK):
        states = [row.state for row in rows[start : start + CHUNK]]
        found += decider.decide_many(states, questions)
        if progress:
            progress(len(found), len(rows))
    scored = {key: _scored(key, found, rows) for key in questions}
    figures = {key: _figures(question, *scored[key]) for key, question in questions.items()}
    for key, question in questions.items():
        own = [row for row in rows if key in row.gold]
        if own:
            order = _order(decider, question, key, own, order_rows)
            figures[key]["order_sensitivity"] = order
    results = {
        "task": task.name,
        "n": len(rows),
        "shortened": sum(any(one.shortened for one in answers.values()) for answers in found),
        "questions": figures,
        "types": _by_type(questions, figures),
        "contamination": known.status,
        "trained_on": known.trained_on,
    }
    if folder is not None:
        lines = (
            {
                "index": row.number,
                "gold": {key: questions[key].names[number] for key, number in row.gold.items()},
                "answers": {key: answer_json(one) for key, one in answers.items()},
            }
            for row, answers in zip(rows, found, strict=True)
        )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(folder / "predictions.jsonl", text.encode())
        write_json(folder / "results.json", results)
        from mlmjax.evaluation.decisions_report import write_decisions_report  # loads matplotlib

        write_decisions_report(folder, task, results, scored, known)
    return results


def decision_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of the figures by question, then by type."""
    yield f"{visible(results['task'])}: {results['n']:,} rows"
    names = ("n", "accuracy", "nll", "brier", "ece", "mae", "within_one", "rps", "quadratic_kappa")
    rows: list[tuple[str, ...]] = [("", *names)]
    for kind in ("questions", "types"):
        for key, figures in results[kind].items():
            shown = [figures.get(name) for name in names[1:]]
            cells = ["" if value is None else score(value) for value in shown]
            label = visible(key) if kind == "questions" else f"all of type {key}"
            rows.append((label, f"{figures['n']:,}", *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for label, *cells in rows:
        line = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield f"{label:<{widths[0]}}  {line}".rstrip()
    yield f"{'contamination':<{widths[0]}}  {results['contamination']}"
    for line in results["trained_on"]:
        yield f"  {visible(line)}"


def _questions(task: DecisionTask) -> dict[str, Question]:
    found = {}
    for one in task.questions:
        with named_place(f"task {task.name}: questions: {one.id!r:.60}"):
            found[one.id] = read_question(
                one.model_dump(include={"type", "instructions", "criteria"})
            )
    return found


def _read_rows(
    task: DecisionTask,
    questions: Mapping[str, Question],
    data: str | Path | None,
    limit: int | None,
) -> list[Row]:
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 row")
    records = enumerate(itertools.islice(read_source(task.location(data)), limit))

    def read(numbered: tuple[int, Any]) -> Row:
        index, record = numbered
        gold = {}
        for one in task.questions:
            value = look_up_or_none(record.fields, one.answer)
            if not is_missing(value):
                with named_place(f"question {one.id!r:.60}"):
                    gold[one.id] = questions[one.id].number(_right(one, value))
        return Row(index, _state(task, record.fields), gold)

    rows = for_each_row(read, ((record.where, (index, record)) for index, record in records))
    if not any(row.gold for row in rows):
        columns = ", ".join(repr(one.answer) for one in task.questions)
        raise InputError(
            f"{data or task.data or task.hub}: task {task.name}: no row has an answer in "
            f"{columns}; check answer of its questions"
        )
    return rows


def _state(task: DecisionTask, fields: Mapping[str, Any]) -> Any:
    if isinstance(task.state, Mapping):
        return {key: look_up(fields, column, f"state.{key}") for key, column in task.state.items()}
    return look_up(fields, task.state, "state")


def _right(question: TaskQuestion, value: Any) -> Any:
    """Return the right answer that a column's value stands for."""
    if question.values is not None:
        key = as_written(value)
        if key not in question.values:
            known = ", ".join(map(repr, question.values))
            raise InputError(f"the answer is {key!r:.60}; expected one of {known:.300} (values)")
        return question.values[key]
    if question.type == "noul" and not isinstance(value, bool):
        return {"true": True, "false": False, "1": True, "0": False}.get(
            as_written(value).lower(), value
        )
    if question.type == SCORE and isinstance(value, str) and value.isdecimal():
        return int(value)
    return as_written(value) if question.type == "choice" else value


def _scored(
    key: str, found: Sequence[Mapping[str, AnyAnswer]], rows: Sequence[Row]
) -> tuple[np.ndarray, np.ndarray]:
    """Return log probabilities `[rows, options]` and right answers of one question."""
    pairs = [(a[key], row.gold[key]) for a, row in zip(found, rows, strict=True) if key in row.gold]
    return np.array([_log_probs(answer) for answer, _ in pairs]), np.array([n for _, n in pairs])


def _figures(question: Question, log_probs: np.ndarray, gold: np.ndarray) -> dict[str, Any]:
    """Return the figures of one question from its answers `[rows, options]` and the right ones."""
    if not len(gold):
        return {"n": 0, "type": question.type}
    right = int((log_probs.argmax(axis=1) == gold).sum())
    figures: dict[str, Any] = {
        "n": len(gold),
        "type": question.type,
        "accuracy": right / len(gold),
        "accuracy_ci95": list(wilson_interval(right, len(gold))),
        **calibration(log_probs, gold),
    }
    return figures | (level_metrics(log_probs, gold) if question.type == SCORE else {})


def _order(
    decider: Decider, question: Question, key: str, rows: Sequence[Row], most: int
) -> dict[str, Any] | None:
    """Return how answers to a question depend on the order of its options, on `most` rows."""
    if most and len(rows) > most:
        drawn = np.random.default_rng([0, len(rows)]).choice(len(rows), most, replace=False)
        rows = [rows[n] for n in sorted(drawn.tolist())]
    scores = decider.in_orders([row.state for row in rows], question, SHIFTS) if most else None
    return None if scores is None else sensitivity(scores, [row.gold[key] for row in rows])


def _log_probs(answer: AnyAnswer) -> np.ndarray:
    if isinstance(answer, YesNoAnswer):
        shares = [answer.probability, 1 - answer.probability]
    elif isinstance(answer, ChoiceAnswer):
        shares = list(answer.probabilities.values())
    else:
        shares = answer.probabilities
    return np.asarray(log_softmax(np.log(np.maximum(shares, 1e-300))))


def _by_type(
    questions: Mapping[str, Question], figures: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for kind in sorted({question.type for question in questions.values()}):
        own = [figures[key] for key, q in questions.items() if q.type == kind and figures[key]["n"]]
        if not own:
            continue
        total = sum(one["n"] for one in own)
        found[kind] = {"n": total}
        for name in own[0]:
            values = [one[name] for one in own]
            if name != "n" and all(isinstance(value, float) for value in values):
                weighted = sum(one["n"] * value for one, value in zip(own, values, strict=True))
                found[kind][name] = weighted / total
    return found
