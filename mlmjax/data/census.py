"""What finished rows hold, counted: tasks, answers, lengths, and some examples drawn at random."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlmjax.data.rows import Manifest, RowFile, RowSource, read_manifest
from mlmjax.data.work import describe_file
from mlmjax.errors import InputError


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
    number of their task `[tasks]`; `drawn` are the examples asked for, in the order of the rows.
    """

    lengths: np.ndarray
    answers: np.ndarray
    tasks: np.ndarray
    drawn: list[Drawn]


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
    drawn: list[Drawn] = []
    seen = 0
    for entry, source in _opened(folder, split, manifest):
        before = seen
        for tokens, sizes, places, numbers, _, labels in source.blocks():
            asked = places >= 0
            starts = np.cumsum(sizes) - sizes
            for kind, which in enumerate((asked, ~asked)):
                lengths[kind] += np.bincount(sizes[which], minlength=lengths.shape[1])
            answers += np.bincount(tokens[(starts + places)[asked]], minlength=len(answers))
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
    return Counted(lengths, answers, tasks, drawn)


def _opened(folder: Path, split: str, manifest: Manifest) -> Iterator[tuple[RowFile, RowSource]]:
    """Open one row file after another; each is closed when the next is asked for."""
    first = 0
    for entry in manifest.splits[split]:
        if entry.rows:
            source = RowSource(folder, split, entry, manifest, first, None)
            if describe_file(source.path)["sha256"] != entry.sha256:
                raise _damaged(source.path, "its hash is not that of the manifest")
            yield entry, source
        first += entry.examples


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: row file is damaged: {what}; delete {path.parent.parent} and prepare again"
    )
