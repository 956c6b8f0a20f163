"""Batches as a pure function of seed and step: which rows, which objective, which masks."""

import bisect
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from mlmjax.config import ObjectiveConfig
from mlmjax.data.batch import ATP, DUMMY_MLM, MLM, PADDING_SEGMENT, UNUSED, Batch
from mlmjax.data.masking import draw_positions
from mlmjax.data.rows import RowSource
from mlmjax.errors import InputError
from mlmjax.tokenizer import Tokenizer

RowNumbers = slice | Sequence[int] | np.ndarray | None

PREFETCH_THREADS = 2
PREFETCH_BATCHES = 4


class Loader:
    """Assembles batches of packed rows; holds no state, so there is none to save or to lose.

    Training rows come shuffled, again in every epoch, without end. When no source has a weight,
    one epoch is every row of all sources once; when all have one, each source is shuffled and
    repeated by itself and gives the share of rows that its weight says. Validation rows come in
    order, once: `epoch_steps` batches, the last filled up with rows that are all padding.

    The objective of an example and its masked positions are drawn by
    `default_rng([seed, epoch, example])`: plain text is always trained by MLM, an example with an
    answer by dummy MLM with `dummy_mlm_share`, by MLM with `mlm_share`, otherwise by ATP.

    `target_width` is the provable bound on targets per row: the most examples in a row, plus
    `ceil(mlm_rate * seq_length)` when anything but ATP can be drawn.

    Raises `InputError` for no rows at all, rows of another `seq_length` or tokenizer, and weights
    given to some sources only.
    """

    def __init__(
        self,
        row_sources: Sequence[RowSource],
        *,
        seed: int,
        batch_size: int,
        seq_length: int,
        objective: ObjectiveConfig,
        tokenizer: Tokenizer,
    ):
        _check(row_sources, batch_size, seq_length, tokenizer)
        self._sources = list(row_sources)
        self._ends = list(accumulate(len(source) for source in row_sources))
        self._seed = seed
        self._batch_size = batch_size
        self._seq_length = seq_length
        self._objective = objective
        self._pad_id = tokenizer.pad_id
        self._mask_id = tokenizer.mask_id
        self._maskable = np.ones(tokenizer.vocab_size, bool)
        self._maskable[list(tokenizer.special_ids)] = False
        self._shuffled = row_sources[0].split == "train"
        self._streams = self._make_streams() if self._shuffled else []
        self.target_width = max(source.max_examples_per_row for source in row_sources)
        masks_at_random = objective.dummy_mlm_share + objective.mlm_share > 0
        if masks_at_random or any(source.text for source in row_sources):
            self.target_width += math.ceil(objective.mlm_rate * seq_length)

    def _make_streams(self) -> list[tuple[int, int, Any]]:
        """One endless shuffled stream of row numbers per weighted source, or one of all rows."""
        # grain imports jax, and data modules must be importable without it.
        import grain

        weighted = self._sources[0].weight is not None
        ends = self._ends if weighted else self._ends[-1:]
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
            weights = [float(source.weight or 0.0) for source in self._sources]
            self._mixture = grain.MapDataset.mix(positions, weights)
        return streams

    def epoch_steps(self) -> int:
        """Count the batches that hold every row once."""
        return -(-self._ends[-1] // self._batch_size)

    def batch(self, step: int, rows: RowNumbers = None) -> Batch:
        """Assemble the batch of one step, or only the `rows` of it that one process needs.

        `rows` indexes the global rows of the batch: the global batch is the same, row by row,
        however it is divided.
        """
        return self._assemble(step, rows)[0]

    def tasks(self, step: int, rows: RowNumbers = None) -> np.ndarray:
        """Give the task number of each target, int32 `[rows, targets]`, `UNUSED` where none is."""
        return self._assemble(step, rows)[1]

    def example_indices(self, step: int, rows: RowNumbers = None) -> list[np.ndarray]:
        """Give, for each row, the indices of the examples in it, int64 `[examples]`."""
        return [
            np.empty(0, np.int64) if columns is None else columns[4]
            for _, columns in self._read(step, rows)
        ]

    def batches(
        self, start: int, stop: int, rows: RowNumbers = None
    ) -> Iterator[tuple[int, Batch]]:
        """Iterate over `(step, batch)` for steps `start..stop-1`, read ahead in threads."""
        # grain imports jax, and data modules must be importable without it.
        import grain

        steps = grain.MapDataset.range(start, stop)
        reader = grain.ReadOptions(
            num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES
        )
        yield from steps.map(lambda step: (step, self.batch(step, rows))).to_iter_dataset(reader)

    def _locate(self, number: int) -> tuple[int, int] | None:
        """Epoch and row number of the `number`-th row drawn; None past the end of validation."""
        if not self._shuffled:
            return (0, number) if number < self._ends[-1] else None
        stream, position = (0, number) if len(self._streams) == 1 else self._mixture[number]
        start, length, order = self._streams[stream]
        return position // length, start + order[position]

    def _read(self, step: int, rows: RowNumbers) -> Iterator[tuple[int, Any]]:
        """Give epoch and columns of each row asked for, None for a row of padding."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        numbers = np.arange(self._batch_size)
        for number in numbers if rows is None else numbers[rows]:
            located = self._locate(step * self._batch_size + int(number))
            if located is None:
                yield 0, None
                continue
            epoch, row = located
            source = bisect.bisect_right(self._ends, row)
            first = self._ends[source - 1] if source else 0
            yield epoch, self._sources[source].columns(row - first)

    def _assemble(self, step: int, rows: RowNumbers) -> tuple[Batch, np.ndarray]:
        contents = list(self._read(step, rows))
        shape = (len(contents), self._seq_length)
        input_ids = np.full(shape, self._pad_id, np.int32)
        segment_ids = np.full(shape, PADDING_SEGMENT, np.int32)
        position_ids = np.zeros(shape, np.int32)
        targets = np.full((4, len(contents), self.target_width), UNUSED, np.int32)
        for row, (epoch, columns) in enumerate(contents):
            if columns is None:
                continue
            tokens, lengths, answers, tasks, indices = columns
            count = len(tokens)
            starts = np.cumsum(lengths) - lengths
            input_ids[row, :count] = tokens
            segment_ids[row, :count] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            position_ids[row, :count] = np.arange(count) - np.repeat(starts, lengths)
            drawn = [
                self._draw(tokens[start : start + length], answer, (epoch, index))
                for start, length, answer, index in zip(
                    starts.tolist(),
                    lengths.tolist(),
                    answers.tolist(),
                    indices.tolist(),
                    strict=True,
                )
            ]
            counts = [len(positions) for _, positions in drawn]
            positions = np.concatenate(
                [p + start for (_, p), start in zip(drawn, starts, strict=True)]
            )
            objectives = np.repeat([objective for objective, _ in drawn], counts)
            width = len(positions)
            targets[0, row, :width] = positions
            targets[1, row, :width] = np.where(
                objectives == DUMMY_MLM, self._mask_id, input_ids[row, positions]
            )
            targets[2, row, :width] = objectives
            targets[3, row, :width] = np.repeat(tasks, counts)
            input_ids[row, positions] = self._mask_id
        batch = Batch(input_ids, segment_ids, position_ids, *targets[:3])
        return batch, targets[3]

    def _draw(
        self, tokens: np.ndarray, answer: int, key: tuple[int, int]
    ) -> tuple[int, np.ndarray]:
        """Draw the objective of one example, and the positions within it that are masked."""
        config = self._objective
        if answer >= 0 and config.dummy_mlm_share + config.mlm_share == 0:
            return ATP, np.array([answer])
        rng = np.random.default_rng([self._seed, *key])
        if answer < 0:
            objective = MLM
        else:
            draw = rng.random()
            if draw >= config.dummy_mlm_share + config.mlm_share:
                return ATP, np.array([answer])
            objective = DUMMY_MLM if draw < config.dummy_mlm_share else MLM
        maskable = np.flatnonzero(self._maskable[tokens])
        return objective, draw_positions(maskable, config.mlm_rate, rng)


def _check(
    sources: Sequence[RowSource], batch_size: int, seq_length: int, tokenizer: Tokenizer
) -> None:
    if not sources:
        raise InputError("there are no rows to read; expected at least one source with rows")
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: expected at least one row")
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
