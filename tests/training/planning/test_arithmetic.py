"""Memory by arithmetic: what it counts, and how it follows the settings."""

import json
import re

import jax
import pytest
from plans import CLASSIFIER, config_of

from mlmjax.cli.main import run
from mlmjax.config.run import load_config
from mlmjax.errors import InputError
from mlmjax.parallel import sharding
from mlmjax.training.optimizer import optimizer_of
from mlmjax.training.planning import plan
from mlmjax.training.planning.arithmetic import estimate, layer_bytes
from mlmjax.training.planning.compilation import _bytes_per_device, compile_run
from mlmjax.training.planning.topology import parse_topology
from mlmjax.training.run.initial_model import describe_start
from mlmjax.training.step import abstract_train_state, split_parameters

ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def training_of(sizes=ONE, **changes):
    config = config_of(**changes)
    return estimate(config, describe_start(config), sizes)["training"]


@pytest.mark.parametrize("sizes", [ONE, {"data": 1, "fsdp": 2, "tensor": 1}])
@pytest.mark.parametrize("patience", [None, 2])
def test_parameters_and_optimizer_state_are_those_of_the_run(sizes, patience):
    config = config_of(data={"validation_rows": 4}, evaluation={"patience": patience})
    model = describe_start(config)
    mesh = sharding.make_mesh(config.mesh.model_copy(update=sizes), jax.devices())
    optimizer = optimizer_of(config)
    state = abstract_train_state(split_parameters(model)[1], optimizer, mesh)
    found = estimate(config, model, sizes)["training"]
    assert found["parameters"] == _bytes_per_device(state.params)
    assert found["optimizer_state"] == pytest.approx(_bytes_per_device(state.opt_state), rel=1e-3)
    copies = found["optimizer_state"] / found["parameters"]
    assert copies == pytest.approx(2 if patience is None else 3, rel=1e-2)


def test_parts_follow_the_settings():
    base = training_of()
    parts = base["estimate"]
    assert base["memory"]["total"] == pytest.approx(
        base["parameters"] + base["optimizer_state"] + sum(parts.values()), abs=8
    )
    assert parts["gradients"] == base["parameters"]
    assert parts["compute_copy"] == 0
    half = training_of(data={"accumulate": 2})["estimate"]
    assert half["activations"] == pytest.approx(parts["activations"] / 2)
    assert half["gradients"] == 2 * parts["gradients"]
    kept = [training_of(remat=r)["estimate"]["activations"] for r in ("none", "dots", "layer")]
    assert kept == sorted(kept, reverse=True)
    low = training_of(dtype="bfloat16")
    assert low["estimate"]["compute_copy"] == low["parameters"] // 2
    assert low["estimate"]["activations"] < parts["activations"]
    spread = training_of({**ONE, "data": 4})["estimate"]
    assert spread["activations"] == pytest.approx(parts["activations"] / 4)
    average = training_of(optimizer={"ema": 0.99})
    ratio = average["optimizer_state"] / base["optimizer_state"]
    assert ratio == pytest.approx(1.5, rel=1e-3)
    assert training_of(**CLASSIFIER)["estimate"]["head"] < parts["head"]


def test_frozen_parameters_have_neither_gradients_nor_optimizer_state():
    """Of base: an adapter of rank 8, and biases and norms only."""
    whole = load_config("configs/atp_base.toml")
    adapter = load_config("configs/atp_base.toml", ["adapter.rank=8"])
    chosen = load_config("configs/atp_base.toml", ["optimizer.train=['*bias', '*norm*']"])
    full, small, least = (
        estimate(config, describe_start(config), ONE)["training"]
        for config in (whole, adapter, chosen)
    )
    for one in (small, least):
        assert one["optimizer_state"] < 0.05 * full["optimizer_state"]
        assert one["estimate"]["gradients"] < 0.05 * full["estimate"]["gradients"]
        assert full["parameters"] <= one["parameters"] < 1.05 * full["parameters"]
    compiled = compile_run(config_of(optimizer={"train": ["*norm*"]}), parse_topology("cpu:1"))
    known = training_of(optimizer={"train": ["*norm*"]})
    assert compiled["training"]["parameters"] == known["parameters"]
    # The compiled state has a counter of four bytes, too.
    assert 0 <= compiled["training"]["optimizer_state"] - known["optimizer_state"] <= 4


