"""What a model was trained on, told by its own folder, and what that means for an evaluation."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from mlmjax.config.data import Location
from mlmjax.config.tables import StrictTable
from mlmjax.config.task import Task
from mlmjax.data.manifest import Manifest
from mlmjax.data.reading.sources import source_files
from mlmjax.errors import InputError
from mlmjax.storage import TRAINING, hash_file, read_json

NAMED = 5
"""Tasks named in one finding; of more, the number is told."""

Status = Literal["unknown", "found", "excluded", "none found"]
_PLACE = ("hub", "subset", "folder", "split", "revision")


class TrainingFile(StrictTable):
    """A file that was read: its name without its folder, and its content's hash."""

    name: str
    sha256: str


class _Place(StrictTable):
    files: list[TrainingFile] = Field(default_factory=list)
    hub: str | None = None
    subset: str | None = None
    folder: str | None = None
    split: str | None = None
    revision: str | None = None


class TrainingSource(_Place):
    """A source that was trained on: files, or a dataset of the hub."""

    name: str


class ExcludedSet(_Place):
    """An evaluation set with which no example shared `ngram` words in a row."""

    task: str
    ngram: int


class TrainingRun(StrictTable):
    """One run: what it started from, its sources, the tasks it saw, and what it kept out."""

    init_from: str | None
    tasks: list[str]
    sources: list[TrainingSource]
    excluded_tasks: list[str]
    excluded: list[ExcludedSet]


class TrainingManifest(StrictTable):
    """The runs that made a model, first to last; `training_manifest.json` of its folder."""

    format: Literal[1]
    runs: list[TrainingRun]

    def text(self) -> str:
        """Return the content of the file."""
        return self.model_dump_json(indent=1, exclude_defaults=True) + "\n"


class Contamination(NamedTuple):
    """What is known: the status, what was found of the evaluation in training, and remarks."""

    status: Status
    trained_on: list[str]
    remarks: list[str]

    @property
    def lines(self) -> list[str]:
        """What is told to people, a line each."""
        if self.status == "found":
            return [f"not zero-shot: the model was {one}" for one in self.trained_on]
        return [f"contamination: {self.status}: {remark}" for remark in self.remarks]


NOTHING_KNOWN = Contamination("unknown", [], ["the model folder has no training manifest"])


def training_manifest(
    init_from: str | None, rows: Manifest, before: TrainingManifest | None
) -> TrainingManifest:
    """Tell what a run trained on; `before` is what the model it started from tells.

    Names of files come without their folders, so that an export can be given away.
    """
    data = rows.config["data"]
    sources = [
        TrainingSource(
            name=report.name,
            files=[
                TrainingFile(name=Path(file.path).name, sha256=file.sha256) for file in report.files
            ],
            **({key: source[key] for key in _PLACE} if source["hub"] is not None else {}),
        )
        for source, report in zip(data["sources"], rows.sources, strict=True)
    ]
    ngram = data.get("exclude", {}).get("ngram", 0)
    excluded = [
        ExcludedSet(
            task=one["task"],
            ngram=ngram,
            files=[
                TrainingFile(name=Path(path).name, sha256=digest)
                for path, digest in one.get("files", {}).items()
            ],
            **{key: one[key] for key in _PLACE if key in one},
        )
        for one in rows.config.get("evaluation", [])
    ]
    run = TrainingRun(
        init_from=init_from,
        tasks=sorted({task for file in rows.splits["train"] for task in file.examples_per_task}),
        sources=sources,
        excluded_tasks=list(data.get("exclude", {}).get("tasks", [])),
        excluded=excluded,
    )
    return TrainingManifest(format=1, runs=[*(before.runs if before else []), run])


def read_training_manifest(folder: Path) -> TrainingManifest | None:
    """Read `training_manifest.json` of a model folder; None where it has none.

    Raises `InputError` for a file that is broken or of another format.
    """
    if not (folder / TRAINING).exists():
        return None
    try:
        return TrainingManifest.model_validate(read_json(folder, TRAINING))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{folder / TRAINING}: is no training manifest of format 1: {where}: "
            f"{first['msg']}; take the file away to go on without knowing what it told"
        ) from error


