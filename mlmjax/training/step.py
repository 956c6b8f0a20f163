"""Make the train state and the jitted steps: pure functions of (state, batch)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, lru_cache, partial, wraps
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mlmjax.data.batch import Batch, LabelBatch
from mlmjax.errors import InputError, suggest_keywords
from mlmjax.parallel import sharding as partition
from mlmjax.parallel.processes import check_not_forked
from mlmjax.training.adapters import Patterns, joined, split_trained
from mlmjax.training.loss import (
    LossKind,
    Metrics,
    label_evaluation,
    label_loss,
    summarize,
    target_losses,
)
from mlmjax.training.optimizer import skipped_updates

AnyBatch = Batch | LabelBatch
TrainStep = Callable[..., "tuple[TrainState, Metrics]"]
"""A function of a state, a batch and the frozen parameters, if there are any."""
Loss = Callable[[Any, Any], tuple[jax.Array, Metrics]]
"""A function of model and batch: a loss sum, and metrics with `loss_sum` and `loss_count`."""


class TrainState(NamedTuple):
    """What a run carries from update to update; `step`, int32 `[]`, counts the updates done."""

    step: Any
    params: Any
    opt_state: Any


@suggest_keywords
def create_train_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, *, mesh: Mesh | None = None
) -> tuple[Any, TrainState]:
    """Split a model into `(graphdef, TrainState)`; the model itself stays usable.

    With a mesh every parameter is sharded by the rules of `parallel.sharding`. The optimizer state
    is made in shards, so no device holds a whole copy. Raises `InputError` as `parameter_sharding`.
    """
    check_not_forked()
    graphdef, params = split_parameters(model)
    return graphdef, start_state(copied(params, mesh), optimizer, mesh)


def create_frozen_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    patterns: Patterns,
    *,
    mesh: Mesh | None = None,
) -> tuple[Any, TrainState, Any]:
    """Return `create_train_state` of the parameters that patterns name, and the frozen others.

    The frozen ones are an argument of the step; None without patterns. Raises `InputError` as
    `adapters.split_trained`.
    """
    check_not_forked()
    graphdef, params = split_parameters(model)
    trained, frozen = split_trained(params, patterns)
    if frozen is not None:
        frozen = jax.device_put(frozen, partition.parameter_sharding(mesh, frozen))
    return graphdef, start_state(copied(trained, mesh), optimizer, mesh), frozen


def copied(params: Any, mesh: Mesh | None) -> Any:
    """Return copies of parameters on a mesh, which a step may donate.

    Shared buffers would take the weights away from the model that they are from.
    """
    # Copied leaf by leaf, because `device_put` may keep a shard that is already on its device.
    return jax.tree.map(
        lambda x, sharding: jax.device_put(jnp.copy(x), sharding),
        params,
        partition.parameter_sharding(mesh, params),
    )


def start_state(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> TrainState:
    """Return the state at step 0 for parameters that are on their devices."""
    sharding = jax.tree.map(lambda x: x.sharding, abstract_train_state(params, optimizer, mesh))
    # JAX keeps the program of `optimizer.init`, so another run with this optimizer shares it.
    opt_state = jax.jit(optimizer.init, out_shardings=sharding.opt_state)(params)
    return TrainState(partition.place(np.int32(0), sharding.step), params, opt_state)


def abstract_train_state(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> TrainState:
    """Return shapes, dtypes and shardings of the state of these (abstract) parameters."""
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.eval_shape(lambda p: p, params),
        jax.eval_shape(optimizer.init, params),
    )
    return partition.abstract_arrays(state, partition.state_sharding(mesh, state.params, state))


def split_parameters(model: nnx.Module) -> tuple[Any, Any]:
    """Split a model into its graph and its parameters; raises `InputError` for other state."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    for name in partition.named_leaves(rest):
        raise InputError(
            f"model: holds state that is not a parameter ({name}); training takes a model "
            "without dropout or other state: set the dropout rates to 0"
        )
    return graphdef, params


def masked_token_loss(
    model: Any, batch: Batch, kind: LossKind = "vocabulary"
) -> tuple[jax.Array, Metrics]:
    """Sum the cross-entropy over the targets; the metrics are those of `loss.summarize`."""
    metrics = target_evaluation(model, batch, kind)
    del metrics["loss"], metrics["correct"]
    return metrics["loss_sum"], metrics


