"""The parts ModernBERT is made of, with the names of the checkpoint's parameters.

Source: "Smarter, Better, Faster, Longer" (arXiv 2412.13663) and transformers 5.23.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mlmjax.model.architecture import ModelConfig
from mlmjax.model.attention import attend
from mlmjax.model.layers import ACTIVATIONS, LayerNorm, Linear, truncated_normal
from mlmjax.parallel.sharding import constrain, platform


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


def make_classifier(config: ModelConfig, rngs: nnx.Rngs) -> Linear:
    """Draw the last layer of a classification model, `[hidden]` to `[num_labels]`."""
    return Linear(
        (config.hidden_size,),
        (config.num_labels,),
        bias=True,
        std=config.hidden_size**-0.5,
        cutoff=config.initializer_cutoff_factor,
        rngs=rngs,
    )


def cut_rows(hidden: jax.Array) -> jax.Array:
    """Cut the rows of `[batch, seq, hidden]` over the devices that share a batch."""
    return constrain(hidden, "batch", None, None)


def _out_std(config: ModelConfig) -> float:
    return config.initializer_range / math.sqrt(2.0 * config.num_hidden_layers)


def _once(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Return `x`; on a CPU it is computed once for all its uses, and so is its gradient.

    There the compiler computes a sum anew wherever it is used, and those along the residual stream
    are sums of sums of all layers: the backward pass of 22 layers took 1.6 times as long. (It
    drops `optimization_barrier` before that.)
    """
    if platform() != "cpu":
        return x
    return _keep(x, rope[0].ravel()[0] > 2.0)  # which no cosine is


@jax.custom_vjp
def _kept(x: jax.Array, never: jax.Array) -> jax.Array:
    """Return `x` out of a loop that takes no turn, into which the compiler cannot see."""
    return jax.lax.while_loop(
        lambda carry: carry[1], lambda carry: (carry[0] + 1, jnp.zeros_like(carry[1])), (x, never)
    )[0]


_kept.defvjp(
    lambda x, never: (_kept(x, never), never),
    lambda never, gradient: (_kept(gradient, never), None),
)
# Outside of any jit a loop would be compiled anew at each call.
_keep = jax.jit(_kept)


def _rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn float32 `[batch, heads, seq, head_dim]`, the two halves of a head being the pairs."""
    cos, sin = rope
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
