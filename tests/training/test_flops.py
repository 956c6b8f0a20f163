from functools import cache

import numpy as np
import pytest
from flax import nnx

from mlmjax.data.batch import UNUSED, Batch, LabelBatch
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.blockwise import visible
from mlmjax.model.modernbert import ModernBertForMaskedLM
from mlmjax.parallel.sharding import named_leaves
from mlmjax.training.flops import forward_flops, peak_flops, training_flops

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
