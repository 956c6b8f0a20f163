from pathlib import Path

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
    check_rows,
    constrain,
    lay_out_slices,
    leaf_path,
    make_mesh,
    parameter_specs,
    state_specs,
)

BASE = {}
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 2624,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
}
SWITCHES = {
    "norm_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
    "classifier_bias": True,
    "num_hidden_layers": 2,
}

# How every parameter of a layer, and around the layers, is sharded.
LAYER = {
    "attn_norm.weight": P(),
    "attn_norm.bias": P(),
    "attn.Wqkv.weight": P("fsdp", None, "tensor", None),
    "attn.Wqkv.bias": P(None, "tensor", None),
    "attn.Wo.weight": P("tensor", None, "fsdp"),
    "attn.Wo.bias": P(),
    "mlp_norm.weight": P(),
    "mlp_norm.bias": P(),
    "mlp.Wi.weight": P("fsdp", None, "tensor"),
    "mlp.Wi.bias": P(None, "tensor"),
    "mlp.Wo.weight": P("tensor", "fsdp"),
    "mlp.Wo.bias": P(),
}
AROUND = {
    "model.embeddings.tok_embeddings.weight": P("tensor", "fsdp"),
    "model.embeddings.norm.weight": P(),
    "model.embeddings.norm.bias": P(),
    "model.final_norm.weight": P(),
    "model.final_norm.bias": P(),
    "head.dense.weight": P("fsdp", None),
    "head.dense.bias": P(),
    "head.norm.weight": P(),
    "head.norm.bias": P(),
    "decoder.bias": P("tensor"),
    "classifier.weight": P("fsdp", None),
    "classifier.bias": P(),
}


def abstract_parameters(model=ModernBertForMaskedLM, **values):
    config = ModelConfig.from_hf(values)
    return nnx.state(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))), nnx.Param)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    return {leaf_path(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("model", [ModernBertForMaskedLM, ModernBertForSequenceClassification])
def test_every_parameter_is_sharded_as_written_down(model):
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    found = by_path(parameter_specs(sizes, abstract_parameters(model, **SWITCHES)))
    for path, spec in found.items():
        in_layer = path.removeprefix("model.layers.").partition(".")[2]
        expected = LAYER[in_layer] if path.startswith("model.layers.") else AROUND[path]
        assert spec == expected, path
    assert len(found) > 12


def sharding_table(name, values):
    """One line for each parameter: the model, its path, and how each dimension is sharded."""
    params = abstract_parameters(**values)
    specs = by_path(parameter_specs({"data": 1, "fsdp": 4, "tensor": 2}, params))
    for path, leaf in by_path(params).items():
        axes = [*specs[path], *[None] * (leaf.ndim - len(specs[path]))]
        cut = [
            f"{size}/{axis}" if axis else str(size)
            for size, axis in zip(leaf.shape, axes, strict=True)
        ]
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


def test_optimizer_state_follows_its_parameter():
    params = abstract_parameters(num_hidden_layers=1)
    sizes = {"data": 1, "fsdp": 2, "tensor": 2}
    expected = by_path(parameter_specs(sizes, params))
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    found = by_path(state_specs(sizes, params, state))
    assert found.pop("0.count") == P()
    assert found == {f"0.{m}.{path}": spec for m in ("mu", "nu") for path, spec in expected.items()}


def test_factored_moments_are_replicated():
    params = abstract_parameters(num_hidden_layers=1)
    state = jax.eval_shape(optax.adafactor(1e-3).init, params)
    specs = by_path(state_specs({"data": 1, "fsdp": 2, "tensor": 2}, params, state))
    rows = [spec for path, spec in specs.items() if "v_row" in path]
    assert rows
    assert all(spec == P() for path, spec in specs.items() if "tok_embeddings" in path)


def test_make_mesh():
    assert dict(make_mesh(MeshConfig(fsdp=2)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh({"tensor": 2}).shape) == {"data": 1, "fsdp": 1, "tensor": 2}
    assert dict(make_mesh({"data": -1, "fsdp": 4, "tensor": 2}).shape)["data"] == 1
    assert make_mesh({"data": 3}).size == 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": 3}, "does not divide the 8 devices"),
        ({"data": 16}, "= 16 devices, but there are 8"),
        ({"model": 2}, "unknown axis 'model'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(sizes)


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


class FakeDevice:
    """What the layout of a mesh looks at."""

    def __init__(self, number, slice_index, platform):
        self.id, self.slice_index, self.platform = number, slice_index, platform
        self.device_kind = platform
        self.process_index = number // 4

    def __repr__(self):
        return f"{self.slice_index}:{self.id}"


def test_only_data_crosses_from_slice_to_slice():
    # Out of order, as a runtime may list them.
    devices = [FakeDevice(n, n % 4, "cpu") for n in range(16)]
    layout = lay_out_slices((8, 2, 1), devices)
    assert layout.shape == (8, 2, 1)
    slices = np.vectorize(lambda device: device.slice_index)(layout)
    assert (slices == slices[:, :1, :1]).all()  # fsdp and tensor stay within a slice
    assert sorted(slices[:, 0, 0]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(device.id for device in layout.ravel()) == list(range(16))
    assert lay_out_slices((2, 8, 1), devices) is None
    assert lay_out_slices((4, 1, 1), devices[::4]) is None  # of one slice
    tpus = [FakeDevice(n, n % 4, "tpu") for n in range(16)]
    with pytest.raises(InputError, match="data 2 cannot be divided over 4 slices"):
        lay_out_slices((2, 8, 1), tpus)
