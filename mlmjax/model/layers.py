"""The pieces a ModernBERT is made of: products, norms, activations and how they start."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlmjax.model.architecture import ModelConfig

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


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the float32 `einsum` of two arrays, computed in the dtype of `x`.

    `subscripts` name each axis, and each axis stands in two of the three terms, as in
    `"bqd,bkd->bqk"`. In bfloat16 and float16 the operands are rounded and the sums are float32; so
    are those of the gradients, which plain differentiation would compute from float32 operands.
    Differentiation is in reverse mode only.

    >>> product("ij,jk->ik", jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4))).dtype
    dtype('float32')
    """
    return _product(subscripts, *_varying_alike(x, y))


def _varying_alike(*arrays: jax.Array) -> Iterator[jax.Array]:
    """Under `shard_map`, let arrays vary over the same axes.

    The gradient of one that does not vary is then summed over devices, which a rule of one's own
    for differentiation has to see to.
    """
    own = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    for array, axes in zip(arrays, own, strict=True):
        missing = tuple(frozenset().union(*own) - axes)
        yield jax.lax.pcast(array, missing, to="varying") if missing else array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return _einsum(subscripts, x, y.astype(x.dtype))


def _forward(
    subscripts: str, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(subscripts, x, y), (x, y)


def _backward(
    subscripts: str, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Each gradient is asked for with its axes in place. Plain differentiation gives that of a
    # weight with its axes swapped, and on a CPU whatever reads it then goes against the grain.
    x, y = saved
    terms, out = subscripts.split("->")
    of_x, of_y = terms.split(",")
    gradient = gradient.astype(x.dtype)
    to_x = _einsum(f"{out},{of_y}->{of_x}", gradient, y.astype(x.dtype))
    to_y = _einsum(f"{of_x},{out}->{of_y}", x, gradient)
    return to_x.astype(x.dtype), to_y.astype(y.dtype)


_product.defvjp(_forward, _backward)


def _einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


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


def _out_std(config: ModelConfig) -> float:
    return config.initializer_range / math.sqrt(2.0 * config.num_hidden_layers)
