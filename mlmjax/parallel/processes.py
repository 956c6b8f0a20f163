"""Many processes, one run: what they tell each other, sum up and agree on."""

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

WORDS, PLACES = "mlmjax/word/", "mlmjax/at/"

parted = threading.Event()
"""Set when this process and the others go their own ways, or it is ending by itself."""


def process_index() -> int:
    """Return which of the processes of a run this is; unlike JAX's, it starts no backend."""
    return int(jax_distributed.global_state.process_id or 0)


def process_count() -> int:
    """Return how many processes this run has; unlike JAX's, it starts no backend."""
    return int(jax_distributed.global_state.num_processes or 1)


def is_first() -> bool:
    """Tell whether this is the process that writes files and talks to people."""
    return process_index() == 0


def client() -> Any:
    """Return the client of the coordinator, which keeps words by their key."""
    return jax_distributed.global_state.client


def table(prefix: str) -> dict[int, str]:
    """Return the words of each process under a prefix."""
    return {int(key.rpartition("/")[2]): text for key, text in client().key_value_dir_get(prefix)}


_told = 0


def told_by_first(make: Callable[[], Any], waiting_for: str | None = None) -> Any:
    """Return, on every process, what `make` returned on the first one (a JSON value).

    Every process calls it in the same order. It may take long: the others wait as long as the
    first one lives, and once a minute it is said for what.
    """
    global _told
    if process_count() == 1:
        return make()
    _told += 1
    key = f"{WORDS}{_told}"
    if is_first():
        value = make()
        client().key_value_set(key, json.dumps(value))
        return value
    begun = said = time.monotonic()
    while True:
        with suppress(Exception):  # Not there yet. When the first one is gone, the watch says so.
            return json.loads(client().key_value_try_get(key))
        time.sleep(0.05 if time.monotonic() - begun < 5 else 1.0)
        if waiting_for and time.monotonic() - said > 60:
            said = time.monotonic()
            print(f"process {process_index()} waits: {waiting_for}", file=sys.stderr, flush=True)


def barrier(name: str) -> None:
    """Wait for all processes, as long as they live; a name can be used once."""
    if process_count() == 1:
        return
    client().key_value_set(f"{PLACES}{name}/{process_index()}", "")
    while len(table(f"{PLACES}{name}/")) < process_count():
        time.sleep(0.05)


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """Return the sums of all processes' values of the same names, float64, exact on the way."""
    if process_count() == 1:
        return dict(values)
    names = sorted(values)
    bits = np.array([values[name] for name in names], np.float64).view(np.uint32)
    everybody = np.ascontiguousarray(multihost_utils.process_allgather(bits))
    return dict(zip(names, everybody.view(np.float64).sum(axis=0).tolist(), strict=True))


def part(name: str) -> None:
    """Wait until all processes are here; from then on none minds that another one ends."""
    barrier(name)
    parted.set()


def vote(flag: bool) -> Callable[[], bool]:
    """Cast a vote without waiting; what is returned waits, and tells whether any process said yes.

    All processes vote together, and all get the same answer.
    """
    if process_count() == 1:
        return lambda: flag
    ballots = NamedSharding(_everybody(), PartitionSpec("device"))
    size = (ballots.mesh.size,)
    votes = jax.make_array_from_callback(size, ballots, lambda index: np.full(1, flag))
    answer = _any_vote()(votes)
    return lambda: bool(answer)


def any_process(flag: bool) -> bool:
    """Tell whether the flag is set on any process; all of them call it together."""
    return vote(flag)()


@cache
def _everybody() -> Mesh:
    devices = jax.devices()
    return jax.make_mesh((len(devices),), ("device",), (AxisType.Auto,), devices=devices)


@cache
def _any_vote() -> Callable[[Any], jax.Array]:
    return jax.jit(
        lambda votes: votes.any(), out_shardings=NamedSharding(_everybody(), PartitionSpec())
    )
