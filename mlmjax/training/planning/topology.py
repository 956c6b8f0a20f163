"""Describe machines by name: TPU slices, GPUs and simulated CPU devices."""

import difflib
import math
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from mlmjax.errors import InputError, counted, first_line, install_advice

GIB = 2**30


class Chip(NamedTuple):
    """A kind of TPU.

    `name` is the compiler's. `sides` is the number of dimensions of a slice and `most` its largest
    number of chips, as Google Cloud's pages of each TPU version say. `memory` is the bytes of HBM
    that a program may use on one device, as libtpu 0.0.48 states when it rejects one. `device` is
    what JAX calls one, and `devices` is their number per chip.
    """

    name: str
    device: str
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
    "v4": Chip("v4", "TPU v4", 3, 4096, 30.75 * GIB, f"{_CUBES}, 4x4x8, ... 12x16x16", _MEGACORE),
    "v5e": Chip("v5e", "TPU v5 lite", 2, 256, 15.75 * GIB, _FLAT),
    "v5p": Chip("v5p", "TPU v5", 3, 8960, 95.73 * GIB, f"1x1x1, {_CUBES}, ... 16x20x28"),
    "v6e": Chip("v6e", "TPU v6 lite", 2, 256, 31.24 * GIB, _FLAT),
    "7x": Chip("tpu7x", "TPU7x", 3, 9216, 94.74 * GIB, f"{_CUBES}, ... 16x16x36", devices=2),
}


# What Google Cloud and GKE call a kind.
_TPU_NAMES = {
    "v5litepod": "v5e", "v5lite": "v5e", "v5-lite-podslice": "v5e", "v5-lite-device": "v5e",
    "v4-podslice": "v4", "v5p-slice": "v5p", "v6e-slice": "v6e", "trillium": "v6e",
    "ironwood": "7x",
}  # fmt: skip

# In names such as v5p-128 the number counts cores of these kinds, and chips of v5e and v6e.
_CORES_PER_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_BOXES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)  # fmt: skip

MIB = 2**20
GPUS: dict[str, tuple[str, dict[int, int]]] = {
    "b200": ("NVIDIA B200", {180: 183_359}),
    "h200": ("NVIDIA H200", {141: 143_771}),
    "h100": ("NVIDIA H100", {80: 81_559, 94: 95_830}),
    "a100": ("NVIDIA A100", {40: 40_960, 80: 81_920}),
    "l40s": ("NVIDIA L40S", {48: 46_068}),
    "l4": ("NVIDIA L4", {24: 23_034}),
    "a10": ("NVIDIA A10", {24: 23_028}),
    "a10g": ("NVIDIA A10G", {24: 23_028}),
    "rtx3090": ("NVIDIA GeForce RTX 3090", {24: 24_576}),
    "rtx4090": ("NVIDIA GeForce RTX 4090", {24: 24_564}),
    "rtx5090": ("NVIDIA GeForce RTX 5090", {32: 32_607}),
    "rtxa6000": ("NVIDIA RTX A6000", {48: 49_140}),
}
"""For each GPU what JAX calls it, and by its GB the MiB that nvidia-smi shows.

cuDNN's attention needs at least these generations (Ampere and later)."""

_NO_CUDNN = "cuDNN's attention needs NVIDIA's Ampere or a newer generation"
_OTHER_GPUS = {
    **dict.fromkeys(("v100", "p100", "t4", "rtx2080"), f"it is older than that: {_NO_CUDNN}"),
    **dict.fromkeys(("mi250x", "mi300x", "mi325x"), f"it is AMD's: {_NO_CUDNN}"),
}
"""GPUs that people name and no plan is made for, with the reason."""

MOST_GPUS = 4096
_GPU = re.compile(
    r"(?:(?P<before>[1-9][0-9]{0,3})x)?(?P<model>[a-z]+[0-9]+[a-z]?|[0-9]{4})"
    r"(?:-?(?P<gb>[0-9]{2,3})(?:g|gb|gib))?(?:x(?P<after>[1-9][0-9]{0,3}))?"
)
# What else nvidia-smi and GKE write in the name of a GPU.
_BESIDES = re.compile(r"nvidia|geforce|tesla|mega|pcie|sxm[0-9]?|hbm[0-9]?e?")
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def memory_fraction() -> float:
    """Return the share of a GPU's memory that JAX takes, 0.75 unless the environment says so.

    Raises `InputError` for a variable that is not a share.
    """
    found = os.environ.get(FRACTION, "0.75")
    try:
        share = float(found)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise InputError(
            f"{FRACTION}: found {found!r}; expected a share above 0 and at most 1, such as 0.9"
        )
    return share


