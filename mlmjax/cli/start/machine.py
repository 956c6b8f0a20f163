"""Look at the devices and the memory of this machine, or of one with a name."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mlmjax.errors import InputError, counted
from mlmjax.training.planning.topology import parse_topology

CPU_SHARE = 0.5
"""The share of a computer's memory that a run on its processor may take."""

UNKNOWN = 4 * 2**30
"""Bytes of memory of a computer that does not say how much it has."""

CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Files in which Linux says how much memory a container may take, of both versions of cgroups."""


class Machine(NamedTuple):
    """The devices of a machine: `memory` is the bytes that a run may use on each.

    `name` is that of `mlmjax plan`; None: JAX sees the devices here.
    """

    platform: str
    device: str
    devices: int
    memory: float
    name: str | None = None

    @property
    def described(self) -> str:
        """Return the machine in words."""
        memory = f"{self.memory / 2**30:.3g} GiB of memory for a run"
        if self.platform == "cpu":
            return f"{counted(count_cores(), 'processor core')}, no accelerator, {memory}"
        devices = f"{self.devices} x {self.device}, {memory} on each"
        return devices if self.name is None else f"{self.name}, {devices}"


def count_cores() -> int:
    """Return the processor cores that this process may use."""
    with_limit = getattr(os, "process_cpu_count", os.cpu_count)  # new in Python 3.13
    return with_limit() or 1


def total_memory() -> float:
    """Return the bytes of memory of this computer, or of the container that this process is in."""
    found = [float("inf")]
    with suppress(AttributeError, OSError, ValueError):  # Windows has none of it
        found.append(float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES"))
    for path in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # not there, or "max"
            found.append(float(path.read_text()))
    least = min(size for size in found if size > 0)
    return least if least < float("inf") else UNKNOWN


def machine_by_name(name: str) -> Machine:
    """Return a machine by its name in `mlmjax plan`.

    Raises `InputError` for an unknown name and for simulated devices.

    >>> machine_by_name("v5e-16").described
    'v5e:4x4, 16 x TPU v5 lite, 15.8 GiB of memory for a run on each'
    """
    topology = parse_topology(name)
    if topology.memory is None:
        raise InputError(
            f"machine {name!r}: is only simulated; name TPUs or GPUs such as v5e-16 or h200:8, or "
            "no machine for the one at hand"
        )
    where = topology.platform, topology.device, topology.devices, topology.memory
    return Machine(*where, topology.name)


def find_machine() -> Machine:
    """Return the devices of this machine, and the memory that a run may use on each."""
    import jax

    devices = jax.devices()
    first = devices[0]
    if first.platform == "cpu":
        return Machine("cpu", first.device_kind, 1, CPU_SHARE * total_memory())
    limit = (first.memory_stats() or {}).get("bytes_limit", 16 * 2**30)
    return Machine(first.platform, first.device_kind, len(devices), float(limit))
