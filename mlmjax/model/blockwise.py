"""Attention in plain XLA: the reference, a loop over blocks, and bands around each block."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.model.cpu import heads_at_once, is_single_cpu
from mlmjax.model.layers import product

# Far below any score. Half of it is too, and then exp of the difference is exactly zero.
_MASKED = -1e30
# Queries per block; twice as many where they see all keys of a long row.
_BLOCK = 128


def attend_at_once(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
) -> jax.Array:
    """Score all queries and keys at once; arguments as in `attention.attend`."""
    positions = np.arange(query.shape[2])
    mask = visible(segment_ids, segment_ids, positions, positions, window)
    return _softmax(query, key, value, mask)


def attend_by_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
) -> jax.Array:
    """Score blocks of queries with near keys or all keys, as suits shape and platform."""
    batch, heads, length, _ = query.shape
    single_cpu = is_single_cpu()
    if not single_cpu and window is not None and max(_BLOCK, window) + 2 * window <= length // 2:
        return _attend_in_bands(query, key, value, segment_ids, window)
    if length < (2 if single_cpu else 4) * _BLOCK:
        return attend_at_once(query, key, value, segment_ids, window)
    near = window if window is not None and _BLOCK + 2 * window < length else None
    size = _BLOCK if near is not None or length < 4 * _BLOCK else 2 * _BLOCK
    keys = length if near is None else size + 2 * near
    segment_ids = jnp.broadcast_to(segment_ids, (batch, length))
    if single_cpu:
        batch, heads = 1, heads_at_once(heads, size, keys)
    missing = -length % size
    before, after = (0, 0) if near is None else (near, near + missing)
    mixed = _attend_in_loop(
        _Blocks(rows=batch, heads=heads, size=size, keys=keys, window=window, near=near),
        _pad(query, 2, 0, missing),
        _pad(key, 2, before, after),
        _pad(value, 2, before, after),
        _pad(segment_ids, 1, 0, missing),
        _pad(segment_ids, 1, before, after),
    )
    return mixed[:, :, :length]


def visible(
    query_segments: jax.Array,
    key_segments: jax.Array,
    query_positions: np.ndarray | jax.Array,
    key_positions: np.ndarray,
    window: int | None,
) -> jax.Array:
    """Return the mask `[..., 1, q, k]` from the segments and positions of queries and keys."""
    queries, keys = query_segments[..., :, None], key_segments[..., None, :]
    mask = (queries == keys) & (keys != 0)
    if window is not None:
        near = abs(query_positions[:, None] - key_positions[None, :]) <= window
        mask = mask & near.reshape((1,) * (mask.ndim - 2) + near.shape)
    return mask[..., None, :, :]


def _softmax(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute softmax attention in float32; a query that sees no key gives zeros."""
    lead = "abcdef"[: query.ndim - 2]
    scores = product(f"{lead}qx,{lead}kx->{lead}qk", query, key) * query.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, _MASKED)
    maximum = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.maximum(maximum, 0.5 * _MASKED))
    total = weights.sum(axis=-1, keepdims=True)
    # Normalising after the product divides [q, head_dim] numbers instead of [q, k].
    mixed = product(f"{lead}qk,{lead}kx->{lead}qx", weights.astype(value.dtype), value)
    return (mixed / jnp.where(total == 0.0, 1.0, total)).astype(query.dtype)


_Arrays = tuple[jax.Array, ...]
"""Queries, keys, values, and the segments of queries and of keys; keys are padded by `near`."""


