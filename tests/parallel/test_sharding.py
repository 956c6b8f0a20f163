import re
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mlmjax.config.run import MeshConfig
from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import ModernBertForMaskedLM, ModernBertForSequenceClassification
from mlmjax.parallel.sharding import (
    AXES,
    check_rows,
    constrain,
    lay_out_slices,
    make_mesh,
    named_leaves,
    parameter_specs,
    state_specs,
)
from mlmjax.training.run.initial_model import PUBLISHED

BASE = {}
LARGE = PUBLISHED["answerdotai/ModernBERT-large"]
SWITCHES = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
SIZES = {"data": 1, "fsdp": 4, "tensor": 2}

# How parameters are sharded, by the end of their path; all others are replicated.
SHARDED = {
    "tok_embeddings.weight": P("tensor", "fsdp"),
    "attn.Wqkv.weight": P("fsdp", None, "tensor", None),
    "attn.Wqkv.bias": P(None, "tensor", None),
    "attn.Wo.weight": P("tensor", None, "fsdp"),
    "mlp.Wi.weight": P("fsdp", None, "tensor"),
    "mlp.Wi.bias": P(None, "tensor"),
    "mlp.Wo.weight": P("tensor", "fsdp"),
    "dense.weight": P("fsdp", None),
    "decoder.weight": P("tensor", "fsdp"),
    "decoder.bias": P("tensor"),
    "classifier.weight": P("fsdp", None),
}


def abstract_parameters(model=ModernBertForMaskedLM, **values):
    config = ModelConfig.from_hf(values)
    return nnx.state(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))), nnx.Param)


@pytest.mark.parametrize("model", [ModernBertForMaskedLM, ModernBertForSequenceClassification])
def test_every_parameter_is_sharded_as_written_down(model):
    params = abstract_parameters(model, **SWITCHES, num_hidden_layers=2, tie_word_embeddings=False)
    found = named_leaves(parameter_specs(SIZES, params))
    for path, spec in found.items():
        expected = [spec for end, spec in SHARDED.items() if f".{path}".endswith(f".{end}")]
        assert [spec] == (expected or [P()]), path
    assert len(found) > 12
    assert ("decoder.weight" in found) == (model is ModernBertForMaskedLM)


def sharding_table(name, values):
    """One line for each parameter: the model, its path, and how each dimension is sharded."""
    params = abstract_parameters(**values)
    specs = named_leaves(parameter_specs(SIZES, params))
    for path, leaf in named_leaves(params).items():
        axes = zip_longest(leaf.shape, specs[path])
        cut = [f"{size}/{axis}" if axis else str(size) for size, axis in axes]
        yield f"{name}\t{path}\t{' x '.join(cut)}"


def test_every_parameter_of_base_and_large_is_in_the_golden_table():
    table = Path(__file__).parents[1] / "data" / "sharding.tsv"
    expected = table.read_text().splitlines()
    assert [*sharding_table("base", BASE), *sharding_table("large", LARGE)] == expected[1:]
    assert len(expected) == 1 + 137 + 173  # six a layer, five of them sharded


@pytest.mark.parametrize("name", ["adapter", "norm"])  # Only vectors of a norm are replicated.
def test_a_parameter_without_a_rule_is_refused(name):
    params = nnx.State({name: {"weight": nnx.Param(jnp.zeros((4, 8)))}})
    message = rf"no sharding rule for parameter {name}.weight \[4, 8\]"
    with pytest.raises(InputError, match=message):
        parameter_specs({"fsdp": 2}, params)


def test_every_dimension_that_does_not_divide_is_listed():
    params = abstract_parameters(num_hidden_layers=2)
    with pytest.raises(InputError) as caught:
        parameter_specs({"data": 1, "fsdp": 1, "tensor": 8}, params)
    assert "attn.Wqkv.weight [768, 3, 12, 64]: tensor = 8 does not divide 12" in str(caught.value)
    assert "these do: 1, 2, 3, 4, 6, 12" in caught.value.message
    # Two layers, Wqkv and Wo each; 8 divides everything else.
    assert len([caught.value.message, *caught.value.details]) == 4


