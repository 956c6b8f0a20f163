"""Exchange values between the processes of a run: broadcasts, sums and votes."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mlmjax.errors import InputError
from mlmjax.parallel import jax_internals

BROADCAST, BARRIER = "mlmjax/broadcast/", "mlmjax/barrier/"

_broadcasts = 0


def process_index() -> int:
    """Return the number of this process in its run, without starting a backend."""
    return int(jax_internals.process_state().process_id or 0)


def process_count() -> int:
    """Return the number of processes of this run, without starting a backend."""
    return int(jax_internals.process_state().num_processes or 1)


def is_first() -> bool:
    """Tell whether this process writes files and prints to the terminal."""
    return process_index() == 0


def coordinator_address() -> str | None:
    """Return where the first process listens; None until this process tries to join."""
    address: str | None = jax_internals.process_state().coordinator_address
    return address


_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = _is_forked or jax_internals.has_started()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def is_forked() -> bool:
    """Tell whether this process was forked from one that had used JAX."""
    return _is_forked


def check_not_forked() -> None:
    """Raise `InputError` in a process forked from one that had used JAX, which would hang."""
    if _is_forked:
        raise InputError(
            "this process was forked from one that had used JAX, whose threads a fork loses; start "
            "processes with multiprocessing.get_context('spawn'), or fork before the first use"
        )


def client() -> Any:
    """Return the client of the coordinator, which stores texts by key."""
    return jax_internals.process_state().client


def read_all(prefix: str) -> dict[int, str]:
    """Return the text that each process has stored under a prefix."""
    return {int(key.rpartition("/")[2]): text for key, text in client().key_value_dir_get(prefix)}


def broadcast_from_first(make: Callable[[], Any], waiting_for: str | None = None) -> Any:
    """Return on every process the JSON value that `make` returns on the first one.

    All processes call it in the same order. The others wait as long as the first one lives, and
    print `waiting_for` once a minute.
    """
    global _broadcasts
    if process_count() == 1:
        return make()
    _broadcasts += 1
    key = f"{BROADCAST}{_broadcasts}"
    if is_first():
        value = make()
        client().key_value_set(key, json.dumps(value))
        return value
    begun = printed = time.monotonic()
    while True:
        with suppress(Exception):  # The key does not exist yet.
            return json.loads(client().key_value_try_get(key))
        time.sleep(0.05 if time.monotonic() - begun < 5 else 1.0)
        if waiting_for and time.monotonic() - printed > 60:
            printed = time.monotonic()
            print(f"process {process_index()} waits: {waiting_for}", file=sys.stderr, flush=True)


def barrier(name: str) -> None:
    """Wait for all processes as long as they live; each name can be used once."""
    if process_count() == 1:
        return
    client().key_value_set(f"{BARRIER}{name}/{process_index()}", "")
    while len(read_all(f"{BARRIER}{name}/")) < process_count():
        time.sleep(0.05)


def sum_over_processes(values: Mapping[str, float]) -> dict[str, float]:
    """Return the sum of each value over all processes, in float64."""
    if process_count() == 1:
        return dict(values)
    names = sorted(values)
    # As bits, because arrays of jax have no float64.
    bits = np.array([values[name] for name in names], np.float64).view(np.uint32)
    gathered = np.ascontiguousarray(jax_internals.gather(bits))
    return dict(zip(names, gathered.view(np.float64).sum(axis=0).tolist(), strict=True))


def vote(flag: bool) -> Callable[[], bool]:
    """Cast a vote; the returned function waits and tells whether any process voted yes.

    All processes vote together and get the same answer.
    """
    if process_count() == 1:
        return lambda: flag
    ballots, count = _count_votes()
    ballot = np.full(1, flag)
    answer = count(jax.make_array_from_callback((jax.device_count(),), ballots, lambda _: ballot))
    return lambda: bool(answer)


@cache
def _count_votes() -> tuple[NamedSharding, Callable[[Any], jax.Array]]:
    """Return the layout of the votes, one on each device, and a function that counts them."""
    mesh = jax.make_mesh((jax.device_count(),), ("device",), (AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    count = jax.jit(lambda votes: votes.any(), out_shardings=whole)
    return NamedSharding(mesh, PartitionSpec("device")), count