class Topology(NamedTuple):
    """A machine: a `kind` of `CHIPS` with the sides of a slice, or GPUs or CPUs with a number.

    The kind of a GPU is its name with its memory, as in `"a100-80g"`; that of CPUs is `"cpu"`.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def platform(self) -> str:
        """Return `"cpu"`, `"gpu"` or `"tpu"`."""
        return "cpu" if self.kind == "cpu" else "tpu" if self.kind in CHIPS else "gpu"

    @property
    def name(self) -> str:
        """Return the name that `parse_topology` reads, as in `"v5e:16x16"`."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """Return the number of devices that JAX sees there."""
        each = CHIPS[self.kind].devices if self.kind in CHIPS else 1
        return math.prod(self.shape) * each

    @property
    def device(self) -> str:
        """Return what JAX calls one device."""
        if self.platform == "gpu":
            return self.gpu[0]
        return CHIPS[self.kind].device if self.kind in CHIPS else "cpu"

    @property
    def gpu(self) -> tuple[str, float]:
        """Return what JAX calls this GPU, and all its memory in bytes."""
        model, _, size = self.kind.partition("-")
        device, sizes = GPUS[model]
        return device, float(sizes[int(size.removesuffix("g"))] * MIB)

    @property
    def memory(self) -> float | None:
        """Return the bytes a program may use on one device; None for simulated devices."""
        if self.platform == "gpu":
            return self.gpu[1] * memory_fraction()
        return None if self.kind == "cpu" else CHIPS[self.kind].memory


def parse_topology(name: str) -> Topology:
    """Parse the name of a machine; raise `InputError` that lists the known ones.

    >>> parse_topology("v5e:16x16"), parse_topology("cpu:8").platform
    (Topology(kind='v5e', shape=(16, 16)), 'cpu')
    >>> [parse_topology(name).name for name in ("v5litepod-16", "v5p-128", "h200:8", "A100-80GB")]
    ['v5e:4x4', 'v5p:4x4x4', 'h200-141g:8', 'a100-80g:1']
    """
    plain = re.sub(r"[\s_]+", "-", name.strip().lower())
    kind, _, sides = plain.partition(":")
    kind = kind.removeprefix("tpu").lstrip("-")
    slices, _, number = kind.rpartition("-")
    if not sides and _TPU_NAMES.get(slices, slices) in _CORES_PER_CHIP:
        return _slice_of(name, slices, number)
    kind = _TPU_NAMES.get(kind, kind)
    chip = CHIPS.get(kind)
    if chip is None and kind != "cpu":
        return _parse_gpu(name, plain, kind)
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
        if len(shape) == 1 and kind in _CORES_PER_CHIP:
            problem += f", and a number alone is written {kind}-{chips * _CORES_PER_CHIP[kind]}"
    elif chips > chip.most:
        problem = f"{chips} chips; {slices} at most {chip.most}"
    elif chip.sides == 2 and max(shape) > 16:
        problem = f"a side of {max(shape)}; {slices} sides of at most 16"
    elif chips > 1 and (shape[0] % 2 or shape[1] % 2):
        problem = f"{sides}; {slices} hosts of 2x2 chips, so the first two sides must be even"
    if problem:
        raise _reject(name, f"found {problem}")
    return Topology(kind, shape)


def _slice_of(name: str, kind: str, number: str) -> Topology:
    """Return the slice that Google Cloud gives for a name such as v5p-128."""
    kind = _TPU_NAMES.get(kind, kind)
    shapes = _SQUARES if CHIPS[kind].sides == 2 else _BOXES
    sizes = {
        str(math.prod(map(int, shape.split("x"))) * _CORES_PER_CHIP[kind]): shape
        for shape in shapes
    }
    if number not in sizes:
        raise _reject(name, f"no {kind} slice has this number; the numbers are {', '.join(sizes)}")
    return Topology(kind, tuple(map(int, sizes[number].split("x"))))


def _parse_gpu(name: str, plain: str, kind: str) -> Topology:
    """Parse names such as h200:8, 8xh100, a100-80gb and rtx-4090."""
    body, colon, after = plain.partition(":")
    short = "-".join(word for word in body.split("-") if not _BESIDES.fullmatch(word))
    found = _GPU.fullmatch(re.sub(r"(?<=h100-)nvl$", "94g", short.replace("rtx-", "rtx")))
    model = found["model"] if found else ""
    if model in _OTHER_GPUS:
        raise _reject(name, f"no plan is made for {model}, because {_OTHER_GPUS[model]}")
    model = next((one for one in (model, f"rtx{model}") if one in GPUS), "")
    if not found or not model:
        base = re.sub(r"(-[0-9]+)?(:.*)?$", "", plain)
        near = difflib.get_close_matches(base, [*CHIPS, *_TPU_NAMES, *GPUS, "cpu"], n=1, cutoff=0.5)
        hint = f"did you mean {near[0] + plain.removeprefix(base)!r}? " if near else ""
        known = f"{', '.join(CHIPS)}, cpu and GPUs"
        raise _reject(name, f"unknown kind {kind!r}; {hint}the kinds are {known}")
    _, sizes = GPUS[model]
    if colon and not re.fullmatch("[1-9][0-9]{0,3}", after):
        raise _reject(name, f"found {after!r}; expected a number of GPUs, as in {model}:8")
    if sum(map(bool, (found["before"], found["after"], after))) > 1:
        raise _reject(name, "found two numbers of GPUs; give one, as in h200:8")
    if found["gb"] is None and len(sizes) > 1 and model != "h100":
        choices = " or ".join(f"{model}-{size}g" for size in sizes)
        raise _reject(name, f"{model} comes with several sizes of memory; give {choices}")
    size = int(found["gb"] or min(sizes))
    if size not in sizes:
        choices = " or ".join(f"{model}-{one}g" for one in sizes)
        raise _reject(name, f"there is no {model} of {size} GB; give {choices}")
    number = int(found["before"] or found["after"] or after or 1)
    if number > MOST_GPUS:
        raise _reject(name, f"found {number} GPUs; expected 1 to {MOST_GPUS}")
    return Topology(f"{model}-{size}g", (number,))


def _reject(name: str, why: str) -> InputError:
    known = [f"{kind}: {chip.shapes}" for kind, chip in CHIPS.items()]
    gpus = [f"{model}-{size}g" for model, (_, sizes) in GPUS.items() for size in sizes]
    return InputError(
        f"machine {name!r}: {why}; give a name such as v5e-16, v5e:16x16, h200:8, a100-80g or "
        "cpu:8",
        [
            "KIND: SHAPES",
            *known,
            f"GPUs, with :NUMBER for several: {', '.join(gpus)}",
            "cpu: a number of simulated devices, 1 to 512",
        ],
    )


def environment(topology: Topology) -> dict[str, str]:
    """Return the variables that a process for this topology needs before JAX starts."""
    count = "--xla_force_host_platform_device_count"
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(count)]
    # Without a cache, because the report states how long compiling takes.
    values = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS": " ".join(flags)}
    if topology.platform == "gpu":  # Compiling needs none of the memory that JAX takes at once.
        return values | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    values["JAX_PLATFORMS"] = "cpu"
    if topology.platform == "cpu":
        return values | {"JAX_NUM_CPU_DEVICES": str(topology.shape[0])}
    # The TPU is only described, so JAX must neither look for one nor wait for a busy one.
    return values | {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_NUM_CPU_DEVICES": "1",
    }


def may_have_gpus() -> bool:
    """Tell whether this JAX is installed for GPUs and allowed to use them."""
    allowed = os.environ.get("JAX_PLATFORMS", "")
    plugins = (f"jax_cuda{version}_plugin" for version in (12, 13))
    return (not allowed or "cuda" in allowed or "gpu" in allowed) and any(map(find_spec, plugins))


def has_tpu_compiler() -> bool:
    """Tell whether the compiler for TPUs, libtpu, is installed."""
    return find_spec("libtpu") is not None


def local_gpus(topology: Topology) -> list[Any]:
    """Return as many GPUs of this machine as a topology names; empty if it has too few."""
    import jax

    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        return []
    named = re.compile(rf"{re.escape(topology.gpu[0])}(?![0-9A-Za-z])")
    same = [device for device in devices if named.match(device.device_kind)]
    # One model comes with several sizes of memory; JAX says the share that it may take.
    limit = topology.memory or 0.0
    limits = [(device.memory_stats() or {}).get("bytes_limit", limit) for device in same]
    near = [one for one, own in zip(same, limits, strict=True) if abs(own / limit - 1) < 0.2]
    return near[: topology.devices] if len(near) >= topology.devices else []


def devices_of(topology: Topology) -> list[Any]:
    """Return described TPU devices, simulated CPU devices, or GPUs (see `environment`).

    Raises `InputError` for a slice that the compiler does not know, if libtpu is missing, and for
    GPUs that this machine lacks.
    """
    import jax

    if topology.platform == "gpu":
        if gpus := local_gpus(topology):
            return gpus
        raise InputError(f"--topology {topology.name}: JAX finds no such GPUs in this machine")
    if topology.kind == "cpu":
        return jax.devices("cpu")[: topology.shape[0]]
    from mlmjax.parallel.jax_internals import describe_tpu

    chip = CHIPS[topology.kind]
    options = dict(chip.options)
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        return describe_tpu(name, **options)
    except Exception as error:  # JAX and libtpu raise only general types here.
        if not has_tpu_compiler() or "libtpu" in str(error):
            raise InputError(
                f"--topology {topology.name}: compiling for a TPU needs its compiler, libtpu; "
                f"{install_advice('plan')}"
            ) from error
        raise _reject(
            topology.name,
            f"the TPU compiler does not know a {topology.kind} slice of this shape "
            f"({first_line(error)})",
        ) from error
