"""Plans: what a run will need, on devices that are simulated or only described."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlmjax.cli.main import run
from mlmjax.config.run import load_config, parse_config
from mlmjax.data.preparing.prepare import prepare
from mlmjax.errors import InputError
from mlmjax.model.attention import attend
from mlmjax.parallel import sharding
from mlmjax.training.flops import peak_flops
from mlmjax.training.planning import plan, programs
from mlmjax.training.planning.topology import CHIPS, devices_of, environment, parse_topology
from mlmjax.training.run.initial_model import describe_start, load_tokenizer
from mlmjax.training.run.inputs import open_loaders

MODEL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def config_of(**changes):
    table = {
        "out": "runs/x",
        "steps": 5,
        "model": MODEL,
        "data": {"rows": "rows/none", "seq_length": 32, "batch_size": 16},
    }
    for key, value in changes.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_config(table)


def planned(**changes):
    return programs.compile_run(config_of(**changes), parse_topology("cpu:8"), ["training"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v9:2x2", "unknown kind 'v9'; the kinds are v4, v5e, v5p, v6e, 7x and cpu"),
        ("", "is empty"),
        ("v5e", "shape ''"),
        ("v5e:ax2", "shape 'ax2'"),
        ("v5e:02x2", "shape '02x2'"),
        ("v5e:\u0662x2", "expected whole numbers"),  # a digit, but not of ASCII
        ("v6e:0x4", "shape '0x4'"),
        ("v5e:2x2x2", r"found 3 side\(s\); a v5e slice has 2"),
        ("v5p:4x4", r"found 2 side\(s\); a v5p slice has 3"),
        ("v5e:32x2", "found a side of 32"),
        ("v5e:3x5", "found 3x5; hosts of a v5e slice have 2x2 chips"),
        ("v5p:100x100x100", "found 1000000 chips; a v5p slice has at most 8960"),
        ("cpu:0", "shape '0'"),
        ("cpu:513", "found 513; expected 1 to 512"),
        ("cpu:2x2", "found 2x2; expected 1 to 512"),
    ],
)
def test_an_unknown_topology_is_refused_with_those_known(name, says):
    with pytest.raises(InputError, match=says) as caught:
        parse_topology(name)
    assert len(caught.value.details) == len(CHIPS) + 2
    assert "16x16" in str(caught.value)


def test_a_shape_that_only_the_compiler_refuses_is_told_in_our_words(monkeypatch):
    def refuse(**_):
        raise RuntimeError("INVALID_ARGUMENT: no such layout\nand pages more")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    monkeypatch.setattr("mlmjax.training.planning.topology._lacks_libtpu", lambda error: False)
    with pytest.raises(InputError, match="does not know a v5e slice of this shape") as caught:
        devices_of(parse_topology("v5e:2x2"))
    assert "pages more" not in caught.value.message


def test_every_kind_has_a_peak_and_a_memory():
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    assert set(kinds) | {"7x"} == set(CHIPS)
    for kind, device in {**kinds, "7x": "TPU7x"}.items():
        assert peak_flops(device, "bfloat16") > 1e14
        assert CHIPS[kind].memory > 10 * 2**30


def test_the_environment_of_a_topology(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4 --a=b")
    values = environment(parse_topology("cpu:12"))
    assert values["XLA_FLAGS"] == "--a=b"
    assert values["JAX_NUM_CPU_DEVICES"] == "12"
    assert environment(parse_topology("tpu-v5e:2x2"))["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("name", ["atp_base", "atp_large", "finetune_head", "finetune_sst2"])
def test_shipped_configurations_are_described_without_the_hub(name):
    config = load_config(f"configs/{name}.toml")
    model = describe_start(config)
    large = (28, 1024) if "base" not in name else (22, 768)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == large
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(model))


@pytest.mark.data
def test_known_models_are_those_published(test_data):
    for size in ("base", "large"):
        file = test_data / "tokenizer" / f"config_{size}.json"
        model = describe_start(config_of(model=None, init_from=f"answerdotai/ModernBERT-{size}"))
        theirs = json.loads(file.read_text())
        for key in model.config.__dataclass_fields__:
            if key in theirs and key != "architectures":
                assert getattr(model.config, key) == theirs[key], key


def test_a_data_parallel_step_sums_the_gradients_once():
    """The tied table alone comes twice: its lookup and its decoder are summed apart."""
    training = planned()["training"]
    table = 50368 * 16 * 4
    found = training["collectives"]
    gradients = training["parameters"]
    assert gradients + table <= found["all-reduce"]["bytes"] < gradients + table + 1000
    assert sum(c["bytes"] for kind, c in found.items() if kind != "all-reduce") < 20_000
    assert training["memory"]["arguments"] == pytest.approx(
        training["parameters"] + training["optimizer_state"] + training["batch"], rel=0.01
    )
    assert training["memory"]["outputs_in_arguments"] > 0.99 * training["memory"]["outputs"]


def test_an_fsdp_step_gathers_parameters_and_holds_a_part():
    whole, cut = planned()["training"], planned(mesh={"fsdp": 8})["training"]
    assert cut["parameters"] < 0.2 * whole["parameters"]  # vectors are whole everywhere
    found = cut["collectives"]
    assert found["all-gather"]["bytes"] > 0.9 * whole["parameters"]
    reduced = found["all-reduce"]["bytes"] + found.get("reduce-scatter", {"bytes": 0})["bytes"]
    # Of the lookup, a device has the gradient of its own columns alone.
    assert 0.9 * whole["parameters"] < reduced < 1.3 * whole["parameters"]
    # Columns of the looked-up rows for rows of all columns, and back.
    assert found["all-to-all"] == {"count": 2, "bytes": 2 * 16 * 32 * 16 * 4 // 8}


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": {"fsdp": 4}},
        {"mesh": {"fsdp": 2, "tensor": 2}, "data": {"accumulate": 2}, "remat": "layer"},
    ],
)
def test_nothing_is_gathered_whole_to_be_cut_anew(changes, capfd):
    """The compiler complains of it on the standard error."""
    changes["data"] = {"rows": "-", "seq_length": 32, "batch_size": 16, **changes.get("data", {})}
    assert planned(**changes, model={**MODEL, "vocab_size": 50432})["training"]["memory"]
    assert "rematerialization" not in capfd.readouterr().err


def test_loops_count_as_often_as_they_go_round():
    mesh = sharding.make_mesh({"data": 8})
    spec = NamedSharding(mesh, P("data"))

    def program(x):
        def body(total, _):
            return jax.shard_map(
                lambda part: part + jax.lax.psum(part.sum() * jnp.ones(100), "data")[:2].sum(),
                mesh=mesh,
                in_specs=P("data"),
                out_specs=P("data"),
            )(total), None

        return jax.lax.scan(body, x, length=5)[0]

    shape = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=spec)
    text = jax.jit(program).lower(shape).compile().as_text()
    assert programs.count_collectives(text) == {"all-reduce": {"count": 5, "bytes": 5 * 400}}


# As a TPU's compiler writes it: no trip count, collectives in parts they run beside, named groups.
GROUPS = "replica_groups=mesh['x'=4,'y'=2] {'y'}, dimensions={0}"
TPU_TEXT = """\
HloModule jit_step

