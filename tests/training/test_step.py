from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import SEQ, WIDTH, make_batch, make_model
from batches import UNEVEN as EIGHT
from flax import nnx

from mlmjax.data.batch import Batch
from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import ModernBertForMaskedLM
from mlmjax.parallel.sharding import make_mesh
from mlmjax.training.optimizer import decay_mask
from mlmjax.training.step import (
    create_train_state,
    make_eval_step,
    make_replicated_step,
    make_train_step,
    masked_token_loss,
)

UNEVEN = EIGHT * 2  # Rows for micro-batches on eight devices; every batch has this shape.
MODEL = make_model()
OPTIMIZER = optax.adamw(1e-4, mask=decay_mask)
GRAPHDEF = nnx.split(MODEL)[0]


@cache
def compiled(accumulate=1):
    """One step for all tests, because compiling takes longer than everything they do."""
    return make_train_step(GRAPHDEF, OPTIMIZER, accumulate=accumulate)


def new_state(mesh=None):
    return create_train_state(MODEL, OPTIMIZER, mesh=mesh)[1]


def take_steps(state, step):
    losses = []
    for number in range(6):
        state, metrics = step(state, make_batch(np.roll(UNEVEN, number), seed=number))
        losses.append(float(metrics["loss_sum"]) / float(metrics["loss_count"]))
    return state, losses


@pytest.fixture(scope="module")
def one_device():
    """The state after some updates on one device, and their losses."""
    state, losses = take_steps(new_state(), compiled())
    assert losses[0] != losses[-1]
    return jax.device_get(state), losses


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, "pmap"])
def test_eight_devices_are_one_device(one_device, sizes):
    mesh = make_mesh({"data": 8} if sizes == "pmap" else sizes)
    step = make_replicated_step(GRAPHDEF, OPTIMIZER) if sizes == "pmap" else compiled()
    state = new_state(mesh)
    before = jax.tree.leaves(jax.tree.map(lambda x: x.sharding, state))
    state, losses = take_steps(state, step)
    np.testing.assert_allclose(losses, one_device[1], rtol=1e-5)
    for leaf, sharding in zip(jax.tree.leaves(state), before, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    # AdamW divides by the second moment's root, so the parameters are compared on its scale.
    for found, expected in zip(*map(jax.tree.leaves, (state, one_device[0])), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)
    if sizes != "pmap":
        kernel = state.opt_state[0].mu["model"]["layers"][0]["mlp"]["Wi"]["weight"][...]
        parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
        assert kernel.addressable_shards[0].data.size * parts == kernel.size


@pytest.mark.parametrize("replicated", [False, True], ids=["pjit", "pmap"])
def test_accumulation_is_the_large_batch(replicated):
    batch = make_batch(UNEVEN)
    large, expected = compiled()(new_state(), batch)
    if replicated:
        step = make_replicated_step(GRAPHDEF, OPTIMIZER, accumulate=2)
        state, metrics = step(new_state(make_mesh({"data": 8})), batch)
    else:
        state, metrics = compiled(2)(new_state(), batch)
    assert expected["loss_count"] == sum(UNEVEN)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    # The first moment is the gradient itself; what Adam makes of it would hide a wrong factor.
    for a, b in zip(
        jax.tree.leaves((state.params, state.opt_state[0].mu)),
        jax.tree.leaves((large.params, large.opt_state[0].mu)),
        strict=True,
    ):
        assert np.linalg.norm(np.asarray(a) - b) <= 1e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("replicated", [False, True], ids=["pjit", "pmap"])
def test_an_update_without_targets_changes_nothing_but_the_step(replicated):
    state = new_state(make_mesh({"data": 8}) if replicated else None)
    if replicated:
        step = make_replicated_step(GRAPHDEF, OPTIMIZER)
    else:
        step = compiled()
        state, _ = step(state, make_batch(UNEVEN))
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, make_batch([0] * 16))
    assert metrics["loss_sum"] == metrics["loss_count"] == metrics["grad_norm"] == 0
    assert state.step == before.step + 1
    for a, b in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((before.params, before.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_the_state_is_donated_and_the_model_is_not():
    weights = jax.tree.map(np.array, nnx.state(MODEL, nnx.Param))
    for mesh in (None, make_mesh({"data": 8})):
        state = new_state(mesh)
        new, _ = compiled()(state, make_batch(UNEVEN))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))
        now = nnx.state(MODEL, nnx.Param)
        for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(weights), strict=True):
            np.testing.assert_array_equal(a, b)