def target_evaluation(model: Any, batch: Batch, kind: LossKind = "vocabulary") -> Metrics:
    """Return the metrics of `loss.summarize`, and for each target `loss` and `correct`.

    These two are float32 and bool `[batch, targets]`, and 0 for unused targets. `kind` is that of
    `loss.target_losses`.
    """
    hidden = model.encode(batch.input_ids, batch.segment_ids, batch.position_ids)
    loss_sum, losses, correct = target_losses(model, hidden, batch, kind)
    metrics = summarize(loss_sum, losses, correct, batch)
    return {**metrics, "loss": losses, "correct": correct}


@suggest_keywords
def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    loss: Loss = masked_token_loss,
) -> TrainStep:
    """Return the jitted update `(TrainState, Batch) -> (TrainState, metrics)`, its state donated.

    `accumulate` divides the rows into that many micro-batches, which are computed one after
    another. Sums and counts are added up and divided once, so the update is that of the large
    batch. A batch without any target changes only `step`. The metrics are those of `loss`, summed
    over micro-batches, and three more: `grad_norm` (of the mean loss, before clipping),
    `update_norm` (of what is added to the parameters) and `skipped` (1 for an update that
    `optimizer.skip_spikes` did not make).

    A third argument, `frozen`, holds the parameters that `state` lacks (`adapters.split_trained`).
    They have neither gradients nor optimizer state.

    Raises `InputError` if the rows cannot be divided over `accumulate` and the devices.
    """
    jitted = jax.jit(
        train_update(graphdef, optimizer, accumulate=accumulate, loss=loss), donate_argnums=0
    )

    @wraps(jitted)
    def step(state: TrainState, batch: AnyBatch, frozen: Any = None) -> tuple[TrainState, Metrics]:
        with _mesh_of(state.step) as mesh:
            return jitted(state, place_batch(batch, mesh, accumulate), frozen)

    return step


