"""Build row files from staged examples: selection, hold-out, shuffle, packing."""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlmjax.config.data import DataConfig, SelectConfig, SourceConfig
from mlmjax.data.manifest import SPLITS, NestedSet, RowFile, SelectionReport
from mlmjax.data.packing import pack_stream
from mlmjax.data.preparing.selection import (
    CAPPED,
    LEFT_OUT,
    UNBALANCED,
    Members,
    Selection,
    mix,
    select,
)
from mlmjax.data.preparing.shuffle import Chunk, read_bucket, scatter
from mlmjax.data.preparing.staging import Piece, Staged, sources_of
from mlmjax.data.preparing.workers import Job, Workers
from mlmjax.data.reading.examples import label_options
from mlmjax.data.rows import write_rows
from mlmjax.errors import InputError, counted
from mlmjax.storage import hash_file, hash_value
from mlmjax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_BIN_SHIFT = 44
_BINS = 2**20
_HELD_OUT = LEFT_OUT  # in place of a level, for examples that are held out for validation


class Group(NamedTuple):
    """Name examples that are packed together: a level of a source in a split."""

    split: str
    source: int
    level: int


def build_rows(
    folder: Path, staged: Staged, config: DataConfig, workers: Workers
) -> tuple[dict[str, list[RowFile]], SelectionReport | None]:
    """Write the row files of every split; return what they hold and what was selected.

    Raises `InputError` if nothing is left to train on.
    """
    chosen = choose(staged, config)
    held_out = _held_out_bins(staged, chosen, config)
    tokens: Counter[Group] = Counter()
    for piece in staged.pieces():
        groups, numbers = _groups_of(piece, chosen, held_out)
        for number, group in enumerate(groups):
            tokens[group] += int(piece.chunk.lengths[numbers == number].sum())
    order = sorted(tokens, key=lambda group: (SPLITS.index(group.split), *group[1:]))

    def chunks() -> Iterator[tuple[Chunk, np.ndarray]]:
        for piece in staged.pieces():
            groups, numbers = _groups_of(piece, chosen, held_out)
            places = np.array([order.index(group) for group in groups] + [-1])
            yield piece.chunk._replace(key=piece.draw), places[numbers]

    packed = _packed_folder(folder, staged, config)
    buckets = folder / "buckets"
    shutil.rmtree(buckets, ignore_errors=True)
    buckets.mkdir()
    sizes = [tokens[group] for group in order]
    written = scatter(chunks(), sizes, buckets, workers.tokenizer.vocab_size)
    splits = _pack(packed, written, order, staged, config, workers)
    for split, files in splits.items():
        (folder / split).mkdir(exist_ok=True)
        for file in files:
            with suppress(FileNotFoundError):  # It has moved if the run was killed just here.
                (packed / split / file.file).rename(folder / split / file.file)
    return splits, None if chosen is None else _report_selection(staged, chosen, config)


def _packed_folder(folder: Path, staged: Staged, config: DataConfig) -> Path:
    """Return the folder for rows of these examples; delete packed rows of any others."""
    identity = [staged.units, config.model_dump(mode="json", exclude={"workers"})]
    packed = folder / "packed" / hash_value(identity)[:24]
    if not packed.exists():
        for path in (packed.parent, *(folder / split for split in SPLITS)):
            shutil.rmtree(path, ignore_errors=True)
        packed.mkdir(parents=True)
    return packed


def choose(staged: Staged, config: DataConfig) -> Selection | None:
    """Select among the examples with an answer; None if the configuration keeps all."""
    wanted = config.select
    if wanted == SelectConfig():
        return None
    counts: Counter[tuple[int, int]] = Counter()
    for members in _answered(staged):
        counts.update(zip(members.task.tolist(), members.answer.tolist(), strict=True))
    return select(
        lambda: _answered(staged),
        counts,
        sizes=wanted.sizes or (None,),
        per_task=wanted.per_task,
        answer_share=wanted.answer_share,
    )


def _answered(staged: Staged) -> Iterator[Members]:
    """Yield the training examples that have an answer."""
    for piece in staged.pieces():
        if piece.unit.split == "train":
            yield _members(piece, piece.chunk.answer >= 0)


def _members(piece: Piece, which: np.ndarray) -> Members:
    # Hashed again, so that selection does not depend on the order in which rows are shuffled.
    return Members(piece.chunk.task[which], piece.chunk.answer[which], mix(piece.draw[which]))


def _report_selection(staged: Staged, chosen: Selection, config: DataConfig) -> SelectionReport:
    found = np.zeros(CAPPED + 1, np.int64)
    for members in _answered(staged):
        found += np.bincount(chosen.levels(members), minlength=len(found))
    asked = config.select.sizes or (None,)
    sizes = np.cumsum(found)[: len(asked)].tolist()
    return SelectionReport(
        sets=[
            NestedSet(asked=size, examples=examples, per_task=per_task)
            for size, examples, per_task in zip(asked, sizes, chosen.per_task, strict=True)
        ],
        one_answer=chosen.one_answer,
        unbalanced=int(found[UNBALANCED]),
        capped=int(found[CAPPED]),
    )


def _levels(piece: Piece, chosen: Selection | None) -> np.ndarray:
    """Return the smallest nested set of each example; `LEFT_OUT` or above for none."""
    level = np.zeros(len(piece.chunk.key), np.int64)
    if chosen is not None and piece.unit.split == "train":
        has_answer = piece.chunk.answer >= 0
        level[has_answer] = chosen.levels(_members(piece, has_answer))
    return level


