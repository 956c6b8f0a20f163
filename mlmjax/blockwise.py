"""Attention in plain XLA: all scores at once (the reference), or blocks of queries at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.partition import batch_shards, mesh_sizes, platform
from mlmjax.product import product

# Far below any score; so is half of it, and then exp of the difference is exactly zero.
_MASKED = -1e30
# Queries handled at a time.
_BLOCK = 128


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
    length = query.shape[2]
    # On a CPU a block is one of a single row, so that its scores stay in the cache. Rows that lie
    # on several devices are kept together, and so are those of an accelerator, to fill it.
    alone = platform() == "cpu" and batch_shards(mesh_sizes()) == 1
    if not alone and window is not None and max(_BLOCK, window) + 2 * window <= length // 2:
        return _banded(query, key, value, segment_ids, window)
    if length < (2 if alone else 4) * _BLOCK:
        return attend_at_once(query, key, value, segment_ids, window)
    return _in_turn(query, key, value, segment_ids, window, 1 if alone else query.shape[0])


def _in_turn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
    rows: int,
) -> jax.Array:
    """Score a block of queries of `rows` rows at a time; backward each block is computed anew."""
    batch, heads, length, width = query.shape
    blocks = -(-length // _BLOCK)
    missing = blocks * _BLOCK - length
    if window is not None and _BLOCK + 2 * window < length:
        before, after, count = window, window + missing, _BLOCK + 2 * window
    else:
        before, after, count = 0, 0, length
    is_near = count < length
    segment_ids = jnp.broadcast_to(segment_ids, (batch, length))
    key, value = (_pad(x, 2, before, after) for x in (key, value))
    key_segments = _pad(segment_ids, 1, before, after)
    query, segment_ids = _pad(query, 2, 0, missing), _pad(segment_ids, 1, 0, missing)

    @jax.checkpoint
    def block(index: jax.Array) -> jax.Array:
        row, start = index // blocks * rows, index % blocks * _BLOCK

        def cut(x: jax.Array, axis: int, start: jax.Array | int, size: int) -> jax.Array:
            starts = [jnp.int32(0)] * x.ndim
            starts[0], starts[axis] = row, jnp.int32(start)
            return jax.lax.dynamic_slice(
                x, starts, [rows, *(size if i == axis else x.shape[i] for i in range(1, x.ndim))]
            )

        first = start if is_near else 0
        mask = visible(
            cut(segment_ids, 1, start, _BLOCK),
            cut(key_segments, 1, first, count),
            np.arange(_BLOCK) + (0 if is_near else start),
            np.arange(count) - before,
            window,
        )
        keys, values = (cut(x, 2, first, count) for x in (key, value))
        return _softmax(cut(query, 2, start, _BLOCK), keys, values, mask)

    done = jax.lax.map(block, jnp.arange(batch // rows * blocks, dtype=jnp.int32))
    done = done.reshape(batch // rows, blocks, rows, heads, _BLOCK, width)
    return _join(jnp.transpose(done, (0, 2, 3, 1, 4, 5)), (batch, heads, length, width))


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
