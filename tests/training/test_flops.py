from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from batches import SIZES
from flax import nnx

from mlmjax.config.run import AdapterConfig
from mlmjax.data.batch import UNUSED, Batch, LabelBatch
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.blockwise import visible
from mlmjax.model.modernbert import ModernBertForMaskedLM
from mlmjax.parallel.sharding import named_leaves
from mlmjax.training.adapters import joined, split_trained
from mlmjax.training.flops import forward_flops, peak_flops, training_flops, update_flops

CONFIG = ModelConfig.from_hf({"num_hidden_layers": 4, "local_attention": 10})


@cache
def kernels():
    """Sizes of the matrices, by name, as the model itself has them."""
    model = nnx.eval_shape(lambda: ModernBertForMaskedLM(CONFIG, rngs=nnx.Rngs(0)))
    leaves = named_leaves(nnx.state(model, nnx.Param))
    return {name: leaf.size for name, leaf in leaves.items() if leaf.ndim > 1}


@pytest.mark.parametrize("lengths", [[1], [3, 5], [6, 7, 40], [64]])
def test_flops_are_those_of_the_matrices_and_of_every_visible_pair(lengths):
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    rows = np.arange(len(segments))
    seen = {
        kind: int(visible(segments, segments, rows, rows, window).sum())
        for kind, window in (("full_attention", None), ("sliding_attention", 5))
    }
    sizes = kernels()
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    head = sizes["head.dense.weight"] + sizes["model.embeddings.tok_embeddings.weight"]
    attention = sum(4 * CONFIG.hidden_size * seen[kind] for kind in CONFIG.layer_types)
    expected = 2 * layers * len(segments) + attention + 2 * head * 2
    assert forward_flops(CONFIG, lengths, 2, CONFIG.vocab_size) == expected


def test_padding_and_unused_targets_count_nothing():
    segments = np.array([[1] * 9 + [2] * 5 + [0] * 2, [0] * 16, [1] * 16])
    targets = np.full((3, 4), UNUSED)
    targets[0, :3] = 7
    batch = Batch(segments, segments, segments, targets, targets, targets)
    labelled = LabelBatch(segments, segments, np.array([1, np.nan, 0], np.float32))
    for given, answers, width in ((batch, 3, CONFIG.vocab_size), (labelled, 2, CONFIG.num_labels)):
        expected = 3 * forward_flops(CONFIG, [9, 5, 16], answers, width)
        assert training_flops(CONFIG, given) == expected


def test_peaks_are_known_by_kind_and_only_for_bfloat16():
    kinds = ("NVIDIA H100 80GB HBM3", "TPU v5 lite", "TPU v5p", "TPU v6 lite")
    assert [peak_flops(kind, "bfloat16") for kind in kinds] == [989e12, 197e12, 459e12, 918e12]
    assert peak_flops("NVIDIA H200", "float32") is None


def products_of(jaxpr):
    """Add up the FLOPs of the products in a program that its results need."""
    total, needed = 0, {id(variable) for variable in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if not needed & {id(variable) for variable in equation.outvars}:
            continue
        needed |= {id(variable) for variable in equation.invars}
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            size = equation.invars[0].aval.shape
            inner = np.prod([size[axis] for axis in contracted])
            total += 2 * np.prod(equation.outvars[0].aval.shape) * inner
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                total += products_of(getattr(value, "jaxpr", value))
    return total


def is_program(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize(
    ("patterns", "adapter"),
    [
        (None, None),
        (["*norm*"], None),
        (["model.layers.1.*"], None),
        (["model.layers.1.mlp.Wo.weight"], None),
        (["head.*"], None),
        (["*lora_*"], AdapterConfig(rank=4)),
        (["*lora_*"], AdapterConfig(rank=4, targets=("mlp.Wo",))),
    ],
)
def test_an_update_has_the_products_of_its_gradient(patterns, adapter):
    """Counted in the program of the gradient, with one text of global attention in each row."""
    sizes = {**SIZES, "global_attn_every_n_layers": 1, "tie_word_embeddings": False}
    sizes["decoder_bias"] = False  # It is spread over the rows by a product, which is cheap.
    config = replace(ModelConfig.from_hf(sizes), adapter=adapter)
    model = nnx.eval_shape(
        lambda: ModernBertForMaskedLM(config, rngs=nnx.Rngs(0), attention="dense")
    )
    graphdef, params = nnx.split(model, nnx.Param)
    trained, frozen = split_trained(params, patterns)
    ids = jax.ShapeDtypeStruct((3, 16), np.int32)

    def loss(trained, frozen, ids):
        model = nnx.merge(graphdef, joined(trained, frozen))
        return (model.mlm_logits(model.encode(ids)[:, 4]) ** 2).sum()

    program = jax.make_jaxpr(jax.grad(loss))(trained, frozen, ids)
    names = named_leaves(trained)
    expected = products_of(program.jaxpr)
    assert update_flops(config, [16] * 3, 3, config.vocab_size, names) == expected
    if patterns is None:
        assert expected == 3 * forward_flops(config, [16] * 3, 3, config.vocab_size)
        assert update_flops(config, [16] * 3, 3, config.vocab_size) == expected
