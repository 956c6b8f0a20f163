"""Count model FLOPs: those of the mathematics, however it is computed."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from mlmjax.data.batch import PADDING_SEGMENT, Batch, LabelBatch
from mlmjax.model.architecture import GLOBAL, ModelConfig

PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU7x": 1153.5e12,
}
"""Dense bfloat16 FLOP/s of a device by the start of its kind, as its maker states them.

A chip of TPU7x is two devices, each with half of the chip's 2307e12."""


def peak_flops(kind: str, dtype: str) -> float | None:
    """Return the peak of a device of this kind (`device_kind` in JAX), None if unknown.

    >>> peak_flops("NVIDIA H200", "bfloat16"), peak_flops("cpu", "bfloat16")
    (989000000000000.0, None)
    """
    known = (peak for name, peak in PEAKS.items() if kind.startswith(name))
    return next(known, None) if dtype == "bfloat16" else None


Trained = Collection[str] | None
"""Names of the parameters that an update changes; None: all."""


def training_flops(
    config: ModelConfig, batch: Batch | LabelBatch, trained: Trained = None
) -> float:
    """Return the model FLOPs of one update on a batch, as `update_flops`.

    Padding, masked scores and recomputation do not count. Local layers count the keys within the
    window, and the head only real targets or labelled rows.
    """
    lengths = segment_lengths(np.asarray(batch.segment_ids))
    if isinstance(batch, LabelBatch):
        is_answer, width = ~np.isnan(batch.labels), config.num_labels
    else:
        is_answer, width = np.asarray(batch.target_ids) >= 0, config.vocab_size
    return update_flops(config, lengths, int(np.count_nonzero(is_answer)), width, trained)


def update_flops(
    config: ModelConfig,
    lengths: np.ndarray | Iterable[int],
    answers: int,
    width: int,
    trained: Trained = None,
) -> float:
    """Return the FLOPs of the matrix products of one update; see `forward_flops`.

    Each product has two more for its gradients: that of its weight, if it is trained, and that of
    its input, if a trained parameter comes before it. So a whole training takes three times the
    forward pass.
    """
    products = _products(config, lengths, answers, width)
    if trained is None:
        return 3 * sum(one.flops for one in products)
    total, below = 0.0, any(".embeddings." in name for name in trained)
    for one in products:
        below = below or any(name in trained for name in _both(one.norm))
        own = below if one.weight is None else one.weight in trained
        total += one.flops * (1 + below + own)
        below = below or own or one.bias in trained
    return total


def forward_flops(
    config: ModelConfig, lengths: np.ndarray | Iterable[int], answers: int, width: int
) -> float:
    """Return the FLOPs of the matrix products of one forward pass.

    `lengths` are those of the segments, `answers` the positions the head runs on, `width` what it
    maps them to. A product `[m, k] x [k, n]` is 2 m k n.
    """
    return sum(one.flops for one in _products(config, lengths, answers, width))


class _Product(NamedTuple):
    """A product: its FLOPs going forward, its weight and bias, and the norm before it.

    Attention scores have no weight: both their factors are activations.
    """

    flops: float
    weight: str | None = None
    bias: str | None = None
    norm: str | None = None


def _both(name: str | None) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def _products(
    config: ModelConfig, lengths: np.ndarray | Iterable[int], answers: int, width: int
) -> list[_Product]:
    """Return the products of a forward pass in their order."""
    lengths = np.asarray(lengths, np.int64)
    hidden, inner, tokens = config.hidden_size, config.intermediate_size, int(lengths.sum())
    near = np.minimum(lengths - 1, config.window)
    pairs = {
        True: int(np.sum(lengths**2)),
        False: int(np.sum(lengths + near * (near + 1) + 2 * (lengths - 1 - near) * config.window)),
    }
    found: list[_Product] = []

    def multiply(layer: str, own: str, inputs: int, outputs: int, norm: str | None = None) -> None:
        name, adapter = f"{layer}.{own}", config.adapter
        found.append(_Product(2.0 * tokens * inputs * outputs, *_both(name), norm))
        if adapter is not None and adapter.changes(own):
            for part, size in (("lora_A", inputs), ("lora_B", outputs)):
                weight = f"{name}.{part}.weight"
                found.append(_Product(2.0 * tokens * size * adapter.rank, weight))

    for index, kind in enumerate(config.layer_types):
        layer = f"model.layers.{index}"
        multiply(layer, "attn.Wqkv", hidden, 3 * hidden, f"{layer}.attn_norm")
        found.append(_Product(4.0 * hidden * pairs[kind == GLOBAL]))
        multiply(layer, "attn.Wo", hidden, hidden)
        multiply(layer, "mlp.Wi", hidden, 2 * inner, f"{layer}.mlp_norm")
        multiply(layer, "mlp.Wo", inner, hidden)
    dense, last = 2.0 * answers * hidden * hidden, 2.0 * answers * hidden * width
    found.append(_Product(dense, *_both("head.dense"), "model.final_norm"))
    found.append(_Product(last, _last_weight(config), "decoder.bias", "head.norm"))
    return found


def _last_weight(config: ModelConfig) -> str:
    """Return the name of the weight of the last product, which the embeddings may be."""
    if config.architectures == ("ModernBertForSequenceClassification",):
        return "classifier.weight"
    if config.tie_word_embeddings:
        return "model.embeddings.tok_embeddings.weight"
    return "decoder.weight"


def segment_lengths(segment_ids: np.ndarray) -> np.ndarray:
    """Return the number of tokens of every segment of `[batch, seq]`, padding left out.

    >>> segment_lengths(np.array([[1, 1, 2, 0], [1, 1, 1, 1]])).tolist()
    [2, 1, 4]
    """
    segments = (row[row != PADDING_SEGMENT] for row in segment_ids)
    return np.concatenate([np.unique(row, return_counts=True)[1] for row in segments])
