"""ModernBERT in Flax NNX: modules hold the parameters, the forward pass is plain JAX.

Source: "Smarter, Better, Faster, Longer" (arXiv 2412.13663) and transformers 5.23, whose parameter
names the attributes carry. Parameters, norms, softmax and RoPE are float32; matrix products take
the compute dtype and accumulate in float32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlmjax.architecture import LOCAL, ModelConfig
from mlmjax.attention import attend
from mlmjax.errors import InputError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5))),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "hardswish": jax.nn.hard_swish,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
ACTIVATIONS |= dict.fromkeys(
    ("gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), ACTIVATIONS["gelu_new"]
)
ACTIVATIONS |= {"gelu_python": ACTIVATIONS["gelu"], "swish": ACTIVATIONS["silu"]}


class Linear(nnx.Module):
    """A product over the last axes of the input: weight `[*inputs, *outputs]`, bias `[*outputs]`.

    Returns float32, whatever the dtype of the input: the caller rounds once, after what follows.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        bias: bool,
        std: float,
        cutoff: float,
        rngs: nnx.Rngs,
    ):
        self.weight = nnx.Param(_truncated_normal(rngs.params(), inputs + outputs, std, cutoff))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None
        self.axes = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[..., *inputs]` to float32 `[..., *outputs]`."""
        product = _product(x, self.weight[...], self.axes)
        return product if self.bias is None else product + _align(self.bias[...], product)


class LayerNorm(nnx.Module):
    """Layer normalisation in float32, with a bias only where the model has one."""

    def __init__(self, config: ModelConfig):
        self.weight = nnx.Param(jnp.ones(config.hidden_size, jnp.float32))
        self.bias = (
            nnx.Param(jnp.zeros(config.hidden_size, jnp.float32)) if config.norm_bias else None
        )
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Normalise the last axis of `[..., hidden]`; the result is rounded to `dtype`."""
        x = x.astype(jnp.float32)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        out = centred * jax.lax.rsqrt(variance + self.eps) * _align(self.weight[...], x)
        if self.bias is not None:
            out = out + _align(self.bias[...], x)
        return out.astype(dtype)


class Embedding(nnx.Module):
    """One vector per token; the MLM decoder reads the same matrix."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(
            _truncated_normal(
                rngs.params(), shape, config.initializer_range, config.initializer_cutoff_factor
            )
        )
        self.pad_token_id = config.pad_token_id

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Look up `[batch, seq]`; an id outside the vocabulary gives NaN, never another token."""
        rows = jnp.take(self.weight[...], input_ids.astype(jnp.uint32), axis=0, mode="fill")
        if self.pad_token_id is None:
            return rows
        # As in torch, where `padding_idx` keeps the padding vector out of the lookup's gradient.
        is_pad = (input_ids == self.pad_token_id)[..., None]
        return jnp.where(is_pad, jax.lax.stop_gradient(rows), rows)


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
    ) -> jax.Array:
        """Map `[batch, seq, hidden]` to float32 of the same shape."""
        query, key, value = jnp.transpose(self.Wqkv(x), (2, 0, 3, 1, 4))
        mixed = attend(
            _rotate(query, rope).astype(x.dtype),
            _rotate(key, rope).astype(x.dtype),
            value.astype(x.dtype),
            segment_ids,
            window=window,
            implementation=implementation,
        )
        return self.Wo(jnp.transpose(mixed, (0, 2, 1, 3)))


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
        both = self.Wi(x)
        gated = ACTIVATIONS[self.activation](both[..., 0, :]) * both[..., 1, :]
        return self.Wo(gated.astype(x.dtype))


class Layer(nnx.Module):
    """One pre-norm block; the first of a model has no attention norm."""

    def __init__(self, config: ModelConfig, index: int, rngs: nnx.Rngs):
        self.attn_norm = LayerNorm(config) if index else None
        self.attn = Attention(config, rngs)
        self.mlp_norm = LayerNorm(config)
        self.mlp = GatedMLP(config, rngs)

    def __call__(self, x: jax.Array, *attention_arguments: Any) -> jax.Array:
        """Map `[batch, seq, hidden]` to the same; the arguments are those of `Attention`."""
        normed = x if self.attn_norm is None else self.attn_norm(x, x.dtype)
        with jax.named_scope("attention"):
            x = (x + self.attn(normed, *attention_arguments)).astype(x.dtype)
        with jax.named_scope("mlp"):
            return (x + self.mlp(self.mlp_norm(x, x.dtype))).astype(x.dtype)


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


class _ModernBert(nnx.Module):
    """What both models share: the encoder, the head, and how they compute."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        attention: str = "auto",
        remat: bool = False,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.attention = attention
        self.remat = remat
        self.model = Encoder(config, rngs)
        self.head = PredictionHead(config, rngs)

    def encode(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> Any:
        """Encode `[batch, seq]` to `[batch, seq, hidden]` in the compute dtype, after the last norm.

        Equal non-zero `segment_ids` attend to each other and 0 is padding, so a Hugging Face
        `attention_mask` is a valid value; None means one segment and no padding. Local windows
        count rows of the input; `position_ids` (default 0, 1, 2, ...) only turn the rotary
        embedding. Values at padding are finite, otherwise unspecified. With
        `output_hidden_states` the result is `(hidden, states)`, states being the embeddings, then
        the output of each layer, the last of them after the final norm.
        Raises `InputError` for arrays of the wrong rank, shape or dtype.
        """
        input_ids, segment_ids, position_ids = _check_inputs(
            input_ids, segment_ids, position_ids, self.config.vocab_size
        )
        config = self.config
        ropes = {
            kind: _rope_tables(position_ids, config.head_dim, config.rope_theta(kind))
            for kind in sorted(set(config.layer_types))
        }
        with jax.named_scope("embeddings"):
            hidden = self.model.embeddings(input_ids, self.dtype)
        states = [hidden]
        for index, (layer, kind) in enumerate(
            zip(self.model.layers, config.layer_types, strict=True)
        ):
            window = config.window if kind == LOCAL else None
            forward = partial(_apply_layer, layer, window, self.attention)
            with jax.named_scope(f"layer_{index}"):
                forward = jax.checkpoint(forward) if self.remat else forward
                hidden = forward(hidden, ropes[kind], segment_ids)
            states.append(hidden)
        with jax.named_scope("final_norm"):
            hidden = self.model.final_norm(hidden, self.dtype)
        return (hidden, (*states[:-1], hidden)) if output_hidden_states else hidden


class ModernBertForMaskedLM(_ModernBert):
    """ModernBERT with the MLM head, whose decoder is the token embedding plus a bias."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(config, rngs=rngs, **options)
        self.decoder = DecoderBias(config)

    def mlm_logits(self, hidden: jax.Array, vocabulary_ids: jax.Array | None = None) -> jax.Array:
        """Map `[..., hidden]` to float32 logits `[..., vocab]`.

        With `vocabulary_ids` `[n]` only these words are scored: `[..., n]`.
        """
        with jax.named_scope("mlm_head"):
            words = self.model.embeddings.tok_embeddings.weight[...]
            bias = None if self.decoder.bias is None else self.decoder.bias[...]
            if vocabulary_ids is not None:
                words = words[vocabulary_ids]
                bias = None if bias is None else bias[vocabulary_ids]
            logits = _product(self.head(hidden.astype(self.dtype)), words.T, 1)
            return logits if bias is None else logits + _align(bias, logits)

    def __call__(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Map `[batch, seq]` to float32 logits `[batch, seq, vocab]`; see `encode`."""
        return self.mlm_logits(self.encode(input_ids, segment_ids, position_ids))


class ModernBertForSequenceClassification(_ModernBert):
    """ModernBERT with one linear layer over the pooled sequence; one example per row."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(config, rngs=rngs, **options)
        self.classifier = Linear(
            (config.hidden_size,),
            (config.num_labels,),
            bias=True,
            std=config.hidden_size**-0.5,
            cutoff=config.initializer_cutoff_factor,
            rngs=rngs,
        )

    def __call__(self, input_ids: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Map `[batch, seq]` to float32 logits `[batch, num_labels]`.

        Pooling is the first token of each row that is no padding, or the mean over those tokens,
        by `config.classifier_pooling`.
        """
        hidden = self.encode(input_ids, segment_ids)
        real = jnp.ones(hidden.shape[:2], bool) if segment_ids is None else segment_ids != 0
        with jax.named_scope("classifier"):
            if self.config.classifier_pooling == "cls":
                pooled = hidden[jnp.arange(hidden.shape[0]), jnp.argmax(real, axis=1)]
            else:
                total = jnp.where(real[..., None], hidden, 0).sum(axis=1, dtype=jnp.float32)
                count = real.sum(axis=1, keepdims=True)
                pooled = (total / jnp.maximum(count, 1)).astype(self.dtype)
            return self.classifier(self.head(pooled))


def _apply_layer(
    layer: Layer,
    window: int | None,
    implementation: str,
    hidden: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segment_ids: jax.Array | None,
) -> jax.Array:
    return layer(hidden, rope, segment_ids, window, implementation)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _truncated_normal(
    key: jax.Array, shape: tuple[int, ...], std: float, cutoff: float
) -> jax.Array:
    """Draw from a normal of `std` cut at `cutoff` of them; its variance is not corrected."""
    return std * jax.random.truncated_normal(key, -cutoff, cutoff, shape, jnp.float32)


def _out_std(config: ModelConfig) -> float:
    return config.initializer_range / math.sqrt(2.0 * config.num_hidden_layers)


def _align(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Give a vector the leading axes of `x`, so that no broadcast is implicit."""
    return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)


def _rope_tables(
    position_ids: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[batch, 1, seq, head_dim / 2]`, float32 (RoFormer, arXiv 2104.09864)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    angles = position_ids[:, None, :, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn float32 `[batch, heads, seq, head_dim]`, the two halves of a head being the pairs."""
    cos, sin = rope
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _product(x: jax.Array, weight: jax.Array, axes: int) -> jax.Array:
    """Contract the last `axes` axes of `x` with the first of a float32 weight, in `x.dtype`."""
    if x.dtype == jnp.float32:
        return _dot(x, weight, axes)
    return _rounded_product(x, weight, axes)


def _dot(x: jax.Array, weight: jax.Array, axes: int) -> jax.Array:
    contracted = (tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes)))
    return jax.lax.dot_general(
        x, weight, (contracted, ((), ())), preferred_element_type=jnp.float32
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_product(x: jax.Array, weight: jax.Array, axes: int) -> jax.Array:
    """`_dot` in the low precision of `x`; so are both backward products, which else were float32."""
    return _dot(x, weight.astype(x.dtype), axes)


def _rounded_product_forward(
    x: jax.Array, weight: jax.Array, axes: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded_product(x, weight, axes), (x, weight)


def _rounded_product_backward(
    axes: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    gradient = gradient.astype(x.dtype)
    leading = x.ndim - axes
    outputs = weight.ndim - axes
    to_x = (
        tuple(range(leading, leading + outputs)),
        tuple(range(axes, axes + outputs)),
    )
    to_weight = (tuple(range(leading)), tuple(range(leading)))
    product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    x_gradient = product(gradient, weight.astype(x.dtype), (to_x, ((), ())))
    weight_gradient = product(x, gradient, (to_weight, ((), ())))
    return x_gradient.astype(x.dtype), weight_gradient


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


def _check_inputs(
    input_ids: jax.Array,
    segment_ids: jax.Array | None,
    position_ids: jax.Array | None,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    input_ids = jnp.asarray(input_ids)
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise InputError(
            f"input_ids: found {input_ids.dtype} {list(input_ids.shape)}; expected token ids "
            "(whole numbers) [batch, seq]"
        )
    if not isinstance(input_ids, jax.core.Tracer) and input_ids.size:
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"input_ids: found {low if low < 0 else high}; expected ids from 0 to "
                f"{vocab_size - 1} (does the tokenizer belong to this model?)"
            )
    if segment_ids is not None:
        segment_ids = _same_shape("segment_ids", segment_ids, input_ids).astype(jnp.int32)
    if position_ids is None:
        position_ids = jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None, :]
    else:
        position_ids = _same_shape("position_ids", position_ids, input_ids)
    return input_ids, segment_ids, position_ids


def _same_shape(name: str, ids: jax.Array, input_ids: jax.Array) -> jax.Array:
    ids = jnp.asarray(ids)
    whole = jnp.issubdtype(ids.dtype, jnp.integer) or ids.dtype == bool
    if ids.shape != input_ids.shape or not whole:
        raise InputError(
            f"{name}: found {ids.dtype} {list(ids.shape)}; expected whole numbers "
            f"{list(input_ids.shape)}, as input_ids"
        )
    return ids
