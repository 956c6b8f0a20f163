"""Tokenised examples on disk between the steps of preparing: columns, mapped and never loaded."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

CHUNK_TOKENS = 2**20


class Chunk(NamedTuple):
    """Some examples as columns: `tokens` of all, one after another, cut at `offsets`.

    `answer` is the id of the answer's token or the number of its class (-1: none),
    `answer_position` where a token stands, `task` a number, `key` the hash of what the model is
    shown, `label` that of a classification head; each `[examples]`, offsets one longer. In the
    buckets of `data.shuffle` the key is the place in the order.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    answer: np.ndarray
    answer_position: np.ndarray
    task: np.ndarray
    key: np.ndarray
    label: np.ndarray

    @property
    def examples(self) -> int:
        """How many examples these are."""
        return len(self.key)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.offsets)

    def take(self, members: np.ndarray) -> "Chunk":
        """Return the examples of these numbers, in this order."""
        lengths = self.lengths[members]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[members] - offsets[:-1], lengths) + np.arange(offsets[-1])
        others = [column[members] for column in self[2:]]
        return Chunk(self.tokens[places], offsets, *others)


def chunk_schema(vocab_size: int) -> pa.Schema:
    """Return the Arrow columns of a chunk; tokens take 16 bits where the vocabulary allows."""
    return pa.schema(
        [
            ("tokens", pa.list_(pa.uint16() if vocab_size <= 2**16 else pa.uint32())),
            ("answer", pa.int32()),
            ("answer_position", pa.int32()),
            ("task", pa.int32()),
            ("key", pa.uint64()),
            ("label", pa.float32()),
        ]
    )


def to_arrow(chunk: Chunk, schema: pa.Schema) -> pa.RecordBatch:
    """Return a chunk as a record batch."""
    token = schema.field("tokens").type.value_type
    arrays = [
        pa.ListArray.from_arrays(
            pa.array(chunk.offsets, pa.int32()), pa.array(chunk.tokens, token)
        ),
        *(pa.array(c, f.type) for c, f in zip(chunk[2:], list(schema)[1:], strict=True)),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def from_arrow(batch: pa.RecordBatch) -> Chunk:
    """Return views of a record batch; nothing is copied, and nothing read before it is used."""
    tokens, *others = batch.columns
    offsets = tokens.offsets.to_numpy()
    columns = [column.to_numpy() for column in others]
    return Chunk(tokens.values.to_numpy(), offsets, *columns)


def write_stage(path: Path, examples: Iterable[tuple], vocab_size: int) -> None:
    """Write `(ids, answer, answer_position, task, key, label)`s in chunks of `CHUNK_TOKENS`."""
    schema = chunk_schema(vocab_size)
    held: list[tuple] = []
    tokens = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for example in examples:
            held.append(example)
            tokens += len(example[0])
            if tokens >= CHUNK_TOKENS:
                writer.write_batch(to_arrow(_columns(held), schema))
                held, tokens = [], 0
        if held:
            writer.write_batch(to_arrow(_columns(held), schema))


def _columns(examples: list[tuple]) -> Chunk:
    ids, *others = zip(*examples, strict=True)
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])])
    answer, position, task = (np.array(column, np.int32) for column in others[:3])
    keys, labels = np.array(others[3], np.uint64), np.array(others[4], np.float32)
    return Chunk(np.concatenate(ids), offsets, answer, position, task, keys, labels)


def read_stage(path: Path) -> Iterator[Chunk]:
    """Give the chunks of a stage in order, as views of the mapped file."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield from_arrow(reader.get_batch(number))
