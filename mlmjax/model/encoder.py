"""The parts ModernBERT is made of, with the names of the checkpoint's parameters.

Source: "Smarter, Better, Faster, Longer" (arXiv 2412.13663) and transformers 5.23.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.attention import attend
from mlmjax.model.cpu import _once
from mlmjax.model.layers import ACTIVATIONS, LayerNorm, Linear, _out_std, truncated_normal
from mlmjax.parallel.sharding import constrain


class Embedding(nnx.Module):
    """One vector per token; the MLM decoder reads the same matrix."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(
            truncated_normal(
                rngs.params(), shape, config.initializer_range, config.initializer_cutoff_factor
            )
        )
        self.pad_token_id = config.pad_token_id

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Look up `[batch, seq]`; an id outside the vocabulary gives NaN, never another token."""
        # The table is cut along hidden: a device looks up its columns for the rows of all devices
        # that hold the others, then columns are exchanged for rows. Left to itself, the compiler
        # may gather every row on every device.
        input_ids = constrain(input_ids, "data", None)
        rows = jnp.take(self.weight[...], input_ids, axis=0, mode="fill")
        rows = constrain(rows, "data", None, "fsdp")
        if self.pad_token_id is not None:
            # As in torch, where `padding_idx` keeps the padding vector out of the gradient.
            is_pad = (input_ids == self.pad_token_id)[..., None]
            rows = jnp.where(is_pad, jax.lax.stop_gradient(rows), rows)
        return cut_rows(constrain(rows, "data", None, "fsdp"))


class Embeddings(nnx.Module):
    """Token vectors and their norm; there is no position embedding."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.tok_embeddings = Embedding(config, rngs)
        self.norm = LayerNorm(config)

    def __call__(self, input_ids: jax.Array, dtype: Any) -> jax.Array:
        """Map `[batch, seq]` to `[batch, seq, hidden]`."""
        return self.norm(self.tok_embeddings(input_ids), dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with rotary positions, global or within a window."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        heads = (config.num_attention_heads, config.head_dim)
        make = partial(
            Linear,
            bias=config.attention_bias,
            cutoff=config.initializer_cutoff_factor,
            rngs=rngs,
        )
        self.Wqkv = make((config.hidden_size,), (3, *heads), std=config.initializer_range)
        self.Wo = make(heads, (config.hidden_size,), std=_out_std(config))

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None,
        window: int | None,
        implementation: str,
        block: int,
    ) -> jax.Array:
        """Map `[batch, seq, hidden]` to float32 of the same shape."""
        query, key, value = jnp.transpose(self.Wqkv(x), (2, 0, 3, 1, 4))
        query, key, value = (
            checkpoint_name(
                constrain(array.astype(x.dtype), "batch", "tensor", None, None), "product"
            )
            for array in (_rotate(query, rope), _rotate(key, rope), value)
        )
        mixed = attend(
            query,
            key,
            value,
            segment_ids,
            window=window,
            implementation=implementation,
            block=block,
        )
        return self.Wo(checkpoint_name(jnp.transpose(mixed, (0, 2, 1, 3)), "product"))


class GatedMLP(nnx.Module):
    """The gated feed-forward block: `Wo(activation(a) * b)` where `Wi` gives both a and b."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        make = partial(
            Linear, bias=config.mlp_bias, cutoff=config.initializer_cutoff_factor, rngs=rngs
        )
        hidden, width = config.hidden_size, config.intermediate_size
        self.Wi = make((hidden,), (2, width), std=config.initializer_range)
        self.Wo = make((width,), (hidden,), std=_out_std(config))
        self.activation = config.hidden_activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, seq, hidden]` to float32 of the same shape."""
        both = constrain(self.Wi(x).astype(x.dtype), "batch", None, None, "tensor")
        both = checkpoint_name(both, "product").astype(jnp.float32)
        gated = ACTIVATIONS[self.activation](both[..., 0, :]) * both[..., 1, :]
        return self.Wo(gated.astype(x.dtype))


class Layer(nnx.Module):
    """One pre-norm block; the first of a model has no attention norm."""

    def __init__(self, config: ModelConfig, index: int, rngs: nnx.Rngs):
        self.attn_norm = LayerNorm(config) if index else None
        self.attn = Attention(config, rngs)
        self.mlp_norm = LayerNorm(config)
        self.mlp = GatedMLP(config, rngs)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], *more: Any) -> jax.Array:
        """Map `[batch, seq, hidden]` to the same; the arguments are those of `Attention`."""
        normed = x if self.attn_norm is None else self.attn_norm(x, x.dtype)
        with jax.named_scope("attention"):
            x = cut_rows((x + self.attn(normed, rope, *more)).astype(x.dtype))
            x = checkpoint_name(_once(x, rope), "product")
        with jax.named_scope("mlp"):
            x = cut_rows((x + self.mlp(self.mlp_norm(x, x.dtype))).astype(x.dtype))
            return _once(x, rope)


