"""Prepare packed rows on disk from configured sources, once."""

import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from mlmjax._version import __version__
from mlmjax.config.data import DataConfig, SourceConfig
from mlmjax.config.run import Head
from mlmjax.config.tables import list_differences
from mlmjax.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Manifest,
    SelectionReport,
    SourceReport,
    read_manifest,
    totals,
)
from mlmjax.data.preparing.build import build_rows
from mlmjax.data.preparing.staging import (
    check_unchanged,
    describe_source,
    describe_tasks,
    report_sources,
    stage,
)
from mlmjax.data.preparing.workers import Workers
from mlmjax.data.reading.exclusion import evaluation_identity
from mlmjax.data.reading.sources import source_files
from mlmjax.errors import InputError, counted
from mlmjax.storage import build_folder, hash_file, is_there, unmark
from mlmjax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Progress = Callable[[str, int], None]
"""Gets the name of the source that is being read, and its records so far."""

_NOT_ROWS = {"rows", "subset", "workers", "batch_size", "batch_start", "batch_warmup", "accumulate"}


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    progress: Progress = lambda name, records: None,
    *,
    head: Head = "mlm",
) -> Path:
    """Tokenise and pack the sources into the folder `config.rows`, and return it.

    The folder appears whole or not at all, and the same input gives the same bytes. If it exists,
    nothing is done, provided that its manifest has this configuration (apart from `weight`, the
    batch and `accumulate`), this tokenizer, and these source files: same names and sizes, and same
    content where a file is newer than the manifest. Source files that are not on this machine are
    not checked.

    `validation_rows` holds out the prompts (documents) whose hash is below a threshold, so that
    equal prompts are in one split, whatever their source. The threshold is the lowest that gives
    `validation_rows` rows' worth of tokens (of examples, without packing), or that share of them.
    More than a third of the examples held out is logged as a warning, more than half is an error.

    Rows are for one `head`: the classification head reads texts without a slot, and their labels.

    Raises `InputError` for rows of other settings (what differs), for bad sources, and if a source
    or the training split has no example; `RunError` if writing fails.
    """
    folder = Path(config.rows)
    unmark(folder)
    if not is_there(folder):
        _check_names(config)
        with build_folder(folder) as partial:
            if partial is not None:
                _build(partial, config, tokenizer, head, progress)
                return folder
    check_same(folder, config, tokenizer, head)
    return folder


def _check_names(config: DataConfig) -> None:
    if not config.sources:
        raise InputError(
            f"{config.rows}: does not exist, and data.sources names nothing to read; name sources"
        )
    names = [source.title for source in (*config.sources, *config.validation_sources)]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise InputError(f"data.sources: two are called {doubled[0]!r}; give each a name")


def summary(manifest: Manifest) -> list[str]:
    """Return lines on what was read, kept, shortened and dropped, and on the rows."""
    lines = [describe_source(one) for one in (*manifest.sources, *manifest.validation_sources)]
    lines += task_notes(manifest)
    if manifest.selection:
        chosen = manifest.selection
        short = [f" ({text})" if text else "" for text in shortages(chosen)]
        lines += [
            f"selected: {counted(one.examples, 'example')}{text}, at most {one.per_task} a task"
            for one, text in zip(chosen.sets, short, strict=True)
        ]
        alike = f"; {counted(chosen.one_answer, 'task')} of one answer" if chosen.one_answer else ""
        lines.append(
            f"left out: {chosen.unbalanced} by select.answer_share, {chosen.capped} by "
            f"select.per_task and select.sizes{alike}"
        )
    for split, files in manifest.splits.items():
        found = totals(files, manifest.seq_length)
        lines.append(
            f"{split}: {counted(found['rows'], 'row')}, {counted(found['tokens'], 'token')}, "
            f"{found['padding_share']:.2%} padding"
        )
    return lines


def task_notes(manifest: Manifest) -> list[str]:
    """Return lines on columns of tasks that were found, and on tasks that nothing names."""
    data = manifest.config.get("data", {})
    patterns = data.get("exclude", {}).get("tasks")
    named = zip(manifest.sources, data.get("sources", ()), strict=False)
    return [
        line
        for number, (report, source) in enumerate(named)
        for line in describe_tasks(report, number, source, patterns)
    ]


