"""Workarounds for XLA's compiler on CPUs, each with its measurement.

The first machine had two shared cores of the Sapphire Rapids class, the second two shared cores of
an AMD EPYC with AVX2. Both ran jax 0.10.2 in November 2026. More is in docs/benchmarks/README.md.
"""

import math

import jax
import jax.numpy as jnp

from mlmjax.model.layers import align
from mlmjax.parallel.sharding import mesh_sizes, platform

# Bytes of attention scores that stay in the cache of a CPU.
_CACHE = 4 << 20


def compute_once(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Return `x`; on a CPU `x` and its gradient are computed only once for all their uses.

    `rope` supplies a condition that is always false and that the compiler cannot evaluate.

    The compiler recomputes a cheap sum in each operation that reads it, and the residual stream is
    a sum over all layers. An update of ModernBERT-base (8 x 128 tokens) took 4.5 to 5.3 s instead
    of 6.6 to 7.2 s. Together with the loop of `blockwise` it brought the memory of a forward pass
    of 8192 tokens from 1308 to 156 MiB (first machine). Tried and rejected: `optimization_barrier`,
    which the compiler drops too early, and a division by one, which it can repeat as a product.
    """
    if platform() != "cpu":
        return x
    return _keep(x, rope[0].ravel()[0] > 2.0)  # no cosine is above 2


@jax.custom_vjp
def _kept(x: jax.Array, never: jax.Array) -> jax.Array:
    """Return `x` from a loop that never runs, which the compiler cannot know."""
    return jax.lax.while_loop(
        lambda carry: carry[1], lambda carry: (carry[0] + 1, jnp.zeros_like(carry[1])), (x, never)
    )[0]


_kept.defvjp(
    lambda x, never: (_kept(x, never), never),
    lambda never, gradient: (_kept(gradient, never), None),
)
# Outside of jit a loop would be compiled again at each call.
_keep = jax.jit(_kept)


def spread(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Give a vector the shape of `x`; off CPUs add only the axes it lacks.

    On a CPU this is a product with ones, because then its gradient is a product too. The compiler
    needs 90 ms to sum the columns of `[128, 50368]`, and 1.5 ms for the product. An update of the
    small model (4 rows of 512) took 3.1 instead of 3.7 s (second machine).
    """
    if platform() != "cpu":
        return align(vector, x)
    leading = "abcd"[: x.ndim - 1]
    return jnp.einsum(f"{leading},v->{leading}v", jnp.ones(x.shape[:-1], vector.dtype), vector)


def is_single_cpu() -> bool:
    """Tell whether the program runs on a CPU and is not sharded."""
    return platform() == "cpu" and math.prod(mesh_sizes().values()) == 1


def heads_at_once(heads: int, queries: int, keys: int) -> int:
    """Return how many heads of one row a CPU scores at a time, so that scores stay in its cache.

    Otherwise each step of the softmax goes through the scores of all rows and heads, which are
    100 MB at 8192 tokens. Attention at 8192 (one row, 12 heads) took 0.09 to 0.10 instead of 0.22 s
    in a local layer and 1.1 to 1.2 instead of 1.9 s in a global one, and 8 rows of 512 took 0.05
    and 0.04 instead of 0.09 s (first machine).

    >>> heads_at_once(12, 128, 256), heads_at_once(12, 256, 8192)
    (12, 1)
    """
    fitting = max(_CACHE // (4 * queries * keys), 1)
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fitting)
