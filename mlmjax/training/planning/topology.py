"""Describe machines by name: TPU slices and simulated CPU devices."""

import math
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from mlmjax.errors import InputError, counted, first_line

GIB = 2**30


class Chip(NamedTuple):
    """A kind of TPU.

    `name` is the compiler's. `sides` is the number of dimensions of a slice and `most` its largest
    number of chips, as Google Cloud's pages of each TPU version say. `memory` is the bytes of HBM
    that a program may use on one device, as libtpu 0.0.48 states when it rejects one. `devices` is
    the number of devices per chip.
    """

    name: str
    sides: int
    most: int
    memory: float
    shapes: str
    options: Mapping[str, Any] = {}
    devices: int = 1


_FLAT = "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"
_CUBES = "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4"

# The two cores of a chip are one device, as JAX has it on the hardware.
_MEGACORE = {"chip_config_name": "megacore"}

CHIPS = {
    "v4": Chip("v4", 3, 4096, 30.75 * GIB, f"{_CUBES}, 4x4x8, ... 12x16x16", _MEGACORE),
    "v5e": Chip("v5e", 2, 256, 15.75 * GIB, _FLAT),
    "v5p": Chip("v5p", 3, 8960, 95.73 * GIB, f"1x1x1, {_CUBES}, ... 16x20x28"),
    "v6e": Chip("v6e", 2, 256, 31.24 * GIB, _FLAT),
    "7x": Chip("tpu7x", 3, 9216, 94.74 * GIB, f"{_CUBES}, ... 16x16x36", devices=2),
}


class Topology(NamedTuple):
    """A machine: a `kind` of `CHIPS` with the sides of a slice, or `"cpu"` with a number."""

    kind: str
    shape: tuple[int, ...]

    @property
    def platform(self) -> str:
        """Return `"cpu"` or `"tpu"`."""
        return "cpu" if self.kind == "cpu" else "tpu"

    @property
    def name(self) -> str:
        """Return the name that `parse_topology` reads, as in `"v5e:16x16"`."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """Return the number of devices that JAX sees there."""
        each = 1 if self.kind == "cpu" else CHIPS[self.kind].devices
        return math.prod(self.shape) * each

    @property
    def memory(self) -> float | None:
        """Return the bytes a program may use on one device; None for simulated devices."""
        return None if self.kind == "cpu" else CHIPS[self.kind].memory


def parse_topology(name: str) -> Topology:
    """Parse the name of a topology; raise `InputError` that lists the known kinds and shapes.

    >>> parse_topology("v5e:16x16"), parse_topology("cpu:8").platform
    (Topology(kind='v5e', shape=(16, 16)), 'cpu')
    """
    kind, _, sides = name.strip().lower().partition(":")
    kind = kind.removeprefix("tpu").lstrip("-")
    chip = CHIPS.get(kind)
    if chip is None and kind != "cpu":
        raise _reject(name, f"unknown kind {kind!r}; the kinds are {', '.join(CHIPS)} and cpu")
    if not re.fullmatch(r"[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})*", sides):
        raise _reject(name, f"shape {sides!r}; expected whole numbers from 1, as in 2x4")
    shape = tuple(map(int, sides.split("x")))
    chips = math.prod(shape)
    if chip is None:
        if len(shape) > 1 or chips > 512:
            raise _reject(name, f"found {sides}; expected 1 to 512 simulated devices, as in cpu:8")
        return Topology(kind, shape)
    slices, problem = f"a {kind} slice has", ""
    if len(shape) != chip.sides:
        problem = f"{counted(len(shape), 'side')}; {slices} {chip.sides}"
    elif chips > chip.most:
        problem = f"{chips} chips; {slices} at most {chip.most}"
    elif chip.sides == 2 and max(shape) > 16:
        problem = f"a side of {max(shape)}; {slices} sides of at most 16"
    elif chips > 1 and (shape[0] % 2 or shape[1] % 2):
        problem = f"{sides}; {slices} hosts of 2x2 chips, so the first two sides must be even"
    if problem:
        raise _reject(name, f"found {problem}")
    return Topology(kind, shape)


def _reject(name: str, why: str) -> InputError:
    known = [f"{kind}: {chip.shapes}" for kind, chip in CHIPS.items()]
    return InputError(
        f"--topology {name!r}: {why}; give KIND:SHAPE, as in v5e:16x16 or cpu:8",
        ["KIND: SHAPES", *known, "cpu: a number of simulated devices, 1 to 512"],
    )


def environment(topology: Topology) -> dict[str, str]:
    """Return the variables that a process for this topology needs before JAX starts."""
    count = "--xla_force_host_platform_device_count"
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(count)]
    # Without a cache, because the report states how long compiling takes.
    values = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    values |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    if topology.platform == "cpu":
        return values | {"JAX_NUM_CPU_DEVICES": str(topology.shape[0])}
    # The TPU is only described, so JAX must neither look for one nor wait for a busy one.
    return values | {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_NUM_CPU_DEVICES": "1",
    }


def devices_of(topology: Topology) -> list[Any]:
    """Return described TPU devices, or simulated CPU devices (see `environment`).

    Raises `InputError` for a slice that the compiler does not know and if libtpu is missing.
    """
    import jax

    if topology.kind == "cpu":
        return jax.devices("cpu")[: topology.shape[0]]
    from jax.experimental import topologies

    chip = CHIPS[topology.kind]
    options = dict(chip.options)
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # JAX and libtpu raise only general types here.
        if find_spec("libtpu") is None or "libtpu" in str(error):
            raise InputError(
                f"--topology {topology.name}: compiling for a TPU needs its compiler, libtpu; "
                "install it with pip install '.[plan]' in a clone of mlmjax, or pip install "
                "'mlmjax[plan]'"
            ) from error
        raise _reject(
            topology.name,
            f"the TPU compiler does not know a {topology.kind} slice of this shape "
            f"({first_line(error)})",
        ) from error
    return list(described.devices)