def test_optimizer_state_follows_its_parameter_and_factored_moments_are_replicated():
    params = abstract_parameters(num_hidden_layers=1)

    def specs_of(optimizer):
        return named_leaves(state_specs(SIZES, params, jax.eval_shape(optimizer.init, params)))

    expected, found = named_leaves(parameter_specs(SIZES, params)), specs_of(optax.adamw(1e-3))
    assert found.pop("0.count") == P()
    assert found == {f"0.{m}.{path}": spec for m in ("mu", "nu") for path, spec in expected.items()}
    specs = specs_of(optax.adafactor(1e-3))
    assert any("v_row" in path for path in specs)
    assert all(spec == P() for path, spec in specs.items() if "tok_embeddings" in path)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(fsdp=2), (4, 2, 1)),
        ({"tensor": 2}, (1, 1, 2)),
        ({"data": -1, "fsdp": 4, "tensor": 2}, (1, 4, 2)),
        ({"data": 3}, (3, 1, 1)),
    ],
)
def test_a_mesh_has_the_sizes_of_its_configuration(config, shape):
    assert tuple(make_mesh(config).shape.items()) == tuple(zip(AXES, shape, strict=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": 3}, "does not divide the 8 devices; set mesh.fsdp=1"),
        ({"data": -1, "fsdp": 16}, "set mesh.fsdp=8"),
        ({"data": -1, "fsdp": 12, "tensor": 4}, "set mesh.fsdp=2"),
        ({"data": -1, "tensor": 12}, "set mesh.tensor=4"),
        ({"data": 16}, "= 16 devices, but there are 8; set mesh.data=-1"),
        ({"data": 2, "fsdp": 16}, "set mesh.data=-1 mesh.fsdp=8"),
        ({"model": 2}, "unknown axis 'model'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_one_that_does(sizes, message):
    with pytest.raises(InputError, match=message) as caught:
        make_mesh(sizes)
    if said := re.findall(r"mesh\.(\w+)=(-?\d+)", caught.value.message):
        make_mesh(sizes | {axis: int(size) for axis, size in said})


def test_rows_that_cannot_be_divided_are_refused():
    check_rows({"data": 2, "fsdp": 2}, 16, accumulate=4)
    check_rows({}, 3)
    with pytest.raises(InputError, match="make batch_size a multiple of 16"):
        check_rows({"data": 2, "fsdp": 2}, 8, accumulate=4)


def test_constrain_shards_inside_a_trace_and_does_nothing_without_a_mesh():
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    cut = jax.jit(lambda x: constrain(x * 2, "batch", "tensor"))
    assert cut(x).sharding.num_devices == 1
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        result = cut(x)
        with pytest.raises(InputError, match="tensor = 2 does not divide 3"):
            jax.jit(lambda x: constrain(x[:, :3], "batch", "tensor"))(x)
    assert result.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(result, 2 * x)


def fake_devices(platform):
    """What the layout of a mesh looks at, out of order, as a runtime may list it."""
    return [
        SimpleNamespace(
            id=n, slice_index=n % 4, platform=platform, device_kind=platform, process_index=n // 4
        )
        for n in range(16)
    ]


def test_only_data_crosses_from_slice_to_slice():
    devices = fake_devices("cpu")
    layout = lay_out_slices((8, 2, 1), devices)
    assert layout.shape == (8, 2, 1)
    slices = np.vectorize(lambda device: device.slice_index)(layout)
    assert (slices == slices[:, :1, :1]).all()  # fsdp and tensor stay within a slice
    assert sorted(slices[:, 0, 0]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(device.id for device in layout.ravel()) == list(range(16))
    assert lay_out_slices((2, 8, 1), devices) is None
    assert lay_out_slices((4, 1, 1), devices[::4]) is None  # of one slice
    with pytest.raises(InputError, match="data 2 cannot be divided over 4 slices"):
        lay_out_slices((2, 8, 1), fake_devices("tpu"))