def contamination(
    task: Task, data: str | Path | None, training: TrainingManifest | None
) -> Contamination:
    """Look for an evaluation in what a model was trained on.

    Found is a source file that is the very file of the evaluation, the same dataset of the hub
    (whatever split of it), and a task whose name has that of the evaluation in it. Excluded is an
    evaluation whose texts every run kept out by overlap, read from the same file or dataset.
    """
    if training is None:
        return NOTHING_KNOWN
    place = task.location(data)
    digests = {hash_file(path): path.name for path in source_files(place)}
    found = [line for run in training.runs for line in _findings(run, task, place, digests)]
    if found:
        return Contamination("found", list(dict.fromkeys(found)), [])
    remarks = []
    held_out = [_held_out(run, task, place, digests) for run in training.runs]
    status: Status = "excluded" if held_out and all(held_out) else "none found"
    if status == "excluded":
        ngrams = sorted({one.ngram for run in training.runs for one in run.excluded})
        told = " or ".join(map(str, ngrams))
        remarks.append(
            f"examples that share {told} words in a row with {task.name} were kept out of training"
        )
    else:
        other = any(one.task == task.name for run in training.runs for one in run.excluded)
        remarks.append(
            f"no file, dataset or task of the training manifest is that of {task.name}; examples "
            "that share text with it were "
            + ("kept out of some runs alone, or by another copy of it" if other else "not kept out")
        )
    start = training.runs[0].init_from if training.runs else None
    if start is not None:
        remarks.append(f"what {start} was trained on is not known")
        status = "unknown" if status == "none found" else status
    return Contamination(status, [], remarks)


def _findings(run: TrainingRun, task: Task, place: Location, digests: dict[str, str]) -> list[str]:
    found = []
    for source in run.sources:
        found += [
            f"trained on the very file of this evaluation: {digests[file.sha256]} (in the source "
            f"{source.name}, as {file.name}, sha256 {file.sha256[:12]}...)"
            for file in source.files
            if file.sha256 in digests
        ]
        keys = ("hub", "subset", "folder")
        wanted = place.hub or task.hub, task.subset, task.folder
        if source.hub is not None and tuple(getattr(source, key) for key in keys) == wanted:
            found.append(
                f"trained on the dataset {source.name} of this evaluation, split {source.split}"
            )
    names = [name for name in run.tasks if is_named(task.name, name)]
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        told = ", ".join(map(repr, names[:NAMED])) + more
        found.append(f"trained on what is named like this evaluation, {task.name}: {told}")
    return found


def is_named(evaluation: str, task: str) -> bool:
    """Tell whether the name of a training task has that of an evaluation in it, as whole words.

    >>> [is_named("ag_news", name) for name in ("task1541_agnews_topic", "ag_news_subset:1.0.0")]
    [True, True]
    >>> [is_named("rte", name) for name in ("glue/RTE:2.0.0", "artery")]
    [True, False]
    """
    pattern = _name_pattern(evaluation)
    return pattern is not None and pattern.search(task.casefold()) is not None


@lru_cache(maxsize=8)
def _name_pattern(evaluation: str) -> re.Pattern[str] | None:
    letters = re.findall(r"[^\W_]", evaluation.casefold())
    if not letters:
        return None
    return re.compile(r"(?<![^\W_])" + r"[\W_]*".join(letters) + r"(?![^\W_])")


def _held_out(run: TrainingRun, task: Task, place: Location, digests: dict[str, str]) -> bool:
    """Tell whether a run kept out the texts of this very file or dataset, read by this task."""
    known = [one for one in run.excluded if one.task == task.name]
    if place.hub is None:
        return digests.keys() <= {file.sha256 for one in known for file in one.files}
    wanted: Sequence[Any] = [getattr(place, key) for key in _PLACE]
    return any([getattr(one, key) for key in _PLACE] == wanted for one in known)
