"""Plans: whether a run fits, the nearest change that fits, and their report."""

import json
import re
import sys
import time
from contextlib import contextmanager

import jax
import pytest
from plans import CLASSIFIER, MODEL, config_of
from processes import write_config

from mlmjax.cli.main import run
from mlmjax.config.run import load_config
from mlmjax.errors import InputError
from mlmjax.parallel import sharding
from mlmjax.training.planning import compilation, plan
from mlmjax.training.planning import topology as topology_module
from mlmjax.training.planning.changes import RECOMPUTED
from mlmjax.training.planning.topology import parse_topology
from mlmjax.training.run import initial_model

REAL_COMPILE = plan._compile


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch, tokenizer):
    """Read the packaged tokenizer once, and not for each configuration."""
    monkeypatch.setattr(initial_model, "load_tokenizer", lambda config: tokenizer)


MESH = {"data": 4, "fsdp": 2, "tensor": 1}


def test_changes_start_with_the_cheapest():
    """Where micro-batches stay large, many of them cost less than to compute twice."""
    config = config_of(data={"batch_size": 32, "seq_length": 2048})
    found = list(plan.changes(config, MESH))
    assert found[:5] == [
        {"data.accumulate": 2},
        {"data.accumulate": 4},
        {"remat": "dots"},
        {"remat": "dots", "data.accumulate": 2},
        {"remat": "dots", "data.accumulate": 4},
    ]
    assert found[5] == {"remat": "layer"}
    assert found[8] == {"mesh.fsdp": 4, "mesh.data": 2}
    assert [change.get("mesh.fsdp") for change in found] == [None] * 8 + [4] * 9 + [8] * 9
    assert {plan.apply_change(config, change).remat for change in found} == set(RECOMPUTED)
    last = list(plan.changes(config_of(remat="layer", data={"batch_size": 32}), MESH))
    assert not any("remat" in change for change in last)


def test_small_micro_batches_cost_more_than_to_compute_twice():
    """Of 256 tokens each device has, and half of them compute for less time than links need."""
    config = config_of(data={"batch_size": 32, "seq_length": 64})
    found = list(plan.changes(config, MESH))
    assert found[:3] == [{"remat": "dots"}, {"remat": "layer"}, {"data.accumulate": 2}]
    whole = list(plan.changes(config, {"data": 8, "fsdp": 1, "tensor": 1}))
    assert whole[:3] == found[:3]  # 256 tokens are enough for whole parameters, and 128 are not
    larger = config_of(data={"batch_size": 64, "seq_length": 64})
    whole = list(plan.changes(larger, {"data": 8, "fsdp": 1, "tensor": 1}))
    assert whole[:2] == [{"data.accumulate": 2}, {"remat": "dots"}]


def test_changes_that_are_hopeless_by_arithmetic_are_not_compiled(monkeypatch):
    compiled = fake_compiler(monkeypatch, lambda config: config.data.accumulate == 2)
    limit = parse_topology("v5e:2x4").memory

    def arithmetic(config, model, sizes):
        hopeless = config.data.accumulate == 1
        return {"training": {"memory": {"total": limit * (1.6 if hopeless else 1.4)}}}

    monkeypatch.setattr(plan, "estimate", arithmetic)
    found, _ = plan_one()
    assert found["change"] == {"data.accumulate": 2}
    assert [remat for remat, *_ in compiled] == ["none"] * 3


def fake_program(needed, fits=True, **more):
    memory = dict.fromkeys(("outputs", "outputs_in_arguments", "temporaries", "code"), 0)
    found = {
        "rows": 16, "seq_length": 32, "accumulate": 1, "remat": "none", "tokens_per_device": 64,
        "model_flops": 1e9, "seconds_at_peak": 0.0981, "parameters": 5e6, "devices": 1,
        "seconds": {"compile": 190.0}, "fits": fits, "what_helps": "give fewer rows", **more,
    }  # fmt: skip
    if fits is False:
        refusal = {"message": "no", "needed": needed, "available": 2 * 2**30}
        return found | {"refusal": refusal}
    collectives = {"all-gather": {"count": 2, "bytes": 3 * 2**20}}
    return found | {"memory": {**memory, "total": needed}, "collectives": collectives}


