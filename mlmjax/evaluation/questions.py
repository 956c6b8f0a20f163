"""Read the rows of a task as questions with their gold answers."""

import itertools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlmjax.config.columns import as_written, is_missing, look_up
from mlmjax.config.labels import drop_advice, find_label, is_dropped, normalize
from mlmjax.config.task import Task, option_list
from mlmjax.data.reading.files import Record
from mlmjax.data.reading.sources import read_source
from mlmjax.errors import InputError, named_place, suggest_name
from mlmjax.statistics.option_orders import shifted
from mlmjax.text.checks import for_each_row
from mlmjax.text.verbalizer import option_names


@dataclass(frozen=True)
class Question:
    """One row to answer: its fields and options, the gold label's number, and its group."""

    index: int
    where: str
    row: Mapping[str, Any]
    gold: int
    group: str


def read_questions(
    task: Task, data: str | Path | None, limit: int | None
) -> tuple[list[Question], dict[str, Any]]:
    """Read the rows of a task as questions; count the rows left out, `dropped` and `blank`.

    The counts also hold `blanked`: for each field of `Task.blank`, the rows in which it is empty.

    `data` replaces the task's own rows, `limit` keeps the first rows. Raises `InputError` that
    names every row without a usable answer, and if no row is left.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 row")
    stop = None if limit is None else min(limit, sys.maxsize)
    blanked: Counter[str] = Counter(dict.fromkeys(task.blank, 0))
    records = enumerate(itertools.islice(read_source(task.location(data)), stop))
    found = for_each_row(
        lambda numbered: _question(task, blanked, *numbered),
        ((record.where, (index, record)) for index, record in records),
    )
    questions = [one for one in found if isinstance(one, Question)]
    left_out: dict[str, Any] = {name: found.count(name) for name in ("dropped", "blank")}
    if task.blank:
        left_out["blanked"] = dict(blanked)
    if not questions:
        raise InputError(
            f"{data or task.data or task.hub}: task {task.name}: no row is left to answer; "
            f"{left_out['dropped']} were dropped by drop_labels, {left_out['blank']} were blank "
            "after cleaning; give a file with more rows"
        )
    return questions, left_out


def _question(
    task: Task, blanked: Counter[str], index: int, record: Record
) -> Question | Literal["dropped", "blank"]:
    """Turn a record into a question, or return why it is left out."""
    # Without an answer the first option is right.
    answer = 0 if task.answer is None else look_up(record.fields, task.answer, "answer")
    value = answer
    if isinstance(answer, str) and task.rules:
        value = normalize(answer, task.rules, Counter())
    if is_dropped(answer, value, task.drop_labels):
        return "dropped"
    row = task.fields_of(record.fields)
    if row is None:
        return "blank"
    for name, text in row.items():
        if is_missing(text):
            raise InputError(
                f'field {name!r} is null; expected text (blank = ["{name}"] reads it as blank)'
            )
    if task.blank and not any(isinstance(text, str) and text.strip() for text in row.values()):
        raise InputError(f"all fields are blank: {', '.join(row)}; expected some text")
    blanked.update(name for name in task.blank if name in row and not row[name])
    row["options"] = task.options_of(record.fields)
    names: Sequence[str] = task.label_names
    if task.options is not None:
        names = option_names(len(row["options"]))
        if task.option_names is not None:
            names = [as_written(name) for name in option_list(task.option_names, record.fields)]
            if len(names) != len(row["options"]):
                raise InputError(
                    f"column {task.option_names!r} has {len(names)} names for "
                    f"{len(row['options'])} options; expected one for each"
                )
    gold = _gold(answer, value, names, task.labels)
    if task.answer is None:
        gold = index % len(row["options"])
        row["options"] = shifted(row["options"], -gold)
    group = None if task.group is None else look_up(record.fields, task.group, "group")
    if task.group is not None and group is None:
        raise InputError(f"column {task.group!r}, the row's group, is null; expected a name")
    return Question(index, record.where, row, gold, "" if group is None else as_written(group))


def _gold(answer: Any, value: Any, names: Sequence[str], labels: Any) -> int:
    """Return the number of the answer, given by table, name or index."""
    table = labels if isinstance(labels, Mapping) else None
    with named_place("the answer"):
        number = find_label(value, names, table)
    if number is not None:
        return number
    listed: Sequence[str] = names if table is None else list(table)
    known = ", ".join(map(repr, listed))
    hint = suggest_name(value, listed) if isinstance(value, str) else ""
    if table is not None:
        raise InputError(
            f"the answer {answer!r} is not one of {known}; {hint}correct it, or add it to labels "
            f"or drop_labels of the task ({drop_advice(answer)})"
        )
    raise InputError(
        f"the answer {answer!r} is not one of {known} and not an index from 0 to "
        f"{len(names) - 1}; {hint}correct it, or set answer of the task to another column "
        f"({drop_advice(answer)})"
    )
