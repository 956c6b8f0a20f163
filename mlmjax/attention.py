"""Attention over packed rows: one function, several ways to compute it."""

import jax
import jax.numpy as jnp

# Far below any score, and half of it still is, so that exp of the difference is exactly zero.
_MASKED = -1e30


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window: int | None,
    implementation: str = "auto",
) -> jax.Array:
    """Attend within segments, and within `window` rows to each side unless it is None.

    `query`, `key`, `value`: `[batch, heads, seq, head_dim]`; `segment_ids`: `[batch, seq]`, 0 is
    padding. Returns `[batch, heads, seq, head_dim]` in the dtype of `query`; padding gives zeros.
    """
    mask = _mask(segment_ids, query.shape[2], window)
    return _softmax_attention(query, key, value, mask)


def _mask(segment_ids: jax.Array | None, length: int, window: int | None) -> jax.Array | None:
    mask = None
    if window is not None and window < length - 1:
        rows = jnp.arange(length)
        mask = (jnp.abs(rows[:, None] - rows[None, :]) <= window)[None]
    if segment_ids is not None:
        same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids != 0)[:, None, :]
        mask = same if mask is None else same & mask
    return None if mask is None else mask[:, None]


def _softmax_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    scale = query.shape[-1] ** -0.5
    scores = scale * jnp.einsum(
        "...qd,...kd->...qk", query, key, preferred_element_type=jnp.float32
    )
    if mask is not None:
        scores = jnp.where(mask, scores, _MASKED)
    # A row without any key keeps a maximum far above _MASKED, so all its weights are zero.
    maximum = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.maximum(maximum, 0.5 * _MASKED))
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum(
        "...qk,...kd->...qd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return (mixed / jnp.where(total == 0.0, 1.0, total)).astype(query.dtype)
