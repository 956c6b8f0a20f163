"""The pieces a ModernBERT is made of: products, norms, activations and how they start."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlmjax.model.architecture import ModelConfig
from mlmjax.model.product import product

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
        self.weight = nnx.Param(truncated_normal(rngs.params(), inputs + outputs, std, cutoff))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None
        self.axes = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[..., *inputs]` to float32 `[..., *outputs]`."""
        weight = self.weight[...]
        leading, outputs = "abcd"[: x.ndim - self.axes], "wxyz"[: weight.ndim - self.axes]
        inputs = "ij"[: self.axes]
        out = product(f"{leading}{inputs},{inputs}{outputs}->{leading}{outputs}", x, weight)
        return out if self.bias is None else out + align(self.bias[...], out)


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
        out = centred * jax.lax.rsqrt(variance + self.eps) * align(self.weight[...], x)
        if self.bias is not None:
            out = out + align(self.bias[...], x)
        return out.astype(dtype)


@partial(jax.jit, static_argnums=1)
def truncated_normal(
    key: jax.Array, shape: tuple[int, ...], std: float, cutoff: float
) -> jax.Array:
    """Draw from a normal of `std` cut at `cutoff` of them; its variance is not corrected."""
    return std * jax.random.truncated_normal(key, -cutoff, cutoff, shape, jnp.float32)


def align(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Give a vector the leading axes of `x`, so that no broadcast is implicit."""
    return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)
