"""The train step under `pmap`: every device holds the whole state and a part of the batch."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import optax

from mlmjax.parallel.sharding import check_rows
from mlmjax.training.loss import Metrics
from mlmjax.training.step import AnyBatch, Loss, TrainState, masked_token_loss, train_update

AXIS = "data"


def make_replicated_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    loss: Loss = masked_token_loss,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Return `step.make_train_step`, data-parallel through `jax.pmap`: same losses, same state.

    The sums and counts of all devices are added before anything is divided. The state keeps its
    layout, whole on every device of its mesh; a mesh that cuts parameters is not for this step.
    Raises `InputError` where the rows cannot be cut over `accumulate` and the devices.
    """
    update = train_update(
        graphdef,
        optimizer,
        accumulate=accumulate,
        loss=loss,
        reduce=lambda sums: jax.lax.psum(sums, AXIS),
    )
    replicated = jax.pmap(
        update, axis_name=AXIS, in_axes=(None, 0), out_axes=(None, None), donate_argnums=0
    )

    @wraps(update)
    def step(state: TrainState, batch: AnyBatch) -> tuple[TrainState, Metrics]:
        devices = jax.local_device_count()
        check_rows({"data": devices}, batch.input_ids.shape[0], accumulate)
        layout = jax.tree.map(lambda x: x.sharding, state)
        parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        state, metrics = replicated(state, parts)
        return jax.device_put(state, layout), metrics

    return step
