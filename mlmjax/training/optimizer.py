"""Make optimizers and learning-rate schedules from the run configuration."""

import re
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlmjax.config.run import OptimizerConfig, RunConfig, ScheduleConfig, updates_of
from mlmjax.errors import InputError
from mlmjax.parallel.sharding import leaf_path, named_leaves

_NO_DECAY = re.compile(r"(^|\.)(\w*norm\.\w+|\w*bias)$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:^|\.)embeddings\.")

SPIKE_WARMUP = 10
"""Updates to make before a gradient norm can count as a spike."""


def make_schedule(config: ScheduleConfig, learning_rate: float, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates done before.

    Warm-up is linear: the first update has `learning_rate / warmup`, update number `warmup` the
    full rate. Then `wsd` is constant until the last `decay` updates, which follow 1 - sqrt (Hägele
    et al. 2024, arXiv 2405.18392). `cosine` and `linear` fall over all that remains and do not use
    `decay`. The first update of a decline has the full rate and the last one a rate above zero, so
    no update is wasted. `warmup` and `decay` below 1 are fractions of `steps`.

    Raises `InputError` if warm-up and decay together are longer than the run.
    """
    warmup = updates_of(config.warmup, steps)
    decay = updates_of(config.decay, steps) if config.name == "wsd" else steps - warmup
    if warmup + decay > steps or decay < 0:
        raise InputError(
            f"schedule: warmup {warmup} + decay {max(decay, 0)} updates are more than steps "
            f"{steps}; make one of them shorter"
        )
    shape = {
        "wsd": lambda done: 1.0 - jnp.sqrt(done),
        "cosine": lambda done: 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
        "linear": lambda done: 1.0 - done,
    }[config.name]

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rising = jnp.minimum(1.0, (count + 1.0) / max(warmup, 1))
        done = jnp.clip((count - (steps - decay)) / max(decay, 1), 0.0, 1.0)
        return learning_rate * rising * shape(done)

    return schedule


def rates_at(schedule: optax.Schedule, counts: Any) -> np.ndarray:
    """Return the learning rate after these numbers of updates, float32, as host values."""
    with jax.transfer_guard("allow"):  # A few numbers, whose constants are moved implicitly.
        return np.asarray(schedule(counts))


@lru_cache(maxsize=8)  # so that runs of one configuration share compiled programs
def make_optimizer(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, steps: int
) -> optax.GradientTransformation:
    """Return the optimizer of a run: `make_update` at the rate of `make_schedule`."""
    rate = make_schedule(schedule, optimizer.learning_rate, steps)
    return make_update(optimizer, rate, optimizer.weight_decay)


def optimizer_of(config: RunConfig) -> optax.GradientTransformation:
    """Return the optimizer of a run, which keeps the best parameters if it may stop early."""
    make = make_optimizer if config.evaluation.patience is None else _make_keeping_optimizer
    return make(config.optimizer, config.schedule, config.steps)


@lru_cache(maxsize=8)
def _make_keeping_optimizer(*parts: Any) -> optax.GradientTransformation:
    return keep_best(make_optimizer(*parts))


def make_update(
    optimizer: OptimizerConfig, learning_rate: optax.ScalarOrSchedule, weight_decay: Any
) -> optax.GradientTransformation:
    """Return clipping by the global norm (`clip = 0`: none), then AdamW or StableAdamW.

    Weight decay is multiplied by the learning rate, and skips norms and biases. ModernBERT
    quotes decay without that factor: its 1e-5 at a learning rate of 5e-4 is 0.02 here. With
    `layer_decay` the rate falls towards the embeddings (`scale_by_depth`). With `ema` the state
    also holds averaged parameters (`with_average`). With `skip_spikes` some updates are not made
    (`skip_spikes`).
    """
    make = {"adamw": optax.adamw, "stable_adamw": stable_adamw}[optimizer.name]
    settings = {"b1": optimizer.b1, "b2": optimizer.b2, "eps": optimizer.eps}
    parts = [make(learning_rate, **settings, weight_decay=weight_decay, mask=decay_mask)]
    if optimizer.clip:
        parts.insert(0, optax.clip_by_global_norm(optimizer.clip))
    if optimizer.layer_decay != 1:
        parts.append(scale_by_depth(optimizer.layer_decay))
    update = optax.chain(*parts) if len(parts) > 1 else parts[0]
    if optimizer.ema:
        update = with_average(update, optimizer.ema)
    return skip_spikes(update, optimizer.skip_spikes) if optimizer.skip_spikes else update


def decay_mask(params: Any) -> Any:
    """Return which parameters weight decay changes: by their path, all but norms and biases.

    Shapes do not say which: the bias of `Wqkv` is `[3, heads, head_dim]`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not _NO_DECAY.search(leaf_path(path)), params
    )


