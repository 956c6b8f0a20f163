"""Count model FLOPs: those of the mathematics, however it is computed."""

from collections.abc import Iterable

import numpy as np

from mlmjax.data.batch import PADDING_SEGMENT, Batch, LabelBatch
from mlmjax.model.architecture import GLOBAL, ModelConfig

BACKWARD = 3
"""Forward passes that a training step is worth: each product has two more for its gradients."""

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


def training_flops(config: ModelConfig, batch: Batch | LabelBatch) -> float:
    """Return the model FLOPs of one update on a batch: `BACKWARD` times the forward products.

    Padding, masked scores and recomputation do not count. Local layers count the keys within the
    window, and the head only real targets or labelled rows.
    """
    lengths = segment_lengths(np.asarray(batch.segment_ids))
    if isinstance(batch, LabelBatch):
        is_answer, width = ~np.isnan(batch.labels), config.num_labels
    else:
        is_answer, width = np.asarray(batch.target_ids) >= 0, config.vocab_size
    return BACKWARD * forward_flops(config, lengths, int(np.count_nonzero(is_answer)), width)


def forward_flops(
    config: ModelConfig, lengths: np.ndarray | Iterable[int], answers: int, width: int
) -> float:
    """Return the FLOPs of the matrix products of one forward pass.

    `lengths` are those of the segments, `answers` the positions the head runs on, `width` what it
    maps them to. A product `[m, k] x [k, n]` is 2 m k n.
    """
    lengths = np.asarray(lengths, np.int64)
    hidden, inner = config.hidden_size, config.intermediate_size
    near = np.minimum(lengths - 1, config.window)
    pairs = {
        True: int(np.sum(lengths**2)),
        False: int(np.sum(lengths + near * (near + 1) + 2 * (lengths - 1 - near) * config.window)),
    }
    linear = 4 * hidden**2 + 3 * hidden * inner
    total = config.num_hidden_layers * int(lengths.sum()) * linear
    total += sum(2 * hidden * pairs[kind == GLOBAL] for kind in config.layer_types)
    return 2.0 * (total + answers * hidden * (hidden + width))


def segment_lengths(segment_ids: np.ndarray) -> np.ndarray:
    """Return the number of tokens of every segment of `[batch, seq]`, padding left out.

    >>> segment_lengths(np.array([[1, 1, 2, 0], [1, 1, 1, 1]])).tolist()
    [2, 1, 4]
    """
    segments = (row[row != PADDING_SEGMENT] for row in segment_ids)
    return np.concatenate([np.unique(row, return_counts=True)[1] for row in segments])
