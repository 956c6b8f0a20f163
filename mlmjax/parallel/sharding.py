"""Shard arrays: one mesh, and one table of rules by parameter path."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mlmjax.config.run import MeshConfig
from mlmjax.errors import InputError, counted
from mlmjax.parallel.jax_internals import lay_out_hybrid

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# A rule matches a whole path, or the part of it after a dot. `fsdp` shards the hidden dimension;
# `tensor` shards heads, the intermediate dimension and the vocabulary. Vectors along the hidden
# dimension are replicated.
RULES: tuple[tuple[str, P], ...] = (
    (r"embeddings\.tok_embeddings\.weight", P("tensor", "fsdp")),
    (r"attn\.Wqkv\.weight", P("fsdp", None, "tensor", None)),
    (r"attn\.Wqkv\.bias", P(None, "tensor", None)),
    (r"attn\.Wo\.weight", P("tensor", None, "fsdp")),
    (r"mlp\.Wi\.weight", P("fsdp", None, "tensor")),
    (r"mlp\.Wi\.bias", P(None, "tensor")),
    (r"mlp\.Wo\.weight", P("tensor", "fsdp")),
    # Matrices of adapters: the axes of the weight that they change, and a rank that stays whole.
    (r"(attn\.Wqkv|mlp\.Wi)\.lora_A\.weight", P("fsdp", None)),
    (r"attn\.Wqkv\.lora_B\.weight", P(None, None, "tensor", None)),
    (r"mlp\.Wi\.lora_B\.weight", P(None, None, "tensor")),
    (r"attn\.Wo\.lora_A\.weight", P("tensor", None, None)),
    (r"mlp\.Wo\.lora_A\.weight", P("tensor", None)),
    (r"(attn|mlp)\.Wo\.lora_B\.weight", P(None, "fsdp")),
    (r"head\.dense\.weight", P("fsdp", None)),
    (r"decoder\.weight", P("tensor", "fsdp")),
    (r"decoder\.bias", P("tensor")),
    (r"classifier\.weight", P("fsdp", None)),
    (r"\w*norm\.(weight|bias)", P()),
    (r"(attn\.Wo|mlp\.Wo|head\.dense|classifier)\.bias", P()),
)


def make_mesh(config: MeshConfig | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh with the axes `data`, `fsdp` and `tensor`.

    `config` gives the number of devices along each axis. A missing axis counts 1, and `data = -1`
    takes all remaining devices. Sizes with a smaller product than the number of devices use the
    first ones. Raises `InputError` if the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = tuple(mesh_shape(config, len(devices)).values())
    devices, kinds = devices[: math.prod(sizes)], (AxisType.Auto,) * len(AXES)
    if (layout := lay_out_slices(sizes, devices)) is not None:
        return Mesh(layout, AXES, axis_types=kinds)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)


def mesh_shape(config: MeshConfig | Mapping[str, int], devices: int) -> dict[str, int]:
    """Return the axis sizes of `make_mesh` for a number of devices; raises as it does."""
    if not isinstance(config, MeshConfig):
        unknown = sorted(set(config) - set(AXES))
        if unknown:
            raise InputError(f"mesh: unknown axis {unknown[0]!r}; the axes are {', '.join(AXES)}")
        config = MeshConfig(**{"data": 1, **config})
    other = config.fsdp * config.tensor
    data = devices // other if config.data == -1 else config.data
    wanted = f"mesh: fsdp {config.fsdp} x tensor {config.tensor}"
    if config.data == -1 and devices % other:
        raise InputError(
            f"{wanted} = {other} does not divide the {counted(devices, 'device')}; "
            f"set {_dividing(config, devices)}"
        )
    if data * other > devices:
        raise InputError(
            f"{wanted} x data {data} = {data * other} devices, but there are {devices}; "
            f"set {_dividing(config, devices)}, where -1 takes the remaining devices"
        )
    return {"data": data, "fsdp": config.fsdp, "tensor": config.tensor}


def _dividing(config: MeshConfig, devices: int) -> str:
    """Return the overrides of a mesh that make its sizes divide the devices.

    The sizes divide those of the mesh too, so that they divide every parameter that these divide.
    """
    tensor = math.gcd(config.tensor, devices)
    wanted = {"data": -1, "fsdp": math.gcd(config.fsdp, devices // tensor), "tensor": tensor}
    found = config.model_dump()
    return " ".join(f"mesh.{axis}={n}" for axis, n in wanted.items() if n != found[axis])


def lay_out_slices(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray | None:
    """Arrange the devices of several slices so that only `data` crosses between slices.

    A slice is a group with a fast network: chips of a TPU slice, often one host of GPUs. Returns
    None for one slice, and for GPUs if `data` does not divide. Raises `InputError` for TPUs if the
    number of slices does not divide `data`.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, *inner = sizes
    if slices > 1 and data % slices == 0:
        within, across = (data // slices, *inner), (slices, 1, 1)
        return lay_out_hybrid(within, across, devices)
    if slices > 1 and devices[0].platform == "tpu":
        raise InputError(
            f"mesh: data {data} cannot be divided over {slices} slices, and only data parallelism "
            f"may cross slices; make data a multiple of {slices}, or -1"
        )
    return None


def local_mesh(batch_size: int | None = None) -> Mesh:
    """Return a mesh of as many local devices as divide a batch equally."""
    devices = local_devices()
    if batch_size:
        used = next(n for n in range(len(devices), 0, -1) if batch_size % n == 0)
        devices = devices[:used]
    return make_mesh({"data": -1}, devices)


def local_devices() -> list[jax.Device]:
    """Return the devices that scoring and in-memory training use."""
    return jax.local_devices()


def place(tree: Any, sharding: Any) -> Any:
    """Put a tree that every process holds whole on devices, as a tree of shardings says.

    Unlike `jax.device_put`, it does not compare the values of the processes.
    """
    if all(where.is_fully_addressable for where in jax.tree.leaves(sharding)):
        return jax.device_put(tree, sharding)

    def put(x: Any, where: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, where)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(put, tree, sharding)


def gather_on_first(tree: Any) -> Any:
    """Return a tree of whole numpy arrays on the first process, and of None on the others.

    All processes call it together.
    """

    def gather(x: Any) -> np.ndarray | None:
        if not (x.is_fully_addressable or x.is_fully_replicated):
            x = jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)
        return np.asarray(x) if jax.process_index() == 0 else None

    return jax.tree.map(gather, tree)


