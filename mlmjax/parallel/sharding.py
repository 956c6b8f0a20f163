"""Where every array lives: one mesh, one table of sharding rules by parameter path."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlmjax.config.run import MeshConfig
from mlmjax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


# The whole path must match, or its end after a dot, so that moments of an optimizer follow the
# parameter they belong to. The hidden dimension is cut over `fsdp`; heads, the intermediate
# dimension and the vocabulary over `tensor`; vectors along the hidden dimension are replicated.
RULES: tuple[tuple[str, P], ...] = (
    (r"embeddings\.tok_embeddings\.weight", P("tensor", "fsdp")),
    (r"attn\.Wqkv\.weight", P("fsdp", None, "tensor", None)),
    (r"attn\.Wqkv\.bias", P(None, "tensor", None)),
    (r"attn\.Wo\.weight", P("tensor", None, "fsdp")),
    (r"mlp\.Wi\.weight", P("fsdp", None, "tensor")),
    (r"mlp\.Wi\.bias", P(None, "tensor")),
    (r"mlp\.Wo\.weight", P("tensor", "fsdp")),
    (r"head\.dense\.weight", P("fsdp", None)),
    (r"decoder\.bias", P("tensor")),
    (r"classifier\.weight", P("fsdp", None)),
    (r"\w*norm\.(weight|bias)", P()),
    (r"(attn\.Wo|mlp\.Wo|head\.dense|classifier)\.bias", P()),
)


def make_mesh(
    config: MeshConfig | Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Build the mesh with the axes `data`, `fsdp` and `tensor`.

    `config` gives the devices along each axis; axes left out count 1, and `data = -1` takes all
    that remain. Explicit sizes whose product is smaller than the number of devices use the first
    ones. Raises `InputError` where the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = tuple(mesh_shape(config, len(devices)).values())
    return _arranged(sizes, devices[: math.prod(sizes)])


def mesh_shape(config: MeshConfig | Mapping[str, int], devices: int) -> dict[str, int]:
    """Return the sizes of the axes of `make_mesh` for a number of devices; raises as it does."""
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
            f"{wanted} = {other} does not divide the {devices} devices here; "
            f"choose sizes whose product does"
        )
    if data * other > devices:
        raise InputError(
            f"{wanted} x data {data} = {data * other} devices, but there are {devices}; "
            f"make an axis smaller, or data = -1 for the remaining devices"
        )
    return {"data": data, "fsdp": config.fsdp, "tensor": config.tensor}


def _arranged(sizes: tuple[int, ...], devices: Sequence[Any]) -> Mesh:
    """Make the mesh of these devices, all of them."""
    kinds = (AxisType.Auto,) * len(AXES)
    layout = across_slices(sizes, devices)
    if layout is not None:
        return Mesh(layout, AXES, axis_types=kinds)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)


def across_slices(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray | None:
    """Lay out the devices of several slices so that only `data` crosses from one to another.

    A slice is what a fast network connects: of TPUs one of its chips, of GPUs often one host. None
    where there is one slice, and where GPUs are to be laid out in any other way. Raises
    `InputError` where `data` cannot be cut over the slices of TPUs.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, *inner = sizes
    if slices > 1 and data % slices == 0:
        within, across = (data // slices, *inner), (slices, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(within, across, devices)
    if slices > 1 and devices[0].platform == "tpu":
        raise InputError(
            f"mesh: data {data} cannot be cut over the {slices} slices, between which only data "
            f"parallelism goes; make data a multiple of {slices}, or -1"
        )
    return None


def place(tree: Any, sharding: Any) -> Any:
    """Put a tree that every process has, whole, where `sharding` (a tree like it) says.

    Unlike `jax.device_put`, it does not compare what the processes have, array by array.
    """

    if all(where.is_fully_addressable for where in jax.tree.leaves(sharding)):
        return jax.device_put(tree, sharding)

    def put(x: Any, where: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, where)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(put, tree, sharding)


def gathered(tree: Any) -> Any:
    """Return a tree of arrays as numpy's, whole, array by array; all processes have to take part.

    On any but the first process the arrays are dropped, None in their place.
    """

    def whole(x: Any) -> np.ndarray | None:
        if not (x.is_fully_addressable or x.is_fully_replicated):
            x = jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)
        return np.asarray(x) if jax.process_index() == 0 else None

    return jax.tree.map(whole, tree)


def mesh_of(tree: Any) -> Mesh | None:
    """Return the mesh that the arrays of a tree lie on, None where there is none."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return None


def leaf_path(key_path: Sequence[Any]) -> str:
    """Return the dotted name of a leaf (`model.layers.3.attn.Wqkv.weight`)."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator=".").removesuffix(".value")


