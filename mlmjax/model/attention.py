"""Attention over packed rows: one function, several ways to compute it.

`dense` is the reference; the others give the same numbers in less time or memory.
"""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax.config.run import RunConfig
from mlmjax.errors import InputError
from mlmjax.model.blockwise import attend_at_once, attend_by_blocks, visible
from mlmjax.model.splash import SPLASH_TILE, splash
from mlmjax.parallel.sharding import platform

IMPLEMENTATIONS = get_args(RunConfig.model_fields["attention"].annotation)

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
    way = attend_at_once if implementation == "dense" else attend_by_blocks
    return way(query, key, value, segment_ids, window)


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


def _cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """Global attention by cuDNN's fused kernel."""
    mask = None
    if segment_ids is not None:
        rows = np.arange(query.shape[2])
        mask = visible(segment_ids, segment_ids, rows, rows, None)
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
