"""Whether a tree of arrays is the one that was saved: paths, shapes, dtypes and every bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mlmjax.errors import InputError
from mlmjax.parallel.sharding import leaf_path


def fingerprints(state: Any) -> dict[str, int]:
    """Return the sum of every array's bits as 32-bit words, modulo 2**32, by the array's path.

    Any change of one word changes it, and it is the same for every sharding. All processes of a
    run have to call this together.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    # Piece by piece, each on its own device: no device has to wait for another one.
    pieces = [
        [
            _fingerprint(piece.data)
            for piece in jnp.asarray(leaf).addressable_shards
            if not piece.replica_id
        ]
        for _, leaf in leaves
    ]
    sums = np.array([sum(map(int, some)) for some in jax.device_get(pieces)], np.uint64)
    if jax.process_count() > 1:
        low = (sums % 2**32).astype(np.uint32)
        sums = multihost_utils.process_allgather(low).astype(np.uint64).sum(axis=0)
    return {leaf_path(path): int(n % 2**32) for (path, _), n in zip(leaves, sums, strict=True)}


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)


def verify(state: Any, expected: Mapping[str, int]) -> None:
    """Raise `ValueError` that names the first array whose bits are not those of `expected`."""
    found = fingerprints(state)
    changed = [name for name in found if found[name] != expected.get(name)]
    if changed:
        raise ValueError(f"{changed[0]} is not what was saved")


def describe(tree: Any) -> dict[str, str]:
    """Return dtype and shape of every array (or abstract one) by its path.

    >>> describe({"a": np.zeros((2, 3), np.float32)})
    {'a': 'float32 [2, 3]'}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        leaf_path(path): f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}" for path, leaf in leaves
    }


def check_same(where: Path, saved: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise `InputError` that lists how a saved tree and the expected one (`describe`) differ."""
    problems = [
        f"{name}: the checkpoint has {saved.get(name, 'nothing')}, the model "
        f"{expected.get(name, 'nothing')}"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if problems:
        raise InputError(
            f"{where}: is the checkpoint of another model: {problems[0]} (differences: "
            f"{len(problems)}); give the configuration it was saved with, or another folder",
            problems[1:],
        )
