"""Shuffle more examples than memory holds, in sorted buckets on disk."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mlmjax.data.batch import Example
from mlmjax.data.rows import to_batch, token_type
from mlmjax.text.checks import split_by_size

CHUNK_TOKENS = 2**20

BUCKET_TOKENS = 2**24
"""About the tokens of a bucket, which is what memory has to hold to sort and pack it."""


class Chunk(NamedTuple):
    """Hold some examples as columns: `tokens` of all, one after another, cut at `offsets`.

    `answer` is the id of the answer token or the number of its class (-1: none), `answer_position`
    the place of that token, `task` a number, `key` the hash of what the model is shown, `label` the
    class or value for a classification head, `weight` its weight; each `[examples]`, offsets one
    longer. `shares` has the probabilities of labels as an Arrow list for each example. In buckets
    the key is the place in the shuffled order.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    answer: np.ndarray
    answer_position: np.ndarray
    task: np.ndarray
    key: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    shares: pa.ListArray

    @property
    def lengths(self) -> np.ndarray:
        """Count the tokens of each example."""
        return np.diff(self.offsets)


def chunk_schema(vocab_size: int) -> pa.Schema:
    """Return the Arrow columns of a chunk."""
    return pa.schema(
        [
            ("tokens", pa.list_(token_type(vocab_size))),
            ("answer", pa.int32()),
            ("answer_position", pa.int32()),
            ("task", pa.int32()),
            ("key", pa.uint64()),
            ("label", pa.float32()),
            ("weight", pa.float32()),
            ("shares", pa.list_(pa.float32())),
        ]
    )


def from_arrow(batch: pa.RecordBatch) -> Chunk:
    """Return views of a record batch, which is read only when they are used."""
    tokens, *others, shares = batch.columns
    columns: list[Any] = [tokens.values.to_numpy(), tokens.offsets.to_numpy()]
    return Chunk._make([*columns, *(column.to_numpy() for column in others), shares])


def write_stage(path: Path, examples: Iterable[tuple], vocab_size: int) -> None:
    """Write tuples of ids and the other columns of `Chunk`, in chunks of `CHUNK_TOKENS`."""
    schema, token = chunk_schema(vocab_size), token_type(vocab_size).to_pandas_dtype()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for held in split_by_size(examples, lambda one: len(one[0]), CHUNK_TOKENS):
            ids, *others = zip(*held, strict=True)
            writer.write_batch(to_batch([[one.astype(token) for one in ids], *others], schema))


def read_stage(path: Path) -> Iterator[Chunk]:
    """Yield the chunks of a stage in order, as views of the mapped file."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield from_arrow(reader.get_batch(number))


def scatter(
    chunks: Iterable[tuple[Chunk, np.ndarray]], tokens: Sequence[int], folder: Path, vocab_size: int
) -> list[tuple[Path, int]]:
    """Write examples into buckets of their groups; return their files and groups, in order.

    `chunks` yield examples, whose `key` is their place in the order (64 bits), and the group of
    each (-1: left out). `tokens` counts those of each group. A bucket is a range of the order.
    """
    counts = [max(1, -(-total // BUCKET_TOKENS)) for total in tokens]
    first = np.concatenate([[0], np.cumsum(counts)])
    schema, token = chunk_schema(vocab_size), token_type(vocab_size)
    paths = [folder / f"{number:05d}.bucket" for number in range(first[-1])]
    for chunk, group in chunks:
        (used,) = np.nonzero(group >= 0)
        own = group[used]
        share = (chunk.key[used] >> np.uint64(32)).astype(np.int64)
        bucket = first[own] + (share * np.array(counts)[own] >> 32)
        order = np.argsort(bucket, kind="stable")
        edges = np.flatnonzero(np.diff(bucket[order], prepend=-1))
        lists = pa.ListArray.from_arrays(chunk.offsets, pa.array(chunk.tokens, token))
        columns = [*map(pa.array, chunk[2:-1]), chunk.shares]
        batch = pa.RecordBatch.from_arrays([lists, *columns], schema=schema)
        for members in np.split(order, edges[1:]) if len(order) else ():
            # Opened for each write, so that many buckets do not run out of open files.
            with paths[bucket[members[0]]].open("ab") as file:
                file.write(batch.take(pa.array(used[members])).serialize())
    groups = np.repeat(np.arange(len(counts)), counts).tolist()
    return [(path, group) for path, group in zip(paths, groups, strict=True) if path.exists()]


def read_bucket(path: Path, vocab_size: int) -> Iterator[Example]:
    """Yield the examples of a bucket in order, numbered from 0."""
    schema = chunk_schema(vocab_size)
    with pa.memory_map(str(path)) as source:
        messages = pa.ipc.MessageReader.open_stream(source)
        table = pa.Table.from_batches(pa.ipc.read_record_batch(one, schema) for one in messages)
        order = np.argsort(table["key"].to_numpy(), kind="stable")
        (batch,) = table.take(order).combine_chunks().to_batches()
        chunk = from_arrow(batch)
        for i in range(len(chunk.key)):
            yield Example(
                chunk.tokens[chunk.offsets[i] : chunk.offsets[i + 1]].astype(np.uint32),
                int(chunk.answer_position[i]),
                int(chunk.task[i]),
                i,
                float(chunk.label[i]),
                float(chunk.weight[i]),
                tuple(chunk.shares[i].as_py()),
            )