def test_eval_step_agrees_with_the_train_step_and_returns_each_target():
    state, batch = new_state(), make_batch(UNEVEN)
    found = make_eval_step(nnx.split(MODEL)[0])(state.params, batch)
    _, metrics = compiled()(state, batch)
    for name in metrics.keys() - {"grad_norm", "update_norm", "skipped"}:
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-6, err_msg=name)
    used = batch.target_ids >= 0
    assert found["loss"].shape == found["correct"].shape == used.shape
    assert not np.any(np.asarray(found["loss"])[~used])
    assert (np.asarray(found["loss"])[used] > 0).all()


def test_a_custom_loss():
    def squares(model, batch):
        loss = jnp.sum(jnp.square(model.encode(batch.input_ids, batch.segment_ids)))
        return loss, {"loss_sum": loss, "loss_count": jnp.float32(batch.input_ids.size)}

    optimizer = optax.sgd(0.1)
    graphdef, state = create_train_state(make_model(1), optimizer)
    step = make_train_step(graphdef, optimizer, accumulate=2, loss=squares)
    state, first = step(state, make_batch(UNEVEN))
    _, second = step(state, make_batch(UNEVEN))
    assert set(first) == {"loss_sum", "loss_count", "grad_norm", "update_norm", "skipped"}
    assert second["loss_sum"] < first["loss_sum"]


@pytest.mark.parametrize("make", [make_train_step, make_replicated_step], ids=["pjit", "pmap"])
def test_rows_that_cannot_be_divided_are_refused(make):
    state = new_state(make_mesh({"data": 8}))
    with pytest.raises(InputError, match="make batch_size a multiple of 16"):
        make(GRAPHDEF, OPTIMIZER, accumulate=2)(state, make_batch(EIGHT))


def test_a_model_with_other_state_is_refused():
    model = make_model(1)
    model.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(1))
    with pytest.raises(InputError, match="set the dropout rates to 0"):
        create_train_state(model, optax.sgd(0.1))


def compile_gradient(model, rows, length):
    graphdef, params = nnx.split(model, nnx.Param)
    token, target = (jax.ShapeDtypeStruct((rows, n), jnp.int32) for n in (length, WIDTH))

    def loss(params, batch):
        return masked_token_loss(nnx.merge(graphdef, params), batch)

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    return gradient.lower(params, Batch(*[token] * 3, *[target] * 3)).compile()


def test_work_of_a_gradient_is_linear_in_layers():
    """On a CPU the compiler would add up the residual stream again for each of its users."""

    def flops(layers):
        model = nnx.eval_shape(lambda: make_model(layers))
        return compile_gradient(model, 8, SEQ).cost_analysis()["flops"]

    few, more, most = map(flops, (2, 5, 8))
    assert (most - more) / (more - few) == pytest.approx(1, abs=1e-3)


@cache
def gradient_memory(rows, length, remat="none"):
    """Return the bytes of temporary arrays that a gradient of six layers needs."""
    config = MODEL.config.to_hf() | {"hidden_size": 64, "intermediate_size": 96}
    config = ModelConfig.from_hf({**config, "layer_types": None, "num_hidden_layers": 6})
    model = nnx.eval_shape(lambda: ModernBertForMaskedLM(config, rngs=nnx.Rngs(0), remat=remat))
    return compile_gradient(model, rows, length).memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_tokens():
    assert gradient_memory(2, 4096) < 4.4 * gradient_memory(2, 1024)


def test_remat_saves_most_of_the_memory():
    none, dots, layer = (gradient_memory(2, 4096, remat) for remat in ("none", "dots", "layer"))
    assert layer < 0.7 * none  # Blocks of attention are computed again in any case.
    assert layer < dots < 0.9 * none
