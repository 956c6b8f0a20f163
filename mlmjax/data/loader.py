"""Batches as a pure function of seed and step: which rows, which objective, which masks."""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np

from mlmjax.config.run import ObjectiveConfig
from mlmjax.data.batch import ATP, DUMMY_MLM, MLM, UNUSED, Batch, LabelBatch
from mlmjax.data.masking import draw_positions, draw_words
from mlmjax.data.packing import lay_out
from mlmjax.data.rows import RowSource
from mlmjax.data.schedule import RowSchedule, target_width
from mlmjax.errors import InputError
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.words import word_starts

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


PREFETCH_THREADS = 2
PREFETCH_BATCHES = 4
AnyBatch = TypeVar("AnyBatch")


class _Loader(ABC, Generic[AnyBatch]):
    """What loaders share: the order of the rows, their layout, reading ahead."""

    def __init__(
        self,
        row_sources: Sequence[RowSource],
        *,
        seed: int,
        batch_size: int | RowSchedule,
        seq_length: int,
        tokenizer: Tokenizer,
    ):
        self._order = RowOrder(
            row_sources,
            seed=seed,
            batch_size=batch_size,
            seq_length=seq_length,
            tokenizer=tokenizer,
        )
        self._seed = seed
        self._seq_length = seq_length
        self._pad_id = tokenizer.pad_id

    def epoch_steps(self) -> int:
        """Count the batches of full size that hold every row once."""
        return self._order.epoch_steps()

    def rows(self, step: int) -> int:
        """Count the global rows of the batch of one step."""
        return self._order.schedule.rows(step)

    def batch(self, step: int, rows: RowNumbers = None) -> AnyBatch:
        """Assemble the batch of one step, or only the `rows` of it that one process needs.

        `rows` indexes the global rows of the batch: the global batch is the same, row by row,
        however it is divided.
        """
        return self._assemble(step, rows)[0]

    def tasks(self, step: int, rows: RowNumbers = None) -> np.ndarray:
        """Give the task number of each target (or labelled row), `UNUSED` where none is."""
        return self._assemble(step, rows)[1]

    def example_indices(self, step: int, rows: RowNumbers = None) -> list[np.ndarray]:
        """Give, for each row, the indices of the examples in it, int64 `[examples]`."""
        return [
            np.empty(0, np.int64) if columns is None else columns[4]
            for _, columns in self._order.read(step, rows)
        ]

    def batches(
        self, start: int, stop: int, rows: RowNumbers | Callable[[int], RowNumbers] = None
    ) -> Iterator[tuple[int, AnyBatch]]:
        """Iterate over `(step, batch)` for steps `start..stop-1`, read ahead in threads.

        `rows` are those of the global rows that one process needs, or a function of the step that
        gives them.
        """
        # grain imports jax, and data modules must be importable without it.
        import grain

        steps = grain.MapDataset.range(start, stop)
        reader = grain.ReadOptions(
            num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES
        )

        def read(step: int) -> tuple[int, AnyBatch]:
            return step, self.batch(step, rows(step) if callable(rows) else rows)

        yield from steps.map(read).to_iter_dataset(reader)

    @abstractmethod
    def _assemble(self, step: int, rows: RowNumbers) -> tuple[AnyBatch, np.ndarray]:
        """Give the batch of one step, and the task of each target (or labelled row)."""

    def _layout(
        self, contents: Sequence[tuple[int, Any]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lay out tokens, segments and positions of rows, as `packing.lay_out`."""
        rows = [None if columns is None else columns[:2] for _, columns in contents]
        return lay_out(rows, self._seq_length, self._pad_id)


class Loader(_Loader[Batch]):
    """Assembles batches of packed rows, masked; the rows come in the order of `RowOrder`.

    The objective of an example and its masked positions are drawn by
    `default_rng([seed, epoch, example])`: plain text is always trained by MLM, an example with an
    answer by dummy MLM with `dummy_mlm_share`, by MLM with `mlm_share`, otherwise by ATP.
    `mask_rate` gives the share masked by the step, `objective.mlm_rate` where it is None;
    `objective.masking` says whether tokens, whole words or spans are drawn.

    `target_width` is the provable bound on targets per row (`schedule.target_width`).

    Raises `InputError` as `RowOrder`.
    """

    def __init__(
        self,
        row_sources: Sequence[RowSource],
        *,
        objective: ObjectiveConfig,
        tokenizer: Tokenizer,
        mask_rate: Callable[[int], float] | None = None,
        **order: Any,
    ):
        super().__init__(row_sources, tokenizer=tokenizer, **order)
        self._objective = objective
        self._mask_rate = mask_rate or (lambda step: objective.mlm_rate)
        self._mask_id = tokenizer.mask_id
        self._maskable = np.ones(tokenizer.vocab_size, bool)
        self._maskable[list(tokenizer.special_ids)] = False
        self._word_starts = None if objective.masking == "token" else word_starts(tokenizer)
        self.target_width = target_width(
            objective,
            self._seq_length,
            max(source.max_examples_per_row for source in row_sources),
            any(source.text for source in row_sources),
        )

    def _assemble(self, step: int, rows: RowNumbers) -> tuple[Batch, np.ndarray]:
        contents = list(self._order.read(step, rows))
        input_ids, segment_ids, position_ids = self._layout(contents)
        rate = self._mask_rate(step)
        targets = np.full((4, len(contents), self.target_width), UNUSED, np.int32)
        for row, (epoch, columns) in enumerate(contents):
            if columns is None:
                continue
            tokens, lengths, answers, tasks, indices, _ = columns
            starts = np.cumsum(lengths) - lengths
            drawn = [
                self._draw(tokens[start : start + length], answer, (epoch, index), rate)
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
        self, tokens: np.ndarray, answer: int, key: tuple[int, int], rate: float
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
        if self._word_starts is None:
            return objective, draw_positions(maskable, rate, rng)
        spans = config.masking == "span"
        return objective, draw_words(maskable, self._word_starts(tokens), rate, rng, spans=spans)


class LabelLoader(_Loader[LabelBatch]):
    """Assembles batches of labelled texts, one per row, for the classification head."""

    def _assemble(self, step: int, rows: RowNumbers) -> tuple[LabelBatch, np.ndarray]:
        contents = list(self._order.read(step, rows))
        labels = np.full(len(contents), np.nan, np.float32)
        tasks = np.full(len(contents), UNUSED, np.int32)
        for row, (_, columns) in enumerate(contents):
            if columns is not None:
                (labels[row],), (tasks[row],) = columns[5], columns[3]
        return LabelBatch(*self._layout(contents)[:2], labels), tasks
