"""The units that sources are read in: what they are, what was read of them, what it adds up to."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlmjax._version import __version__
from mlmjax.config.data import DataConfig, SourceConfig
from mlmjax.data.manifest import FORMAT, SourceFile, SourceReport
from mlmjax.data.preparing.selection import mix
from mlmjax.data.preparing.shuffle import Chunk, read_stage
from mlmjax.data.preparing.workers import Job, do, merge
from mlmjax.data.reading.answers import Head
from mlmjax.data.reading.examples import Counts, read_examples, source_name
from mlmjax.data.reading.exclusion import evaluation_identity
from mlmjax.data.reading.files import BROKEN_FILE
from mlmjax.data.reading.sources import source_files
from mlmjax.errors import InputError
from mlmjax.storage import hash_value
from mlmjax.text.tokenizer import Tokenizer

_WORTH_PROCESSES = 2**26
"""Bytes of data files from which on starting processes pays."""


class Unit(NamedTuple):
    """One file of a source (or a source read in one go), its `_stats`, and its job."""

    split: str
    source: int
    job: Job
    stats: list[list[int]]


class Piece(NamedTuple):
    """Some staged examples of one unit, and for each a hash that is its own alone, `[examples]`.

    `draw` is of what the model is shown and of the place among all examples, so that equal prompts
    differ in it. The key of the chunk is of the prompt (the document) alone.
    """

    unit: Unit
    chunk: Chunk
    draw: np.ndarray


class Staged(NamedTuple):
    """What is staged: the units, the answers to their jobs, and the numbers of all tasks."""

    units: list[Unit]
    answers: list[Job]
    tasks: dict[str, int]

    def pieces(self) -> Iterator[Piece]:
        """Go through all examples in order, their tasks numbered through all units."""
        place = 0
        for unit, answer in zip(self.units, self.answers, strict=True):
            numbers = np.array([self.tasks[name] for name in answer["tasks"]] or [0], np.int32)
            for chunk in read_stage(Path(unit.job["out"])):
                places = np.arange(place, place + chunk.examples, dtype=np.uint64)
                place += chunk.examples
                draw = mix(chunk.key ^ mix(places))
                yield Piece(unit, chunk._replace(task=numbers[chunk.task]), draw)


def stage(
    folder: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    head: Head,
    progress: Callable[[str, int], None],
) -> Staged:
    """Read and tokenise all sources into `folder/stage`, but for the units that are there.

    Raises `InputError` as `read_examples`, for all sources before one of them is read.
    """
    units = _units(folder / "stage", config, tokenizer, head)
    read = dict.fromkeys(range(len(units)), 0)

    def told(number: int, records: int) -> None:
        read[number] = records
        place = units[number][:2]
        total = sum(n for other, n in read.items() if units[other][:2] == place)
        progress(source_name(_source(config, units[number])), total)

    answers = do([unit.job for unit in units], tokenizer, workers_for(config), told)
    tasks: dict[str, int] = {}
    for answer in answers:
        for name in answer["tasks"]:
            tasks.setdefault(name, len(tasks))
    return Staged(units, answers, tasks)


def _source(config: DataConfig, unit: Unit) -> SourceConfig:
    return (config.sources if unit.split == "train" else config.validation_sources)[unit.source]


def _units(folder: Path, config: DataConfig, tokenizer: Tokenizer, head: Head) -> list[Unit]:
    """Cut the sources into units, and throw away what was staged for others.

    A unit's name is a hash of all that decides its content, so that work done before is found again
    as long as nothing about it has changed.
    """
    folder.mkdir(exist_ok=True)
    units = []
    evaluation = evaluation_identity(config.exclude)  # Reads every set, so once for all units.
    for split, sources in (("train", config.sources), ("validation", config.validation_sources)):
        for number, source in enumerate(sources):
            # Opened before one is read: a mistake in the last should not cost the first's hours.
            read_examples(source, tokenizer, config.seq_length, Counts(), head)
            files = [str(path) for path in source_files(source)]
            whole = source.limit is not None or not files
            for paths in [files] if whole else [[file] for file in files]:
                table = source.model_dump(mode="json", exclude={"weight"})
                table |= {"name": source_name(source), "path": paths or None}
                exclude = config.exclude.model_dump(mode="json") if split == "train" else None
                job: Job = {
                    "kind": "stage",
                    "source": table,
                    "exclude": exclude,
                    "seq_length": config.seq_length,
                    "head": head,
                }
                stats = [_stats(path) for path in paths]
                sets = evaluation if split == "train" else None
                content = [job, stats, sets, tokenizer.sha256, __version__, FORMAT]
                job["out"] = str(folder / f"{hash_value(content)[:24]}.arrow")
                units.append(Unit(split, number, job, stats))
    known = {Path(unit.job["out"]).name for unit in units}
    for path in folder.iterdir():
        if path.name.removesuffix(".json") not in known:
            path.unlink()
    return units


def _stats(path: str) -> list[int]:
    """Return what changes when a file does; the last cannot be set back by copying or unpacking."""
    stat = Path(path).stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def check_unchanged(staged: Staged) -> None:
    """Raise `InputError` if a file is not as it was when it was going to be read."""
    for unit in staged.units:
        for path, before in zip(unit.job["source"]["path"] or (), unit.stats, strict=True):
            if _stats(path) != before:
                raise InputError(
                    f"{path}: has changed while it was read; run the same command again to read "
                    "it anew"
                )


def workers_for(config: DataConfig) -> int:
    """Count the processes that are worth starting: as configured, or one for each core.

    What one process reads in some seconds is left to one.
    """
    if config.workers is not None:
        return config.workers
    files = [path for source in config.sources for path in source_files(source)]
    large = sum(path.stat().st_size for path in files) > _WORTH_PROCESSES
    if not large:
        return 1
    # Only Linux tells which cores a process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(staged: Staged, config: DataConfig, split: str) -> list[SourceReport]:
    """Add up what became of the records of each source that was configured for a split.

    Raises `InputError` for a source of which no example is left.
    """
    reports = []
    for number, source in enumerate(
        config.sources if split == "train" else config.validation_sources
    ):
        mine = [
            answer
            for unit, answer in zip(staged.units, staged.answers, strict=True)
            if (unit.split, unit.source) == (split, number)
        ]
        counts = merge([answer["counts"] for answer in mine])
        one = SourceReport(
            name=source_name(source),
            files=[SourceFile(**file) for answer in mine for file in answer["files"]],
            records=counts.records,
            examples=counts.examples,
            dropped=_sorted(counts.dropped),
            shortened=_sorted(counts.shortened),
            normalized=_sorted(counts.normalized),
            broken=counts.broken,
            broken_files=counts.broken_files,
            hits={name: [list(hit) for hit in hits] for name, hits in sorted(counts.hits.items())},
        )
        if not one.examples:
            raise InputError(f"no example is left to train on: {sentence(one)}")
        reports.append(one)
    return reports


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def sentence(report: SourceReport) -> str:
    """Say in one line what became of the records of a source."""
    parts = [f"{report.name}: {report.records} records, {report.examples} examples"]
    dropped = dict(report.dropped)
    if files := dropped.pop(BROKEN_FILE, 0):
        parts.append(f"{files} {'file' if files == 1 else 'files'} broken off")
    parts += [f"{count} dropped ({reason})" for reason, count in dropped.items()]
    parts += [f"{count} shortened in {name!r}" for name, count in report.shortened.items()]
    return ", ".join(parts)
