"""The rows of a suite's tasks: local files found by patterns, or datasets of the hub."""

import fnmatch
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlmjax.config.suite import Part, Planned, Suite
from mlmjax.config.task import Task
from mlmjax.data.reading.sources import read_source
from mlmjax.errors import InputError
from mlmjax.evaluation.questions import Question, read_questions
from mlmjax.text.checks import check_row, for_each_row
from mlmjax.text.prompts import Template

SAMPLE_SEED, HELD_OUT_SEED = 0, 1
_BETWEEN = re.compile(r"(\[[^\]]*\])|[^a-z0-9*?\[]+|\[")


class NoDataError(InputError):
    """A part of a task is nowhere to be found; the message says where it was looked for."""


@dataclass(frozen=True)
class Rows:
    """The rows of an entry; a zero-shot one has `test` alone.

    `held_out` tells that `validation` was drawn from the training rows; `left_out` counts rows of
    all parts that were dropped or blank. `task` and `data` are where `test` was read from.
    """

    task: Task
    data: Path | None
    train: list[Question]
    validation: list[Question]
    test: list[Question]
    held_out: bool
    left_out: int


def read_rows(planned: Planned, suite: Suite, folder: Path | None) -> Rows:
    """Read all parts of an entry, from files of `folder`, else from the hub.

    Raises `NoDataError` where a part is not there, `InputError` for rows that cannot be asked.
    """
    entry, task = planned
    test_task, data = place_of(task, entry.test, folder, "test")
    parts: dict[str, list[Question]] = {"train": [], "validation": [], "test": []}
    left_out = 0
    for number, (name, part) in enumerate(
        (("train", entry.train), ("validation", entry.validation), ("test", entry.test))
    ):
        if part is None:
            continue
        try:
            where = place_of(task, part, folder, name)
        except NoDataError:
            if name == "validation":
                continue
            raise
        questions, missing = _read(*where)
        left_out += missing
        parts[name] = sample(questions, suite.limit, [SAMPLE_SEED, number])
    held_out = entry.kind == "fine-tune" and not parts["validation"]
    if held_out:
        parts["train"], parts["validation"] = hold_out(
            parts["train"], suite.sweep.held_out, task.name
        )
    if entry.kind == "fine-tune" and len({question.gold for question in parts["train"]}) < 2:
        raise InputError(
            f"task {task.name}: its {len(parts['train'])} training rows have one label alone; "
            "expected two or more; give more rows, or a higher limit"
        )
    return Rows(test_task, data, **parts, held_out=held_out, left_out=left_out)


def place_of(task: Task, part: Part, folder: Path | None, name: str) -> tuple[Task, Path | None]:
    """Say where a part is: the task with the part's place on the hub, and the local file if any.

    Raises `NoDataError` where it is in neither.
    """
    if folder is not None:
        return task, find_file(folder, part.files, f"{name} rows of {task.name}")
    if name == "test" and part.split is None:
        if task.hub is None and task.data is None:
            raise NoDataError(f"test rows of {task.name}: the task names no dataset of the hub")
        return task, None
    if part.split is None or (part.hub or task.hub) is None:
        raise NoDataError(f"{name} rows of {task.name}: are not on the hub; give a folder (--data)")
    place = {"hub": part.hub or task.hub, "split": part.split, "data": None}
    if part.hub is not None:  # another dataset: nothing of the task's own place holds for it
        place |= {key: getattr(part, key) for key in ("subset", "folder", "revision")}
    else:
        own = {key: getattr(part, key) for key in ("subset", "folder", "revision")}
        place |= {key: value for key, value in own.items() if value is not None}
    return task.model_copy(update=place), None


def find_file(folder: Path, patterns: Sequence[str], what: str) -> Path:
    """Find the one file of a folder, or below it, that the first fitting pattern means.

    Patterns and names are compared in lower case, with one `_` for everything between letters and
    digits. Raises `NoDataError` if none fits, `InputError` if several do.
    """
    found = _files(folder)
    for pattern in patterns:
        wanted = plain(pattern)
        fits = [
            path
            for path in found
            if fnmatch.fnmatchcase(plain(path.name), wanted)
            or fnmatch.fnmatchcase(plain(str(path.relative_to(folder))), wanted)
        ]
        if len(fits) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in fits[:5])
            raise InputError(
                f"{folder}: {what}: {len(fits)} files fit {pattern!r} ({names}); keep one of them "
                "in the folder, or name it in a suite file of your own"
            )
        if fits:
            return fits[0]
    looked = " or ".join(map(repr, patterns)) or "a pattern, of which it has none"
    raise NoDataError(f"{what}: no file of {folder} fits {looked}")


def plain(name: str) -> str:
    """Write a name as patterns see it.

    >>> plain("SST-2/train.tsv"), plain("mmlu_[0-9]*")
    ('sst_2_train_tsv', 'mmlu_[0-9]*')
    """
    return _BETWEEN.sub(lambda found: found[1] or "_", name.lower())


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; give the folder of the suite's files as data")
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _read(task: Task, data: Path | None) -> tuple[list[Question], int]:
    """Read the questions of a part and check that each can be asked; count those left out."""
    if data is None and task.data is None:
        try:
            next(iter(read_source(task.location())))
        except InputError as error:
            raise NoDataError(error.message, error.details) from error
    questions, left_out = read_questions(task, data, None)
    fields = Template(task.prompt).fields
    for_each_row(
        lambda row: check_row(row, fields, len(task.label_names) or len(row["options"])),
        ((question.where, question.row) for question in questions),
    )
    return questions, left_out.total()


def sample(questions: list[Question], count: int | None, seed: list[int]) -> list[Question]:
    """Draw that many questions without putting back, in the order they stand.

    >>> sample(list("abcdef"), 3, [0, 0])
    ['d', 'e', 'f']
    """
    if count is None or count >= len(questions):
        return questions
    drawn = np.random.default_rng(seed).choice(len(questions), count, replace=False)
    return [questions[i] for i in sorted(drawn)]


def hold_out(
    questions: list[Question], share: float, name: str
) -> tuple[list[Question], list[Question]]:
    """Split training questions into those to train on and a seeded share to choose on.

    >>> hold_out(list("abcdef"), 0.3, "t")
    (['a', 'b', 'e', 'f'], ['c', 'd'])
    """
    count = max(1, round(share * len(questions)))
    if count >= len(questions):
        raise InputError(
            f"task {name}: has {len(questions)} training rows, of which {count} would be held out "
            "to choose the setting; give more rows, or a higher limit"
        )
    drawn = set(
        np.random.default_rng(HELD_OUT_SEED).choice(len(questions), count, replace=False).tolist()
    )
    kept = [question for i, question in enumerate(questions) if i not in drawn]
    return kept, [question for i, question in enumerate(questions) if i in drawn]


def digest(questions: Sequence[Question]) -> str:
    """Return the hash of what is asked and of the right answers, whatever file they came from."""
    found = hashlib.sha256()
    for question in questions:
        line = [sorted(question.row.items()), question.gold]
        found.update(json.dumps(line, default=list).encode() + b"\n")
    return found.hexdigest()