MACHINE = {
    "topology": "v5e:2x4", "device": "TPU v5 lite", "devices": 8, "used": 8, "memory": 2 * 2**30,
    "mesh": {"data": 8, "fsdp": 1, "tensor": 1}, "peak_flops": 2e14, "jax": "",
    "attention": "auto", "attention_chosen": "splash", "splash_blocks": [512, 256], "compiler": "",
    "memory_by": "compiler",
}  # fmt: skip


def fake_compiler(monkeypatch, training, scoring=lambda config: True):
    """Have plans take verdicts from these functions; return what was to be compiled."""
    compiled = []

    def compile_as_if(config, topology, which=compilation.PROGRAMS, seconds=None):
        compiled.append((config.remat, config.data.accumulate, *which))
        mesh = sharding.mesh_shape(config.mesh, 8)
        found = {}
        for name, verdict in (("training", training), ("scoring", scoring)):
            if name in which:
                fits = verdict(config)
                found[name] = fake_program(2**30 if fits else 28 * 2**30, fits)
        return {"machine": {**MACHINE, "mesh": mesh}, **found, "assumptions": []}

    monkeypatch.setattr(plan, "_compile", compile_as_if)
    monkeypatch.setattr(plan, "has_tpu_compiler", lambda: True)
    return compiled


def plan_one(**changes):
    """Return a plan for a slice of a TPU, and its report."""
    found = plan.make_plan(config_of(**changes), "v5e:2x4")
    return found, "\n".join(plan.report(found))


def test_the_nearest_change_that_fits_is_found_by_compiling(monkeypatch):
    compiled = fake_compiler(monkeypatch, lambda config: config.data.accumulate == 2)
    found, text = plan_one()
    assert found["fits"] is False
    assert found["change"] == {"data.accumulate": 2}
    assert compiled == [
        ("none", 1, "training", "scoring"),
        ("dots", 1, "training"),
        ("layer", 1, "training"),
        ("none", 2, "training"),
        ("none", 2, "scoring"),
    ]
    assert len(found["tried"]) == 3
    assert "DOES NOT FIT" in text
    assert "nearest change that fits: data.accumulate=2" in text
    fake_compiler(monkeypatch, lambda config: False)
    _, text = plan_one()
    assert "no change fits" in text
    assert "rejected: needs 28.000 GiB of 2.000 GiB" in text


