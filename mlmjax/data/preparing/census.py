"""What finished rows hold, counted: tasks, answers, lengths, and some examples drawn at random."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlmjax.data.manifest import Manifest, RowFile, read_manifest
from mlmjax.data.rows import RowSource
from mlmjax.errors import InputError
from mlmjax.storage import hash_file

_WAITING = 2**14
"""Pairs of task and answer that are held before they are added up."""


@dataclass(frozen=True)
class Drawn:
    """One example of the rows: its tokens, where its answer stands (-1: none), its task and source.

    `number` counts the examples of the split in the order of the row files; `label` is that of a
    classification head (NaN: none).
    """

    number: int
    source: str
    task: str
    ids: np.ndarray
    answer_position: int
    label: float


@dataclass(frozen=True)
class Counted:
    """One split counted. `lengths[kind, n]`: examples of n tokens, with an answer (0), without (1).

    `answers` counts the examples by the id of their answer's token `[vocabulary]`, `tasks` by the
    number of their task `[tasks]`, those of plain text left out. `pairs` has the number of a task,
    the id of an answer and their examples `[pairs, 3]`, for all that occur, in ascending order.
    `drawn` are the examples asked for, in the order of the rows.
    """

    lengths: np.ndarray
    answers: np.ndarray
    tasks: np.ndarray
    pairs: np.ndarray
    drawn: list[Drawn]


class _Tally:
    """How often each number occurred; memory grows with the different ones alone."""

    def __init__(self) -> None:
        self.numbers = np.empty(0, np.int64)
        self.counts = np.empty(0, np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, numbers: np.ndarray) -> None:
        self._waiting.append(np.unique(numbers, return_counts=True))
        # Not at every block: each time all that is known is sorted again.
        if sum(len(found) for found, _ in self._waiting) > len(self.numbers) + _WAITING:
            self.merge()

    def merge(self) -> None:
        numbers, counts = zip((self.numbers, self.counts), *self._waiting, strict=True)
        self.numbers, where = np.unique(np.concatenate(numbers), return_inverse=True)
        self.counts = np.zeros(len(self.numbers), np.int64)
        np.add.at(self.counts, where, np.concatenate(counts))
        self._waiting = []


def count(folder: Path, split: str, *, draw: int = 0, seed: int = 0) -> Counted:
    """Go through the rows of a split once, and draw some of its examples, each equally likely.

    Memory does not grow with the rows: one row file is open at a time, one block of it is read.
    Raises `InputError` for a damaged row file, which is compared with the hash of the manifest.
    """
    manifest = read_manifest(folder)
    entries = manifest.splits[split]
    total = sum(entry.examples for entry in entries)
    rng = np.random.default_rng([seed])
    wanted = np.sort(rng.choice(total, min(draw, total), replace=False))
    lengths = np.zeros((2, manifest.seq_length + 1), np.int64)
    answers = np.zeros(manifest.vocab_size, np.int64)
    tasks = np.zeros(len(manifest.tasks), np.int64)
    pairs = _Tally()
    drawn: list[Drawn] = []
    seen = 0
    for entry, source in _opened(folder, split, manifest):
        before = seen
        for tokens, sizes, places, numbers, _, labels in source.blocks():
            asked = places >= 0
            starts = np.cumsum(sizes) - sizes
            for kind, which in enumerate((asked, ~asked)):
                lengths[kind] += np.bincount(sizes[which], minlength=lengths.shape[1])
            given = tokens[(starts + places)[asked]].astype(np.int64)
            answers += np.bincount(given, minlength=len(answers))
            pairs.add(numbers[asked].astype(np.int64) << 32 | given)
            if not entry.text:
                tasks += np.bincount(numbers, minlength=len(tasks))
            first, last = np.searchsorted(wanted, [seen, seen + len(sizes)])
            for number in wanted[first:last].tolist():
                at = number - seen
                drawn.append(
                    Drawn(
                        number=number,
                        source=entry.name,
                        task=manifest.tasks[numbers[at]],
                        ids=tokens[starts[at] : starts[at] + sizes[at]].astype(np.uint32),
                        answer_position=int(places[at]),
                        label=float(labels[at]),
                    )
                )
            seen += len(sizes)
        if seen - before != entry.examples:
            raise _damaged(
                source.path, f"{seen - before} examples, the manifest says {entry.examples}"
            )
    pairs.merge()
    columns = [pairs.numbers >> 32, pairs.numbers & (2**32 - 1), pairs.counts]
    return Counted(lengths, answers, tasks, np.stack(columns, axis=1), drawn)


def _opened(folder: Path, split: str, manifest: Manifest) -> Iterator[tuple[RowFile, RowSource]]:
    """Open one row file after another; each is closed when the next is asked for."""
    first = 0
    for entry in manifest.splits[split]:
        if entry.rows:
            source = RowSource(folder, split, entry, manifest, first, None)
            if hash_file(source.path) != entry.sha256:
                raise _damaged(source.path, "its hash is not that of the manifest")
            yield entry, source
        first += entry.examples


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: row file is damaged: {what}; delete {path.parent.parent} and prepare again"
    )
