import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmjax.data.batch import UNUSED, Batch
from mlmjax.parallel.sharding import batch_sharding, make_mesh
from mlmjax.training import loss as loss_module
from mlmjax.training.loss import summarize, target_losses

ROWS, SEQ, HIDDEN, VOCAB, WIDTH = 8, 12, 16, 40, 7


class Head(nnx.Module):
    """The part of a model the loss uses, with parameters it does not use."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.words = nnx.Param(jnp.asarray(rng.normal(size=(VOCAB, HIDDEN)), jnp.float32))
        self.bias = nnx.Param(jnp.asarray(rng.normal(size=VOCAB), jnp.float32))
        self.unused = nnx.Param(jnp.ones(3))

    def mlm_logits(self, hidden):
        return jnp.tanh(hidden) @ self.words[...].T + self.bias[...][None, None]


def make_batch(counts, seed=0):
    """Targets at random places, `counts[row]` of them in each row, filled from the left."""
    rng = np.random.default_rng(seed)
    positions = np.full((len(counts), WIDTH), UNUSED, np.int32)
    ids, objective = positions.copy(), positions.copy()
    for row, count in enumerate(counts):
        positions[row, :count] = np.sort(rng.choice(SEQ, count, replace=False))
        ids[row, :count] = rng.integers(0, VOCAB, count)
        objective[row, :count] = rng.integers(0, 3, count)
    tokens = np.zeros((len(counts), SEQ), np.int32)
    return Batch(tokens, tokens, tokens, positions, ids, objective)


def make_hidden(rows=ROWS, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, SEQ, HIDDEN)), jnp.float32)


def dense(model, hidden, batch):
    """Cross-entropy of every target from the logits of every position."""
    logp = jax.nn.log_softmax(model.mlm_logits(hidden))
    used = batch.target_ids >= 0
    rows = np.arange(len(used))[:, None]
    losses = -logp[rows, jnp.maximum(batch.target_positions, 0), jnp.maximum(batch.target_ids, 0)]
    return jnp.where(used, losses, 0.0), jnp.argmax(logp, axis=-1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", {"cpu": 5})


@jax.jit
def both_losses(params, hidden, batch):
    """Return our loss, and both losses with their gradients; one program for all batches."""
    graphdef = nnx.split(nnx.eval_shape(Head))[0]

    def ours(params, hidden):
        return target_losses(nnx.merge(graphdef, params), hidden, batch)[0]

    def reference(params, hidden):
        return jnp.sum(dense(nnx.merge(graphdef, params), hidden, batch)[0])

    found, expected = (
        jax.value_and_grad(loss, argnums=(0, 1))(params, hidden) for loss in (ours, reference)
    )
    return (ours(params, hidden), found), expected


@pytest.mark.parametrize(
    "counts",
    [[3, 0, 7, 1, 2, 0, 5, 4], [7] * 8, [0, 0, 0, 0, 0, 0, 0, 1], [5, 0, 0, 0, 0, 0, 0, 0]],
    ids=["uneven", "full", "one", "one chunk exactly"],
)
def test_loss_and_gradients_are_those_of_dense_logits(counts):
    inputs = nnx.state(Head()), make_hidden(), make_batch(counts)
    (value, (found, found_grads)), (expected, grads) = both_losses(*inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))
    # The value alone takes another path than the value with its gradient.
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@jax.jit
def everything(params, hidden, batch):
    model = nnx.merge(nnx.split(nnx.eval_shape(Head))[0], params)
    found = target_losses(model, hidden, batch)
    return found, summarize(*found, batch), dense(model, hidden, batch)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, WIDTH), min_size=ROWS, max_size=ROWS), st.integers(0, 10**6))
def test_every_target_is_counted_once_under_its_objective(counts, seed):
    batch, hidden = make_batch(counts, seed), make_hidden(seed=seed)
    found, metrics, (expected, best) = everything(nnx.state(Head()), hidden, batch)
    loss_sum, losses, correct = found
    used = batch.target_ids >= 0
    at = np.take_along_axis(np.asarray(best), np.maximum(batch.target_positions, 0), 1)
    right = used & (at == batch.target_ids)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(correct, right)
    np.testing.assert_allclose(loss_sum, np.sum(expected), rtol=1e-6)
    assert metrics["loss_count"] == sum(counts)
    for number, name in enumerate(("atp", "dummy", "mlm")):
        mine = used & (batch.target_objective == number)
        assert metrics[f"{name}_count"] == np.count_nonzero(mine)
        assert metrics[f"{name}_correct"] == np.count_nonzero(right & mine)
        total = np.sum(np.where(mine, expected, 0))
        np.testing.assert_allclose(metrics[f"{name}_loss_sum"], total, rtol=1e-5)


def test_without_targets_everything_is_zero():
    inputs = nnx.state(Head()), make_hidden(), make_batch([0] * ROWS)
    found = everything(*inputs)[:2], both_losses(*inputs)[0]
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(found))


def test_of_equal_logits_the_smallest_id_is_the_prediction():
    model, hidden = Head(), make_hidden()
    for parameter in (model.words, model.bias):
        parameter[...] = np.zeros(parameter.shape, np.float32)
    batch = make_batch([2] * ROWS)
    batch.target_ids[:, :2] = 0, 1
    _, losses, correct = everything(nnx.state(model), hidden, batch)[0]
    np.testing.assert_array_equal(correct[:, :2], [[True, False]] * ROWS)
    np.testing.assert_allclose(losses[:, :2], np.log(VOCAB), rtol=1e-6)
    # A broken model gets nothing right.
    model.bias[...] = np.full(VOCAB, np.nan, np.float32)
    loss_sum, _, correct = everything(nnx.state(model), hidden, batch)[0]
    assert np.isnan(loss_sum)
    assert not correct.any()


def test_rows_on_several_devices_give_the_same_sums():
    graphdef, params = nnx.split(Head())
    hidden, batch = make_hidden(), make_batch([3, 0, 7, 1, 2, 0, 5, 4])

    def value(hidden, batch):
        return target_losses(nnx.merge(graphdef, params), hidden, batch)[0]

    expected = jax.jit(jax.value_and_grad(value))(hidden, batch)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put((hidden, batch), batch_sharding(mesh))
        found = jax.jit(jax.value_and_grad(value))(*placed)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)
