"""What is kept out of training so that a model can be tested on it: tasks and evaluation sets."""

import fnmatch
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mlmjax.config.data import EvaluationSet, ExcludeConfig, Location
from mlmjax.config.task import Task, load_task
from mlmjax.data.reading.overlap import Hit, OverlapIndex, words_of
from mlmjax.data.reading.sources import read_source, source_files
from mlmjax.errors import InputError
from mlmjax.storage import hash_file

_TEXT_KEYS = {"prompt", "columns", "clean", "strip", "options"}
"""The keys of a task that decide which texts its rows hold."""


class Exclusion:
    """The records that `[data.exclude]` keeps out, by their task's name and by their text.

    Made once and asked for each record; the evaluation sets are read when it is made. Raises
    `InputError` for an unknown task, for a set without data here or on the hub, for one of the hub
    without a commit, and for rows that cannot be read, naming file and row.
    """

    def __init__(self, config: ExcludeConfig):
        self.patterns = config.tasks
        self._tasks = [re.compile(fnmatch.translate(p.casefold())) for p in config.tasks]
        self.index = None
        if config.overlap:
            texts: dict[str, Iterable[str]] = {}
            for one in config.overlap:
                task, place = _opened(one)
                # A set may have several files: each is an entry of the same task.
                texts[task.name] = itertools.chain(
                    texts.get(task.name, ()), _texts(task, place, config.ngram)
                )
            self.index = OverlapIndex.of(texts, config.ngram)

    def pattern(self, task: str) -> str | None:
        """Return the first pattern that a task's name matches, whatever its case; or None.

        >>> exclusion = Exclusion(ExcludeConfig(tasks=("*mmlu*", "glue/rte:*")))
        >>> exclusion.pattern("GLUE/RTE:2.0.0"), exclusion.pattern("glue/wnli:2.0.0")
        ('glue/rte:*', None)
        """
        name = task.casefold()
        matches = zip(self.patterns, self._tasks, strict=True)
        return next((pattern for pattern, known in matches if known.match(name)), None)

    def overlap(self, text: str) -> Hit | None:
        """Return what a text shares with an evaluation set; or None."""
        return None if self.index is None else self.index.hit(text)


def evaluation_identity(config: ExcludeConfig) -> list[dict[str, Any]]:
    """Describe the evaluation sets of `[data.exclude]` by their content, as JSON values.

    Of each: `task` (its name), `texts` (a hash of how the task reads a row), and `files` (sha256 by
    path), or of a dataset of the hub `hub`, `subset`, `folder`, `split` and `revision`. Raises
    `InputError` as `Exclusion`.
    """
    return [_identity(one) for one in config.overlap]


def _identity(one: EvaluationSet) -> dict[str, Any]:
    task, place = _opened(one)
    reading = task.model_dump_json(include=_TEXT_KEYS).encode()
    found = {"task": task.name, "texts": hashlib.sha256(reading).hexdigest()}
    if place.hub is None:
        return {**found, "files": {str(path): hash_file(path) for path in source_files(place)}}
    hub = place.model_dump(mode="json", include={"hub", "subset", "folder", "split", "revision"})
    return {**found, **hub}


def _opened(one: EvaluationSet) -> tuple[Task, Location]:
    where = f"data.exclude.overlap: {one.task}"
    try:
        task = load_task(one.task)
        place = task.location(one.data)
        source_files(place)
    except InputError as error:
        hint = f'; or name its rows here: {{ task = "{one.task}", data = "FILE" }}'
        raise InputError(f"{where}: {error.message}{hint}", error.details) from error
    if not place.is_pinned:
        raise InputError(
            f"{where}: hub dataset {place.hub} has no commit as its revision, so that its rows "
            "could change; pin it in the task file, or give a file of its rows as data"
        )
    return task, place


def _texts(task: Task, place: Location, ngram: int) -> Iterator[str]:
    """Stream the texts of an evaluation set: the fields of each row, and its own long options.

    The wording of the prompt and the labels that all rows have are no part of them, and options
    below `ngram` words are left out: "the president of the United States" is no question.
    """
    for record in read_source(place):
        try:
            fields = [*(task.fields_of(record.fields) or {}).values()]
            options = task.options_of(record.fields) if task.options is not None else []
        except InputError as error:
            raise InputError(f"{record.where}: {error.message}", error.details) from error
        for value in (*fields, *options):
            if not isinstance(value, str):
                raise InputError(
                    f"{record.where}: task {task.name}: has {value!r:.60} where text is expected"
                )
        yield from fields
        yield from (option for option in options if len(words_of(option)) >= ngram)
