"""Look at the devices and the memory of this machine."""

import os
from typing import NamedTuple

CPU_SHARE = 0.5
"""The share of a computer's memory that a run on its processor may take."""


class Machine(NamedTuple):
    """The devices that JAX sees here: `memory` is the bytes that a run may use on each."""

    platform: str
    device: str
    devices: int
    memory: float

    @property
    def described(self) -> str:
        """Return the machine in words."""
        memory = f"{self.memory / 2**30:.0f} GiB of memory for a run"
        if self.platform == "cpu":
            return f"{os.cpu_count()} processor cores, no accelerator, {memory}"
        return f"{self.devices} x {self.device}, {memory} on each"


def find_machine() -> Machine:
    """Return the devices of this machine, and the memory that a run may use on each."""
    import jax

    devices = jax.devices()
    first = devices[0]
    if first.platform == "cpu":
        memory = CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine("cpu", first.device_kind, 1, memory)
    limit = (first.memory_stats() or {}).get("bytes_limit", 16 * 2**30)
    return Machine(first.platform, first.device_kind, len(devices), float(limit))
