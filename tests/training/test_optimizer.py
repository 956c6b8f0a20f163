from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mlmjax.config.run import OptimizerConfig, ScheduleConfig
from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import ModernBertForMaskedLM, ModernBertForSequenceClassification
from mlmjax.parallel.sharding import named_leaves
from mlmjax.training.optimizer import (
    averaged_parameters,
    decay_mask,
    make_optimizer,
    make_schedule,
    scale_by_depth,
    skipped_updates,
)


def rates(name, steps=10, **values):
    schedule = make_schedule(ScheduleConfig(name=name, **values), 2.0, steps)
    return np.asarray(schedule(np.arange(steps)))


SLOWER = [2 * (1 - 3**-0.5), 2 * (1 - (2 / 3) ** 0.5)]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("wsd", {"warmup": 4, "decay": 3}, [0.5, 1, 1.5, 2, 2, 2, 2, 2, *SLOWER]),
        ("wsd", {"warmup": 0.4, "decay": 0.3}, [0.5, 1, 1.5, 2, 2, 2, 2, 2, *SLOWER]),
        ("linear", {"warmup": 2}, [1, 2, 2, 1.5, 1, 0.5]),
        ("cosine", {"warmup": 2}, [1, 2, 2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5]),
    ],
)
def test_rates_follow_their_schedule(name, values, expected):
    np.testing.assert_allclose(rates(name, len(expected), **values), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_no_update_is_wasted(name, steps):
    found = rates(name, steps)
    assert found.min() > 0
    assert found.max() <= 2
    assert steps == 1 or found.max() == 2


def test_a_schedule_longer_than_the_run_is_rejected():
    with pytest.raises(InputError, match="warmup 8 \\+ decay 5 updates are more than steps 10"):
        rates("wsd", warmup=8, decay=5)
    with pytest.raises(InputError, match="more than steps 10"):
        rates("cosine", warmup=11)


@pytest.mark.parametrize("model", [ModernBertForMaskedLM, ModernBertForSequenceClassification])
def test_weight_decay_changes_only_matrices(model):
    switches = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
    config = ModelConfig.from_hf({"num_hidden_layers": 2} | dict.fromkeys(switches, True))
    params = nnx.state(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))), nnx.Param)
    decays = {path for path, on in named_leaves(decay_mask(params)).items() if on}
    layer = ["attn.Wqkv.weight", "attn.Wo.weight", "mlp.Wi.weight", "mlp.Wo.weight"]
    assert decays - {"classifier.weight"} == {
        "head.dense.weight",
        "model.embeddings.tok_embeddings.weight",
        *(f"model.layers.{i}.{name}" for i in range(2) for name in layer),
    }
    is_classifier = model is ModernBertForSequenceClassification
    assert ("classifier.weight" in decays) == is_classifier


PARAMS = {"dense": {"weight": np.linspace(-1, 1, 6).reshape(2, 3)}, "norm": {"weight": np.ones(3)}}
SCHEDULE = ScheduleConfig(name="linear", warmup=2)


def gradients(step):
    """Small gradients, then a sudden large one: what update clipping is for."""
    rng = np.random.default_rng(step)
    scale = 100.0 if step == 4 else 1.0
    return jax.tree.map(lambda x: scale * rng.normal(size=x.shape), PARAMS)


def to_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def run(optimizer, steps):
    """Yield the parameters and the state after each update."""
    params = to_float32(PARAMS)
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = optimizer.update(to_float32(gradients(step)), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


def assert_close(found, expected, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), found, expected)


def adamw_in_float64(config, rate, steps, *, stable=False):
    """The published equations, one tensor at a time, in float64."""
    params = jax.tree.map(np.array, PARAMS)
    moments = jax.tree.map(lambda x: (np.zeros_like(x), np.zeros_like(x)), PARAMS)
    for t in range(1, steps + 1):
        lr, grads = float(rate(t - 1)), gradients(t - 1)
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
        clip = min(1.0, config.clip / norm) if config.clip else 1.0
        for name, inner in params.items():
            theta, (m, v) = inner["weight"], moments[name]["weight"]
            g = grads[name]["weight"] * clip
            if stable:
                beta1, beta2 = ((b - b**t) / (1 - b**t) for b in (config.b1, config.b2))
                m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
                change = m / (np.sqrt(v) + config.eps)
                lr_t = lr / max(1.0, np.sqrt(np.mean(g**2 / np.maximum(v, config.eps**2))))
            else:
                m, v = config.b1 * m + (1 - config.b1) * g, config.b2 * v + (1 - config.b2) * g**2
                change = (m / (1 - config.b1**t)) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
                lr_t = lr
            decay = 0.0 if name == "norm" else config.weight_decay
            inner["weight"] = theta - lr_t * (change + decay * theta)
            moments[name]["weight"] = (m, v)
    return params