def scale_by_depth(layer_decay: float) -> optax.GradientTransformation:
    """Multiply the update of a parameter by `layer_decay` for each layer above it.

    Layer-wise learning-rate decay (ELECTRA, arXiv 2003.10555): the heads and the final norm keep
    the full rate, the last layer has `layer_decay` of it, and the embeddings, which are also the
    decoder, have `layer_decay ** (layers + 1)`.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> Any:
        found = map(_LAYER.search, named_leaves(updates))
        layers = 1 + max((int(layer[1]) for layer in found if layer), default=0)

        def scale(path: Any, change: jax.Array) -> jax.Array:
            layer = _LAYER.search(name := leaf_path(path))
            embeds = _EMBEDDINGS.search(name) is not None
            above = layers - int(layer[1]) if layer else (layers + 1) * embeds
            return change * layer_decay**above

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class AverageState(NamedTuple):
    """The updates done, the averaged parameters, and the state of the optimizer inside."""

    step: jax.Array
    average: Any
    inner: Any


def with_average(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """Keep an exponential moving average of the parameters.

    After update t, average = d average + (1 - d) parameters, d = min(decay, (1 + t) / (10 + t)).
    The smaller d at first keeps the initial parameters from dominating a short run.
    """

    def init(params: Any) -> AverageState:
        average = jax.tree.map(jnp.copy, params)
        return AverageState(jnp.zeros([], jnp.int32), average, optimizer.init(params))

    def update(grads: Any, state: AverageState, params: Any = None) -> Any:
        updates, inner = optimizer.update(grads, state.inner, params)
        count = state.step + 1
        t = count.astype(jnp.float32)
        slow = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
        average = jax.tree.map(
            lambda old, theta, change: slow * old + (1.0 - slow) * (theta + change),
            state.average,
            params,
            updates,
        )
        return updates, AverageState(count, average, inner)

    return optax.GradientTransformation(init, update)


def averaged_parameters(params: Any, opt_state: Any) -> Any:
    """Return the averaged parameters if the optimizer keeps them, else the parameters."""
    found = _within(opt_state, AverageState)
    return params if found is None else found.average


class BestState(NamedTuple):
    """The parameters of the lowest validation loss, and the state inside.

    `loss` is that loss and `step` the updates before it. `since` counts the validations after it,
    and `validated` is the step of the last one.
    """

    params: Any
    loss: jax.Array
    step: jax.Array
    since: jax.Array
    validated: jax.Array
    inner: Any


def keep_best(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Add `BestState` to an optimizer, which its updates do not change.

    So it is sharded, saved and restored with the state of the run.
    """

    def init(params: Any) -> BestState:
        zero = jnp.zeros([], jnp.int32)
        return BestState(
            params=jax.tree.map(jnp.copy, params),
            loss=jnp.full([], jnp.inf, jnp.float32),
            step=zero,
            since=jnp.copy(zero),
            validated=jnp.copy(zero),
            inner=optimizer.init(params),
        )

    def update(grads: Any, state: BestState, params: Any = None) -> Any:
        updates, inner = optimizer.update(grads, state.inner, params)
        return updates, state._replace(inner=inner)

    return optax.GradientTransformation(init, update)


def best_parameters(params: Any, opt_state: Any) -> Any:
    """Return the parameters of the lowest validation loss, or else `averaged_parameters`."""
    if isinstance(opt_state, BestState):
        return opt_state.params
    return averaged_parameters(params, opt_state)


def _within(opt_state: Any, kind: type) -> Any:
    """Return the state of this kind, which others may be around; None if there is none."""
    while opt_state is not None and not isinstance(opt_state, kind):
        inner = getattr(opt_state, "inner_state", None)  # of `optax.inject_hyperparams`
        opt_state = getattr(opt_state, "inner", inner)
    return opt_state


class SpikeState(NamedTuple):
    """The mean gradient norm, the numbers of updates made and skipped, and the state inside."""

    mean: jax.Array
    made: jax.Array
    skipped: jax.Array
    inner: Any


def skip_spikes(
    optimizer: optax.GradientTransformation, factor: float
) -> optax.GradientTransformation:
    """Skip updates whose gradient norm is above `factor` times the usual one, or not finite.

    The usual norm is the exponential mean over the updates made before: the first norm, then with
    decay min(0.99, (1 + t) / (10 + t)) after t of them. The first `SPIKE_WARMUP` updates are
    skipped only if they are not finite. A skipped update changes neither the parameters nor the
    state inside. All this is in the state, so a resumed run skips the same updates.
    """

    def init(params: Any) -> SpikeState:
        zero = jnp.zeros([], jnp.int32)
        return SpikeState(jnp.zeros([]), zero, jnp.copy(zero), optimizer.init(params))

    def update(grads: Any, state: SpikeState, params: Any = None) -> Any:
        norm = optax.tree.norm(grads)
        usual = (state.made < SPIKE_WARMUP) | (norm <= factor * state.mean)
        makes = jnp.isfinite(norm) & usual
        updates, inner = optimizer.update(grads, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(makes, u, jnp.zeros_like(u)), updates)
        inner = jax.tree.map(lambda new, old: jnp.where(makes, new, old), inner, state.inner)
        t = state.made.astype(jnp.float32)
        decay = jnp.where(state.made == 0, 0.0, jnp.minimum(0.99, (1.0 + t) / (10.0 + t)))
        mean = jnp.where(makes, decay * state.mean + (1.0 - decay) * norm, state.mean)
        made = state.made + makes.astype(jnp.int32)
        skipped = state.skipped + (~makes).astype(jnp.int32)
        return updates, SpikeState(mean, made, skipped, inner)

    return optax.GradientTransformation(init, update)


def skipped_updates(opt_state: Any) -> jax.Array:
    """Return how many updates were skipped as spikes, int32 `[]`."""
    found = _within(opt_state, SpikeState)
    return jnp.zeros([], jnp.int32) if found is None else found.skipped


class StableAdamWState(NamedTuple):
    """The updates done, and the debiased moments, shaped like the parameters."""

    step: jax.Array
    mu: Any
    nu: Any


def stable_adamw(
    learning_rate: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: Any, mask: Any
) -> optax.GradientTransformation:
    """Return AdamW with a lower learning rate for tensors whose second moment is outdated.

    Algorithm 2 of Wortsman et al. 2023 (arXiv 2304.13013), with update clipping from Adafactor
    (Shazeer and Stern 2018). For update t with gradient g and learning rate a:
    beta_t = beta (1 - beta^(t-1)) / (1 - beta^t) for both moments, which debiases them;
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
        rate, decays = learning_rate(state.step), mask(params)

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
