"""Packed batches of a given number of targets, and a model for them."""

import numpy as np
from flax import nnx

from mlmjax.data.batch import UNUSED, Batch
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import ModernBertForMaskedLM

VOCAB, SEQ, WIDTH = 64, 16, 6


UNEVEN = [6, 0, 1, 0, 6, 5, 0, 0] * 2  # Rows for micro-batches on eight devices.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "local_attention": 8,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    **dict.fromkeys(("cls_token_id", "sep_token_id"), 1),
}


def make_model(layers=2):
    config = ModelConfig.from_hf({**SIZES, "num_hidden_layers": layers})
    return ModernBertForMaskedLM(config, rngs=nnx.Rngs(0), attention="dense")


def make_batch(counts, seed=0):
    """Return rows of two segments and some padding, with `counts[row]` targets each."""
    rng = np.random.default_rng(seed)
    rows = len(counts)
    ids = rng.integers(2, VOCAB, (rows, SEQ)).astype(np.int32)
    segments = np.repeat([[1] * 9 + [2] * 5 + [0] * 2], rows, axis=0).astype(np.int32)
    positions = np.repeat([[*range(9), *range(5), 0, 0]], rows, axis=0).astype(np.int32)
    targets = np.full((3, rows, WIDTH), UNUSED, np.int32)
    for row, count in enumerate(counts):
        targets[0, row, :count] = np.sort(rng.choice(14, count, replace=False))
        targets[1, row, :count] = rng.integers(2, VOCAB, count)
        targets[2, row, :count] = rng.integers(0, 3, count)
    return Batch(ids, segments, positions, *targets)
