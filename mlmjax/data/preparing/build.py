"""From staged examples to row files: what is kept, what is held out, the shuffle, the packing."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlmjax.config.data import DataConfig, SelectConfig
from mlmjax.data.manifest import SPLITS, NestedSet, RowFile, SelectionReport
from mlmjax.data.preparing.selection import (
    CAPPED,
    LEFT_OUT,
    UNBALANCED,
    Members,
    Selection,
    mix,
    select,
)
from mlmjax.data.preparing.shuffle import Bucket, Chunk, scatter
from mlmjax.data.preparing.staging import Piece, Staged, workers_for
from mlmjax.data.preparing.workers import do
from mlmjax.data.reading.examples import source_name
from mlmjax.errors import InputError
from mlmjax.storage import hash_value
from mlmjax.text.tokenizer import Tokenizer

_BIN_SHIFT = 44
_BINS = 2**20
_HELD_OUT = LEFT_OUT
"""In place of a level, for what is kept and held out for validation."""

Levels = Callable[[Piece], np.ndarray]
"""For each example the smallest nested set it is in, `LEFT_OUT` or above for none."""


class Group(NamedTuple):
    """Examples that are shuffled and packed together: one level of one source in one split."""

    split: str
    source: int
    level: int


def build_rows(
    folder: Path, staged: Staged, config: DataConfig, tokenizer: Tokenizer
) -> tuple[dict[str, list[RowFile]], SelectionReport | None]:
    """Write the row files of every split, and describe them and what was chosen.

    Raises `InputError` when nothing would be left to train on.
    """
    chosen = choose(staged, config)
    levels = _levels(staged, chosen)
    held_out = _held_out_bins(staged, levels, config)
    tokens: Counter[Group] = Counter()
    for piece in staged.pieces():
        groups, numbers = _grouped(piece, levels, held_out)
        for number, group in enumerate(groups):
            tokens[group] += int(piece.chunk.lengths[numbers == number].sum())
    order = sorted(tokens, key=lambda group: (SPLITS.index(group.split), *group[1:]))

    def ordered() -> Iterator[tuple[Chunk, np.ndarray]]:
        for piece in staged.pieces():
            groups, numbers = _grouped(piece, levels, held_out)
            of = np.array([order.index(group) for group in groups] + [-1])
            yield piece.chunk._replace(key=piece.draw), of[numbers]

    _keep_if_same(folder, staged, config)
    buckets = folder / "buckets"
    shutil.rmtree(buckets, ignore_errors=True)
    buckets.mkdir()
    written = scatter(ordered(), [tokens[group] for group in order], buckets, tokenizer.vocab_size)
    splits = _pack(folder, written, order, staged, config, tokenizer)
    return splits, None if chosen is None else _told(staged, chosen, config)


def _keep_if_same(folder: Path, staged: Staged, config: DataConfig) -> None:
    """Throw away rows that were packed of other examples, or otherwise, by one who was stopped."""
    name = (
        folder
        / "packed"
        / hash_value([staged.units, config.model_dump(mode="json", exclude={"workers"})])[:24]
    )
    if not name.exists():
        for path in (name.parent, *(folder / split for split in SPLITS)):
            shutil.rmtree(path, ignore_errors=True)
        name.parent.mkdir()
        name.touch()


def choose(staged: Staged, config: DataConfig) -> Selection | None:
    """Choose among the examples with an answer, if the configuration asks for less than all."""
    wanted = config.select
    if wanted == SelectConfig():
        return None
    counts: Counter[tuple[int, int]] = Counter()
    for members in _answered(staged):
        pairs = np.stack([members.task, members.answer], axis=1)
        for (task, token), examples in zip(
            *np.unique(pairs, axis=0, return_counts=True), strict=True
        ):
            counts[int(task), int(token)] += int(examples)

    return select(
        lambda: _answered(staged),
        counts,
        sizes=wanted.sizes or (None,),
        per_task=wanted.per_task,
        answer_share=wanted.answer_share,
    )


def _answered(staged: Staged) -> Iterator[Members]:
    """Go through the training examples that have an answer."""
    for piece in staged.pieces():
        if piece.unit.split == "train":
            yield _members(piece, piece.chunk.answer >= 0)


def _told(staged: Staged, chosen: Selection, config: DataConfig) -> SelectionReport:
    """Count what was chosen and what was not."""
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


def _members(piece: Piece, which: np.ndarray) -> Members:
    # Hashed once more: in its order the rows are shuffled, and which are kept must not tell where.
    return Members(piece.chunk.task[which], piece.chunk.answer[which], mix(piece.draw[which]))


def _levels(staged: Staged, chosen: Selection | None) -> Levels:
    def levels(piece: Piece) -> np.ndarray:
        level = np.zeros(piece.chunk.examples, np.uint8)
        if chosen is not None and piece.unit.split == "train":
            asked = piece.chunk.answer >= 0
            level[asked] = chosen.levels(_members(piece, asked))
        return level

    return levels


def _grouped(piece: Piece, levels: Levels, held_out: int) -> tuple[list[Group], np.ndarray]:
    """Return the groups of a piece, and the number of each example's among them (-1: left out)."""
    level = levels(piece).astype(np.int64)
    held = (piece.chunk.key >> np.uint64(_BIN_SHIFT)) < held_out
    code = np.where(level >= LEFT_OUT, -1, np.where(held, _HELD_OUT, level))
    found = [int(value) for value in np.unique(code) if value >= 0]
    numbers = np.searchsorted(found, code) if found else np.zeros(len(code), np.int64)
    groups = [
        Group("validation", piece.unit.source, 0)
        if value == _HELD_OUT
        else Group(piece.unit.split, piece.unit.source, value)
        for value in found
    ]
    return groups, np.where(code < 0, -1, numbers)