class _Blocks(NamedTuple):
    """The size of a block (rows, heads, queries) and the number of keys it sees.

    The keys begin `near` positions before the block, or at the start of the row (None).
    """

    rows: int
    heads: int
    size: int
    keys: int
    window: int | None
    near: int | None

    def grid(self, query: jax.Array) -> tuple[int, ...]:
        """Return how many blocks there are along rows, heads and queries."""
        return tuple(n // m for n, m in zip(query.shape[:3], self[:3], strict=True))

    def cut(self, x: jax.Array, start: tuple[Any, ...], length: int) -> jax.Array:
        """Cut out queries, keys or values from a row, head and position on."""
        return jax.lax.dynamic_slice(x, start, (self.rows, self.heads, length, x.shape[3]))

    def load(self, index: jax.Array, query: jax.Array, arrays: _Arrays) -> tuple[Any, ...]:
        """Return where a block and its keys start, and its queries, keys, values and mask."""
        _, key, value, segment_ids, key_segments = arrays
        numbers = jnp.unravel_index(index, self.grid(query))
        row, head, first = (number * n for number, n in zip(numbers, self[:3], strict=True))
        first_key = jnp.zeros_like(first) if self.near is None else first
        start, keys_start = (row, head, first, 0), (row, head, first_key, 0)
        queries = self.cut(query, start, self.size)
        keys, values = (self.cut(x, keys_start, self.keys) for x in (key, value))
        mask = visible(
            jax.lax.dynamic_slice(segment_ids, (row, first), (self.rows, self.size)),
            jax.lax.dynamic_slice(key_segments, (row, first_key), (self.rows, self.keys)),
            np.arange(self.size) + (first - first_key),
            np.arange(self.keys) - (self.near or 0),
            self.window,
        )
        return start, keys_start, queries, keys, values, mask


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(blocks: _Blocks, *arrays: jax.Array) -> jax.Array:
    """Attend block by block; the result of a block overwrites its queries.

    The backward pass computes each block again. A loop that JAX differentiates allocates its own
    output, and the compiler allocates those of all layers at once: 528 MiB for base at 8192 tokens.
    """

    def body(index: jax.Array, mixed: jax.Array) -> jax.Array:
        start, _, *parts = blocks.load(index, mixed, arrays)
        part = _softmax(*parts)
        return jax.lax.dynamic_update_slice(mixed, part, start)

    return jax.lax.fori_loop(0, math.prod(blocks.grid(arrays[0])), body, arrays[0])


def _loop_backward(blocks: _Blocks, arrays: _Arrays, gradient: jax.Array) -> tuple[Any, ...]:
    query, key, value, *_ = arrays

    def body(index: jax.Array, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start, keys_start, queries, keys, values, mask = blocks.load(index, query, arrays)
        _, pull_back = jax.vjp(partial(_softmax, mask=mask), queries, keys, values)
        to_query, *to_others = pull_back(blocks.cut(gradients[0], start, blocks.size))
        totals = []
        for total, part in zip(gradients[1:], to_others, strict=True):
            part += blocks.cut(total, keys_start, blocks.keys)
            totals.append(jax.lax.dynamic_update_slice(total, part, keys_start))
        return jax.lax.dynamic_update_slice(gradients[0], to_query, start), *totals

    # Several blocks add to the gradient of the same key, in float32 like all sums.
    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    count = math.prod(blocks.grid(query))
    to_query, to_key, to_value = jax.lax.fori_loop(0, count, body, (gradient, *zeros))
    return to_query, to_key.astype(key.dtype), to_value.astype(value.dtype), None, None


_loop.defvjp(lambda blocks, *arrays: (_loop(blocks, *arrays), arrays), _loop_backward)
# Outside of jit a loop would be compiled again at each call.
_attend_in_loop = jax.jit(_loop, static_argnums=0)


def _attend_in_bands(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, window: int
) -> jax.Array:
    """Score only near keys: each block of queries sees itself and `window` positions around it.

    These are the sliding chunks of Longformer (arXiv 2004.05150) without their overlap.
    """
    size = max(_BLOCK, window)
    queries = _cut(query, 2, size)
    keys, values = (_surround(_cut(x, 2, size), window) for x in (key, value))
    segments = _cut(segment_ids, 1, size)
    around = _surround(segments[..., None], window)[..., 0]
    mask = visible(segments, around, np.arange(size), np.arange(-window, size + window), window)
    # Arrays are [batch, heads, blocks, ...] and the mask is [batch, blocks, 1, q, k].
    blocks = _softmax(queries, keys, values, jnp.moveaxis(mask, 2, 1))
    return blocks.reshape(*query.shape[:2], -1, query.shape[3])[:, :, : query.shape[2]]


def _cut(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Cut an axis into blocks of `size`, padding the last one with zeros (segment 0)."""
    x = _pad(x, axis, 0, -x.shape[axis] % size)
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _pad(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    """Add zeros (segment 0) before and after an axis."""
    return jnp.pad(x, [(before, after) if i == axis else (0, 0) for i in range(x.ndim)])


def _surround(blocks: jax.Array, rows: int) -> jax.Array:
    """Extend blocks `[..., blocks, size, width]` by `rows <= size` of both neighbours.

    The first and the last block get zeros on their outer side.
    """
    size, axis = blocks.shape[-2], blocks.ndim - 3
    before = _pad(blocks[..., :-1, size - rows :, :], axis, 1, 0)
    after = _pad(blocks[..., 1:, :rows, :], axis, 0, 1)
    return jnp.concatenate([before, blocks, after], axis=-2)