def mesh_of(tree: Any) -> Mesh | None:
    """Return the mesh that holds the arrays of a tree, or None."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return None


def leaf_path(key_path: Sequence[Any]) -> str:
    """Return the dotted name of a leaf (`model.layers.3.attn.Wqkv.weight`)."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator=".").removesuffix(".value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their dotted names."""
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def parameter_specs(sizes: Mapping[str, int], abstract_params: Any) -> Any:
    """Return the `PartitionSpec` of every parameter, as a tree like `abstract_params`.

    `sizes` is the number of devices along each mesh axis (`dict(mesh.shape)`). Raises `InputError`
    that lists every parameter without a rule and every dimension that its axes do not divide.
    """
    specs, problems = [], []
    for name, leaf in named_leaves(abstract_params).items():
        what, spec = f"parameter {name}", _find_rule(name, leaf.ndim)
        specs.append(spec)
        if spec is None:
            lacks = f"no sharding rule for {what} {list(leaf.shape)}; add one to sharding.RULES"
            problems.append(lacks)
        else:
            problems += _find_indivisible(what, leaf.shape, spec, sizes)
    if problems:
        raise InputError(f"mesh: {problems[0]}", problems[1:])
    return jax.tree.unflatten(jax.tree.structure(abstract_params), specs)


def state_specs(sizes: Mapping[str, int], abstract_params: Any, abstract_tree: Any) -> Any:
    """Return the `PartitionSpec` of every leaf of a tree such as an optimizer state.

    A leaf whose path ends in a parameter's path and that has its shape is sharded like the
    parameter; everything else (counters, factored moments) is replicated.
    """
    params = jax.tree_util.tree_leaves_with_path(abstract_params)
    specs = jax.tree.leaves(parameter_specs(sizes, abstract_params))
    known = {(path, leaf.shape): spec for (path, leaf), spec in zip(params, specs, strict=True)}

    def find_spec(path: tuple[Any, ...], leaf: Any) -> P:
        ends = (known.get((path[start:], leaf.shape)) for start in range(len(path)))
        return next((spec for spec in ends if spec is not None), P())

    return jax.tree_util.tree_map_with_path(find_spec, abstract_tree)


def parameter_sharding(mesh: Mesh | None, abstract_params: Any) -> Any:
    """Return the sharding of every parameter; raises `InputError` as `parameter_specs`."""
    return state_sharding(mesh, abstract_params, abstract_params)


def state_sharding(mesh: Mesh | None, abstract_params: Any, abstract_tree: Any) -> Any:
    """Return the sharding of every leaf as `state_specs` says: the first device without a mesh."""
    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: device, abstract_tree)
    specs = state_specs(mesh.shape, abstract_params, abstract_tree)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def abstract_arrays(tree: Any, sharding: Any) -> Any:
    """Return the shapes and dtypes of a tree of arrays, with a tree of shardings."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, sharding
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def one_each(devices: Sequence[jax.Device]) -> NamedSharding:
    """Return the sharding that gives each device one entry of the first axis."""
    return NamedSharding(Mesh(np.array(devices), ("data",)), P("data"))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_shards(sizes: Mapping[str, int]) -> int:
    """Return the number of shards of a batch."""
    return sizes.get("data", 1) * sizes.get("fsdp", 1)


