from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import SEQ, SIZES, UNEVEN, make_batch, make_model
from flax import nnx

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
)

MODEL = make_model()
OPTIMIZER = optax.adamw(1e-4, mask=decay_mask)
GRAPHDEF = nnx.split(MODEL)[0]


# One step for all tests, because compiling takes longer than everything they do.
compiled, replicated_step = (
    cache(partial(make, GRAPHDEF, OPTIMIZER)) for make in (make_train_step, make_replicated_step)
)
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
WAYS = pytest.mark.parametrize(
    ("make", "sizes"), [(compiled, None), (replicated_step, {"data": 8})], ids=["pjit", "pmap"]
)


def new_state(sizes=None):
    mesh = make_mesh(sizes) if sizes else None
    return create_train_state(MODEL, OPTIMIZER, mesh=mesh)[1]


def pairs_of(state, expected):
    return zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)


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


@pytest.mark.parametrize(
    ("make", "options", "sizes"),
    [
        pytest.param(compiled, {}, {"data": 8}, marks=pytest.mark.long),
        (compiled, {}, CUBE),
        (replicated_step, {"accumulate": 2}, {"data": 8}),
    ],
)
def test_eight_devices_are_one_device(one_device, make, options, sizes):
    state = new_state(sizes)
    before = jax.tree.map(lambda x: x.sharding, state)
    state, losses = take_steps(state, make(**options))
    np.testing.assert_allclose(losses, one_device[1], rtol=1e-5)
    for leaf, sharding in pairs_of(state, before):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    # AdamW divides by the second moment's root, so the parameters are compared on its scale.
    for found, expected in pairs_of(state, one_device[0]):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)
    kernel = state.opt_state[0].mu["model"]["layers"][0]["mlp"]["Wi"]["weight"][...]
    parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size * parts == kernel.size


@WAYS
def test_accumulation_is_the_large_batch(make, sizes):
    batch = make_batch(UNEVEN)
    large, expected = compiled()(new_state(), batch)
    state, metrics = make(accumulate=2)(new_state(sizes), batch)
    assert expected["loss_count"] == sum(UNEVEN)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    # The first moment is the gradient itself; what Adam makes of it would hide a wrong factor.
    found, known = ((one.params, one.opt_state[0].mu) for one in (state, large))
    for a, b in pairs_of(found, known):
        assert np.linalg.norm(np.asarray(a) - b) <= 1e-6 * np.linalg.norm(b)


@WAYS
def test_an_update_without_targets_changes_nothing_but_the_step(make, sizes):
    step = make(accumulate=2)
    state, _ = step(new_state(sizes), make_batch(UNEVEN))
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, make_batch([0] * 16))
    assert metrics["loss_sum"] == metrics["loss_count"] == metrics["grad_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, state, before._replace(step=2))


@pytest.mark.parametrize("sizes", [None, CUBE])
def test_the_state_is_donated_and_the_model_is_not(sizes):
    weights = jax.tree.map(np.array, nnx.state(MODEL, nnx.Param))
    state = new_state(sizes)
    new, _ = compiled()(state, make_batch(UNEVEN))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(MODEL, nnx.Param), weights)


def test_eval_step_agrees_with_the_train_step_and_returns_each_target():
    state, batch = new_state(), make_batch(UNEVEN)
    found = make_eval_step(GRAPHDEF)(state.params, batch)
    _, metrics = compiled()(state, batch)
    for name in metrics.keys() - {"grad_norm", "update_norm", "skipped"}:
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-6, err_msg=name)
    used = batch.target_ids >= 0
    assert found["correct"].shape == used.shape
    np.testing.assert_array_equal(found["loss"] > 0, used)


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


@pytest.mark.parametrize("make", [compiled, replicated_step])
def test_rows_that_cannot_be_divided_are_rejected(make):
    with pytest.raises(InputError, match="make batch_size a multiple of 16"):
        make(accumulate=2)(new_state({"data": 8}), make_batch(UNEVEN[:8]))


def test_a_model_with_other_state_is_rejected():
    model = make_model(1)
    model.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(1))
    with pytest.raises(InputError, match="set the dropout rates to 0"):
        create_train_state(model, optax.sgd(0.1))


def compile_gradient(remat="none", length=SEQ, **sizes):
    """Compile a gradient of two rows of this length through the encoder."""
    config = ModelConfig.from_hf(SIZES | sizes)
    model = nnx.eval_shape(lambda: ModernBertForMaskedLM(config, rngs=nnx.Rngs(0), remat=remat))
    graphdef, params = nnx.split(model, nnx.Param)
    token = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def total(params, ids, segments, positions):
        return nnx.merge(graphdef, params).encode(ids, segments, positions).sum()

    return jax.jit(jax.grad(total)).lower(params, *[token] * 3).compile()


def test_work_of_a_gradient_is_linear_in_layers():
    """On a CPU the compiler would add up the residual stream again for each of its users."""
    few, more, most = (
        compile_gradient(num_hidden_layers=n, global_attn_every_n_layers=1).cost_analysis()["flops"]
        for n in (2, 3, 4)
    )
    assert (most - more) / (more - few) == pytest.approx(1, abs=1e-3)


LONG = 8192


def gradient_memory(remat, layers, intermediate):
    """Return the bytes of temporary arrays that a gradient needs."""
    sizes = {"intermediate_size": intermediate, "num_hidden_layers": layers, "hidden_size": 64}
    return compile_gradient(remat, LONG, **sizes).memory_analysis().temp_size_in_bytes


def test_a_gradient_never_holds_the_scores_of_all_pairs():
    """Those of one layer, of two rows and two heads, would take twice as much as all the rest."""
    assert gradient_memory("none", 3, 256) < 2 * 2 * LONG**2 * 4 / 2


def test_remat_saves_most_of_the_memory():
    none, dots, layer = (gradient_memory(remat, 5, 512) for remat in ("none", "dots", "layer"))
    assert layer < 0.4 * none  # Blocks of attention are computed again in any case.
    assert layer < dots < 0.75 * none


def test_a_decoder_of_its_own_is_trained_and_sharded():
    config = ModelConfig.from_hf({**SIZES, "num_hidden_layers": 1, "tie_word_embeddings": False})
    model = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0), attention="dense")
    graphdef, state = create_train_state(model, OPTIMIZER, mesh=make_mesh(CUBE))
    before = np.asarray(state.params["decoder"]["weight"][...])
    state, _ = make_train_step(graphdef, OPTIMIZER)(state, make_batch(UNEVEN))
    decoder = state.params["decoder"]["weight"][...]
    assert decoder.addressable_shards[0].data.size * 4 == decoder.size
    assert (np.asarray(decoder) != before).any(axis=1).all()  # every word is in each softmax
