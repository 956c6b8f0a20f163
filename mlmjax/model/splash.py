"""Attention on a TPU: JAX's splash kernels (Pallas), one mask for all heads, segments beside it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mlmjax.parallel.sharding import BATCH_AXES, mesh_sizes

SPLASH_TILE = 128
"""What the kernels cut the sequence into multiples of."""

_KERNELS = ("", "_dkv", "_dq")  # forward, and the two backward: for keys and values, for queries


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
    """Attend as `attention.attend` does, except at padding, which sees itself.

    `block` is how many queries meet how many keys at a time; see `splash_block`. Each device runs
    the kernel on its own rows and heads, because the compiler cannot cut a kernel. `interpret` runs
    it without a TPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    batch, _, length, head_dim = query.shape
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    missing = -length % SPLASH_TILE
    shape = (length + missing, length + missing)
    size = splash_block(length, block)
    blocks: dict[str, Any] = {f"block_{x}{of}": size for x in ("q", "kv") for of in _KERNELS}
    sizes = splash_attention_kernel.BlockSizes(**blocks)
    mask = (
        splash_attention_mask.FullMask(shape)
        if window is None
        else splash_attention_mask.LocalMask(shape, (window, window), 0)
    )

    def on_one_device(q: jax.Array, k: jax.Array, v: jax.Array, s: jax.Array) -> jax.Array:
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        segments = splash_attention_kernel.SegmentIds(q=s, kv=s)
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
    """Return the largest block, at most `wanted`, that a sequence (filled to tiles) divides into.

    >>> splash_block(2048, 512), splash_block(600, 512), splash_block(700, 512)
    (512, 128, 384)
    """
    tiles = -(-length // SPLASH_TILE)
    most = max(1, wanted // SPLASH_TILE)
    return SPLASH_TILE * max(n for n in range(1, most + 1) if tiles % n == 0)