def check_rows(sizes: Mapping[str, int], rows: int, accumulate: int = 1) -> None:
    """Raise `InputError` unless micro-batches and devices divide `rows`."""
    shards = batch_shards(sizes)
    if rows % (shards * accumulate):
        raise InputError(
            f"batch of {rows} rows cannot be divided by accumulate {accumulate} x data "
            f"{sizes.get('data', 1)} x fsdp {sizes.get('fsdp', 1)}; "
            f"make batch_size a multiple of {shards * accumulate}"
        )


def mesh_sizes() -> Mapping[str, int]:
    """Return the axis sizes of the current mesh (`jax.set_mesh`); empty without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return {}
    return dict(mesh.shape)


def platform() -> str:
    """Return the platform of the current mesh, or the default one without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shard `x` over mesh axes: one name for each dimension, `None` for a whole one.

    `"batch"` means `data` and `fsdp` together. Without a current mesh (`jax.set_mesh`), and
    inside `shard_map`, `x` is returned unchanged. Raises `InputError` if an axis does not divide
    its dimension.
    """
    sizes = mesh_sizes()
    if not sizes:
        return x
    if len(axes) != x.ndim:
        raise ValueError(f"constrain: {len(axes)} axes for an array of shape {x.shape}")
    spec = P(*(BATCH_AXES if axis == "batch" else axis for axis in axes))
    for problem in _find_indivisible("array", x.shape, spec, sizes):
        raise InputError(f"mesh: {problem}")
    return jax.lax.with_sharding_constraint(x, spec)


def _find_rule(path: str, ndim: int) -> P | None:
    for pattern, spec in RULES:
        # P() replicates vectors only: a matrix with such a name has no rule.
        if re.search(rf"(?:^|\.)(?:{pattern})$", path) and ndim == (len(spec) or 1):
            return spec
    return None


def _find_indivisible(
    name: str, shape: Sequence[int], spec: P, sizes: Mapping[str, int]
) -> Iterator[str]:
    for size, entry in zip(shape, spec, strict=False):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        parts = math.prod(sizes.get(axis, 1) for axis in axes)
        if size % parts:
            divisors = ", ".join(str(n) for n in range(1, min(size, 256) + 1) if size % n == 0)
            yield (
                f"{name} {list(shape)}: {' x '.join(axes)} = {parts} does not divide {size}; "
                f"these do: {divisors}"
            )
