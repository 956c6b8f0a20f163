"""Workarounds for the compiler on CPUs, each with its measurement."""

import jax
import jax.numpy as jnp

from mlmjax.model.layers import align
from mlmjax.parallel.sharding import platform


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


def _spread(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Give a vector the shape of `x` or, off CPUs, the axes it lacks.

    By a product with ones, whose gradient is a product too: the compiler for CPUs sums the columns
    of `[128, 50368]` in 90 ms, and takes 1.5 ms for a product that gives the same.
    """
    if platform() != "cpu":
        return align(vector, x)
    leading = "abcd"[: x.ndim - 1]
    return jnp.einsum(f"{leading},v->{leading}v", jnp.ones(x.shape[:-1], vector.dtype), vector)
