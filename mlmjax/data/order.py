"""Which rows every update reads: a pure function of seed and step, with no state to lose."""

import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from mlmjax.data.rows import RowSource
from mlmjax.data.schedule import RowSchedule
from mlmjax.errors import InputError
from mlmjax.text.tokenizer import Tokenizer

RowNumbers = slice | Sequence[int] | np.ndarray | None


class RowOrder:
    """The order in which the rows of some sources are drawn.

    Training rows come shuffled, again in every epoch, without end. When no source has a weight,
    one epoch is every row of all sources once; when all have one, each source is shuffled and
    repeated by itself and gives the share of rows that its weight says. Validation rows come in
    order, once: `epoch_steps` batches, the last filled up with rows that are all padding.

    Raises `InputError` for no rows at all, rows of another `seq_length` or tokenizer, and weights
    given to some sources only.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        *,
        seed: int,
        batch_size: int | RowSchedule,
        seq_length: int,
        tokenizer: Tokenizer,
    ):
        _check(sources, seq_length, tokenizer)
        if isinstance(batch_size, int):
            if batch_size < 1:
                raise InputError(f"batch_size {batch_size}: expected at least one row")
            batch_size = RowSchedule(batch_size, batch_size)
        self.schedule = batch_size
        self._sources = list(sources)
        self._ends = list(accumulate(len(source) for source in sources))
        self._seed = seed
        self._shuffled = sources[0].split == "train"
        self._streams = self._make_streams() if self._shuffled else []

    def _make_streams(self) -> list[tuple[int, int, Any]]:
        """One endless shuffled stream of row numbers per weighted source, or one of all rows."""
        # grain imports jax, and data modules must be importable without it.
        import grain

        weighted = self._sources[0].weight is not None
        names = [source.name for source in self._sources]
        # A source may have several files, which come one after another.
        last = [
            number + 1 == len(names) or name != names[number + 1]
            for number, name in enumerate(names)
        ]
        ends = [end for end, is_last in zip(self._ends, last, strict=True) if is_last]
        ends = ends if weighted else ends[-1:]
        streams = []
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
            order = grain.MapDataset.range(end - start).shuffle(seed=seed).repeat()
            streams.append((start, end - start, order))
        if len(streams) > 1:
            positions = [
                grain.MapDataset.range(2**62).map(
                    lambda position, number=number: (number, position)
                )
                for number in range(len(streams))
            ]
            weights = [
                float(source.weight or 0.0)
                for source, is_last in zip(self._sources, last, strict=True)
                if is_last
            ]
            self._mixture = grain.MapDataset.mix(positions, weights)
        return streams

    def epoch_steps(self) -> int:
        """Count the batches of full size that hold every row once."""
        return -(-self._ends[-1] // self.schedule.full)

    def read(self, step: int, rows: RowNumbers = None) -> Iterator[tuple[int, Any]]:
        """Give epoch and columns (`RowSource.columns`) of each row, None for a row of padding.

        `rows` are those of the global rows of the batch that one process needs.
        """
        if step < 0:
            raise IndexError(f"step {step} is negative")
        first = self.schedule.before(step)
        numbers = np.arange(self.schedule.rows(step))
        for number in numbers if rows is None else numbers[rows]:
            located = self._locate(first + int(number))
            if located is None:
                yield 0, None
                continue
            epoch, row = located
            source = bisect.bisect_right(self._ends, row)
            start = self._ends[source - 1] if source else 0
            yield epoch, self._sources[source].columns(row - start)

    def _locate(self, number: int) -> tuple[int, int] | None:
        """Epoch and row number of the `number`-th row drawn; None past the end of validation."""
        if not self._shuffled:
            return (0, number) if number < self._ends[-1] else None
        stream, position = (0, number) if len(self._streams) == 1 else self._mixture[number]
        start, length, order = self._streams[stream]
        return position // length, start + order[position]


def _check(sources: Sequence[RowSource], seq_length: int, tokenizer: Tokenizer) -> None:
    if not sources:
        raise InputError("there are no rows to read; expected at least one source with rows")
    for source in sources:
        if source.seq_length != seq_length:
            raise InputError(
                f"{source.path}: rows of {source.seq_length} tokens, but seq_length is "
                f"{seq_length}; set data.seq_length or prepare other rows"
            )
        if source.tokenizer_sha256 != tokenizer.sha256:
            raise InputError(
                f"{source.path}: rows were made with another tokenizer (sha256 "
                f"{source.tokenizer_sha256[:12]}, this one has {tokenizer.sha256[:12]}); prepare "
                "other rows, or give that tokenizer"
            )
    weighted = [source.weight is not None for source in sources]
    if sources[0].split == "train" and any(weighted) and not all(weighted):
        without = [source.name for source in sources if source.weight is None]
        raise InputError(
            f"data.sources: {', '.join(without)} has no weight while others have; give every "
            "source a weight (its share of the rows), or none (every row once per epoch)"
        )