def test_an_invalid_change_does_not_end_the_search(monkeypatch):
    """The changes cannot be compiled; the figures of the run are still reported."""
    fake_compiler(monkeypatch, lambda config: False)
    monkeypatch.setattr(
        sharding, "mesh_shape", lambda mesh, _: {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": 1}
    )
    monkeypatch.setattr(plan, "changes", lambda *_: [{"mesh.fsdp": 32}, {"mesh.data": -3}])
    found, text = plan_one(data={"batch_size": 32})
    first, second = (tried["refusal"]["message"] for tried in found["tried"])
    assert "fsdp = 32 does not divide 16" in first
    assert "mesh.data: found -3" in second
    assert "tried mesh.fsdp=32: rejected: mesh: parameter" in text
    assert "training step: 16 rows" in text


def test_a_change_is_accepted_by_training_and_its_scoring_is_reported(monkeypatch):
    compiled = fake_compiler(monkeypatch, lambda c: c.remat != "none", lambda c: False)
    found, text = plan_one()
    assert [a[:2] for a in compiled] == [("none", 1), ("dots", 1), ("dots", 1)]
    assert found["tried"][-1]["scoring"]["fits"] is False
    assert "nearest change with which the training step fits: remat=dots" in text
    assert "scoring does not fit: give fewer rows" in text
    # If only scoring does not fit, no change of the training helps, so none is tried.
    compiled = fake_compiler(monkeypatch, lambda c: True, lambda c: False)
    found, text = plan_one()
    assert (found["fits"], "tried" in found, len(compiled)) == (False, False, 1)
    assert "scoring does not fit" in text
    # But one helps the validation of a classifier.
    fake_compiler(monkeypatch, lambda c: True, lambda c: c.data.accumulate == 2)
    found, _ = plan_one(**CLASSIFIER)
    assert found["change"] == {"data.accumulate": 2}


def test_figures_of_a_program_have_one_unit_and_readable_seconds():
    found = {"fits": True, "machine": MACHINE, "assumptions": []}
    found |= {"training": fake_program(2**30), "scoring": fake_program(2**29)}
    text = "\n".join(plan.report(found))
    training, _, scoring = text.partition("\nscoring")
    assert "1.000 GiB of 2.000 GiB per device" in training
    assert "MiB" not in training
    assert "all-gather         0.003 GiB, 2 per step" in training
    assert "512.00 MiB of 2.000 GiB per device" in scoring
    assert scoring.count("GiB") == 1
    assert "98.1 ms at the peak" in training
    assert "compiling it 3 min 10 s" in training
    assert "attention auto: splash, blocks of 512 in global and 256 in local layers" in training


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallel": "pmap"}, "parallel: only 'pjit' can be planned"),
        ({"data": {"batch_size": 12}}, "batch of 12 rows cannot be divided"),
        ({"data": {"batch_start": 4, "batch_warmup": 2}}, "batch of 4 rows cannot be divided"),
        ({"attention": "splash"}, "'splash' needs a TPU, and this is cpu"),
        ({"attention": "cudnn"}, "'cudnn' needs an NVIDIA GPU, and this is cpu"),
        ({"mesh": {"tensor": 8}}, "tensor = 8 does not divide 2"),
        ({"mesh": {"fsdp": 3}}, "does not divide the 8 devices; set mesh.fsdp=1"),
        ({"data": {"seq_length": 128}}, "the model takes at most 64"),
    ],
)
def test_what_needs_no_compiler_is_rejected_before_it_starts(changes, says, monkeypatch):
    monkeypatch.setattr(plan, "_compile", None)
    said = []
    with pytest.raises(InputError, match=says):
        plan.make_plan(config_of(**changes), "cpu:8", say=said.append)
    assert not said


def test_a_compiler_that_aborts_is_explained(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="the compiler stopped"):
        plan.make_plan(config_of(), "cpu:8")
    topology, says = parse_topology("cpu:8"), "x.cc:234] Unknown flag in XLA_FLAGS: --nope=1"
    for status, lines, message in (
        (1, ["more", says], "XLA_FLAGS: --nope=1 is not a flag"),
        (-9, [], "too little memory"),
    ):
        assert message in plan._explain_death(topology, status, lines).message


