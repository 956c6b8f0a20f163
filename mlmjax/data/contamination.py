"""Record what a model was trained on, and look for an evaluation in it."""

import re
from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from mlmjax.config.data import ALL_SUBSETS, Location
from mlmjax.config.tables import StrictTable, check_values
from mlmjax.config.task import TaskTable
from mlmjax.data.manifest import Manifest
from mlmjax.data.reading.sources import source_files
from mlmjax.storage import TRAINING, hash_file, parse_object, read_json, without_folder

NAMED = 5
"""At most this many task names are listed in a finding."""

Status = Literal["unknown", "found", "excluded", "none found"]
_BROKEN = f"{TRAINING}: is not a training manifest of format 1"
_WAY_OUT = "; remove the file to continue without its facts"
_PLACE = ("hub", "subset", "folder", "split", "revision")


class TrainingFile(StrictTable):
    """Name a file that was read, without its folder, and the hash of its content."""

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
    """Name a source of training data: files, or a dataset of the hub.

    `unnamed` counts the records whose task nothing names; None: not known.
    """

    name: str
    records: int | None = None
    unnamed: int | None = None


class ExcludedSet(_Place):
    """Name an evaluation set that shares no `ngram` words in a row with any example."""

    task: str
    ngram: int


class TrainingRun(StrictTable):
    """Describe one run: its start, its sources and tasks, and what it kept out."""

    init_from: str | None
    tasks: list[str]
    sources: list[TrainingSource]
    excluded_tasks: list[str]
    excluded: list[ExcludedSet]


class TrainingManifest(StrictTable):
    """List the runs that made a model, in order: `training_manifest.json` in its folder."""

    format: Literal[1]
    runs: list[TrainingRun]

    def text(self) -> str:
        """Return the content of the file."""
        return self.model_dump_json(indent=1, exclude_defaults=True) + "\n"


class Contamination(NamedTuple):
    """Say whether a model saw an evaluation in training: status, findings and remarks."""

    status: Status
    trained_on: list[str]
    remarks: list[str]

    @property
    def lines(self) -> list[str]:
        """Return the lines to print."""
        if self.status == "found":
            return [f"not zero-shot: the model was {one}" for one in self.trained_on]
        return [f"contamination: {self.status}: {remark}" for remark in self.remarks]


NOTHING_KNOWN = Contamination("unknown", [], ["the model folder has no training manifest"])


def training_manifest(
    init_from: str | None, rows: Manifest, before: TrainingManifest | None
) -> TrainingManifest:
    """Return the manifest of a run; `before` is that of the model it started from.

    Files and folders are named without the folders they are in, so that an export can be published.
    """
    data = rows.config["data"]
    exclude = data.get("exclude", {})
    sources = [
        TrainingSource(
            name=without_folder(report.name),
            records=report.records,
            unnamed=report.unnamed,
            files=[_named(file.path, file.sha256) for file in report.files],
            **({key: source[key] for key in _PLACE} if source["hub"] is not None else {}),
        )
        for source, report in zip(data["sources"], rows.sources, strict=True)
    ]
    excluded = [
        ExcludedSet(
            task=one["task"],
            ngram=exclude.get("ngram", 0),
            files=[_named(*file) for file in one.get("files", {}).items()],
            **{key: one[key] for key in _PLACE if key in one},
        )
        for one in rows.config.get("evaluation", [])
    ]
    run = TrainingRun(
        init_from=None if init_from is None else without_folder(init_from),
        tasks=sorted({task for file in rows.splits["train"] for task in file.examples_per_task}),
        sources=sources,
        excluded_tasks=list(exclude.get("tasks", [])),
        excluded=excluded,
    )
    return TrainingManifest(format=1, runs=[*(before.runs if before else []), run])


def add_unknown_run(manifest: bytes, source: str, init_from: str | None = None) -> bytes:
    """Add a run to a training manifest whose data is known by a name only; raises `InputError`."""
    before = check_values(TrainingManifest, parse_object(manifest, TRAINING), _BROKEN, _WAY_OUT)
    run = _run(init_from, TrainingSource(name=source))
    return TrainingManifest(format=1, runs=[*before.runs, run]).text().encode()


def with_table_run(manifest: str | None, path: str, *, init_from: str, records: int) -> str:
    """Return a training manifest whose last run names the table that was fitted to.

    `manifest` is that of a classifier after `fit`, or None if its start had none. Labels name no
    task, so `records` name none.
    """
    before = [] if manifest is None else TrainingManifest.model_validate_json(manifest).runs[:-1]
    files = [_named(path, hash_file(Path(path)))]
    name = Path(path).name
    run = _run(init_from, TrainingSource(name=name, records=records, unnamed=records, files=files))
    return TrainingManifest(format=1, runs=[*before, run]).text()


def _run(init_from: str | None, source: TrainingSource) -> TrainingRun:
    start = None if init_from is None else without_folder(init_from)
    return TrainingRun(init_from=start, tasks=[], sources=[source], excluded_tasks=[], excluded=[])


def _named(path: str, sha256: str) -> TrainingFile:
    return TrainingFile(name=Path(path).name, sha256=sha256)


def read_training_manifest(folder: Path) -> TrainingManifest | None:
    """Read `training_manifest.json` of a model folder; None if there is no such file.

    Raises `InputError` for a file that is broken or of another format.
    """
    if not (folder / TRAINING).exists():
        return None
    where = f"{folder / TRAINING}: {_BROKEN.partition(': ')[2]}"
    return check_values(TrainingManifest, read_json(folder, TRAINING), where, _WAY_OUT)