@pytest.mark.parametrize("name", ["adamw", "stable_adamw"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_optimizers_follow_their_equations(name, clip):
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.3, clip=clip)
    rate = make_schedule(SCHEDULE, config.learning_rate, 8)
    expected = adamw_in_float64(config, rate, 8, stable=name == "stable_adamw")
    *_, (found, _) = run(make_optimizer(config, SCHEDULE, 8), 8)
    assert_close(found, expected, rtol=2e-5, atol=1e-6)


def test_layer_decay_lowers_the_rate_once_for_each_layer_above():
    config = ModelConfig.from_hf({"num_hidden_layers": 3})
    model = nnx.eval_shape(lambda: ModernBertForMaskedLM(config, rngs=nnx.Rngs(0)))
    updates = jax.tree.map(lambda x: jnp.ones(()), nnx.state(model, nnx.Param))
    scaled, _ = scale_by_depth(0.5).update(updates, optax.EmptyState())
    expected = {
        "model.embeddings.tok_embeddings.weight": 0.5**4,
        "model.embeddings.norm.weight": 0.5**4,
        "model.layers.0.attn.Wqkv.weight": 0.5**3,
        "model.layers.1.mlp_norm.weight": 0.5**2,
        "model.layers.2.mlp.Wo.weight": 0.5,
        "model.final_norm.weight": 1.0,
        "head.dense.weight": 1.0,
        "decoder.bias": 1.0,
    }
    assert expected.items() <= named_leaves(scaled).items()


@pytest.mark.parametrize("name", ["adamw", "stable_adamw"])
def test_layer_decay_scales_weight_decay_with_the_rate(name):
    """One update with `layer_decay` is the plain one, scaled: decay is part of the rate."""
    params = {"layers": {"0": {"w": jnp.array([1.0, -2.0])}, "1": {"w": jnp.array([3.0, 1.0])}}}
    grads = jax.tree.map(jnp.cos, params)
    settings = {"name": name, "learning_rate": 0.1, "weight_decay": 0.5}

    def update(**more):
        optimizer = make_optimizer(OptimizerConfig(**settings, **more), SCHEDULE, 8)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    plain, scaled = update()["layers"], update(layer_decay=0.5)["layers"]
    for index, factor in (("0", 0.25), ("1", 0.5)):
        assert_close(scaled[index]["w"], factor * plain[index]["w"], rtol=1e-6)


def test_the_average_follows_its_equation():
    settings = {"learning_rate": 0.1, "clip": 0.5}
    plain = make_optimizer(OptimizerConfig(**settings), SCHEDULE, 8)
    optimizer = make_optimizer(OptimizerConfig(**settings, ema=0.3), SCHEDULE, 8)
    expected = PARAMS
    both = zip(run(optimizer, 6), run(plain, 6), strict=True)
    for step, ((params, state), (others, other)) in enumerate(both):
        slow = min(0.3, (2 + step) / (11 + step))
        expected = jax.tree.map(
            lambda old, new, slow=slow: slow * old + (1 - slow) * np.asarray(new, np.float64),
            expected,
            params,
        )
        assert_close(params, others, rtol=0)  # Averaging changes nothing about the training.
        assert_close(averaged_parameters(params, state), expected, rtol=1e-5, atol=1e-7)
        assert averaged_parameters(params, other) is params


def test_a_spike_is_skipped_and_counted():
    """Unusual or not finite: parameters, moments and schedule stay; the next update is as usual."""
    settings = {"learning_rate": 0.1, "skip_spikes": 3.0, "clip": 0.0, "ema": 0.5}
    schedule = ScheduleConfig(warmup=0)
    optimizer = make_optimizer(OptimizerConfig(**settings), schedule, 40)
    plain = make_optimizer(OptimizerConfig(**settings | {"skip_spikes": None}), schedule, 40)
    params = others = {"norm": {"weight": jnp.ones(4)}}
    state, other = optimizer.init(params), plain.init(params)
    norms = [1.0] * 5 + [50.0] + [1.0] * 8 + [float("nan"), 2.0, 400.0, float("inf"), 1.5]
    skipped = []
    for norm in norms:
        grads = {"norm": {"weight": jnp.full(4, norm / 2)}}
        before = int(skipped_updates(state))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if int(skipped_updates(state)) > before:
            skipped.append(norm)
            continue
        updates, other = plain.update(grads, other, others)
        others = optax.apply_updates(others, updates)
    # The sixth is still in the warm-up, where every finite norm is accepted.
    assert [str(norm) for norm in skipped] == ["nan", "400.0", "inf"]
    assert int(state.made) == len(norms) - 3
    found = params, averaged_parameters(params, state)
    assert_close(found, (others, averaged_parameters(others, other)), rtol=0)
    assert int(skipped_updates(other)) == 0