def test_the_command_prints_figures(tmp_path, capsys, monkeypatch):
    data = {"rows": "r", "seq_length": 16, "batch_size": 4}
    model = {**MODEL, "num_hidden_layers": 1}
    table = {"out": str(tmp_path / "run"), "steps": 2, "data": data, "model": model}
    file = write_config(table)
    assert run(["plan", str(file), "mesh.fsdp=2", "--topology", "cpu:4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Simulated devices have no memory limit.
    assert (found["fits"], found["machine"]["memory"], "tried" in found) == (None, None, False)
    assert found["training"]["memory"]["total"] > 1e6
    assert found["machine"]["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert found["scoring"]["seq_length"] == 64
    text = "\n".join(plan.report(found))
    assert "cpu:4: no verdict for simulated devices" in text
    assert "attention auto: banded" in text
    assert "optimizer state" in text
    assert run(["plan", str(file), "mesh.fsdp=3", "--topology", "cpu:4"]) == 2
    assert "does not divide the 4 devices" in capsys.readouterr().err
    fake_compiler(monkeypatch, lambda config: False)
    assert run(["plan", str(file), "--topology", "v5e:2x2"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_a_search_is_bounded_in_time_and_shown(monkeypatch):
    compiled = fake_compiler(monkeypatch, lambda config: False)
    said, watched = [], []

    @contextmanager
    def watch(what):
        watched.append(what)
        yield

    options = {"say": said.append, "watch": watch, "search_seconds": 0.0}
    found = plan.make_plan(config_of(), "v5litepod-8", **options)
    assert found["stopped"]
    assert found["change"] is None
    assert len(compiled) == 1
    assert "the search ran out of time" in "\n".join(plan.report(found))
    assert watched == ["compiling for v5e:2x4; large models take minutes"]
    assert re.fullmatch(
        r"by arithmetic the training step fits: about 0\.\d of 15\.75 GiB per device; compiling "
        r"for v5e:2x4 to be sure",
        said[0],
    )
    plan.make_plan(config_of(), "v5e-8", say=said.append, watch=watch)
    assert "trying remat=dots" in watched


def test_a_compilation_of_the_search_ends_with_its_time(monkeypatch):
    """The second compilation is real, and has no time."""
    fake_compiler(monkeypatch, lambda config: False)
    first, real = plan._compile, REAL_COMPILE
    left = []

    def compile_then_hurry(config, topology, which=compilation.PROGRAMS, seconds=None):
        if seconds is None:
            return first(config, topology, which)
        left.append(seconds)
        return real(config, topology, which, 0.01)

    monkeypatch.setattr(plan, "_compile", compile_then_hurry)
    began = time.monotonic()
    found = plan.make_plan(config_of(), "v5e:2x4", search_seconds=100.0)
    assert (found["stopped"], found["tried"], found["fits"]) == (True, [], False)
    assert 0 < left[0] <= 100
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("topology", "fsdp", "verdict"),
    [("v5e-256", 16, "is close"), ("v6e-256", 16, "fits"), ("h200:8", 8, "does not fit")],
)
def test_large_is_judged_within_seconds(monkeypatch, topology, fsdp, verdict):
    """By arithmetic, before anything is compiled, whatever the machine."""

    def compile_nothing(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "_compile", compile_nothing)
    monkeypatch.setattr(plan, "may_have_gpus", lambda: True)
    monkeypatch.setattr(plan, "has_tpu_compiler", lambda: True)
    said, began = [], time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        plan.make_plan(
            load_config("configs/atp_large.toml", [f"mesh.fsdp={fsdp}"]), topology, say=said.append
        )
    assert time.monotonic() - began < 30
    assert said[0].startswith(f"by arithmetic the training step {verdict}: about ")


def test_gpus_of_this_machine_are_compiled_for(monkeypatch):
    """The CPU stands in for the GPU, from which a plan takes its devices."""
    gpus = jax.devices()[:1]
    monkeypatch.setattr(topology_module, "local_gpus", lambda topology: gpus[: topology.devices])
    monkeypatch.setattr(plan, "may_have_gpus", lambda: True)
    monkeypatch.setattr(plan, "_compile", compilation.compile_run)
    found = plan.make_plan(config_of(), "h100")
    machine, training = found["machine"], found["training"]
    assert (machine["memory_by"], machine["topology"]) == ("compiler", "h100-80g:1")
    assert "estimate" not in training
    assert training["memory"]["temporaries"] > 0
    assert found["fits"] is True
    assert "memory as the compiler reports it" in "\n".join(plan.report(found))
    # A machine with other GPUs, and one without any.
    gpus.clear()
    found = plan.make_plan(config_of(), "h100")
    assert found["machine"]["memory_by"] == "arithmetic"
    assert "JAX finds no such GPUs in this machine" in found["assumptions"][-1]
    monkeypatch.setattr(plan, "may_have_gpus", lambda: False)
    monkeypatch.setattr(plan, "_compile", None)
    text = "\n".join(plan.report(plan.make_plan(config_of(), "h100")))
    assert "nothing compiled; memory by arithmetic" in text
