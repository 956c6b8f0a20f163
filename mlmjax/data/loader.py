"""Assemble batches of packed rows, as a pure function of seed and step."""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from mlmjax.config.run import DrawnRate, ObjectiveConfig
from mlmjax.data.batch import ATP, DUMMY_MLM, MLM, UNUSED, Batch, LabelBatch, Options
from mlmjax.data.masking.draws import count_masked, replace_tokens
from mlmjax.data.masking.maskers import Masker, make_masker
from mlmjax.data.packing import lay_out
from mlmjax.data.rows import RowColumns, RowSource
from mlmjax.data.schedule import RowSchedule, target_width
from mlmjax.errors import InputError
from mlmjax.text.tokenizer import Tokenizer

AnyBatch = TypeVar("AnyBatch")
RowNumbers = slice | Sequence[int] | np.ndarray | None
"""Rows of the global batch; None: all."""


def _check_sources(sources: Sequence[RowSource], seq_length: int, tokenizer: Tokenizer) -> None:
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
    without = [source.name for source in sources if source.weight is None]
    if sources[0].split == "train" and 0 < len(without) < len(sources):
        raise InputError(
            f"data.sources: {', '.join(without)} has no weight while others have; give every "
            "source a weight (its share of the rows), or none (every row once per epoch)"
        )


