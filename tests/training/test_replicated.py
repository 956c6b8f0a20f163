"""The pmap step is the pjit step: same losses, same state, same treatment of uneven targets."""

import jax
import numpy as np
import optax
import pytest
from batches import UNEVEN, make_batch, make_model

from mlmjax.errors import InputError
from mlmjax.parallel.sharding import make_mesh
from mlmjax.training.optimizer import decay_mask
from mlmjax.training.step import create_train_state, make_replicated_step, make_train_step


def take_steps(step, state, batches):
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss_sum"]) / float(metrics["loss_count"]))
    return state, losses


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pmap_is_pjit(accumulate):
    batches = [make_batch(np.roll(UNEVEN * accumulate, k), seed=k) for k in range(20 // accumulate)]
    optimizer = optax.adamw(1e-4, mask=decay_mask)
    results = {}
    for make_step, mesh in ((make_train_step, None), (make_replicated_step, {"data": 8})):
        mesh = None if mesh is None else make_mesh(mesh)
        graphdef, state = create_train_state(make_model(), optimizer, mesh=mesh)
        layout = jax.tree.map(lambda x: x.sharding, state)
        step = make_step(graphdef, optimizer, accumulate=accumulate)
        state, losses = take_steps(step, state, batches)
        assert jax.tree.map(lambda x: x.sharding, state) == layout
        results[make_step] = (jax.device_get(state), losses)
    (one, losses), (eight, found) = results.values()
    assert losses[0] != losses[-1]
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    # AdamW divides by the second moment's root, so the parameters are compared on its scale.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), one, eight)


def test_a_batch_without_targets_changes_nothing_but_the_step():
    optimizer = optax.adamw(1e-2)
    graphdef, state = create_train_state(make_model(), optimizer, mesh=make_mesh({"data": 8}))
    before = jax.device_get(state)
    state, metrics = make_replicated_step(graphdef, optimizer)(state, make_batch([0] * 8))
    jax.tree.map(np.testing.assert_array_equal, before.params, jax.device_get(state.params))
    assert int(state.step) == 1
    assert float(metrics["loss_count"]) == 0


def test_rows_must_divide():
    optimizer = optax.adamw(1e-2)
    graphdef, state = create_train_state(make_model(), optimizer, mesh=make_mesh({"data": 8}))
    with pytest.raises(InputError, match="multiple of 8"):
        make_replicated_step(graphdef, optimizer)(state, make_batch([*UNEVEN, 1]))