def test_bytes_of_a_layer_by_hand():
    model = describe_start(config_of()).config
    hidden, inner = model.hidden_size, model.intermediate_size
    assert layer_bytes(model, "float32", "layer") == 8 * hidden
    assert layer_bytes(model, "float32", "dots") == 8 * (6 * hidden + 2 * inner)
    assert layer_bytes(model, "bfloat16", "none") == 32 * hidden + 8 * inner


@pytest.mark.parametrize(
    ("topology", "changes", "compiled"),
    [  # GiB per chip, as docs/pods.md and docs/machines.md have them from the TPU compiler
        ("v5e-256", "remat=none", 13.42),
        ("v5e-256", "remat=dots", 9.09),
        ("v5e-256", "remat=layer", 2.41),
        ("v6e-256", "remat=dots", 10.45),
        ("v5p-128", "remat=dots", 39.43),
        ("v5e-16", "data.accumulate=16", 10.14),
        ("v6e-8", "mesh.fsdp=8 data.accumulate=32", 9.74),
    ],
)
def test_estimates_are_near_the_compiler_and_above_it(topology, changes, compiled):
    config = load_config("configs/atp_large.toml", changes.split())
    machine = parse_topology(topology)
    sizes = sharding.mesh_shape(config.mesh, machine.devices)
    found = estimate(config, describe_start(config), sizes)["training"]["memory"]["total"]
    assert 1.0 <= found / 2**30 / compiled <= 4 / 3


@pytest.mark.parametrize("command", [["--json"], []])
def test_a_gpu_is_planned_without_compiling(capsys, monkeypatch, command):
    monkeypatch.setattr(plan, "_compile", None)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    table = ["configs/atp_base.toml", "data.batch_size=64"]
    assert run(["plan", *table, "--topology", "rtx4090", *command]) == 1
    out = capsys.readouterr().out
    if not command:
        assert out.startswith("rtx4090-24g:1: DOES NOT FIT\n")
        assert "nearest change that fits: data.accumulate=" in out
        assert "activations" in out
        assert "note: memory is an estimate by arithmetic" in out
        assert "the limit is 75% of 24.0 GiB" in out
        return
    found = json.loads(out)
    assert found["fits"] is False
    assert found["tried"][-1]["fits"] is True
    changed = plan.apply_change(load_config(table[0], table[1:]), found["change"])
    again = plan.make_plan(changed, "rtx4090")
    assert again["fits"] is True
    assert "tried" not in again
    assert again["training"]["memory"]["total"] <= again["machine"]["memory"]


@pytest.mark.parametrize(("dtype", "chosen"), [("float32", "banded"), ("bfloat16", "cudnn")])
def test_a_plan_for_a_gpu_shows_the_attention_that_would_run(monkeypatch, dtype, chosen):
    monkeypatch.setattr(plan, "may_have_gpus", lambda: False)
    settings = [f'dtype="{dtype}"', "data.batch_size=8"]
    config = load_config("configs/atp_base.toml", settings)
    assert f"  attention auto: {chosen}" in plan.report(plan.make_plan(config, "h200"))
    asked = load_config("configs/atp_base.toml", [*settings, 'attention="cudnn"'])
    if chosen == "cudnn":
        assert "  attention cudnn" in plan.report(plan.make_plan(asked, "h200"))
    else:
        with pytest.raises(InputError, match="attention 'cudnn' computes in bfloat16"):
            plan.make_plan(asked, "h200")


def test_a_tpu_is_planned_by_arithmetic_without_its_compiler(capsys, monkeypatch):
    monkeypatch.setattr(plan, "_compile", None)
    monkeypatch.setattr(plan, "has_tpu_compiler", lambda: False)
    large = ["plan", "configs/atp_large.toml", "--topology", "v5e-16"]
    assert run(large) == 1
    out = capsys.readouterr().out
    assert out.startswith("v5e:4x4: DOES NOT FIT\n")
    assert "16 x TPU v5 lite, 15.750 GiB each; mesh data 1 x fsdp 16" in out
    assert (
        "memory by arithmetic; to compile for this TPU, run pip install 'mlmjax[plan]', or" in out
    )
    assert "activations" in out
    assert "the share that JAX takes" not in out
    (change,) = re.findall("^nearest change that fits: (.+)$", out, flags=re.M)
    assert run([*large, *change.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["machine"]["memory_by"] == "arithmetic"
    assert found["training"]["seconds_at_peak"] == pytest.approx(1.57, abs=0.01)
    assert run(["plan", "configs/atp_tiny.toml", "--topology", "v6e-1"]) == 0
