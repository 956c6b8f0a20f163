"""Machines described by name: TPU slices that need not be there, and simulated CPU devices."""

import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from mlmjax.errors import InputError

GIB = 2**30


class Chip(NamedTuple):
    """A kind of TPU: how its compiler calls it, how its slices look, and what a device holds.

    `memory` is what the compiler leaves to a program, of the HBM of one device (a chip, but half
    a chip of 7x), in bytes, as libtpu 0.0.48 states it when it refuses one. `sides`, `most`: the
    dimensions of a slice, and the chips of the largest (Google Cloud's pages of each TPU version).
    `devices`: how many one chip counts as.
    """

    name: str
    sides: int
    most: int
    memory: float
    shapes: str
    options: Mapping[str, Any] = {}
    devices: int = 1


CHIPS = {
    "v4": Chip(
        # One device for the two cores of a chip, as JAX has it on the hardware.
        "v4",
        3,
        4096,
        30.75 * GIB,
        "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, ... 12x16x16",
        {"chip_config_name": "megacore"},
    ),
    "v5e": Chip("v5e", 2, 256, 15.75 * GIB, "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
    "v5p": Chip(
        "v5p", 3, 8960, 95.73 * GIB, "1x1x1, 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, ... 16x20x28"
    ),
    "v6e": Chip("v6e", 2, 256, 31.24 * GIB, "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
    "7x": Chip(
        "tpu7x",
        3,
        9216,
        94.74 * GIB,
        "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, ... 16x16x36",
        devices=2,
    ),
}


class Topology(NamedTuple):
    """A machine by name: `kind` of `CHIPS` and the sides of the slice, or `"cpu"` and how many."""

    kind: str
    shape: tuple[int, ...]

    @property
    def platform(self) -> str:
        """`"cpu"` or `"tpu"`."""
        return "cpu" if self.kind == "cpu" else "tpu"

    @property
    def name(self) -> str:
        """The name it is read from, as in `"v5e:16x16"`."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """How many devices JAX sees there."""
        each = 1 if self.kind == "cpu" else CHIPS[self.kind].devices
        return math.prod(self.shape) * each

    @property
    def memory(self) -> float | None:
        """Bytes a program may use on one device; None for simulated devices, which have none."""
        return None if self.kind == "cpu" else CHIPS[self.kind].memory


def parse_topology(name: str) -> Topology:
    """Read the name of a topology; raises `InputError` that lists the known kinds and shapes.

    >>> parse_topology("v5e:16x16"), parse_topology("cpu:8").platform
    (Topology(kind='v5e', shape=(16, 16)), 'cpu')
    """
    if not name.strip():
        raise _refused(name, "is empty")
    kind, _, sides = name.strip().lower().partition(":")
    kind = kind.removeprefix("tpu").lstrip("-")
    chip = CHIPS.get(kind)
    if chip is None and kind != "cpu":
        raise _refused(name, f"unknown kind {kind!r}; known are {', '.join(CHIPS)} and cpu")
    if not re.fullmatch(r"[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})*", sides):
        raise _refused(name, f"found {sides!r} for a shape; expected whole numbers from 1, as 2x4")
    shape = tuple(map(int, sides.split("x")))
    chips = math.prod(shape)
    if chip is None:
        if len(shape) > 1 or chips > 512:
            raise _refused(name, f"found {sides}; expected 1 to 512 simulated devices, as in cpu:8")
        return Topology(kind, shape)
    if len(shape) != chip.sides:
        raise _refused(name, f"found {len(shape)} side(s); a {kind} slice has {chip.sides}")
    if chips > chip.most:
        raise _refused(name, f"found {chips} chips; a {kind} slice has at most {chip.most}")
    if chip.sides == 2 and max(shape) > 16:
        raise _refused(name, f"found a side of {max(shape)}; in {kind} none is longer than 16")
    if chips > 1 and (shape[0] % 2 or shape[1] % 2):
        raise _refused(
            name,
            f"found {sides}; hosts of a {kind} slice have 2x2 chips, so the first two sides "
            "are even",
        )
    return Topology(kind, shape)


def _refused(name: str, why: str) -> InputError:
    known = [f"{kind}: {chip.shapes}" for kind, chip in CHIPS.items()]
    return InputError(
        f"--topology {name!r}: {why}; give KIND:SHAPE, as v5e:16x16 or cpu:8",
        ["KIND: SHAPES", *known, "cpu: a number of simulated devices, 1 to 512"],
    )


def environment(topology: Topology) -> dict[str, str]:
    """Return what the environment of a process must hold before JAX starts there."""
    count = "--xla_force_host_platform_device_count"
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(count)]
    # The seconds told are those of a compilation, not of finding one.
    values = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    values["XLA_FLAGS"] = " ".join(flags)
    if topology.platform == "cpu":
        return values | {"JAX_NUM_CPU_DEVICES": str(topology.shape[0])}
    return values | {
        # Described, not looked for: nobody is asked which TPU this machine is, and one that is
        # busy here does not stand in the way.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_NUM_CPU_DEVICES": "1",
    }


def devices_of(topology: Topology) -> list[Any]:
    """Return the devices of a topology: described ones, or those of a CPU (`environment`).

    Raises `InputError` for a slice the compiler does not know, and where libtpu is missing.
    """
    import jax

    if topology.kind == "cpu":
        found = jax.devices("cpu")
        if len(found) < topology.shape[0]:
            raise InputError(
                f"--topology {topology.name}: JAX has started with {len(found)} CPU devices; set "
                f"jax_num_cpu_devices to {topology.shape[0]} before it starts"
            )
        return found[: topology.shape[0]]
    from jax.experimental import topologies

    chip = CHIPS[topology.kind]
    options = dict(chip.options)
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # the errors of JAX and of libtpu have no type of their own
        if _lacks_libtpu(error):
            raise InputError(
                f"--topology {topology.name}: compiling for a TPU needs its compiler, libtpu; "
                "install it with pip install '.[plan]' in a clone of mlmjax, or pip install "
                "'mlmjax[plan]'"
            ) from error
        says = str(error).partition("\n")[0]
        raise _refused(
            topology.name, f"the TPU compiler knows no {topology.kind} slice of this shape ({says})"
        ) from error
    return list(described.devices)


def _lacks_libtpu(error: BaseException) -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is None or "libtpu" in str(error)