class Encoder(nnx.Module):
    """The stack of layers under both models."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List(
            [Layer(config, index, rngs) for index in range(config.num_hidden_layers)]
        )
        self.final_norm = LayerNorm(config)


class PredictionHead(nnx.Module):
    """Dense, activation, norm: before the decoder and before the classifier alike."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        hidden = (config.hidden_size,)
        self.dense = Linear(
            hidden,
            hidden,
            bias=config.classifier_bias,
            std=_out_std(config),
            cutoff=config.initializer_cutoff_factor,
            rngs=rngs,
        )
        self.norm = LayerNorm(config)
        self.activation = config.classifier_activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[..., hidden]` to the same."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)), x.dtype)


class DecoderBias(nnx.Module):
    """What the tied decoder owns: its bias, where it has one."""

    def __init__(self, config: ModelConfig):
        self.bias = (
            nnx.Param(jnp.zeros(config.vocab_size, jnp.float32)) if config.decoder_bias else None
        )


def cut_rows(hidden: jax.Array) -> jax.Array:
    """Cut the rows of `[batch, seq, hidden]` over the devices that share a batch."""
    return constrain(hidden, "batch", None, None)


def _rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn float32 `[batch, heads, seq, head_dim]`, the two halves of a head being the pairs."""
    cos, sin = rope
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# What the backward pass finds stored of a layer besides its input, where not everything is: with
# "dots" whatever took a matrix product to make, all at the compute dtype.
_STORED = {"dots": jax.checkpoint_policies.save_only_these_names("product")}


def _apply_layer(
    layer: Layer,
    window: int | None,
    implementation: str,
    block: int,
    hidden: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segment_ids: jax.Array | None,
) -> jax.Array:
    return layer(hidden, rope, segment_ids, window, implementation, block)


def _repetition(kinds: Sequence[str]) -> tuple[range, int]:
    """Find the layers that are equal periods, and the period; none, unless they are most layers.

    Layer 0 is left out, because it has no attention norm.

    >>> _repetition(("full", "local", "local", "full", "local", "local", "full", "local"))
    (range(1, 7), 3)
    """
    best, best_period = range(0), 0
    for period in range(1, len(kinds) // 2 + 1):
        end = 1 + period
        while end < len(kinds) and kinds[end] == kinds[end - period]:
            end += 1
        repeats = (end - 1) // period
        if repeats > 1 and period * repeats > max(len(best), len(kinds) // 2):
            best, best_period = range(1, 1 + period * repeats), period
    return best, best_period


def _rope_tables(
    position_ids: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[batch, 1, seq, head_dim / 2]`, float32 (RoFormer, arXiv 2104.09864)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    angles = position_ids[:, None, :, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _check_inputs(
    input_ids: ArrayLike,
    segment_ids: ArrayLike | None,
    position_ids: ArrayLike | None,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    ids = _token_ids("input_ids", input_ids, 2, vocab_size)
    if position_ids is None:
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    else:
        positions = _like_ids("position_ids", position_ids, ids)
    return (
        ids,
        None if segment_ids is None else _like_ids("segment_ids", segment_ids, ids),
        positions,
    )


def _token_ids(name: str, values: ArrayLike, rank: int, vocab_size: int) -> jax.Array:
    ids = jnp.asarray(values)
    if ids.ndim != rank or not jnp.issubdtype(ids.dtype, jnp.integer):
        expected = f"whole numbers {['[n]', '[batch, seq]'][rank - 1]}"
        raise InputError(f"{name}: found {ids.dtype} {list(ids.shape)}; expected {expected}")
    if not isinstance(values, jax.core.Tracer) and ids.size:
        known = np.asarray(values)  # In numpy, because jit also traces operations on known arrays.
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"{name}: found {low if low < 0 else high}; expected ids from 0 to "
                f"{vocab_size - 1} (does the tokenizer belong to this model?)"
            )
    # Unsigned, so that a traced negative id is out of range too instead of counting from the end.
    return ids.astype(jnp.uint32)


def _like_ids(name: str, values: ArrayLike, input_ids: jax.Array) -> jax.Array:
    array = jnp.asarray(values)
    whole = jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool
    if array.shape != input_ids.shape or not whole:
        raise InputError(
            f"{name}: found {array.dtype} {list(array.shape)}; expected whole numbers "
            f"{list(input_ids.shape)}, as input_ids"
        )
    return array.astype(jnp.int32)
