"""A shuffle of more examples than memory holds: by hash into buckets on disk, each sorted alone."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mlmjax.data.batch import Example
from mlmjax.data.preparing.stage import Chunk, chunk_schema, from_arrow, to_arrow

BUCKET_TOKENS = 2**24
"""Tokens in a bucket, about: what is sorted and packed together, and so what memory has to hold."""


class Bucket(NamedTuple):
    """A part of one group of examples: its file, and how many examples and tokens are in it."""

    path: Path
    group: int
    examples: int
    tokens: int


def scatter(
    chunks: Iterable[tuple[Chunk, np.ndarray]],
    tokens: Sequence[int],
    folder: Path,
    vocab_size: int,
) -> list[Bucket]:
    """Write examples into the buckets of their groups; give the buckets in order, group by group.

    `chunks` give the examples, whose `key` is their place in the order (64 bits), and the group of
    each (-1: left out). `tokens` are those of each group. Buckets are consecutive stretches of the
    order, so that all of a group, each sorted, are the group in order.
    """
    counts = [max(1, -(-total // BUCKET_TOKENS)) for total in tokens]
    first = np.concatenate([[0], np.cumsum(counts)])
    schema = chunk_schema(vocab_size)
    paths = [folder / f"{number:05d}.bucket" for number in range(first[-1])]
    totals = np.zeros((len(paths), 2), np.int64)
    for chunk, group in chunks:
        (used,) = np.nonzero(group >= 0)
        of = group[used]
        share = (chunk.key[used] >> np.uint64(32)).astype(np.int64)
        bucket = first[of] + (share * np.array(counts)[of] >> 32)
        order = np.argsort(bucket, kind="stable")
        edges = np.flatnonzero(np.diff(bucket[order], prepend=-1))
        for members in np.split(order, edges[1:]) if len(order) else ():
            number = int(bucket[members[0]])
            part = chunk.take(used[members])
            # Opened for each write: a group of any size must not run out of open files.
            with paths[number].open("ab") as file:
                file.write(to_arrow(part, schema).serialize())
            totals[number] += part.examples, len(part.tokens)
    groups = np.repeat(np.arange(len(counts)), counts).tolist()
    return [
        Bucket(path, group, *total)
        for path, group, total in zip(paths, groups, totals.tolist(), strict=True)
        if total[0]
    ]


def read_bucket(path: Path, vocab_size: int) -> Iterator[Example]:
    """Read the examples of a bucket in order, numbered from 0."""
    schema = chunk_schema(vocab_size)
    with pa.memory_map(str(path)) as source:
        messages = pa.ipc.MessageReader.open_stream(source)
        chunks = [from_arrow(pa.ipc.read_record_batch(message, schema)) for message in messages]
        keys = np.concatenate([chunk.key for chunk in chunks])
        number = np.repeat(np.arange(len(chunks)), [chunk.examples for chunk in chunks])
        place = np.concatenate([np.arange(chunk.examples) for chunk in chunks])
        for index, at in enumerate(np.argsort(keys, kind="stable")):
            chunk, i = chunks[number[at]], place[at]
            yield Example(
                chunk.tokens[chunk.offsets[i] : chunk.offsets[i + 1]].astype(np.uint32),
                int(chunk.answer_position[i]),
                int(chunk.task[i]),
                index,
                float(chunk.label[i]),
            )
