"""Write packed rows to Arrow files, and read them in any order."""

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mlmjax.data.batch import Example
from mlmjax.data.manifest import Manifest, RowFile, read_manifest
from mlmjax.errors import InputError, first_line
from mlmjax.storage import hash_file

ROWS_PER_CHUNK = 256
"""Rows per Arrow record batch, which is buffered in writing and mapped in reading."""


def token_type(vocab_size: int) -> pa.DataType:
    """Return the type of stored tokens: 16 bits if the vocabulary allows it."""
    return pa.uint16() if vocab_size <= 2**16 else pa.uint32()


def _schema(vocab_size: int, soft: bool = False) -> pa.Schema:
    more = [("weights", pa.list_(pa.float32())), ("shares", pa.list_(pa.float32()))]
    return pa.schema(
        [
            ("tokens", pa.list_(token_type(vocab_size))),
            ("lengths", pa.list_(pa.int32())),
            ("answer_positions", pa.list_(pa.int32())),
            ("tasks", pa.list_(pa.int32())),
            ("indices", pa.list_(pa.int64())),
            ("labels", pa.list_(pa.float32())),
            *(more if soft else ()),
            ("crc", pa.uint32()),
        ]
    )


class RowColumns(NamedTuple):
    """Hold a row as arrays: `tokens` `[tokens]`, and `[examples]` of all others.

    `answers` are positions in the example, `indices` number the examples of the split. A soft file
    has `weights` and `shares` `[examples, options]`, of which `options` `[options]` are the
    answers; others have None.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray
    tasks: np.ndarray
    indices: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None
    shares: np.ndarray | None
    options: np.ndarray


def write_rows(
    path: Path,
    rows: Iterable[list[Example]],
    *,
    vocab_size: int,
    seq_length: int,
    options: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write rows of examples to one Arrow file; return the counts that `RowFile` holds.

    Each row carries the CRC-32 of its content, which every read checks. With `options`, the answers
    of the labels, the file is soft: it has weights, and a distribution over these for each example.
    """
    schema = _schema(vocab_size, options is not None)
    counts: dict[str, Any] = {"rows": 0, "examples": 0, "tokens": 0, "max_examples_per_row": 0}
    per_task: Counter[int] = Counter()
    rows = iter(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while chunk := list(islice(rows, ROWS_PER_CHUNK)):
            columns = zip(*(_to_columns(row, vocab_size, options) for row in chunk), strict=True)
            writer.write_batch(to_batch(columns, schema))
            sizes = [len(row) for row in chunk]
            counts["rows"] += len(chunk)
            counts["examples"] += sum(sizes)
            counts["tokens"] += sum(len(example) for row in chunk for example in row)
            counts["max_examples_per_row"] = max(counts["max_examples_per_row"], *sizes)
            per_task.update(example.task for row in chunk for example in row)
    capacity = counts["rows"] * seq_length
    counts["padding_share"] = 1.0 - counts["tokens"] / capacity if capacity else 0.0
    counts["per_task"] = per_task
    return counts


def to_batch(columns: Iterable[Sequence[Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Return a record batch of columns, whose lists are arrays of the type of the schema."""
    named = dict(zip(schema.names, map(list, columns), strict=True))
    return pa.RecordBatch.from_pydict(named, schema=schema)


def _to_columns(
    row: list[Example], vocab_size: int, options: Sequence[int] | None
) -> tuple[Any, ...]:
    token = token_type(vocab_size).to_pandas_dtype()
    facts = [(len(one), one.answer_position, one.task, one.index, one.label) for one in row]
    types = (np.int32, np.int32, np.int32, np.int64, np.float32)
    numbers = zip(zip(*facts, strict=True), types, strict=True)
    tokens = np.concatenate([example.ids for example in row]).astype(token)
    columns = [tokens, *(np.array(values, kind) for values, kind in numbers)]
    if options is not None:
        columns.append(np.array([example.weight for example in row], np.float32))
        shares = [example.shares or _one_hot(example, options) for example in row]
        columns.append(np.array(shares, np.float32).ravel())
    return (*columns, _crc(columns))


def _one_hot(example: Example, options: Sequence[int]) -> list[float]:
    """Return the distribution of an example with a hard label."""
    position = example.answer_position
    answer = example.label if position < 0 else int(example.ids[position])
    return [float(answer == option) for option in options]


def _crc(columns: Iterable[np.ndarray]) -> int:
    return reduce(lambda value, column: zlib.crc32(column, value), columns, 0)


class RowSource:
    """Read the rows of one file: `source[i]` is the list of examples of row `i`.

    The file is memory mapped. `len`, `name`, `weight` (None: by its rows), `text` (plain text,
    without answers), `max_examples_per_row`, `seq_length` and `tokenizer_sha256` come from the
    manifest. Examples are numbered through all files of the split.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        entry: RowFile,
        manifest: Manifest,
        first_example: int,
        weight: float | None,
    ):
        self.path = folder / split / entry.file
        self.split = split
        self.name = entry.name
        self.weight = weight
        self.text = entry.text
        self.max_examples_per_row = entry.max_examples_per_row
        self.seq_length = manifest.seq_length
        self.tokenizer_sha256 = manifest.tokenizer_sha256
        self.options, self.soft = np.array(entry.options, np.int32), entry.soft
        self._entry, self._manifest, self._first_example = entry, manifest, first_example
        self._chunks = self._open()
        self._views: list[Any] = [None] * len(self._chunks)

    def _open(self) -> list[pa.RecordBatch]:
        entry = self._entry
        if Path(entry.file).name != entry.file:
            raise self.damaged("its name in the manifest leads out of the rows folder")
        try:
            size = self.path.stat().st_size
            if size != entry.bytes:
                raise self.damaged(f"{size} bytes, the manifest says {entry.bytes}")
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            if reader.schema != _schema(self._manifest.vocab_size, entry.soft):
                raise self.damaged("other columns than the manifest's format has")
            chunks = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            for chunk in chunks:
                chunk.validate()
        except (OSError, pa.ArrowException) as error:
            raise self.damaged(first_line(error)) from error
        expected = [ROWS_PER_CHUNK] * (entry.rows // ROWS_PER_CHUNK)
        if last := entry.rows % ROWS_PER_CHUNK:
            expected.append(last)
        if [chunk.num_rows for chunk in chunks] != expected:
            raise self.damaged(f"not the {entry.rows} rows of the manifest")
        return chunks

    def _map(self, chunk: int) -> Any:
        """Return numpy views of one chunk: (offsets, values) of each list column, and CRCs."""
        *lists, crcs = self._chunks[chunk].columns
        try:
            views = [(column.offsets.to_numpy(), column.values.to_numpy()) for column in lists]
            return views, crcs.to_numpy()
        except (ValueError, pa.ArrowException) as error:
            raise self.damaged(f"chunk {chunk} cannot be read") from error

    def check_hash(self) -> None:
        """Raise `InputError` if the file is not the one of the manifest."""
        if hash_file(self.path) != self._entry.sha256:
            raise self.damaged("its hash is not that of the manifest")

    def damaged(self, what: str) -> InputError:
        """Return the error for a damaged file."""
        return InputError(
            f"{self.path}: row file is damaged: {what}; delete {self.path.parent.parent} and "
            "prepare again"
        )

    def __len__(self) -> int:
        return self._entry.rows

    def __getitem__(self, row: int) -> list[Example]:
        """Read one row, checked against its CRC-32 and the bounds of ids, positions and tasks."""
        tokens, *others, weights, shares, _ = self.columns(row)
        ends = np.cumsum(others[0])
        if weights is not None and shares is not None:
            others += [weights, shares]
        return [
            Example(tokens[end - length : end].astype(np.uint32), *rest)
            for end, length, *rest in zip(ends, *(one.tolist() for one in others), strict=True)
        ]

    def columns(self, row: int) -> RowColumns:
        """Read one row as arrays, with all the checks of `source[i]`."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        chunk, offset = divmod(row, ROWS_PER_CHUNK)
        if self._views[chunk] is None:
            self._views[chunk] = self._map(chunk)
        lists, crcs = self._views[chunk]
        # Slicing in numpy cannot leave the buffer, whatever damaged offsets say.
        columns = [values[offsets[offset] : offsets[offset + 1]] for offsets, values in lists]
        if _crc(columns) != crcs[offset]:
            raise self.damaged(f"the checksum of row {row} does not match")
        return self._checked(columns, 1, f"row {row}")

    def _checked(self, columns: list[np.ndarray], rows: int, what: str) -> RowColumns:
        """Return the columns of some rows with the numbers of their examples in the whole split."""
        tokens, lengths, answers, tasks, indices, labels, *soft = columns
        size = len(lengths), len(self.options)
        is_sound = (
            len(lengths) == len(answers) == len(tasks) == len(indices) == len(labels) > 0
            and lengths.min() > 0
            and lengths.sum() == len(tokens) <= rows * self.seq_length
            and tokens.max() < self._manifest.vocab_size
            and lengths.max() <= self.seq_length
            and (answers < lengths).all()
            and answers.min() >= -1
            and 0 <= tasks.min() <= tasks.max() < len(self._manifest.tasks)
            and [len(column) for column in soft] == [size[0], size[0] * size[1]][: len(soft)]
        )
        if not is_sound:
            raise self.damaged(f"{what} holds lengths, ids, positions or tasks out of bounds")
        weights, shares = (soft[0], soft[1].reshape(size)) if soft else (None, None)
        indices = indices + self._first_example
        own = tokens, lengths, answers, tasks, indices, labels
        return RowColumns(*own, weights, shares, self.options)

    def blocks(self) -> Iterator[RowColumns]:
        """Yield the columns of all rows in order, those of `ROWS_PER_CHUNK` rows joined.

        Only bounds are checked: call `check_hash` first.
        """
        for number in range(len(self._chunks)):
            lists, _ = self._map(number)  # Not kept, because reading all must not hold all.
            columns = [values[offsets[0] : offsets[-1]] for offsets, values in lists]
            yield self._checked(columns, ROWS_PER_CHUNK, f"chunk {number}")


def open_rows(
    path: str | Path,
    split: str,
    weights: Mapping[str, float | None] | None = None,
    *,
    level: int | None = None,
) -> list[RowSource]:
    """Open the row files of one split, those of a source next to each other.

    `level` leaves out the rows of larger nested sets (None: all). `weights` by source name replace
    those of the manifest, because a mixture may change without preparing again. Raises `InputError`
    for a missing split and for damaged files.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        known = ", ".join(manifest.splits)
        raise InputError(f"{folder}: has no split {split!r}; its splits: {known}")
    sources, first_example = [], 0
    for entry in manifest.splits[split]:
        weight = entry.weight if weights is None else weights.get(entry.name, entry.weight)
        if entry.rows and (level is None or entry.level <= level):
            sources.append(RowSource(folder, split, entry, manifest, first_example, weight))
        first_example += entry.examples
    names = {source.name for source in sources}
    for name, weight in (weights or {}).items() if split == "train" else ():
        if weight is not None and name not in names:
            raise InputError(
                f"{folder}: the source {name} has the weight {weight} and no row to draw, because "
                "all of its examples are held out for validation; give it more data, hold out "
                "fewer rows, or leave it out"
            )
    return sources
