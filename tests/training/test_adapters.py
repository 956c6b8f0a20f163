"""Adapters and chosen parameters: what is frozen has no gradient, no optimizer state, no change."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from batches import UNEVEN, make_batch, make_model
from flax import nnx

from mlmjax.config.run import AdapterConfig, OptimizerConfig, ScheduleConfig
from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import abstract_model, parameters, with_adapter, with_classifier
from mlmjax.parallel.sharding import make_mesh, named_leaves
from mlmjax.training.adapters import joined, split_trained, trained_patterns
from mlmjax.training.optimizer import decay_mask, make_optimizer
from mlmjax.training.run.initial_model import PUBLISHED
from mlmjax.training.step import (
    create_frozen_state,
    create_train_state,
    make_replicated_step,
    make_train_step,
)

MODEL = make_model()
ADAPTED = with_adapter(MODEL, AdapterConfig(rank=2), seed=5)
PATTERNS = ("*bias", "*norm*", "model.layers.1.mlp.*")
OPTIMIZER = optax.adamw(1e-2, mask=decay_mask)


def take_steps(model, patterns, sizes=None, make=make_train_step, **options):
    """Return the state after two updates, all parameters, and the metrics of the last update."""
    mesh = make_mesh(sizes) if sizes else None
    graphdef, state, frozen = create_frozen_state(model, OPTIMIZER, patterns, mesh=mesh)
    step = make(graphdef, OPTIMIZER, **options)
    for number in range(2):
        state, metrics = step(state, make_batch(UNEVEN, seed=number), frozen)
    whole = named_leaves(jax.device_get(joined(state.params, frozen)))
    return state, whole, jax.device_get(metrics)


@pytest.fixture(scope="module")
def adapter_steps():
    return take_steps(ADAPTED, trained_patterns(ADAPTED))


def test_only_the_adapter_changes_and_has_optimizer_state(adapter_steps):
    state, whole, _ = adapter_steps
    before = parameters(ADAPTED)
    assert whole.keys() == before.keys()
    for name, value in whole.items():
        is_trained = ".lora_" in name
        assert (name in named_leaves(state.params)) == is_trained
        assert np.array_equal(value, before[name]) != is_trained, name
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments == 2 * sizes + 1
    assert sizes * 3 < sum(leaf.size for leaf in jax.tree.leaves(before))


@pytest.mark.parametrize(
    ("make", "sizes", "options"),
    [
        (make_train_step, {"data": 2, "fsdp": 2, "tensor": 2}, {"accumulate": 2}),
        (make_replicated_step, {"data": 8}, {"accumulate": 2}),
    ],
    ids=["cube", "pmap"],
)
def test_eight_devices_are_one_device(adapter_steps, make, sizes, options):
    state, whole, metrics = take_steps(ADAPTED, trained_patterns(ADAPTED), sizes, make, **options)
    for name, value in adapter_steps[1].items():
        np.testing.assert_allclose(whole[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    for name, value in adapter_steps[2].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)
    if "tensor" in sizes:
        changed = named_leaves(state.params)["model.layers.1.mlp.Wi.lora_B.weight"]
        assert changed.addressable_shards[0].data.size * 2 == changed.size


def test_chosen_parameters_take_the_update_of_a_whole_training():
    """AdamW works on each number alone, so what is frozen has no part in it."""
    graphdef, state = create_train_state(MODEL, OPTIMIZER)
    full, _ = make_train_step(graphdef, OPTIMIZER)(state, make_batch(UNEVEN))
    graphdef, state, frozen = create_frozen_state(MODEL, OPTIMIZER, PATTERNS)
    part, _ = make_train_step(graphdef, OPTIMIZER)(state, make_batch(UNEVEN), frozen)
    expected, found = named_leaves(full.params), named_leaves(part.params)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in found} == {
        "decoder", "norm", "final_norm", "attn_norm", "mlp_norm", "Wi", "Wo",
    }  # fmt: skip
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_new_adapter_changes_no_answer_and_is_drawn_by_its_seed():
    batch = make_batch(UNEVEN)
    arguments = batch.input_ids, batch.segment_ids, batch.position_ids
    np.testing.assert_array_equal(MODEL(*arguments), ADAPTED(*arguments))
    again, other = (with_adapter(MODEL, AdapterConfig(rank=2), seed=seed) for seed in (5, 6))
    name = "model.layers.0.attn.Wo.lora_A.weight"
    assert np.array_equal(parameters(again)[name], parameters(ADAPTED)[name])
    assert not np.array_equal(parameters(other)[name], parameters(ADAPTED)[name])
    drawn = np.abs(parameters(ADAPTED)[name])
    assert 0.5 * 32**-0.5 < drawn.max() <= 32**-0.5


@pytest.mark.parametrize(
    ("adapter", "train", "most"),
    [(AdapterConfig(), None, 0.02), (AdapterConfig(rank=32), None, 0.05), (None, ["*bias"], 1e-3)],
)
def test_optimizer_state_and_gradients_of_a_base_model_are_small(adapter, train, most):
    """Counted from shapes, as a share of those of a whole training."""
    config = ModelConfig.from_hf(PUBLISHED["answerdotai/ModernBERT-base"])
    optimizer = make_optimizer(OptimizerConfig(), ScheduleConfig(), 100)

    def bytes_of(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def changing(config, train):
        model = abstract_model("ModernBertForMaskedLM", config)
        params = nnx.state(model, nnx.Param)
        trained, _ = split_trained(params, trained_patterns(model, train))
        return bytes_of(trained) + bytes_of(jax.eval_shape(optimizer.init, trained))

    whole = changing(config, None)
    assert whole > 1.7e9  # a gradient and two moments, each of 149 M numbers
    assert changing(replace(config, adapter=adapter), train) < most * whole


def test_layers_in_a_loop_have_adapters_too(adapter_steps):
    options = {"dtype": "float32", "attention": "dense", "remat": "layer"}
    looped = type(MODEL)(MODEL.config, rngs=nnx.Rngs(0), **options)
    looped = with_adapter(looped, AdapterConfig(rank=2), seed=5)
    _, whole, _ = take_steps(looped, trained_patterns(looped))
    for name, value in adapter_steps[1].items():
        np.testing.assert_allclose(whole[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_patterns():
    params = nnx.state(MODEL, nnx.Param)
    assert trained_patterns(MODEL) is None
    assert split_trained(params, None) == (params, None)
    labelled = with_classifier(MODEL, ["a", "b"], seed=0)
    assert trained_patterns(labelled) is None
    assert trained_patterns(labelled, ["*bias"]) == ("*bias", "classifier.*")
    with pytest.raises(
        InputError, match=r"train: 'decoder\.bais' names no parameter; did you mean"
    ):
        split_trained(params, ["decoder.bais"])
    with pytest.raises(InputError, match=r"expected patterns such as '\*bias'") as caught:
        split_trained(params, ["[", "*"])
    assert "decoder.bias" in caught.value.details
