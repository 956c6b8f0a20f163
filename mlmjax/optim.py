"""Optimizers and learning-rate schedules, built from the run configuration."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlmjax.config import OptimizerConfig, ScheduleConfig
from mlmjax.errors import InputError
from mlmjax.partition import leaf_path

_NO_DECAY = re.compile(r"(^|\.)(\w*norm\.\w+|\w*bias)$")


def make_schedule(config: ScheduleConfig, learning_rate: float, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates done before (0 at first).

    Warm-up is linear and already gives `learning_rate / warmup` to the first update, the full rate
    to update number `warmup`. Then `wsd` is constant until the last `decay` updates, which follow
    1 - sqrt (Hägele et al. 2024, arXiv 2405.18392); `cosine` and `linear` fall over all that
    remains and do not use `decay`. The first update of a decline has the full rate, the last one a
    rate above zero: no update is wasted. `warmup` and `decay` below 1 are fractions of `steps`.

    Raises `InputError` where warm-up and decay together are longer than the run.
    """
    warmup = _updates(config.warmup, steps)
    decay = _updates(config.decay, steps) if config.name == "wsd" else steps - warmup
    if warmup + decay > steps or decay < 0:
        raise InputError(
            f"schedule: warmup {warmup} + decay {max(decay, 0)} updates is more than steps {steps};"
            f" make one of them shorter"
        )
    shapes = {
        "wsd": lambda done: 1.0 - jnp.sqrt(done),
        "cosine": lambda done: 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
        "linear": lambda done: 1.0 - done,
    }
    shape = shapes[config.name]

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rising = jnp.minimum(1.0, (count + 1.0) / max(warmup, 1))
        done = jnp.clip((count - (steps - decay)) / max(decay, 1), 0.0, 1.0)
        return learning_rate * rising * shape(done)

    return schedule


def make_optimizer(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, steps: int
) -> optax.GradientTransformation:
    """Return clipping by the global norm (`clip = 0`: none), then AdamW or StableAdamW.

    Weight decay is multiplied by the learning rate, and leaves norms and biases alone. ModernBERT
    quotes decay without that factor: its 1e-5 at a learning rate of 5e-4 is 0.02 here.
    """
    rate = make_schedule(schedule, optimizer.learning_rate, steps)
    settings = {
        "b1": optimizer.b1,
        "b2": optimizer.b2,
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "mask": decay_mask,
    }
    update = {"adamw": optax.adamw, "stable_adamw": stable_adamw}[optimizer.name](rate, **settings)
    if optimizer.clip:
        return optax.chain(optax.clip_by_global_norm(optimizer.clip), update)
    return update


def decay_mask(params: Any) -> Any:
    """Return which parameters weight decay touches: all but norms and biases, by their path.

    The shape does not tell: the bias of `Wqkv` is `[3, heads, head_dim]`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not _NO_DECAY.search(leaf_path(path)), params
    )


class StableAdamWState(NamedTuple):
    """Number of updates done, and the debiased moments, shaped like the parameters."""

    step: jax.Array
    mu: Any
    nu: Any


def stable_adamw(
    learning_rate: optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    mask: Any = None,
) -> optax.GradientTransformation:
    """AdamW whose learning rate is lowered, tensor by tensor, where the second moment is outdated.

    Algorithm 2 of Wortsman et al. 2023 (arXiv 2304.13013), with update clipping from Adafactor
    (Shazeer and Stern 2018). For update t with gradient g and learning rate a:
    beta_t = beta (1 - beta^(t-1)) / (1 - beta^t) for both moments, so they need no other debiasing;
    v = beta1_t v + (1 - beta1_t) g, u = beta2_t u + (1 - beta2_t) g^2;
    RMS = sqrt(mean(g^2 / max(u, eps^2))), eta = a / max(1, RMS);
    theta = theta - eta (weight_decay theta + v / (sqrt(u) + eps)).
    """

    def init(params: Any) -> StableAdamWState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return StableAdamWState(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(grads: Any, state: StableAdamWState, params: Any = None) -> Any:
        count = state.step + 1
        beta1, beta2 = _debiased(b1, count), _debiased(b2, count)
        mu = jax.tree.map(lambda v, g: beta1 * v + (1 - beta1) * g, state.mu, grads)
        nu = jax.tree.map(lambda u, g: beta2 * u + (1 - beta2) * g * g, state.nu, grads)
        decays = mask(params) if mask else jax.tree.map(lambda _: True, params)
        rate = learning_rate(state.step)

        def change(g: jax.Array, v: jax.Array, u: jax.Array, theta: jax.Array, d: bool) -> Any:
            rms = jnp.sqrt(jnp.mean(g * g / jnp.maximum(u, eps**2)))
            decay = weight_decay * theta if d else 0.0
            return -rate / jnp.maximum(1.0, rms) * (decay + v / (jnp.sqrt(u) + eps))

        changes = jax.tree.map(change, grads, mu, nu, params, decays)
        return changes, StableAdamWState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _debiased(beta: float, count: jax.Array) -> jax.Array:
    power = jnp.power(beta, count.astype(jnp.float32))
    return (beta - power) / (1.0 - power)


def _updates(amount: float, steps: int) -> int:
    """A number below 1 is a fraction of the run, any other a number of updates."""
    return round(amount * steps) if amount < 1 else math.ceil(amount)
