"""Matrix products that accumulate in float32, and do so backward too."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp


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