def shortages(selection: SelectionReport) -> list[str]:
    """Describe each nested set that is smaller than asked; an empty text for any other.

    >>> one = {"asked": 3000, "examples": 2734, "per_task": 80}
    >>> shortages(SelectionReport(sets=[one], one_answer=0, unbalanced=0, capped=0))
    ['asked 3000, found 2734: there are no more']
    """
    limited = " within the limits" if selection.unbalanced or selection.capped else ""
    return [
        f"asked {one.asked}, found {one.examples}: there are no more{limited}"
        if one.asked is not None and one.examples < one.asked
        else ""
        for one in selection.sets
    ]


def _build(
    folder: Path, config: DataConfig, tokenizer: Tokenizer, head: Head, progress: Progress
) -> None:
    """Stage the sources, write the rows and their manifest; finished parts are used again."""
    evaluation = evaluation_identity(config.exclude)
    with closing(Workers(tokenizer)) as workers:
        staged = stage(folder, config, workers, head, evaluation, progress)
        reports = {split: report_sources(staged, config, split) for split in SPLITS}
        splits, selection = build_rows(folder, staged, config, workers)
    check_unchanged(staged)
    manifest = Manifest(
        format=FORMAT,
        version=__version__,
        config=_identity(config, head) | {"evaluation": evaluation},
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        seq_length=config.seq_length,
        tasks=list(staged.tasks),
        sources=reports["train"],
        validation_sources=reports["validation"],
        selection=selection,
        splits=splits,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    for name in ("buckets", "packed", "stage"):
        shutil.rmtree(folder / name)


def _identity(config: DataConfig, head: Head) -> dict[str, Any]:
    """Return the part of the configuration that decides the rows."""
    table = config.model_dump(mode="json", exclude=_NOT_ROWS)
    for source in (*table["sources"], *table["validation_sources"]):
        del source["weight"]
    return {"head": head, "data": table}


def check_same(folder: Path, config: DataConfig, tokenizer: Tokenizer, head: Head) -> None:
    """Raise `InputError` that lists how the rows differ from those of this configuration.

    `prepare` says what is compared. Nothing is written.
    """
    manifest = read_manifest(folder)
    identity, known = _identity(config, head), dict(manifest.config)
    try:
        identity["evaluation"] = evaluation_identity(config.exclude)
    except InputError as error:
        log.info("%s; the rows are not checked against it", error.message)
        known.pop("evaluation", None)
    differences = list_differences(identity, known, "the rows have")
    for name in ("sources", "validation_sources"):
        now, then = (len(one["data"].get(name, ())) for one in (identity, known))
        if now != then:  # Their settings are not compared one by one.
            rest = [line for line in differences if not line.startswith(f"data.{name}.")]
            found = f"has {now}" if now else "is empty"
            differences = [f"data.{name} {found}; the rows have {then}", *rest]
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        differences.append(
            f"the tokenizer's sha256 is {tokenizer.sha256[:12]}..., the rows have "
            f"{manifest.tokenizer_sha256[:12]}..."
        )
    if not differences:
        written = (folder / MANIFEST).stat().st_mtime_ns
        sources = (*config.sources, *config.validation_sources)
        reports = (*manifest.sources, *manifest.validation_sources)
        for source, report in zip(sources, reports, strict=True):
            differences += _changed_files(source, report, written)
    if differences:
        raise InputError(
            f"{folder}: holds rows made differently: {differences[0]}; delete the folder to "
            "prepare again, or name another in data.rows",
            differences[1:],
        )


def _changed_files(source: SourceConfig, report: SourceReport, written: int) -> list[str]:
    try:
        files = {str(path): path for path in source_files(source)}
    except InputError:
        log.info("%s: its files are not here; the rows are not checked against them", report.name)
        return []
    known = {file.path: file for file in report.files}
    changed = [f"{name} is new" for name in files.keys() - known.keys()]
    changed += [f"{name} is missing" for name in known.keys() - files.keys()]
    for name in files.keys() & known.keys():
        stat = files[name].stat()
        if stat.st_size != known[name].bytes or (
            max(stat.st_mtime_ns, stat.st_ctime_ns) > written
            and hash_file(files[name]) != known[name].sha256
        ):
            changed.append(f"{name} has changed since")
    return sorted(changed)
