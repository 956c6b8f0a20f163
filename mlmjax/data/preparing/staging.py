"""Stage sources: read and tokenise every file, and count what becomes of its records."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlmjax._version import __version__
from mlmjax.config.data import DataConfig, ExcludeConfig, SourceConfig
from mlmjax.config.run import Head
from mlmjax.data.manifest import FORMAT, SPLITS, SourceFile, SourceReport
from mlmjax.data.preparing.selection import mix
from mlmjax.data.preparing.shuffle import Chunk, read_stage, write_stage
from mlmjax.data.preparing.workers import Job, Workers
from mlmjax.data.reading.examples import TOO_LONG, Counts, Encoded, read_examples
from mlmjax.data.reading.exclusion import Exclusion
from mlmjax.data.reading.files import BROKEN_FILE
from mlmjax.data.reading.sources import first_columns, source_files
from mlmjax.errors import InputError, counted
from mlmjax.storage import describe_file, hash_value
from mlmjax.text.tokenizer import Tokenizer

_BYTES_WORTH_PROCESSES = 2**26
"""Data files of fewer bytes are read faster than processes start."""

STAGE_FORMAT = 2
"""Version of staged files, which a later run may find; it grows with the columns of `Chunk`."""

_PROGRESS_EVERY = 1000


class Unit(NamedTuple):
    """Describe what one job reads: a file of a source, or a whole source."""

    split: str
    source: int
    job: Job
    stats: list[list[int]]


class Piece(NamedTuple):
    """Hold some staged examples of one unit, each with its own hash, `[examples]`.

    The key of the chunk is a hash of the prompt (or document), which is equal for equal prompts.
    `draw` also depends on the place among all examples.
    """

    unit: Unit
    chunk: Chunk
    draw: np.ndarray


class Staged(NamedTuple):
    """Hold the staged units, the answers of their jobs, and the numbers of all tasks."""

    units: list[Unit]
    answers: list[Job]
    tasks: dict[str, int]
    processes: int

    def is_soft(self, split: str, source: int) -> bool:
        """Tell whether examples of a source have weights or distributions."""
        answers = zip(self.units, self.answers, strict=True)
        return any(one["soft"] for unit, one in answers if unit[:2] == (split, source))

    def pieces(self) -> Iterator[Piece]:
        """Yield all examples in order; tasks are numbered across all units."""
        place = 0
        for unit, answer in zip(self.units, self.answers, strict=True):
            numbers = np.array([self.tasks[name] for name in answer["tasks"]] or [0], np.int32)
            for chunk in read_stage(Path(unit.job["out"])):
                places = np.arange(place, place + len(chunk.key), dtype=np.uint64)
                place += len(chunk.key)
                draw = mix(chunk.key ^ mix(places))
                yield Piece(unit, chunk._replace(task=numbers[chunk.task]), draw)


def sources_of(config: DataConfig, split: str) -> tuple[SourceConfig, ...]:
    """Return the sources that are configured for a split."""
    return config.sources if split == "train" else config.validation_sources


def stage(
    folder: Path,
    config: DataConfig,
    workers: Workers,
    head: Head,
    evaluation: list[dict[str, Any]],
    progress: Callable[[str, int], None],
) -> Staged:
    """Read and tokenise all sources into `folder/stage`, except finished units.

    `evaluation` identifies the excluded evaluation sets. Raises `InputError` as `read_examples`,
    for all sources before it reads one of them.
    """
    units = _units(folder / "stage", config, workers.tokenizer, head, evaluation)
    processes = config.workers or _count_processes(units)
    read: dict[int, int] = {}

    def show(number: int, records: int) -> None:
        read[number] = records
        split, source = units[number][:2]
        total = sum(n for other, n in read.items() if units[other][:2] == (split, source))
        progress(sources_of(config, split)[source].title, total)

    answers = workers.run(stage_unit, [unit.job for unit in units], processes, show)
    names = dict.fromkeys(name for answer in answers for name in answer["tasks"])
    return Staged(units, answers, {name: n for n, name in enumerate(names)}, processes)


def _units(
    folder: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    head: Head,
    evaluation: list[dict[str, Any]],
) -> list[Unit]:
    """Divide the sources into units, named by a hash of all that decides their content.

    Delete what was staged for other units.
    """
    folder.mkdir(exist_ok=True)
    units = []
    for split in SPLITS:
        is_train = split == "train"
        for number, source in enumerate(sources_of(config, split)):
            files = [str(path) for path in source_files(source)]
            resolved = source.model_copy(update={"path": tuple(files) or None})
            # Checked before any is read, so that a mistake in the last does not cost hours.
            read_examples(resolved, tokenizer, config.seq_length, Counts(), head)
            is_whole = source.limit is not None or not files
            for paths in [files] if is_whole else [[file] for file in files]:
                # A share of the rows decides nothing that is staged.
                weighs = set() if source.weight_column else {"weight"}
                table = source.model_dump(mode="json", exclude=weighs)
                job: Job = {
                    "source": table | {"name": source.title, "path": paths or None},
                    "exclude": config.exclude.model_dump(mode="json") if is_train else None,
                    "seq_length": config.seq_length,
                    "head": head,
                }
                stats = [_stats(path) for path in paths]
                sets = evaluation if is_train else None
                content = [job, stats, sets, tokenizer.sha256, __version__, FORMAT, STAGE_FORMAT]
                job["out"] = str(folder / f"{hash_value(content)[:24]}.arrow")
                units.append(Unit(split, number, job, stats))
    known = {Path(unit.job["out"]).name for unit in units}
    for path in folder.iterdir():
        if path.name.removesuffix(".json") not in known:
            path.unlink(missing_ok=True)
    return units


def _stats(path: str) -> list[int]:
    """Return what changes with a file; copying or unpacking cannot reset the last."""
    stat = Path(path).stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _count_processes(units: list[Unit]) -> int:
    """Return one process per core, or one if that reads all data in seconds."""
    if sum(size for unit in units for size, *_ in unit.stats) <= _BYTES_WORTH_PROCESSES:
        return 1
    from joblib import cpu_count  # Slow to import, and seldom needed.

    return cpu_count()


def stage_unit(
    tokenizer: Tokenizer,
    progress: Callable[[int], None],
    *,
    source: dict[str, Any],
    exclude: dict[str, Any] | None,
    seq_length: int,
    head: Head,
    out: str,
) -> Job:
    """Tokenise one unit of a source into `out`; return what was read, kept and dropped.

    The answer has `files` (with their hashes), the `counts`, the names of the `tasks` in the order
    of their numbers, and whether examples are `soft` (weighted, or distributions over labels).
    """
    unit = SourceConfig.model_validate(source, strict=False)
    exclusion = None if exclude is None else _exclusion(json.dumps(exclude))
    counts = Counts()
    tasks: dict[str, int] = {}
    is_soft = unit.weight_column is not None

    def columns() -> Iterator[tuple]:
        nonlocal is_soft
        for one in read_examples(unit, tokenizer, seq_length, counts, head, exclusion):
            counts.examples += 1
            if counts.examples % _PROGRESS_EVERY == 0:
                progress(counts.records)
            is_soft = is_soft or bool(one.shares)
            task = tasks.setdefault(one.task, len(tasks))
            facts = _answer(unit, one), one.answer_position, task, one.key
            yield one.ids, *facts, one.label, one.weight, one.shares
        progress(counts.records)

    write_stage(Path(out), columns(), tokenizer.vocab_size)
    files = [describe_file(Path(path)) for path in unit.paths]
    return {"files": files, "counts": vars(counts), "tasks": list(tasks), "soft": is_soft}


def _answer(source: SourceConfig, one: Encoded) -> int:
    """Return an answer's token or class; 0 for a value, -1 for plain text."""
    if one.answer_position >= 0:
        return int(one.ids[one.answer_position])
    if source.text is not None:
        return -1
    return 0 if source.labels is None else int(one.label)