%condition (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(9)
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%beside.1 (a: bf16[4,128]) -> bf16[8,128] {
  ROOT %all-gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=3, @GROUPS@
}

%beside.2 (a: bf16[4,128]) -> bf16[8,128] {
  ROOT %all-gather.2 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=3, @GROUPS@
}

%all-reduce-scatter.1 (b: f32[64]) -> f32[8] {
  %all-reduce.7 = f32[64]{0:T(128)} all-reduce(%b), channel_id=5, replica_groups=[1,8]<=[8]
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = bf16[8,128]{1,0} fusion(%x), kind=kCustom, calls=%beside.1
  %fusion.2 = bf16[8,128]{1,0} fusion(%x), kind=kCustom, calls=%beside.2
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %fusion.3 = f32[8]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %all-reduce.9 = f32[2]{0} all-reduce(%z), channel_id=6, replica_groups={{0},{1}}, to_apply=%add
  %start = (f32[4]{0}, f32[8]{0}) all-gather-start(%z), channel_id=8, replica_groups={{0,1},{2,3}}
}
"""


def test_collectives_of_a_tpu():
    assert programs.count_collectives(TPU_TEXT.replace("@GROUPS@", GROUPS)) == {
        "all-gather": {"count": 10, "bytes": 9 * 8 * 128 * 2 + 8 * 4},
        "reduce-scatter": {"count": 1, "bytes": 256},
    }


def test_a_refusal_for_want_of_memory_is_an_answer():
    says = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    says += "temporaries (600.00G) exceeds available HBM (15.75G). HLO module: jit_step."
    found = programs.read_refusal(RuntimeError(says))
    assert (found["needed"], found["available"]) == (600 * 2**30, 15.75 * 2**30)
    assert programs.read_refusal(RuntimeError("INTERNAL: broken")) is None


@pytest.mark.parametrize("pack", [True, False])
def test_targets_of_a_row_are_those_of_the_loader(tmp_path, pack):
    source = tmp_path / "s.jsonl"
    records = [{"q": f"question {n}?", "a": "yes"} for n in range(40)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {
        "rows": str(tmp_path / "rows"),
        "seq_length": 32,
        "pack": pack,
        "sources": [{"path": str(source), "prompt": "{q}", "answer": "a"}],
    }
    config = config_of(data=data, objective={"dummy_mlm_share": 0.2})
    bound = programs.bound_targets(config, [])
    tokenizer = load_tokenizer(config)
    prepare(config.data, tokenizer)
    assumptions = []
    width = programs.bound_targets(config, assumptions)
    assert width == open_loaders(config, tokenizer).train.target_width <= bound
    assert "from the rows in" in assumptions[0]
    # `train` refuses these rows under other settings: nothing is counted by them.
    other = config_of(data={**data, "seq_length": 64}, objective={"dummy_mlm_share": 0.2})
    assumptions = []
    width = programs.bound_targets(other, assumptions)
    assert "rows made differently: data.seq_length is 64, the rows have 32" in assumptions[0]
    assert "the most possible" in assumptions[1]
    other = config_of(
        data={**data, "rows": "none", "seq_length": 64}, objective={"dummy_mlm_share": 0.2}
    )
    assert width == programs.bound_targets(other, [])


def test_changes_go_from_the_cheapest_on():
    mesh = {"data": 4, "fsdp": 2, "tensor": 1}
    found = list(plan.changes(config_of(data={"batch_size": 32}), mesh))
    assert found[0] == {"remat": "dots"}
    assert found[1] == {"remat": "layer"}
    assert [c.get("data.accumulate") for c in found[2:]] == [2, 4, 4, 4]
    assert [c.get("mesh.fsdp") for c in found[4:]] == [4, 8]
    for change in found:
        changed = plan.apply_change(config_of(data={"batch_size": 32}), change)
        assert changed.remat == change["remat"]
    assert "remat" not in next(plan.changes(config_of(remat="layer"), mesh))


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
}  # fmt: skip


def fake_compiler(monkeypatch, training, scoring=lambda config: True):
    """Have plans ask these for the verdict of a configuration; return what they were asked."""
    asked = []

    def ask(config, topology, which=programs.PROGRAMS):
        asked.append((config.remat, config.data.accumulate, *which))
        mesh = sharding.mesh_shape(config.mesh, 8)
        found = {}
        for name, verdict in (("training", training), ("scoring", scoring)):
            if name in which:
                fits = verdict(config)
                found[name] = fake_program(2**30 if fits else 28 * 2**30, fits)
        return {"machine": {**MACHINE, "mesh": mesh}, **found, "assumptions": []}

    monkeypatch.setattr(plan, "_compile", ask)
    return asked


def test_the_nearest_change_that_fits_is_found_by_compiling(monkeypatch):
    asked = fake_compiler(monkeypatch, lambda config: config.data.accumulate == 2)
    found = plan.make_plan(config_of(), "v5e:2x4")
    assert found["fits"] is False
    assert found["change"] == {"remat": "layer", "data.accumulate": 2}
    assert asked == [
        ("none", 1, "training", "scoring"),
        ("dots", 1, "training"),
        ("layer", 1, "training"),
        ("layer", 2, "training"),
        ("layer", 2, "scoring"),
    ]
    assert len(found["tried"]) == 3
    text = "\n".join(plan.report(found))
    assert "DOES NOT FIT" in text
    assert "nearest change that fits: remat=layer data.accumulate=2" in text
    fake_compiler(monkeypatch, lambda config: False)
    text = "\n".join(plan.report(plan.make_plan(config_of(), "v5e:2x4")))
    assert "no change fits" in text
    assert "rejected: needs 28.000 GiB of 2.000 GiB" in text


def test_what_cannot_be_compiled_does_not_end_the_search(monkeypatch):
    """The last changes cut 16 columns in 32, which no run can; the figures are still told."""
    fake_compiler(monkeypatch, lambda config: False)
    monkeypatch.setattr(
        sharding, "mesh_shape", lambda mesh, _: {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": 1}
    )
    monkeypatch.setattr(plan, "changes", lambda *_: [{"mesh.fsdp": 32}, {"mesh.data": -3}])
    found = plan.make_plan(config_of(data={"batch_size": 32}), "v5e:2x4")
    first, second = (tried["refusal"]["message"] for tried in found["tried"])
    assert "fsdp = 32 does not divide 16" in first
    assert "data is -3" in second
    text = "\n".join(plan.report(found))
    assert "tried mesh.fsdp=32: rejected: mesh: parameter" in text
    assert "training step: 16 rows" in text


def test_a_change_is_accepted_by_training_and_its_scoring_is_told(monkeypatch):
    asked = fake_compiler(monkeypatch, lambda c: c.remat != "none", lambda c: False)
    found = plan.make_plan(config_of(), "v5e:2x4")
    assert [a[:2] for a in asked] == [("none", 1), ("dots", 1), ("dots", 1)]
    assert found["tried"][-1]["scoring"]["fits"] is False
    text = "\n".join(plan.report(found))
    assert "nearest change with which the training step fits: remat=dots" in text
    assert "scoring does not fit: give fewer rows" in text
    # Scoring alone: nothing is searched, because no change of the training helps.
    asked = fake_compiler(monkeypatch, lambda c: True, lambda c: False)
    found = plan.make_plan(config_of(), "v5e:2x4")
    assert (found["fits"], "tried" in found, len(asked)) == (False, False, 1)
    assert "scoring does not fit" in "\n".join(plan.report(found))


def test_validation_of_a_classifier_is_searched_for_too(monkeypatch):
    source = {"path": "s.jsonl", "prompt": "{q}", "answer": "a", "labels": {"x": "X", "y": "Y"}}
    data = {"rows": "-", "seq_length": 32, "batch_size": 16, "pack": False, "sources": [source]}
    fake_compiler(monkeypatch, lambda c: True, lambda c: c.data.accumulate == 2)
    found = plan.make_plan(config_of(head="classification", data=data), "v5e:2x4")
    assert found["change"] == {"remat": "layer", "data.accumulate": 2}


def test_figures_of_a_program_have_one_unit_and_seconds_are_readable():
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
    assert "compile 3 min 10 s" in training
    assert "attention auto: splash, blocks of 512 in global and 256 in local layers" in training


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallel": "pmap"}, "parallel: only 'pjit' can be planned"),
        ({"data": {"batch_size": 12}}, "batch of 12 rows cannot be divided"),
        (
            {"data": {"batch_size": 16, "batch_start": 4, "batch_warmup": 2}},
            "batch of 4 rows cannot be divided",
        ),
        ({"attention": "splash"}, "'splash' needs a TPU, and this is cpu"),
        ({"attention": "cudnn"}, "'cudnn' needs an NVIDIA GPU, and this is cpu"),
        ({"mesh": {"tensor": 8}}, "tensor = 8 does not divide 2"),
        ({"mesh": {"fsdp": 3}}, "does not divide the 8 devices"),
        ({"data": {"seq_length": 128}}, "the model takes at most 64"),
    ],
)
def test_what_needs_no_compiler_is_refused_before_it_starts(changes, says, monkeypatch):
    monkeypatch.setattr(plan, "_compile", None)
    said = []
    with pytest.raises(InputError, match=says):
        plan.make_plan(config_of(**changes), "cpu:8", say=said.append)
    assert not said


def test_a_compiler_that_aborts_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="the compiler stopped"):
        plan.make_plan(config_of(), "cpu:8")
    topology, says = parse_topology("cpu:8"), "x.cc:234] Unknown flag in XLA_FLAGS: --nope=1"
    assert (
        "XLA_FLAGS: --nope=1 is not a flag"
        in plan._explain_death(topology, 1, ["more", says]).message
    )
    assert "too little memory" in plan._explain_death(topology, -9, []).message


def test_the_command_prints_figures(tmp_path, capsys, monkeypatch):
    file = tmp_path / "run.toml"
    file.write_text(
        'out = "x"\nsteps = 2\n[data]\nrows = "r"\nseq_length = 16\nbatch_size = 4\n[model]\n'
        + "\n".join(f"{key} = {value}" for key, value in MODEL.items())
    )
    assert run(["plan", str(file), "mesh.fsdp=2", "--topology", "cpu:4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Simulated devices have no memory of their own to judge by.
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


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr("mlmjax.training.planning.topology._lacks_libtpu", lambda error: True)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", lambda **_: 1 / 0)
    with pytest.raises(InputError, match=r"pip install '\.\[plan\]' in a clone"):
        devices_of(parse_topology("v5e:2x2"))


@pytest.mark.libtpu
def test_a_step_with_splash_kernels_compiles_for_a_tpu():
    config = config_of(dtype="bfloat16", attention="splash", mesh={"fsdp": 2})
    found = plan.make_plan(config, "v5e:2x2")
    assert found["fits"]
    assert found["machine"]["device"] == "TPU v5 lite"
    assert found["training"]["collectives"]["all-gather"]["count"] > 4
    assert found["training"]["seconds_at_peak"] > 0


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "7x:2x2x1"])
def test_kernels_of_both_kinds_of_layers_compile_for_every_tpu(topology, monkeypatch):
    for name, value in environment(parse_topology(topology)).items():
        if "TPU" in name:
            monkeypatch.setenv(name, value)
    mesh = sharding.make_mesh({"data": 2, "tensor": 2}, devices_of(parse_topology(topology)))
    heads = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
    shape = jax.ShapeDtypeStruct((2, 4, 1024, 64), jnp.bfloat16, sharding=heads)
    ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32, sharding=sharding.batch_sharding(mesh))

    def loss(q, k, v, ids):
        out = attend(q, k, v, ids, window=None, block=512)
        return attend(out, k, v, ids, window=64, block=256).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape, ids)
        text = program.compile().as_text()
    assert text.count("tpu_custom_call") >= 6