def _groups_of(
    piece: Piece, chosen: Selection | None, held_out: int
) -> tuple[list[Group], np.ndarray]:
    """Return the groups of a piece, and the number of each example's (-1: left out)."""
    level = _levels(piece, chosen)
    is_held_out = (piece.chunk.key >> np.uint64(_BIN_SHIFT)) < held_out
    code = np.where(level >= LEFT_OUT, -1, np.where(is_held_out, _HELD_OUT, level))
    found = np.unique(code[code >= 0]).tolist()
    split, source, *_ = piece.unit
    groups = [
        Group("validation", source, 0) if value == _HELD_OUT else Group(split, source, value)
        for value in found
    ]
    return groups, np.where(code < 0, -1, np.searchsorted(found, code))


def _held_out_bins(staged: Staged, chosen: Selection | None, config: DataConfig) -> int:
    """Return how many bins of the key, from the lowest, are held out for validation."""
    if not config.validation_rows:
        return 0
    counts, sizes = np.zeros((2, _BINS), np.int64)
    row_size = config.seq_length if config.pack else 1
    for piece in staged.pieces():
        chunk, kept = piece.chunk, _levels(piece, chosen) < LEFT_OUT
        bins_of = (chunk.key[kept] >> np.uint64(_BIN_SHIFT)).astype(int)
        np.add.at(counts, bins_of, 1)
        np.add.at(sizes, bins_of, chunk.lengths[kept] if config.pack else 1)
    filled = np.cumsum(sizes)
    if isinstance(config.validation_rows, float):
        wanted = max(1, round(config.validation_rows * int(filled[-1])))
    else:
        wanted = config.validation_rows * row_size
    bins = int(np.searchsorted(filled, wanted)) + 1
    if bins > _BINS or filled[bins - 1] == filled[-1]:
        unit_name = "tokens" if config.pack else "examples"
        least = int(np.searchsorted(filled, row_size))
        advice = "leaves nothing to train on; lower data.validation_rows or give more data"
        if least >= _BINS or filled[least] == filled[-1]:
            advice = (
                f"would hold out every document ({np.count_nonzero(sizes)}); set "
                "data.validation_rows = 0, use data.validation_sources, or give more documents"
            )
        raise InputError(
            f"data.validation_rows = {config.validation_rows}: holding out {wanted} {unit_name} of "
            f"{filled[-1]} {advice}"
        )
    _check_share(int(counts[:bins].sum()), int(counts.sum()), config)
    return bins


def _check_share(held_out: int, total: int, config: DataConfig) -> None:
    """Warn if over a third of the examples are held out; raise `InputError` if over half are."""
    if 3 * held_out <= total:
        return
    what = (
        f"data.validation_rows = {config.validation_rows}: holds out {held_out} of "
        f"{counted(total, 'example')}; "
    )
    lower = "lower it, for example to a share: data.validation_rows = 0.1"
    if 2 * held_out > total:
        raise InputError(f"{what}expected at most half, so that most examples train; {lower}")
    log.warning("%smore than a third does not train; %s", what, lower)


def _pack(
    folder: Path,
    buckets: list[tuple[Path, int]],
    order: list[Group],
    staged: Staged,
    config: DataConfig,
    workers: Workers,
) -> dict[str, list[RowFile]]:
    """Pack every bucket into its own row file."""
    jobs: list[Job] = []
    files: Counter[str] = Counter()
    head = staged.units[0].job["head"]
    for path, group in buckets:
        split = order[group].split
        source = _source(config, order[group])
        options = label_options(source, workers.tokenizer, head)
        # Held-out rows are those of a source for training, unless there are others.
        is_soft = staged.is_soft(_split_of(config, split), order[group].source)
        (folder / split).mkdir(exist_ok=True)
        jobs.append(
            {
                "bucket": str(path),
                "seq_length": config.seq_length,
                "pack": config.pack,
                "out": str(folder / split / f"{files[split]}.arrow"),
                "options": options if is_soft else None,
            }
        )
        files[split] += 1
    splits: dict[str, list[RowFile]] = {"train": []}
    names = list(staged.tasks)
    answers = workers.run(pack_bucket, jobs, staged.processes)
    for (_, number), job, counts in zip(buckets, jobs, answers, strict=True):
        split, _, level = order[number]
        source = _source(config, order[number])
        per_task = sorted((int(task), n) for task, n in counts.pop("per_task").items())
        splits.setdefault(split, []).append(
            RowFile(
                name=source.title,
                file=Path(job["out"]).name,
                text=source.text is not None,
                weight=source.share,
                level=level,
                options=label_options(source, workers.tokenizer, head),
                soft=job["options"] is not None,
                examples_per_task={names[task]: n for task, n in per_task},
                **counts,
            )
        )
    return splits


def _split_of(config: DataConfig, split: str) -> str:
    """Return the split of the sources that the rows of a split are from."""
    return split if sources_of(config, split) else "train"


def _source(config: DataConfig, group: Group) -> SourceConfig:
    return sources_of(config, _split_of(config, group.split))[group.source]


def pack_bucket(
    tokenizer: Tokenizer,
    progress: Callable[[int], None],
    *,
    bucket: str,
    seq_length: int,
    pack: bool,
    out: str,
    options: list[int] | None = None,
) -> dict[str, Any]:
    """Pack the examples of a bucket into rows in the file `out`; return their counts.

    `options` are those of `write_rows`.
    """
    vocab_size, path = tokenizer.vocab_size, Path(out)
    examples = read_bucket(Path(bucket), vocab_size)
    rows = pack_stream(examples, seq_length) if pack else ([example] for example in examples)
    counts = write_rows(path, rows, vocab_size=vocab_size, seq_length=seq_length, options=options)
    return counts | {"bytes": path.stat().st_size, "sha256": hash_file(path)}
