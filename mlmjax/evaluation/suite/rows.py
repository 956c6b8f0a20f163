"""Read the rows of a suite's tasks, from local files found by patterns or from the hub."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import numpy as np

from mlmjax.config.suite import Part, Planned, Suite
from mlmjax.config.task import Task
from mlmjax.data.reading.sources import read_source
from mlmjax.errors import InputError
from mlmjax.evaluation.questions import Question, read_questions
from mlmjax.text.checks import check_row, for_each_row

PARTS = ("train", "validation", "test")
SAMPLE_SEED, HELD_OUT_SEED = 0, 1
_BETWEEN = re.compile(r"(\[[^\]]*\])|[^a-z0-9*?\[]+|\[")


class NoDataError(InputError):
    """A part of a task that was not found; the message says where it was searched."""


@dataclass(frozen=True)
class Rows:
    """The rows of an entry; a zero-shot entry has only `test`.

    `held_out` is True if `validation` was drawn from the training rows. `left_out` counts rows of
    all parts that were dropped or blank. `task` and `data` say where `test` was read.
    """

    task: Task
    data: Path | None
    train: list[Question]
    validation: list[Question]
    test: list[Question]
    held_out: bool
    left_out: int

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The hash of each part's questions and correct answers."""
        return {name: _hash(getattr(self, name)) for name in PARTS}


def read_rows(planned: Planned, suite: Suite, folder: Path | None) -> Rows:
    """Read all parts of an entry from files of `folder`, or from the hub.

    Raises `NoDataError` for a part that is not there, `InputError` for rows that cannot be used.
    """
    entry, task = planned
    test_task, data = locate_part(task, entry.test, folder, "test")
    parts: dict[str, list[Question]] = {name: [] for name in PARTS}
    left_out = 0
    for number, name in enumerate(PARTS):
        part = getattr(entry, name)
        if part is None:
            continue
        try:
            place = locate_part(task, part, folder, name)
        except NoDataError:
            if name == "validation":
                continue
            raise
        questions, missing = _read(*place)
        left_out += missing
        parts[name] = sample(questions, suite.limit, [SAMPLE_SEED, number])
    held_out = entry.kind == "fine-tune" and not parts["validation"]
    if held_out:
        parts["train"], parts["validation"] = hold_out(
            parts["train"], suite.sweep.held_out, task.name
        )
    if entry.kind == "fine-tune" and len({question.gold for question in parts["train"]}) < 2:
        raise InputError(
            f"task {task.name}: its {len(parts['train'])} training rows have only one label; "
            "expected two or more; give more rows, or a higher limit"
        )
    return Rows(test_task, data, **parts, held_out=held_out, left_out=left_out)


def locate_part(task: Task, part: Part, folder: Path | None, name: str) -> tuple[Task, Path | None]:
    """Return the task with the part's place on the hub, and the local file.

    Raises `NoDataError` if the part is in neither.
    """
    if folder is not None:
        return task, find_file(folder, part.files, f"{name} rows of {task.name}")
    if name == "test" and part.split is None:
        if task.hub is None and task.data is None:
            raise NoDataError(f"test rows of {task.name}: the task names no dataset of the hub")
        return task, None
    if part.split is None or (part.hub or task.hub) is None:
        raise NoDataError(f"its {name} rows are not on the hub")
    place = {key: getattr(part, key) for key in ("subset", "folder", "revision")}
    if part.hub is None:  # the task's own dataset; otherwise nothing of the task's place applies
        place = {key: value for key, value in place.items() if value is not None}
    place |= {"hub": part.hub or task.hub, "split": part.split, "data": None}
    return task.model_copy(update=place), None


def find_file(folder: Path, patterns: Sequence[str], what: str) -> Path:
    """Find the one file in a folder that matches the first pattern with a match.

    Patterns and names are compared as `normalize_name` writes them. Raises `NoDataError` if no file
    matches, `InputError` if several match one pattern.
    """
    found = _files(folder)
    for pattern in patterns:
        wanted = normalize_name(pattern)
        fits = [
            name
            for name in found
            if any(fnmatchcase(normalize_name(one), wanted) for one in (name, Path(name).name))
        ]
        if len(fits) > 1:
            raise InputError(
                f"{folder}: {what}: {len(fits)} files match {pattern!r} ({', '.join(fits[:5])}); "
                "keep one of them in the folder, or name it in your own suite file"
            )
        if fits:
            return folder / fits[0]
    wanted = " or ".join(map(repr, patterns))
    raise NoDataError(
        f"{what}: no file of {folder} matches {wanted}"
        if patterns
        else f"{what}: the suite names no files for them"
    )


def normalize_name(name: str) -> str:
    """Write a name in lower case, with one `_` for everything between letters and digits.

    >>> normalize_name("SST-2/train.tsv"), normalize_name("mmlu_[0-9]*")
    ('sst_2_train_tsv', 'mmlu_[0-9]*')
    """
    return _BETWEEN.sub(lambda found: found[1] or "_", name.lower())


def _files(folder: Path) -> list[str]:
    """Return the paths of files in a folder, without hidden files and folders."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; give the folder of the suite's files as data")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in paths]
    return [name for name in names if not any(part[0] == "." for part in Path(name).parts)]


def _read(task: Task, data: Path | None) -> tuple[list[Question], int]:
    """Read and check the questions of a part; count rows that were left out."""
    if data is None and task.data is None:
        try:
            next(iter(read_source(task.location())))
        except InputError as error:
            raise NoDataError(error.message, error.details) from error
    questions, left_out = read_questions(task, data, None)
    fields, labels = task.template().fields, len(task.label_names)
    for_each_row(
        lambda row: check_row(row, fields, labels or len(row["options"]), task.blank),
        ((question.where, question.row) for question in questions),
    )
    return questions, left_out["dropped"] + left_out["blank"]


def sample(questions: list[Question], count: int | None, seed: list[int]) -> list[Question]:
    """Draw that many questions without replacement, and keep their order.

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
    """Hold out a seeded share of the training questions as validation questions.

    >>> hold_out(list("abcdef"), 0.3, "t")
    (['a', 'b', 'e', 'f'], ['c', 'd'])
    """
    count = max(1, round(share * len(questions)))
    if count >= len(questions):
        raise InputError(
            f"task {name}: has {len(questions)} training rows, and {count} would be held out to "
            "choose the setting; give more rows, or a higher limit"
        )
    drawn = sample(questions, count, [HELD_OUT_SEED])
    held = set(map(id, drawn))
    return [question for question in questions if id(question) not in held], drawn


def _hash(questions: Sequence[Question]) -> str:
    found = hashlib.sha256()
    for question in questions:
        line = [sorted(question.row.items()), question.gold]
        found.update(json.dumps(line, default=list).encode() + b"\n")
    return found.hexdigest()