class _Loader(ABC, Generic[AnyBatch]):
    """Draw rows in an order that depends only on the seed, lay them out, and read ahead.

    Training rows are shuffled in every epoch, without end. Without weights, an epoch is every row
    of all sources once. With weights, each source is shuffled and repeated by itself, and its
    weight is its share of the rows. Validation rows come in order, once: `epoch_steps` batches, the
    last one filled up with padding.

    Raises `InputError` for no rows, rows that do not fit, and weights of only some sources.
    """

    def __init__(
        self,
        row_sources: Sequence[RowSource],
        *,
        seed: int,
        batch_size: int | RowSchedule,
        seq_length: int,
        tokenizer: Tokenizer,
    ):
        _check_sources(row_sources, seq_length, tokenizer)
        if isinstance(batch_size, int):
            if batch_size < 1:
                raise InputError(f"batch_size {batch_size}: expected at least one row")
            batch_size = RowSchedule(batch_size, batch_size)
        self._schedule = batch_size
        self._seed = seed
        self._seq_length = seq_length
        self._pad_id = tokenizer.pad_id
        self._sources = list(row_sources)
        self._ends = list(accumulate(len(source) for source in row_sources))
        self._is_shuffled = row_sources[0].split == "train"
        if self._is_shuffled:
            self._open_streams()

    def _open_streams(self) -> None:
        """Make an endless shuffled stream of each weighted source, or one of all rows."""
        # grain imports jax, and data modules must be importable without it.
        import grain

        groups = [self._sources]
        if self._sources[0].weight is not None:
            # The files of a source come one after another.
            groups = [list(group) for _, group in groupby(self._sources, lambda one: one.name)]
        self._lengths = [sum(map(len, group)) for group in groups]
        self._starts = [0, *accumulate(self._lengths)]
        self._streams = []
        for number, length in enumerate(self._lengths):
            own_seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
            self._streams.append(grain.MapDataset.range(length).shuffle(seed=own_seed).repeat())
        self._mixture: Any = None
        if len(groups) > 1:
            numbered = [
                grain.MapDataset.range(2**62).map(lambda place, number=number: (number, place))
                for number in range(len(groups))
            ]
            weights = [float(group[0].weight or 0.0) for group in groups]
            self._mixture = grain.MapDataset.mix(numbered, weights)

    def epoch_steps(self) -> int:
        """Count the batches of full size that hold every row once."""
        return -(-self._ends[-1] // self._schedule.full)

    def rows(self, step: int) -> int:
        """Count the global rows of the batch of one step."""
        return self._schedule.rows(step)

    def batch(self, step: int, rows: RowNumbers = None) -> AnyBatch:
        """Assemble the batch of one step, or the `rows` of it that one process needs.

        `rows` indexes the global batch, which is the same, row by row, however it is divided.
        """
        return self._assemble(step, rows)[0]

    def tasks(self, step: int, rows: RowNumbers = None) -> np.ndarray:
        """Return the task number of each target (or labelled row), or `UNUSED`."""
        return self._assemble(step, rows)[1]

    def example_indices(self, step: int, rows: RowNumbers = None) -> list[np.ndarray]:
        """Return, for each row, the indices of the examples in it, int64 `[examples]`."""
        return [
            np.empty(0, np.int64) if columns is None else columns[4]
            for _, columns in self._read(step, rows)
        ]

    def batches(
        self, start: int, stop: int, rows: RowNumbers | Callable[[int], RowNumbers] = None
    ) -> Iterator[tuple[int, AnyBatch]]:
        """Yield `(step, batch)` for steps `start..stop-1`, read ahead in threads.

        `rows` are the global rows that one process needs, or a function from step to rows.
        """
        import grain

        reader = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)

        def read(step: int) -> tuple[int, AnyBatch]:
            return step, self.batch(step, rows(step) if callable(rows) else rows)

        yield from grain.MapDataset.range(start, stop).map(read).to_iter_dataset(reader)

    def _read(self, step: int, rows: RowNumbers = None) -> Iterator[tuple[int, Any]]:
        """Yield epoch and columns of each row of a batch; None for those of padding."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        first = self._schedule.before(step)
        numbers = np.arange(self._schedule.rows(step))
        for number in numbers if rows is None else numbers[rows]:
            epoch, row = self._locate(first + int(number))
            source = bisect.bisect_right(self._ends, row)
            if source == len(self._sources):
                yield epoch, None  # Validation is over.
            else:
                start = self._ends[source] - len(self._sources[source])
                yield epoch, self._sources[source].columns(row - start)

    def _locate(self, number: int) -> tuple[int, int]:
        """Return epoch and row of the `number`-th draw."""
        if not self._is_shuffled:
            return 0, number
        stream, place = (0, number) if self._mixture is None else self._mixture[number]
        return place // self._lengths[stream], self._starts[stream] + self._streams[stream][place]

    @abstractmethod
    def _assemble(self, step: int, rows: RowNumbers) -> tuple[AnyBatch, np.ndarray]:
        """Return the batch of one step, and the task of each target (or labelled row)."""

    def _lay_out(self, drawn: Sequence[tuple[int, Any]]) -> tuple[np.ndarray, ...]:
        return lay_out([columns for _, columns in drawn], self._seq_length, self._pad_id)


class Loader(_Loader[Batch]):
    """Assemble batches of packed, masked rows.

    The objective of an example and its masked positions are drawn by
    `default_rng([seed, epoch, example])`. Plain text is always trained by MLM. An example with an
    answer is trained by dummy MLM with `dummy_mlm_share`, by MLM with `mlm_share`, otherwise by
    ATP. `mask_rate` gives the share to mask at a step, by default `objective.mlm_rate`; one that is
    drawn is drawn for each example. `masker` chooses the positions, by default that of
    `objective.masking`.

    `target_width` bounds the targets of a row (`schedule.target_width`).
    """

    def __init__(
        self,
        row_sources: Sequence[RowSource],
        *,
        objective: ObjectiveConfig,
        tokenizer: Tokenizer,
        mask_rate: Callable[[int], float | DrawnRate] | None = None,
        masker: Masker | None = None,
        **order: Any,
    ):
        super().__init__(row_sources, tokenizer=tokenizer, **order)
        self._objective = objective
        self._mask_rate = mask_rate or (lambda step: objective.mlm_rate)
        self._mask_id = tokenizer.mask_id
        self._is_maskable = np.ones(tokenizer.vocab_size, bool)
        self._is_maskable[list(tokenizer.special_ids)] = False
        self._vocabulary = np.flatnonzero(self._is_maskable)
        self._weighs = any(source.soft for source in row_sources)
        self._weighs |= objective.target_weight != "one"
        spreads = objective.needs_labels or any(source.soft for source in row_sources)
        self._most_options = (
            max(1, *(len(source.options) for source in row_sources)) if spreads else 0
        )
        self._masker = masker or make_masker(objective.masking, tokenizer)
        self.target_width = target_width(
            objective,
            self._seq_length,
            max(source.max_examples_per_row for source in row_sources),
            any(source.text for source in row_sources),
        )

    def _assemble(self, step: int, rows: RowNumbers) -> tuple[Batch, np.ndarray]:
        drawn = list(self._read(step, rows))
        input_ids, segment_ids, position_ids = self._lay_out(drawn)
        rate = self._mask_rate(step)
        size = len(drawn), self.target_width
        targets = np.full((4, *size), UNUSED, np.int32)
        weights = np.zeros(size, np.float32) if self._weighs else None
        options = None
        if width := self._most_options:
            options = Options(
                np.full((*size, width), UNUSED, np.int32), np.zeros((*size, width), np.float32)
            )
        for row, (epoch, columns) in enumerate(drawn):
            if columns is None:
                continue
            tokens, lengths, answers, tasks, indices, *_ = columns
            starts = np.cumsum(lengths) - lengths
            facts = (starts.tolist(), lengths.tolist(), answers.tolist(), indices.tolist())
            drawn_of = [
                self._draw(tokens[start : start + length], answer, (epoch, index), rate)
                for start, length, answer, index in zip(*facts, strict=True)
            ]
            objectives = [one.objective for one in drawn_of]
            counts = [len(one.positions) for one in drawn_of]
            positions = np.concatenate(
                [one.positions + start for one, start in zip(drawn_of, starts, strict=True)]
            )
            of_targets = np.repeat(objectives, counts)
            originals = np.where(of_targets == DUMMY_MLM, self._mask_id, input_ids[row, positions])
            found = (positions, originals, of_targets, np.repeat(tasks, counts))
            targets[:, row, : len(positions)] = found
            input_ids[row, positions] = np.concatenate([one.inputs for one in drawn_of])
            count = len(positions)
            if weights is not None:
                own = np.array([one.weight for one in drawn_of])
                own *= 1.0 if columns.weights is None else columns.weights
                weights[row, :count] = np.repeat(own, counts)
            if options is not None:
                examples = np.repeat(np.arange(len(counts)), counts)
                for part, values in zip(
                    options, self._options_of(columns, examples, of_targets, originals), strict=True
                ):
                    part[row, :count] = values
        batch = Batch(input_ids, segment_ids, position_ids, *targets[:3])
        return batch._replace(weights=weights, options=options), targets[3]

    def _options_of(
        self, columns: RowColumns, examples: np.ndarray, objectives: np.ndarray, ids: np.ndarray
    ) -> Options:
        """Return the options of the targets of a row, each padded to the most options.

        An answer is distributed over the options of its source. Any other target is its token.
        """
        shape = len(ids), self._most_options
        found = Options(np.full(shape, UNUSED, np.int32), np.zeros(shape, np.float32))
        found.ids[:, 0], found.probs[:, 0] = ids, 1.0
        count, smoothing = len(columns.options), self._objective.label_smoothing
        is_answer = (objectives == ATP) & (count > 0)
        if not is_answer.any():
            return found
        if columns.shares is None:
            shares = np.float32(columns.options == ids[is_answer][:, None])
        else:
            shares = columns.shares[examples[is_answer]]
        found.ids[is_answer, :count] = columns.options
        found.probs[is_answer] = 0.0
        found.probs[is_answer, :count] = shares * (1 - smoothing) + smoothing / count
        return found

    def _draw(
        self, tokens: np.ndarray, answer: int, key: tuple[int, int], rate: float | DrawnRate
    ) -> "_Drawn":
        """Draw the objective of one example, and the positions in it to mask."""
        config = self._objective
        masked_share = config.dummy_mlm_share + config.mlm_share
        only_answer = _Drawn(ATP, np.array([answer]), np.array([self._mask_id]))
        if answer >= 0 and masked_share == 0:
            return only_answer
        rng = np.random.default_rng([self._seed, *key])
        objective = MLM
        if answer >= 0:
            draw = rng.random()
            if draw >= masked_share:
                return only_answer
            objective = DUMMY_MLM if draw < config.dummy_mlm_share else MLM
        if isinstance(rate, DrawnRate):
            rate = rate.draw(rng)
        maskable = np.flatnonzero(self._is_maskable[tokens])
        count = count_masked(maskable, rate)
        positions = self._masker(tokens, maskable, count, rng)
        inputs = np.full(count, self._mask_id)
        if objective == MLM and config.random_tokens + config.kept_tokens > 0:
            inputs = replace_tokens(
                tokens[positions],
                self._mask_id,
                rng,
                random_share=config.random_tokens,
                kept_share=config.kept_tokens,
                vocabulary=self._vocabulary,
            )
        weight = len(maskable) / count if config.target_weight == "inverse_rate" else 1.0
        return _Drawn(objective, positions, inputs, weight)


class _Drawn(NamedTuple):
    """What was drawn for an example; `inputs` stand at its masked positions."""

    objective: int
    positions: np.ndarray
    inputs: np.ndarray
    weight: float = 1.0


class LabelLoader(_Loader[LabelBatch]):
    """Assemble batches of labelled texts, one per row, for the classification head.

    `smoothing` is the share of the probability of the right class that all classes divide equally.
    """

    def __init__(self, row_sources: Sequence[RowSource], *, smoothing: float = 0.0, **order: Any):
        super().__init__(row_sources, **order)
        self._smoothing = smoothing
        self._weighs = any(source.soft for source in row_sources)
        self._spreads = smoothing > 0 or any(s.soft and len(s.options) for s in row_sources)
        self._classes = max(len(source.options) for source in row_sources)

    def _assemble(self, step: int, rows: RowNumbers) -> tuple[LabelBatch, np.ndarray]:
        drawn = list(self._read(step, rows))
        labels = np.full(len(drawn), np.nan, np.float32)
        tasks = np.full(len(drawn), UNUSED, np.int32)
        weights = np.zeros(len(drawn), np.float32) if self._weighs else None
        probs = np.zeros((len(drawn), self._classes), np.float32) if self._spreads else None
        for row, (_, columns) in enumerate(drawn):
            if columns is None:
                continue
            (labels[row],), (tasks[row],) = columns.labels, columns.tasks
            if weights is not None:
                weights[row] = 1.0 if columns.weights is None else columns.weights[0]
            if probs is not None:
                hard = np.float32(columns.options == columns.labels)
                shares = hard if columns.shares is None else columns.shares[0]
                probs[row] = shares * (1 - self._smoothing) + self._smoothing / self._classes
        input_ids, segment_ids, _ = self._lay_out(drawn)
        return LabelBatch(input_ids, segment_ids, labels, weights, probs), tasks
