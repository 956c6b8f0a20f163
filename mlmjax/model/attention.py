"""Attention over packed rows: one function and several implementations.

`dense` is the reference; the others give the same numbers in less time or memory.
"""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mlmjax.config.run import AttentionName
from mlmjax.errors import InputError
from mlmjax.model.blockwise import attend_at_once, attend_by_blocks, visible
from mlmjax.parallel.jax_internals import splash_kernels
from mlmjax.parallel.sharding import BATCH_AXES, mesh_sizes, platform

IMPLEMENTATIONS = get_args(AttentionName)
# The splash kernels take sequences of a multiple of this many tokens.
SPLASH_TILE = 128
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
    """Attend to tokens of the same segment, at most `window` positions away (None: any distance).

    `query`, `key`, `value`: `[batch, heads, seq, head_dim]`. `segment_ids`: int32 `[batch, seq]`,
    0 is padding; None means one segment without padding. Returns `[batch, heads, seq, head_dim]` in
    the dtype of `query`. At padding the result and its gradient are zero.

    `implementation` is `"dense"` (the reference: all scores at once), `"banded"` (local layers in
    O(seq x window), long global layers in blocks of queries; any backend), `"cudnn"` (global layers
    by cuDNN, local ones banded), `"splash"` (Pallas kernels for TPU, `block` queries and keys at a
    time), or `"auto"`.
    Raises `InputError` if the implementation cannot run here.
    """
    length = query.shape[2]
    if window is not None and window >= length - 1:
        window = None
    implementation = _resolve(implementation, query)
    if implementation == "splash":
        return _without_padding(splash(query, key, value, segment_ids, window, block), segment_ids)
    if implementation == "cudnn" and window is None:
        return _cudnn(query, key, value, segment_ids)
    if segment_ids is None:
        segment_ids = jnp.ones((1, length), jnp.int32)
    plain = attend_at_once if implementation == "dense" else attend_by_blocks
    return plain(query, key, value, segment_ids, window)


def _resolve(implementation: str, query: jax.Array) -> str:
    """Return the implementation for these arrays; raises `InputError` if it cannot run."""
    return choose_implementation(implementation, platform(), query.dtype, query.shape[3])


def choose_implementation(name: str, where: str, dtype: Any, head_dim: int) -> str:
    """Return the implementation of this name, or what `"auto"` means, for arrays on a platform.

    A GPU uses cuDNN for arrays that cuDNN takes. On a TPU `"auto"` is `"banded"`, with a warning,
    if this JAX lacks the kernels. Raises `InputError` if the implementation cannot run.

    >>> choose_implementation("auto", "gpu", "bfloat16", 64)
    'cudnn'
    >>> choose_implementation("auto", "gpu", "float32", 64)
    'banded'
    """
    refusal = _cudnn_refusal(jnp.dtype(dtype), head_dim)
    if name == "auto":
        if where == "tpu" and splash_kernels() is not None:
            return "splash"
        return "cudnn" if where in _GPUS and refusal is None else "banded"
    check_platform(name, where)
    if name == "cudnn" and refusal:
        raise InputError(f"attention 'cudnn' {refusal}; set attention to 'auto'")
    return name


def check_platform(implementation: str, where: str) -> None:
    """Raise `InputError` for an implementation that is unknown or cannot run on a platform."""
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


def _cudnn_refusal(dtype: Any, head_dim: int) -> str | None:
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, not {dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"takes a head_dim that is a multiple of 8 up to 128, not {head_dim}"
    return None


def _cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """Compute global attention with cuDNN's fused kernel."""
    mask = None
    if segment_ids is not None:
        positions = np.arange(query.shape[2])
        mask = visible(segment_ids, segment_ids, positions, positions, None)
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    try:
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    except RuntimeError as error:
        raise InputError(
            f"attention 'cudnn' cannot run here ({error}); set attention to 'banded'"
        ) from error
    return _without_padding(jnp.swapaxes(mixed, 1, 2), segment_ids)


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    window: int | None,
    block: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attend with the TPU splash kernels, as `attend` does except at padding, which sees itself.

    `block` is the number of queries and of keys per step; see `splash_block`. Each device runs the
    kernel on its own rows and heads, because the compiler cannot shard a kernel. `interpret` runs
    it without a TPU.
    """
    if (found := splash_kernels()) is None:
        raise InputError(
            f"attention 'splash': jax {jax.__version__} has no such kernels; set attention to "
            "'banded'"
        )
    kernels, masks = found
    batch, _, length, head_dim = query.shape
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    missing = -length % SPLASH_TILE
    shape = (length + missing, length + missing)
    size = splash_block(length, block)
    passes = ("", "_dkv", "_dq")  # forward, gradient of keys and values, gradient of queries
    blocks: dict[str, Any] = {f"block_{x}{of}": size for x in ("q", "kv") for of in passes}
    sizes = kernels.BlockSizes(**blocks)
    mask = masks.FullMask(shape) if window is None else masks.LocalMask(shape, (window, window), 0)

    def on_one_device(q: jax.Array, k: jax.Array, v: jax.Array, s: jax.Array) -> jax.Array:
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        segments = kernels.SegmentIds(q=s, kv=s)
        return jax.vmap(kernel)(q, k, v, segments)

    rows = [(0, 0), (0, 0), (0, missing), (0, 0)]
    inputs = [jnp.pad(x, rows) for x in (query * head_dim**-0.5, key, value)]
    inputs.append(jnp.pad(segment_ids, rows[1:3]))
    if mesh_sizes():
        heads = P(BATCH_AXES, "tensor", None, None)
        on_one_device = jax.shard_map(
            on_one_device,
            in_specs=(heads, heads, heads, P(BATCH_AXES, None)),
            out_specs=heads,
            check_vma=False,
        )
    return on_one_device(*inputs)[:, :, :length]


def splash_block(length: int, wanted: int) -> int:
    """Return the largest block, at most `wanted`, that divides the padded sequence.

    >>> splash_block(2048, 512), splash_block(600, 512), splash_block(700, 512)
    (512, 128, 384)
    """
    tiles = -(-length // SPLASH_TILE)
    most = max(1, wanted // SPLASH_TILE)
    return SPLASH_TILE * max(n for n in range(1, most + 1) if tiles % n == 0)


def _without_padding(mixed: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Set the result at padding to zero, where kernels return an average."""
    if segment_ids is None:
        return mixed
    return jnp.where((segment_ids != 0)[:, None, :, None], mixed, jnp.zeros((), mixed.dtype))
