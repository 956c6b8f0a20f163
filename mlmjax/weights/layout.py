"""How a parameter lies in a Hugging Face file: rules by the end of its name, used both ways."""

import math

import numpy as np

# Parameters have the checkpoint's names. torch keeps a kernel as `[out, in]`; here its axes are
# the inputs, then the outputs, and either may be cut into parts (`[hidden, 3, heads, head_dim]`).
# The number is how many leading axes are inputs; None marks what is stored axis by axis as it is.
LAYOUTS: tuple[tuple[str, int | None], ...] = (
    ("tok_embeddings.weight", None),
    ("norm.weight", None),
    ("attn.Wqkv.weight", 1),
    ("attn.Wo.weight", 2),
    ("mlp.Wi.weight", 1),
    ("mlp.Wo.weight", 1),
    ("head.dense.weight", 1),
    ("classifier.weight", 1),
    (".bias", 0),
)


def hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape on disk of a parameter that has `shape` here.

    >>> hf_shape("model.layers.0.attn.Wqkv.weight", (32, 3, 4, 8))
    (96, 32)
    """
    inputs = _inputs(name)
    if inputs is None:
        return shape
    outputs = math.prod(shape[inputs:])
    return (outputs, math.prod(shape[:inputs])) if inputs else (outputs,)


def to_hf_layout(name: str, value: np.ndarray) -> np.ndarray:
    """Return a parameter as it is laid out on disk."""
    shape = hf_shape(name, value.shape)
    if _inputs(name):
        return np.ascontiguousarray(value.reshape(shape[::-1]).T)
    return value.reshape(shape)


def from_hf_layout(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a tensor from disk as the parameter of `shape`: the inverse of `to_hf_layout`."""
    return (value.T if _inputs(name) else value).reshape(shape)


def _inputs(name: str) -> int | None:
    for suffix, inputs in LAYOUTS:
        if name.endswith(suffix):
            return inputs
    raise ValueError(f"parameter {name} has no layout; add one to layout.LAYOUTS")
