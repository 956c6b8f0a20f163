"""Attention over packed rows: one function, several ways to compute it.

`dense` is the reference; the others give the same numbers in less time or memory.
"""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.config import RunConfig
from mlmjax.errors import InputError
from mlmjax.partition import platform
from mlmjax.product import product
from mlmjax.splash import SPLASH_TILE, splash

IMPLEMENTATIONS = get_args(RunConfig.model_fields["attention"].annotation)

# Far below any score; so is half of it, and then exp of the difference is exactly zero.
_MASKED = -1e30
# Queries handled at a time: by the banded path, and by long global layers.
_BLOCK = 128
_GPUS = ("gpu", "cuda")


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window: int | None,
    implementation: str = "auto",
    block: int = SPLASH_TILE,
) -> jax.Array:
    """Attend to the tokens of the same segment, `window` rows to each side or (None) all.

    `query`, `key`, `value`: `[batch, heads, seq, head_dim]`. `segment_ids`: int32 `[batch, seq]`,
    0 is padding; None means one segment without padding. Returns `[batch, heads, seq, head_dim]` in
    the dtype of `query`; at padding it is zero, and so is its gradient.

    `implementation` is `"dense"` (the reference: all scores at once), `"banded"` (local layers in
    O(seq x window), long global layers in blocks of queries; any backend), `"cudnn"` (global layers
    by cuDNN, local ones banded), `"splash"` (Pallas kernels for TPU, `block` queries and keys at a
    time), or `"auto"`.
    Raises `InputError` where the implementation cannot run here.
    """
    length = query.shape[2]
    if window is not None and window >= length - 1:
        window = None
    if implementation == "auto":
        implementation = _choose(query)
    _check(implementation, query)
    if implementation == "splash":
        return _without_padding(splash(query, key, value, segment_ids, window, block), segment_ids)
    if implementation == "cudnn" and window is None:
        return _cudnn(query, key, value, segment_ids)
    if segment_ids is None:
        segment_ids = jnp.ones((1, length), jnp.int32)
    if implementation == "dense":
        rows = np.arange(length)
        return _softmax(query, key, value, _mask(segment_ids, segment_ids, rows, rows, window))
    if window is not None and max(_BLOCK, window) + 2 * window <= length // 2:
        return _banded(query, key, value, segment_ids, window)
    return _by_blocks(query, key, value, segment_ids, window)


def _choose(query: jax.Array) -> str:
    """Pick by platform; what is not a matter of platform `banded` decides by shape."""
    choice = automatic(platform())
    return "banded" if choice == "cudnn" and _cudnn_refusal(query) else choice


def automatic(where: str) -> str:
    """Return what `"auto"` is on a platform; on a GPU, where cuDNN takes the arrays."""
    return "splash" if where == "tpu" else "cudnn" if where in _GPUS else "banded"


def check_platform(implementation: str, where: str) -> None:
    """Raise `InputError` for an implementation that is unknown, or not for this platform."""
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"attention: found {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    needs = {"splash": ("a TPU", ("tpu",)), "cudnn": ("an NVIDIA GPU", _GPUS)}
    what, platforms = needs.get(implementation, ("", (where,)))
    if where not in platforms:
        raise InputError(
            f"attention {implementation!r} needs {what}, and this is {where}; set attention to "
            "'auto'"
        )


def _check(implementation: str, query: jax.Array) -> None:
    check_platform(implementation, platform())
    refusal = _cudnn_refusal(query) if implementation == "cudnn" else None
    if refusal:
        raise InputError(f"attention 'cudnn' {refusal}; set attention to 'auto'")


def _cudnn_refusal(query: jax.Array) -> str | None:
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, not {query.dtype}"
    head_dim = query.shape[3]
    if head_dim % 8 or head_dim > 128:
        return f"takes a head_dim that is a multiple of 8 up to 128, not {head_dim}"
    return None


def _mask(
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


def _by_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
) -> jax.Array:
    """Score all keys, a block of queries at a time; the backward pass computes a block anew."""
    length = query.shape[2]
    rows = np.arange(length)
    if length < 4 * _BLOCK:
        return _softmax(query, key, value, _mask(segment_ids, segment_ids, rows, rows, window))

    @jax.checkpoint
    def block(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        queries, segments, numbers = inputs
        mask = _mask(segments, segment_ids, numbers, rows, window)
        return _softmax(queries, key, value, mask)

    blocks = (
        jnp.moveaxis(_cut(query, 2, _BLOCK), 2, 0),
        jnp.moveaxis(_cut(segment_ids, 1, _BLOCK), 1, 0),
        _cut(jnp.asarray(rows), 0, _BLOCK),
    )
    return _join(jnp.moveaxis(jax.lax.map(block, blocks), 0, 2), query.shape)


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
    mask = _mask(segments, around, np.arange(size), np.arange(-window, size + window), window)
    # Blocks take the place of heads in the mask's [batch, blocks, 1, q, k]; heads come before them.
    return _join(_softmax(queries, keys, values, jnp.moveaxis(mask, 2, 1)), query.shape)


def _cut(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Cut an axis into blocks of `size`, the last one padded with zeros (which is padding)."""
    missing = -x.shape[axis] % size
    if missing:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


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


def _cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """Global attention by cuDNN's fused kernel."""
    mask = None
    if segment_ids is not None:
        rows = np.arange(query.shape[2])
        mask = _mask(segment_ids, segment_ids, rows, rows, None)
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    try:
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    except RuntimeError as error:
        raise InputError(
            f"attention 'cudnn' cannot run here ({error}); set attention to 'banded'"
        ) from error
    return _without_padding(jnp.swapaxes(mixed, 1, 2), segment_ids)


def _without_padding(mixed: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Zero the rows at padding, which kernels fill with some average."""
    if segment_ids is None:
        return mixed
    return jnp.where((segment_ids != 0)[:, None, :, None], mixed, jnp.zeros((), mixed.dtype))
