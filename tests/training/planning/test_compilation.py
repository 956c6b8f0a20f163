"""Programs of a run, compiled for simulated and described devices."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from plans import CLASSIFIER, config_of

from mlmjax.config.run import load_config
from mlmjax.data.preparing.prepare import prepare
from mlmjax.model.attention import attend
from mlmjax.parallel import sharding
from mlmjax.training.planning import compilation, compiled, plan
from mlmjax.training.planning.topology import devices_of, environment, parse_topology
from mlmjax.training.run.initial_model import describe_start, load_tokenizer
from mlmjax.training.run.inputs import open_loaders


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


def compile_one(program="training", **changes):
    config = config_of(**{"model": {"num_hidden_layers": 1}} | changes)
    return compilation.compile_run(config, parse_topology("cpu:8"), [program])[program]


@cache
def data_parallel_step():
    return compile_one()


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
    """Only the tied table is summed twice: for its lookup and for its decoder."""
    training = data_parallel_step()
    table = 50368 * 16 * 4
    found = training["collectives"]
    gradients = training["parameters"]
    assert gradients + table <= found["all-reduce"]["bytes"] < gradients + table + 1000
    assert sum(c["bytes"] for kind, c in found.items() if kind != "all-reduce") < 20_000
    assert training["memory"]["arguments"] == pytest.approx(
        training["parameters"] + training["optimizer_state"] + training["batch"], rel=0.01
    )
    assert training["memory"]["outputs_in_arguments"] > 0.99 * training["memory"]["outputs"]


def test_an_fsdp_step_gathers_parameters_and_holds_a_shard():
    whole, cut = data_parallel_step(), compile_one(mesh={"fsdp": 8})
    assert cut["parameters"] < 0.2 * whole["parameters"]  # vectors are whole everywhere
    found = cut["collectives"]
    assert found["all-gather"]["bytes"] > 0.9 * whole["parameters"]
    reduced = found["all-reduce"]["bytes"] + found.get("reduce-scatter", {"bytes": 0})["bytes"]
    # A device has the gradient of the lookup only for its own columns.
    assert 0.9 * whole["parameters"] < reduced < 1.3 * whole["parameters"]
    # It exchanges columns of the looked-up rows for rows of all columns, and back.
    assert found["all-to-all"] == {"count": 2, "bytes": 2 * 16 * 32 * 16 * 4 // 8}


def test_the_scoring_of_a_classification_head_is_its_validation():
    data = CLASSIFIER["data"] | {"accumulate": 2}
    scoring = compile_one("scoring", **CLASSIFIER | {"data": data})
    assert (scoring["rows"], scoring["seq_length"], scoring["devices"]) == (8, 32, 8)
    assert scoring["memory"]["total"] > scoring["parameters"]


@pytest.mark.parametrize(
    "changes",
    [
        long({"mesh": {"fsdp": 4}}),
        {"mesh": {"fsdp": 2, "tensor": 2}, "data": {"accumulate": 2}, "remat": "layer"},
    ],
)
def test_no_array_is_gathered_whole_to_be_resharded(changes, capfd):
    """The compiler would warn about it on standard error."""
    assert compile_one(**changes, model={"vocab_size": 50432})["memory"]
    assert "rematerialization" not in capfd.readouterr().err


def test_collectives_in_a_loop_count_once_per_iteration():
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
    assert compiled.count_collectives(text) == {"all-reduce": {"count": 5, "bytes": 5 * 400}}


# As a TPU's compiler writes it: no trip counts, overlapping collectives, named groups.
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
    assert compiled.count_collectives(TPU_TEXT.replace("@GROUPS@", GROUPS)) == {
        "all-gather": {"count": 10, "bytes": 9 * 8 * 128 * 2 + 8 * 4},
        "reduce-scatter": {"count": 1, "bytes": 256},
    }


def test_too_little_memory_is_an_answer():
    says = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    says += "temporaries (600.00G) exceeds available HBM (15.75G). HLO module: jit_step."
    found = compiled.read_refusal(RuntimeError(says))
    assert (found["needed"], found["available"]) == (600 * 2**30, 15.75 * 2**30)
    assert compiled.read_refusal(RuntimeError("INTERNAL: broken")) is None


@pytest.mark.parametrize("pack", [True, False])
def test_the_targets_of_a_row_are_those_of_the_loader(tmp_path, pack):
    source = tmp_path / "s.jsonl"
    records = [{"q": f"question {n}?", "a": "yes"} for n in range(40)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = [{"path": str(source), "prompt": "{q}", "answer": "a"}]

    def bound_of(**changes):
        """Return the configuration, the bound of its targets, and what it says."""
        data = {"rows": str(tmp_path / "rows"), "pack": pack, "sources": sources, **changes}
        config, assumptions = config_of(data=data, objective={"dummy_mlm_share": 0.2}), []
        return config, compilation.bound_targets(config, assumptions), assumptions

    config, bound, _ = bound_of()
    tokenizer = load_tokenizer(config)
    prepare(config.data, tokenizer)
    _, width, says = bound_of()
    assert width == open_loaders(config, tokenizer).train.target_width <= bound
    assert "from the rows in" in says[0]
    # `train` rejects these rows under other settings, so they do not count.
    _, width, says = bound_of(seq_length=64)
    assert "rows made differently: data.seq_length is 64, the rows have 32" in says[0]
    assert "the most possible" in says[1]
    assert width == bound_of(seq_length=64, rows="none")[1]


@pytest.fixture
def tpu_environment(monkeypatch):
    """Describe TPUs in this process; the command does so in a child process."""
    for name, value in environment(parse_topology("v5e:2x2")).items():
        if "TPU" in name:
            monkeypatch.setenv(name, value)


SPLASH = {"dtype": "bfloat16", "attention": "splash", "mesh": {"fsdp": 2}}


@pytest.mark.long
@pytest.mark.libtpu
def test_a_step_with_splash_kernels_compiles_for_a_tpu(tpu_environment):
    config = config_of(**SPLASH, model={"num_hidden_layers": 1})
    found = compilation.compile_run(config, parse_topology("v5e:2x2"), ["training"])
    assert found["machine"]["device"] == "TPU v5 lite"
    assert found["training"]["fits"]
    assert found["training"]["collectives"]["all-gather"]["count"] > 4
    assert found["training"]["seconds_at_peak"] > 0


@pytest.mark.long
@pytest.mark.libtpu
def test_a_run_with_splash_kernels_fits_a_tpu():
    assert plan.make_plan(config_of(**SPLASH), "v5e:2x2")["fits"]


@pytest.mark.libtpu
@pytest.mark.parametrize(
    "topology", ["v5e:2x2", *map(long, ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "7x:2x2x1"])]
)
def test_kernels_of_both_kinds_of_layers_compile_for_every_tpu(topology, tpu_environment):
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