@lru_cache(maxsize=1)
def _exclusion(config: str) -> Exclusion:
    """Read the evaluation sets once for all units of a process."""
    return Exclusion(ExcludeConfig.model_validate_json(config, strict=False))


def check_unchanged(staged: Staged) -> None:
    """Raise `InputError` if a file has changed since the units were made."""
    for unit in staged.units:
        for path, before in zip(unit.job["source"]["path"] or (), unit.stats, strict=True):
            if _stats(path) != before:
                raise InputError(
                    f"{path}: has changed while it was read; run the same command again"
                )


def report_sources(staged: Staged, config: DataConfig, split: str) -> list[SourceReport]:
    """Add up what became of the records of each source of a split.

    Raises `InputError` for a source without an example.
    """
    reports = []
    for number, source in enumerate(sources_of(config, split)):
        counts, files = Counts(), []
        for unit, answer in zip(staged.units, staged.answers, strict=True):
            if (unit.split, unit.source) == (split, number):
                counts.add(Counts(**answer["counts"]))
                files += [SourceFile(**file) for file in answer["files"]]
        found: dict[str, Any] = {
            name: dict(sorted(value.items())) if isinstance(value, dict) else value
            for name, value in vars(counts).items()
        }
        if config.exclude.tasks and counts.unnamed:
            found["columns"] = first_columns(source)
        report = SourceReport(name=source.title, files=files, **found)
        if not report.examples:
            hint = f"; raise data.seq_length, which is {config.seq_length}"
            raise InputError(
                f"no example is left to train on: {describe_source(report)}"
                + hint * (TOO_LONG in report.dropped)
            )
        reports.append(report)
    return reports


def describe_source(report: SourceReport) -> str:
    """Describe in one line what became of the records of a source."""
    parts = [f"{report.name}: {counted(report.records, 'record')}"]
    parts.append(counted(report.examples, "example"))
    dropped = dict(report.dropped)
    if files := dropped.pop(BROKEN_FILE, 0):
        parts.append(counted(files, "broken file"))
    parts += [f"{count} dropped ({reason})" for reason, count in dropped.items()]
    parts += [f"{count} shortened in {name!r}" for name, count in report.shortened.items()]
    parts += [f"{count} blank in {name!r}" for name, count in report.blanked.items()]
    return ", ".join(parts)


def describe_tasks(
    report: SourceReport, number: int, source: Mapping[str, Any], patterns: Any
) -> list[str]:
    """Say in which column the tasks of a source were found, and what could not be excluded.

    `source` is its configuration, source `number` of the run; `patterns` are those of
    `data.exclude.tasks`.
    """
    lines = []
    if report.task_columns and source.get("task") is None:
        found = " and ".join(f"{name!r}" for name in report.task_columns)
        lines.append(f"{report.name}: tasks are named by the column {found}")
    lines += [
        f"{report.name}: the column {name!r} holds numbers, which are no names of tasks"
        for name in report.numbered
    ]
    if patterns and report.unnamed:
        what, them = (
            f"{report.unnamed} of {counted(report.records, 'record')} name no task",
            "those",
        )
        if report.unnamed == report.records:
            what, them = "no record names its task", "it"
        columns = f" (columns: {', '.join(report.columns)})" if report.columns else ""
        lines.append(
            f"{report.name}: data.exclude.tasks: {what}, so nothing could be excluded by name from "
            f"{them}; set data.sources.{number}.task to the column of the task{columns}, or "
            "compare texts with data.exclude.overlap"
        )
    return lines
