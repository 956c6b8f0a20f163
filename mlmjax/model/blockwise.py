"""Attention in plain XLA: all scores at once (the reference), or blocks of queries at a time."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.model.layers import product
from mlmjax.parallel.sharding import mesh_sizes, platform

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
    keys = length if near is None else size + 2 * near
    segment_ids = jnp.broadcast_to(segment_ids, (batch, length))
    if alone:
        # One row, and as many heads as have their scores in the cache: 1.5 to 3 times as fast.
        fitting = max(_CACHE // (4 * size * keys), 1)
        batch, heads = 1, max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fitting)
    missing = -length % size
    before, after = (0, 0) if near is None else (near, near + missing)
    mixed = _attend_in_turn(
        _Blocks(batch, heads, size, keys, window, near),
        _pad(query, 2, 0, missing),
        _pad(key, 2, before, after),
        _pad(value, 2, before, after),
        _pad(segment_ids, 1, 0, missing),
        _pad(segment_ids, 1, before, after),
    )
    return mixed[:, :, :length]


class _Blocks(NamedTuple):
    """Blocks of so many rows, heads and queries (`size`), and how many keys each of them meets.

    Keys begin `near` rows before the block, or (None) where the row begins.
    """

    rows: int
    heads: int
    size: int
    keys: int
    window: int | None
    near: int | None

    def grid(self, query: jax.Array) -> tuple[int, ...]:
        """Return how many blocks there are along rows, heads and queries."""
        return tuple(n // m for n, m in zip(query.shape, self[:3], strict=False))

    def place(self, index: jax.Array, query: jax.Array) -> tuple[jax.Array, ...]:
        """Return the first row, head, query and key of a block; keys are padded by `near`."""
        numbers = jnp.unravel_index(index, self.grid(query))
        row, head, start = (number * n for number, n in zip(numbers, self[:3], strict=False))
        return row, head, start, jnp.zeros_like(start) if self.near is None else start

    def queries(self, place: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
        """Cut the queries of a block out."""
        row, head, start, _ = place
        return jax.lax.dynamic_slice(x, (row, head, start, 0), (*self[:3], x.shape[3]))

    def met(self, place: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
        """Cut the keys or values out that a block meets."""
        row, head, _, first = place
        sizes = self.rows, self.heads, self.keys, x.shape[3]
        return jax.lax.dynamic_slice(x, (row, head, first, 0), sizes)

    def mask(
        self, place: tuple[jax.Array, ...], segment_ids: jax.Array, key_segments: jax.Array
    ) -> jax.Array:
        """Return which query of a block sees which key."""
        row, _, start, first = place
        return visible(
            jax.lax.dynamic_slice(segment_ids, (row, start), (self.rows, self.size)),
            jax.lax.dynamic_slice(key_segments, (row, first), (self.rows, self.keys)),
            np.arange(self.size) + (start - first),
            np.arange(self.keys) - (self.near or 0),
            self.window,
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turn(
    blocks: _Blocks,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    key_segments: jax.Array,
) -> jax.Array:
    """Attend block by block; what a block gives takes the place of its queries.

    The backward pass computes each block anew. A loop that JAX differentiates by itself gives an
    array of its own, and the compiler makes those of all layers at once: 528 MiB at 8192 tokens.
    """

    def body(index: jax.Array, mixed: jax.Array) -> jax.Array:
        place = blocks.place(index, query)
        part = _softmax(
            blocks.queries(place, mixed),
            blocks.met(place, key),
            blocks.met(place, value),
            blocks.mask(place, segment_ids, key_segments),
        )
        return jax.lax.dynamic_update_slice(mixed, part, (*place[:3], 0))

    return jax.lax.fori_loop(0, math.prod(blocks.grid(query)), body, query)


def _in_turn_forward(blocks: _Blocks, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    return _in_turn(blocks, *arrays), arrays


def _in_turn_backward(blocks: _Blocks, arrays: Any, gradient: jax.Array) -> tuple[Any, ...]:
    query, key, value, *segments = arrays

    def body(index: jax.Array, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        place = blocks.place(index, query)
        mask = blocks.mask(place, *segments)
        parts = blocks.queries(place, query), blocks.met(place, key), blocks.met(place, value)
        _, pull_back = jax.vjp(lambda q, k, v: _softmax(q, k, v, mask), *parts)
        to_query, *to_others = pull_back(blocks.queries(place, gradients[0]))
        first = place[0], place[1], place[3], 0
        return (
            jax.lax.dynamic_update_slice(gradients[0], to_query, (*place[:3], 0)),
            *(
                jax.lax.dynamic_update_slice(total, blocks.met(place, total) + part, first)
                for total, part in zip(gradients[1:], to_others, strict=True)
            ),
        )

    # Blocks add up what they send to the same key, in float32 as all sums.
    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    count = math.prod(blocks.grid(query))
    to_query, to_key, to_value = jax.lax.fori_loop(0, count, body, (gradient, *zeros))
    return to_query, to_key.astype(key.dtype), to_value.astype(value.dtype), None, None


_in_turn.defvjp(_in_turn_forward, _in_turn_backward)
# Outside of any jit a loop would be compiled anew at each call.
_attend_in_turn = jax.jit(_in_turn, static_argnums=0)


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