def parameter_specs(sizes: Mapping[str, int], abstract_params: Any) -> Any:
    """Return the `PartitionSpec` of every parameter, as a tree like `abstract_params`.

    `sizes` is the number of devices along each mesh axis (`dict(mesh.shape)`). Raises `InputError`
    that lists every parameter without a rule and every dimension its axis does not divide.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract_params)
    found = [(leaf_path(path), leaf.shape) for path, leaf in leaves]
    problems = [line for path, shape in found for line in _problems(path, shape, sizes)]
    if problems:
        raise InputError(f"mesh: {problems[0]}", problems[1:])
    return jax.tree.unflatten(treedef, [_rule(path, len(shape)) for path, shape in found])


def parameter_sharding(mesh: Mesh, abstract_params: Any) -> Any:
    """Return the `NamedSharding` of every parameter; raises `InputError` as `parameter_specs`."""
    specs = parameter_specs(mesh.shape, abstract_params)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def state_specs(sizes: Mapping[str, int], abstract_params: Any, abstract_tree: Any) -> Any:
    """Return the `PartitionSpec` of every leaf of an optimizer state (or any such tree).

    A leaf whose path ends in a parameter's path and that has its shape is cut like the parameter;
    everything else (counters, factored moments) is replicated.
    """
    params = jax.tree_util.tree_flatten_with_path(abstract_params)[0]
    specs = jax.tree.leaves(parameter_specs(sizes, abstract_params), is_leaf=_is_spec)
    known = {
        tuple(path): (leaf.shape, spec) for (path, leaf), spec in zip(params, specs, strict=True)
    }

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> P:
        for start in range(len(path)):
            shape, spec = known.get(path[start:], (None, None))
            if spec is not None and shape == leaf.shape:
                return spec
        return P()

    return jax.tree_util.tree_map_with_path(of_leaf, abstract_tree)


def state_sharding(mesh: Mesh, abstract_params: Any, abstract_tree: Any) -> Any:
    """Return the `NamedSharding` of every leaf of an optimizer state, as `state_specs`."""
    specs = state_specs(mesh.shape, abstract_params, abstract_tree)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def batch_shards(sizes: Mapping[str, int]) -> int:
    """Return into how many parts the rows of a batch are cut."""
    return sizes.get("data", 1) * sizes.get("fsdp", 1)


def check_rows(sizes: Mapping[str, int], rows: int, accumulate: int = 1) -> None:
    """Raise `InputError` unless `rows` can be cut over accumulation and the devices."""
    shards = batch_shards(sizes)
    if rows % (shards * accumulate):
        raise InputError(
            f"batch of {rows} rows cannot be cut over accumulate {accumulate} x data "
            f"{sizes.get('data', 1)} x fsdp {sizes.get('fsdp', 1)}; "
            f"make batch_size a multiple of {shards * accumulate}"
        )


def mesh_sizes() -> Mapping[str, int]:
    """Return the devices along each axis of the mesh in force (`jax.set_mesh`); empty for none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return {}
    return dict(mesh.shape)


def platform() -> str:
    """Return where the program will run: on the devices of the mesh in force, if there is one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Ask the compiler to cut `x` over mesh axes: one name for each dimension, `None` for whole.

    `"batch"` stands for `data` and `fsdp` together. Without a mesh in force (`jax.set_mesh`), and
    inside `shard_map`, `x` is returned as it is. Raises `InputError` where an axis does not divide.
    """
    sizes = mesh_sizes()
    if not sizes:
        return x
    if len(axes) != x.ndim:
        raise ValueError(f"constrain: {len(axes)} axes for an array of shape {x.shape}")
    spec = P(*(BATCH_AXES if axis == "batch" else axis for axis in axes))
    for problem in _indivisible("array", x.shape, spec, sizes):
        raise InputError(f"mesh: {problem}")
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_tree(tree: Any, specs: Any) -> Any:
    """Ask the compiler to cut every leaf as its `PartitionSpec` says (a mesh must be in force)."""
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def _is_spec(value: Any) -> bool:
    return isinstance(value, P)


def _rule(path: str, ndim: int) -> P | None:
    for pattern, spec in RULES:
        # A replicated entry stands for vectors only: a matrix under such a name has no rule.
        if re.search(rf"(?:^|\.)(?:{pattern})$", path) and ndim == (len(spec) or 1):
            return spec
    return None


def _problems(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Iterator[str]:
    spec = _rule(path, len(shape))
    if spec is None:
        yield f"no sharding rule for parameter {path} {list(shape)}; add one to partition.RULES"
    else:
        yield from _indivisible(f"parameter {path}", shape, spec, sizes)


def _indivisible(
    name: str, shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]
) -> Iterator[str]:
    for size, entry in zip(shape, spec, strict=False):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        parts = 1
        for axis in axes:
            parts *= sizes.get(axis, 1)
        if size % parts:
            divisors = ", ".join(str(n) for n in range(1, min(size, 256) + 1) if size % n == 0)
            yield (
                f"{name} {list(shape)}: {' x '.join(axes)} = {parts} does not divide {size}; "
                f"these do: {divisors}"
            )


def local_mesh(batch_size: int | None = None) -> Mesh:
    """Return a mesh of the local devices: as many as can have equal parts of a batch."""
    devices = local_devices()
    if batch_size:
        used = next(n for n in range(len(devices), 0, -1) if batch_size % n == 0)
        devices = devices[:used]
    return make_mesh({"data": -1}, devices)


def local_devices() -> list[jax.Device]:
    """Return the devices that batches are cut over."""
    return jax.local_devices()
