"""From a loader to the devices of all processes: each reads the rows its own devices need."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mlmjax.data.loader import LabelLoader, Loader
from mlmjax.parallel.sharding import batch_sharding
from mlmjax.training.step import AnyBatch


class Share(NamedTuple):
    """The rows of a batch that a process needs (int64, in order), and which of them it counts.

    Where several processes need a row, one of them counts it.
    """

    rows: np.ndarray
    counts: np.ndarray


class Fed(NamedTuple):
    """A batch as the devices get it, and the rows of it, on the host, that this process counts."""

    step: int
    batch: Any
    counted: AnyBatch


def feed(
    loader: Loader | LabelLoader,
    mesh: Mesh | None,
    start: int,
    stop: int,
    change: Callable[[Any], Any] = lambda batch: batch,
) -> Iterator[Fed]:
    """Iterate over the batches of steps `start..stop-1`, the same, row by row, on any processes.

    `change` may widen the batches.
    """
    if mesh is None or not mesh.is_multi_process:
        for step, batch in loader.batches(start, stop):
            batch = change(batch)
            yield Fed(step, batch, batch)
        return
    share = cache(lambda rows: share_of(mesh, rows, jax.process_index()))
    for step, batch in loader.batches(start, stop, lambda step: share(loader.rows(step)).rows):
        batch, size = change(batch), loader.rows(step)
        mine = share(size)
        counted = jax.tree.map(lambda x, keep=mine.counts: x[keep], batch)
        yield Fed(step, assemble(batch, mesh, mine.rows, size), counted)


def share_of(
    mesh: Mesh,
    rows: int,
    process: int,
    process_of: Callable[[Any], int] = lambda device: device.process_index,
) -> Share:
    """Return which of so many rows the devices of a process need."""
    owners: dict[tuple[int, int], int] = {}
    needed = []
    placed: Any = batch_sharding(mesh).devices_indices_map((rows,))
    for device, index in placed.items():
        first, last, _ = index[0].indices(rows)
        owners.setdefault((first, last), process_of(device))
        if process_of(device) == process:
            needed.append((first, last))
    parts = sorted(set(needed))
    numbers = [np.arange(*part) for part in parts]
    counts = [np.full(part[1] - part[0], owners[part] == process) for part in parts]
    if not parts:
        return Share(np.empty(0, np.int64), np.empty(0, bool))
    return Share(np.concatenate(numbers), np.concatenate(counts))


def assemble(batch: AnyBatch, mesh: Mesh, rows: np.ndarray, size: int) -> Any:
    """Make the global batch of `size` rows from the `rows` that every process has of it."""
    sharding = batch_sharding(mesh)

    def piece(x: np.ndarray, index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(size)
        at = int(np.searchsorted(rows, first))
        return x[at : at + last - first]

    return jax.tree.map(
        lambda x: jax.make_array_from_callback(
            (size, *x.shape[1:]), sharding, lambda index: piece(x, index)
        ),
        batch,
    )