def contamination(
    task: TaskTable, data: str | Path | None, training: TrainingManifest | None
) -> Contamination:
    """Look for an evaluation in the training data of a model.

    It is found as a file with the same content, the same dataset of the hub (any split), or a task
    whose name contains its own. It is excluded if every run kept out texts that overlap with this
    file or dataset. It is unknown if records name no task, because no name could be looked for.
    """
    if training is None:
        return NOTHING_KNOWN
    place = task.location(data)
    digests = {hash_file(path): path.name for path in source_files(place)}
    found = [line for run in training.runs for line in _findings(run, task, place, digests)]
    if found:
        return Contamination("found", list(dict.fromkeys(found)), [])
    held_out = [_is_held_out(run, task, place, digests) for run in training.runs]
    excluded = [one for run in training.runs for one in run.excluded]
    status: Status = "none found"
    if held_out and all(held_out):
        status = "excluded"
        ngrams = " or ".join(map(str, sorted({one.ngram for one in excluded})))
        shared = f"{ngrams} words in a row with {task.name}"
        remarks = [f"examples that share {shared} were kept out of training"]
    else:
        missed = _which(training, [not is_out for is_out in held_out])
        how = f"examples that share text with it were not kept out by {missed}"
        if any(one.task == task.name for one in excluded):
            how = (
                f"not every run kept out examples that share text with {task.name}, or a run used "
                f"another copy of it: {missed}"
            )
        remarks = [f"the training manifest names no file, dataset or task of {task.name}; {how}"]
    sources = [source for run in training.runs for source in run.sources]
    names = dict.fromkeys(one.name for one in sources if not one.files and not one.hub)
    lost = [(n, [n in (s.name for s in run.sources) for run in training.runs]) for n in names]
    if lost:
        remarks += [
            f"what {name} held is not known ({_which(training, has, sources=False)})"
            for name, has in lost
        ]
        status = "unknown"
    unknown = _unknown(training) if status == "none found" else []
    start = training.runs[0].init_from if training.runs else None
    if start is not None:
        unknown.append(f"what {start}, the start of the first run, was trained on is not known")
    if unknown and status == "none found":
        status = "unknown"
    return Contamination(status, [], [*remarks, *unknown])


def _which(training: TrainingManifest, chosen: Sequence[bool], *, sources: bool = True) -> str:
    """Name runs by their place in the manifest and their sources; the last made the model."""
    count, shown = len(training.runs), []
    if count > 1 and all(chosen) and sources:
        return f"any of the {count} training runs"
    for number, (run, is_chosen) in enumerate(zip(training.runs, chosen, strict=True), 1):
        if is_chosen:
            which = "the only training run" if count == 1 else f"training run {number} of {count}"
            names = ", ".join(source.name for source in run.sources[:NAMED])
            more = f" and {len(run.sources) - NAMED} more" if len(run.sources) > NAMED else ""
            shown.append(which + (f" ({names}{more})" if names and sources else ""))
    return " and ".join(shown) or "any training run"


def _unknown(training: TrainingManifest) -> list[str]:
    """Name the sources of training data in which no task could be looked for by its name."""
    found = []
    for run in training.runs:
        for source in run.sources:
            # Earlier versions did not count. A record without a task has the name of its source.
            unnamed = source.name in run.tasks if source.unnamed is None else source.unnamed
            if unnamed:
                is_some = source.records is not None and unnamed != source.records
                count = f"{unnamed} of {source.records} " if is_some else ""
                found.append(f"{count}records of {source.name} name no task")
    return list(dict.fromkeys(found))[:NAMED]


def _findings(
    run: TrainingRun, task: TaskTable, place: Location, digests: dict[str, str]
) -> list[str]:
    found = []
    for source in run.sources:
        found += [
            f"trained on the file of this evaluation, {digests[file.sha256]} (in the source "
            f"{source.name}, as {file.name}, sha256 {file.sha256[:12]}...)"
            for file in source.files
            if file.sha256 in digests
        ]
        wanted = place.hub or task.hub, task.folder
        subsets = {source.subset, task.subset}
        is_same = len(subsets) == 1 or ALL_SUBSETS in subsets
        if source.hub is not None and is_same and (source.hub, source.folder) == wanted:
            found.append(
                f"trained on the dataset of this evaluation, {source.name}, split {source.split}"
            )
    names = [name for name in run.tasks if is_named(task.name, name)]
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        listed = ", ".join(map(repr, names[:NAMED])) + more
        whose = "whose name contains" if len(names) == 1 else "whose names contain"
        found.append(f"trained on {listed}, {whose} the name of this task, {task.name!r}")
    return found


def is_named(evaluation: str, task: str) -> bool:
    """Tell whether the name of a training task contains that of an evaluation.

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


def _is_held_out(
    run: TrainingRun, task: TaskTable, place: Location, digests: dict[str, str]
) -> bool:
    """Tell whether a run kept out the texts of this task in these files."""
    known = [one for one in run.excluded if one.task == task.name]
    if place.hub is None:
        return digests.keys() <= {file.sha256 for one in known for file in one.files}
    where = attrgetter(*_PLACE)
    return any(where(one) == where(place) for one in known)