def train_update(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int,
    loss: Loss,
    reduce: Callable[[Any], Any] = lambda sums: sums,
) -> TrainStep:
    """Return the update of `make_train_step` as a pure function, not yet compiled.

    `reduce` adds up the sums (metrics and gradients) of devices that run a program each, on its own
    part of the batch.
    """

    @partial(jax.value_and_grad, has_aux=True)
    def gradient(params: Any, batch: Any, frozen: Any) -> tuple[jax.Array, Metrics]:
        return loss(nnx.merge(graphdef, joined(params, frozen)), batch)

    def train_step(state: TrainState, batch: Any, frozen: Any = None) -> tuple[TrainState, Metrics]:
        if accumulate == 1:
            (_, metrics), grads = gradient(state.params, batch, frozen)
        else:
            # Each takes every `accumulate`-th row, so each device has rows of every micro-batch.
            micro = jax.tree.map(
                lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch
            )
            first = jax.tree.map(lambda x: x[0], micro)
            shapes = jax.eval_shape(gradient, state.params, first, frozen)
            zeros = jax.tree.map(jnp.zeros_like, shapes)

            def add(total: Any, part: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradient(state.params, part, frozen)), None

            ((_, metrics), grads), _ = jax.lax.scan(add, zeros, micro)

        metrics, grads = reduce((metrics, grads))
        count = metrics["loss_count"]
        scale = 1.0 / jnp.where(count > 0, count, 1.0)  # A sum of weights may be below 1.
        grads = _keep_sharding(state.params, jax.tree.map(lambda g: g * scale, grads))
        with jax.numpy_dtype_promotion("standard"):  # Optax raises a number to an integer count.
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(count > 0, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        new_state = _keep_sharding(state.params, TrainState(state.step + 1, params, opt_state))
        skipped = skipped_updates(opt_state) - skipped_updates(state.opt_state)
        return new_state, {
            **metrics,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": jnp.where(count > 0, optax.tree.norm(updates), 0.0),
            "skipped": skipped.astype(jnp.float32),
        }

    return train_step


class Head(NamedTuple):
    """The loss that trains a head, and the function that validates it."""

    loss: Loss
    evaluate: Callable[[Any, Any], Metrics]


HEADS = {
    "mlm": Head(masked_token_loss, target_evaluation),
    "classification": Head(label_loss, label_evaluation),
}


@cache  # so that runs with one loss share compiled steps
def head_of(name: str, kind: LossKind = "vocabulary") -> Head:
    """Return the loss of a head, and its validation; `kind` is that of `loss.target_losses`."""
    loss, evaluate = (cast(Any, one) for one in HEADS[name])
    if kind == "vocabulary" or (kind == "labels" and name == "classification"):
        return Head(loss, evaluate)
    return Head(partial(loss, kind=kind), partial(evaluate, kind=kind))


def make_eval_step(
    graphdef: Any, evaluate: Callable[[Any, Any], Metrics] = target_evaluation
) -> Callable[[Any, Any], Metrics]:
    """Return the jitted function `(params, batch) -> evaluate(model, batch)` for validation."""

    def eval_step(params: Any, batch: Any) -> Metrics:
        return evaluate(nnx.merge(graphdef, params), batch)

    jitted = jax.jit(eval_step)

    @cache
    def over_processes(mesh: Mesh) -> Any:
        # A process cannot read what is on another one, so all of them get everything.
        return jax.jit(eval_step, out_shardings=partition.replicated_sharding(mesh))

    @wraps(jitted)
    def step(params: Any, batch: Any) -> Metrics:
        with _mesh_of(jax.tree.leaves(params)[0]) as mesh:
            run = over_processes(mesh) if mesh is not None and mesh.is_multi_process else jitted
            return run(params, place_batch(batch, mesh))

    return step


def place_batch(batch: Any, mesh: Mesh | None, accumulate: int = 1) -> Batch:
    """Shard a batch over `data` and `fsdp`; raises `InputError` if its rows do not divide."""
    partition.check_rows(mesh.shape if mesh else {}, batch.input_ids.shape[0], accumulate)
    if mesh is None:
        return jax.device_put(batch)
    sharding = partition.batch_sharding(mesh)
    return partition.place(batch, jax.tree.map(lambda _: sharding, batch))


@contextmanager
def _mesh_of(array: Any) -> Iterator[Mesh | None]:
    """Set the mesh an array is on, for `sharding.constrain`, and yield it."""
    mesh = None if isinstance(array, jax.core.Tracer) else partition.mesh_of(array)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield mesh


def _keep_sharding(params: Any, tree: Any) -> Any:
    """Constrain a tree to the rules, so that an update returns its state sharded as before."""
    sizes = partition.mesh_sizes()
    if not sizes:
        return tree
    specs = partition.state_specs(sizes, params, tree)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def make_replicated_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    loss: Loss = masked_token_loss,
) -> TrainStep:
    """Return `make_train_step` as a data-parallel `jax.pmap`, with the same losses and state.

    The sums and counts of all devices are added before anything is divided. The state keeps its
    layout, whole on every device of its mesh; this step takes no mesh that shards parameters.
    Raises `InputError` if the rows cannot be divided over `accumulate` and the devices.
    """
    add_up = partial(jax.lax.psum, axis_name="data")
    update = train_update(graphdef, optimizer, accumulate=accumulate, loss=loss, reduce=add_up)
    replicated = jax.pmap(
        update, axis_name="data", in_axes=(None, 0, None), out_axes=(None, None), donate_argnums=0
    )

    @wraps(update)
    def step(state: TrainState, batch: AnyBatch, frozen: Any = None) -> tuple[TrainState, Metrics]:
        devices = jax.local_device_count()
        partition.check_rows({"data": devices}, batch.input_ids.shape[0], accumulate)
        layout = jax.tree.map(lambda x: x.sharding, state)
        parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        parts = jax.device_put(parts, partition.one_each(jax.local_devices()))
        state, metrics = replicated(state, parts, frozen)
        return jax.device_put(state, layout), metrics

    return step


# Runs of one architecture and optimizer in a process share what is compiled.
shared_train_step = lru_cache(maxsize=8)(make_train_step)
shared_replicated_step = lru_cache(maxsize=8)(make_replicated_step)
shared_eval_step = lru_cache(maxsize=8)(make_eval_step)
