"""Attention in plain XLA: all scores at once (the reference), or blocks of queries at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.partition import mesh_sizes, platform
from mlmjax.product import product

# Far below any score; so is half of it, and then exp of the difference is exactly zero.
_MASKED = -1e30
# Queries handled at a time; twice as many where they see all keys of a long row.
_BLOCK = 128
# Bytes of scores that stay in the cache of a CPU.
_CACHE = 4 << 20


def visible(
    query_segments: jax.Array,
    key_segments: jax.Array,
    query_rows: np.ndarray | jax.Array,
    key_rows: np.ndarray,
    window: int | None,
) -> jax.Array:
    """Return who sees whom, `[..., 1, q, k]`, from segments and row numbers of both sides."""
    queries, keys = query_segments[..., :, None], key_segments[..., None, :]
    mask = (queries == keys) & (keys != 0)
    if window is not None:
        near = abs(query_rows[:, None] - key_rows[None, :]) <= window
        mask = mask & near.reshape((1,) * (mask.ndim - 2) + near.shape)
    return mask[..., None, :, :]


def _softmax(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention over the last two axes, in float32; a row without keys gives zeros."""
    lead = "abcdef"[: query.ndim - 2]
    scores = product(f"{lead}qx,{lead}kx->{lead}qk", query, key) * query.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, _MASKED)
    maximum = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.maximum(maximum, 0.5 * _MASKED))
    total = weights.sum(axis=-1, keepdims=True)
    # Normalised after the product: that divides [q, head_dim] numbers instead of [q, k].
    mixed = product(f"{lead}qk,{lead}kx->{lead}qx", weights.astype(value.dtype), value)
    return (mixed / jnp.where(total == 0.0, 1.0, total)).astype(query.dtype)


def attend_at_once(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
) -> jax.Array:
    """Score all queries and keys at once; shapes as in `attention.attend`."""
    rows = np.arange(query.shape[2])
    return _softmax(query, key, value, visible(segment_ids, segment_ids, rows, rows, window))


def attend_by_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
) -> jax.Array:
    """Score blocks of queries with near keys or all, whichever way suits shape and platform."""
    batch, heads, length, _ = query.shape
    alone = platform() == "cpu" and math.prod(mesh_sizes().values()) == 1
    if not alone and window is not None and max(_BLOCK, window) + 2 * window <= length // 2:
        return _banded(query, key, value, segment_ids, window)
    if length < (2 if alone else 4) * _BLOCK:
        return attend_at_once(query, key, value, segment_ids, window)
    near = window if window is not None and _BLOCK + 2 * window < length else None
    size = _BLOCK if near is not None or length < 4 * _BLOCK else 2 * _BLOCK
    if alone:
        # One row, and as many heads as have their scores in the cache: 1.5 to 3 times as fast.
        fitting = _CACHE // (4 * size * (length if near is None else size + 2 * near))
        divisors = (n for n in range(1, heads + 1) if heads % n == 0)
        batch, heads = 1, max(n for n in divisors if n <= max(fitting, 1))
    return _in_turn(query, key, value, segment_ids, window, near, (batch, heads, size))


def _in_turn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
    near: int | None,
    block: tuple[int, int, int],
) -> jax.Array:
    """Score a block of so many rows, heads and queries after the other.

    A block meets all keys, or itself and `near` on both sides. Backward it is computed anew.
    """
    rows, heads, size = block
    batch, all_heads, length, width = query.shape
    grid = batch // rows, all_heads // heads, -(-length // size)
    missing = grid[2] * size - length
    before, after = (0, 0) if near is None else (near, near + missing)
    keys = length if near is None else size + 2 * near
    segment_ids = jnp.broadcast_to(segment_ids, (batch, length))
    key, value = (_pad(x, 2, before, after) for x in (key, value))
    key_segments = _pad(segment_ids, 1, before, after)
    query, segment_ids = _pad(query, 2, 0, missing), _pad(segment_ids, 1, 0, missing)

    @jax.checkpoint
    def one(index: jax.Array) -> jax.Array:
        row, head, start = jnp.unravel_index(index, grid)
        row, head, start = row * rows, head * heads, start * size
        first = jnp.zeros_like(start) if near is None else start

        def cut(x: jax.Array, at: jax.Array, count: int) -> jax.Array:
            return jax.lax.dynamic_slice(x, (row, head, at, 0), (rows, heads, count, width))

        def cut_segments(x: jax.Array, at: jax.Array, count: int) -> jax.Array:
            return jax.lax.dynamic_slice(x, (row, at), (rows, count))

        mask = visible(
            cut_segments(segment_ids, start, size),
            cut_segments(key_segments, first, keys),
            np.arange(size) + (start - first),
            np.arange(keys) - before,
            window,
        )
        met_keys, met_values = (cut(x, first, keys) for x in (key, value))
        return _softmax(cut(query, start, size), met_keys, met_values, mask)

    done = jax.lax.map(one, jnp.arange(math.prod(grid), dtype=jnp.int32))
    done = jnp.transpose(done.reshape(*grid, rows, heads, size, width), (0, 3, 1, 4, 2, 5, 6))
    return done.reshape(batch, all_heads, -1, width)[:, :, :length]


def _banded(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, window: int
) -> jax.Array:
    """Score only near keys: each block of queries sees itself and `window` rows around it.

    As the sliding chunks of Longformer (arXiv 2004.05150), but the chunks do not overlap.
    """
    size = max(_BLOCK, window)
    queries = _cut(query, 2, size)
    keys, values = (_surround(_cut(x, 2, size), window) for x in (key, value))
    segments = _cut(segment_ids, 1, size)
    around = _surround(segments[..., None], window)[..., 0]
    mask = visible(segments, around, np.arange(size), np.arange(-window, size + window), window)
    # Blocks take the place of heads in the mask's [batch, blocks, 1, q, k]; heads come before them.
    return _join(_softmax(queries, keys, values, jnp.moveaxis(mask, 2, 1)), query.shape)


def _cut(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Cut an axis into blocks of `size`, the last one padded with zeros (which is padding)."""
    x = _pad(x, axis, 0, -x.shape[axis] % size)
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _pad(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    """Put zeros (which are padding) before and after an axis."""
    return jnp.pad(x, [(before, after) if i == axis else (0, 0) for i in range(x.ndim)])


def _join(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `_cut` along axis 2 of an array that had this shape."""
    return blocks.reshape(*shape[:2], -1, shape[3])[:, :, : shape[2]]


def _surround(blocks: jax.Array, rows: int) -> jax.Array:
    """Extend blocks `[..., blocks, size, width]` by `rows <= size` of both their neighbours.

    Outside the first and the last block there are zeros.
    """
    size = blocks.shape[-2]
    untouched = [(0, 0)] * (blocks.ndim - 3)
    before = jnp.pad(blocks[..., :-1, size - rows :, :], [*untouched, (1, 0), (0, 0), (0, 0)])
    after = jnp.pad(blocks[..., 1:, :rows, :], [*untouched, (0, 1), (0, 0), (0, 0)])
    return jnp.concatenate([before, blocks, after], axis=-2)