def _held_out_bins(staged: Staged, levels: Levels, config: DataConfig) -> int:
    """Find how many bins of the hash, from the lowest, are held out for validation."""
    if not config.validation_rows:
        return 0
    sizes = np.zeros(_BINS, np.int64)
    for piece in staged.pieces():
        chunk, kept = piece.chunk, levels(piece) < LEFT_OUT
        weight = chunk.lengths if config.pack else np.ones(chunk.examples, np.int64)
        np.add.at(sizes, (chunk.key[kept] >> np.uint64(_BIN_SHIFT)).astype(int), weight[kept])
    wanted = config.validation_rows * (config.seq_length if config.pack else 1)
    filled = np.cumsum(sizes)
    bins = int(np.searchsorted(filled, wanted)) + 1
    if bins > _BINS or filled[bins - 1] == filled[-1]:
        unit_name = "tokens" if config.pack else "examples"
        raise InputError(
            f"data.validation_rows = {config.validation_rows}: holding out {wanted} {unit_name} of "
            f"{filled[-1]} leaves nothing to train on; give fewer rows or more data"
        )
    return bins


def _pack(
    folder: Path,
    written: list[Bucket],
    order: list[Group],
    staged: Staged,
    config: DataConfig,
    tokenizer: Tokenizer,
) -> dict[str, list[RowFile]]:
    """Pack every bucket into a row file of its own."""
    jobs: list[dict[str, Any]] = []
    files: Counter[str] = Counter()
    for bucket in written:
        split = order[bucket.group].split
        (folder / split).mkdir(exist_ok=True)
        jobs.append(
            {
                "kind": "pack",
                "bucket": str(bucket.path),
                "seq_length": config.seq_length,
                "pack": config.pack,
                "out": str(folder / split / f"{files[split]}.arrow"),
            }
        )
        files[split] += 1
    splits: dict[str, list[RowFile]] = {"train": []}
    names = list(staged.tasks)
    done = do(jobs, tokenizer, workers_for(config))
    for bucket, job, counts in zip(written, jobs, done, strict=True):
        group = order[bucket.group]
        own = config.validation_sources if config.validation_sources else config.sources
        source = (config.sources if group.split == "train" else own)[group.source]
        per_task = {int(task): n for task, n in counts.pop("per_task").items()}
        splits.setdefault(group.split, []).append(
            RowFile(
                name=source_name(source),
                file=Path(job["out"]).name,
                text=source.text is not None,
                weight=source.weight,
                level=group.level,
                examples_per_task={names[task]: per_task[task] for task in sorted(per_task)},
                **counts,
            )
        )
        Path(f"{job['out']}.json").unlink()
    return splits
