"""Keep tasks and evaluation sets out of training, to test models on them."""

import fnmatch
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mlmjax.config.data import EvaluationSet, ExcludeConfig, Location
from mlmjax.config.task import Task, load_task
from mlmjax.data.reading.overlap import Hit, OverlapIndex, words_of
from mlmjax.data.reading.sources import read_source, source_files
from mlmjax.errors import InputError, named_place
from mlmjax.storage import hash_file

_TEXT_KEYS = {"prompt", "columns", "clean", "strip", "options"}
_LATER_KEYS = {"blank", "csv"}
"""Keys of a task that decide which texts its rows hold."""


class Exclusion:
    """Find the records that `[data.exclude]` keeps out, by their task or text.

    The constructor reads the evaluation sets. It raises `InputError` for an unknown task, for a set
    without data here or on the hub, for a set on the hub without a commit, and for rows that cannot
    be read, with file and row.
    """

    def __init__(self, config: ExcludeConfig):
        self.patterns = config.tasks
        self._tasks = [re.compile(fnmatch.translate(p.casefold())) for p in config.tasks]
        texts: dict[str, Iterable[str]] = {}
        for task, place, _ in map(_open, config.overlap):  # A set may have several files.
            own = _texts(task, place, config.ngram)
            texts[task.name] = itertools.chain(texts.get(task.name, ()), own)
        self.index = OverlapIndex(texts, config.ngram) if texts else None

    def pattern(self, task: str) -> str | None:
        """Return the first pattern that a task's name matches, in any case; or None.

        >>> exclusion = Exclusion(ExcludeConfig(tasks=("*mmlu*", "glue/rte:*")))
        >>> exclusion.pattern("GLUE/RTE:2.0.0"), exclusion.pattern("glue/wnli:2.0.0")
        ('glue/rte:*', None)
        """
        named = zip(self.patterns, self._tasks, strict=True)
        return next((pattern for pattern, known in named if known.match(task.casefold())), None)

    def overlap(self, text: str) -> Hit | None:
        """Return what a text shares with an evaluation set; or None."""
        return None if self.index is None else self.index.hit(text)


def evaluation_identity(config: ExcludeConfig) -> list[dict[str, Any]]:
    """Describe the content of the evaluation sets of `[data.exclude]`, as JSON values.

    Each has `task` (its name), `texts` (a hash of how the task reads a row), and `files` (SHA-256
    by path), or for the hub `hub`, `subset`, `folder`, `split` and `revision`. Raises `InputError`
    as `Exclusion`.
    """
    place_keys = {"hub", "subset", "folder", "split", "revision"}
    found: list[dict[str, Any]] = []
    for task, place, files in map(_open, config.overlap):
        # Left out where they are not set, as in rows that earlier versions prepared.
        own = {key for key in _LATER_KEYS if getattr(task, key)}
        reading = task.model_dump_json(include=_TEXT_KEYS | own).encode()
        reading += (task.encoding or "").encode()
        rows: dict[str, Any] = {"files": {str(path): hash_file(path) for path in files}}
        if place.hub is not None:
            rows = place.model_dump(mode="json", include=place_keys)
        found.append({"task": task.name, "texts": hashlib.sha256(reading).hexdigest(), **rows})
    return found


def _open(one: EvaluationSet) -> tuple[Task, Location, list[Path]]:
    """Return the task of an evaluation set, and where its rows are."""
    where = f"data.exclude.overlap: {one.task}"
    with named_place(where, f'; or name its rows here: {{ task = "{one.task}", data = "FILE" }}'):
        task = load_task(one.task)
        place = task.location(one.data)
        files = source_files(place)
    if not place.is_pinned:
        raise InputError(
            f"{where}: hub dataset {place.hub} has no commit as its revision, so its rows could "
            "change; pin it in the task file, or give a file of its rows as data"
        )
    return task, place, files


def _texts(task: Task, place: Location, ngram: int) -> Iterator[str]:
    """Yield the fields of each row of an evaluation set, and its own long options.

    The wording of the prompt and the labels of all rows are left out. So are options below `ngram`
    words, because many texts hold "the president of the United States".
    """
    for record in read_source(place):
        with named_place(record.where):
            fields = [*(task.fields_of(record.fields) or {}).values()]
            options = task.options_of(record.fields) if task.options is not None else []
        for value in (*fields, *options):
            if not isinstance(value, str):
                raise InputError(
                    f"{record.where}: task {task.name}: has {value!r:.60} where text is expected"
                )
        yield from fields
        yield from (option for option in options if len(words_of(option)) >= ngram)
