"""Lay parameters out as Hugging Face files have them, and write them."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from mlmjax.errors import InputError
from mlmjax.model.modernbert import parameters
from mlmjax.parallel.sharding import named_leaves
from mlmjax.storage import CONFIG
from mlmjax.weights.tensors.tensor_files import INDEX

SHARD_BYTES = 5 * 10**9


def write_weights(folder: Path, tensors: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
    """Write parameters by their names as safetensors files of at most `SHARD_BYTES`.

    The folder has its `config.json` already, whose permissions the files get. Raises `InputError`
    for values that a dtype cannot hold.
    """
    sizes = {name: tensors[name].size * np.dtype(dtypes[name]).itemsize for name in sorted(tensors)}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            with np.errstate(over="ignore"):  # values that overflow are rejected below, by name
                value = to_hf_layout(name, np.asarray(tensors[name])).astype(dtypes[name])
            if not np.isfinite(value.astype(np.float32)).all():
                raise InputError(
                    f"{name}: holds values that are NaN, infinite or beyond {dtypes[name]}; "
                    "nothing was written"
                )
            shard[name] = value
        save_file(shard, folder / file, metadata={"format": "pt"})
        # safetensors makes files that only the owner can read, whatever the umask says.
        shutil.copymode(folder / CONFIG, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# Parameters have the checkpoint's names. torch keeps a kernel as `[out, in]`. Here its axes are the
# inputs, then the outputs, and either may have several parts (`[hidden, 3, heads, head_dim]`). The
# number is how many leading axes are inputs; None marks tensors with the same axes on disk.
LAYOUTS: tuple[tuple[str, int | None], ...] = (
    ("tok_embeddings.weight", None),
    ("decoder.weight", None),
    ("norm.weight", None),
    ("attn.Wqkv.weight", 1),
    ("attn.Wo.weight", 2),
    ("mlp.Wi.weight", 1),
    ("mlp.Wo.weight", 1),
    ("attn.Wo.lora_A.weight", 2),
    ("lora_A.weight", 1),
    ("lora_B.weight", 1),
    ("head.dense.weight", 1),
    ("classifier.weight", 1),
    (".bias", 0),
)


def hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape on disk of a parameter that has `shape` here.

    >>> hf_shape("model.layers.0.attn.Wqkv.weight", (32, 3, 4, 8))
    (96, 32)
    """
    inputs = input_axes(name)
    if inputs is None:
        return shape
    outputs = math.prod(shape[inputs:])
    return (outputs, math.prod(shape[:inputs])) if inputs else (outputs,)


def to_hf_tensors(params: Any) -> dict[str, np.ndarray]:
    """Return the parameters of a model, or a tree of them, as tensors on disk by their names."""
    named = parameters(params) if isinstance(params, nnx.Module) else named_leaves(params)
    return {name: to_hf_layout(name, np.asarray(value)) for name, value in named.items()}


def to_hf_layout(name: str, value: np.ndarray) -> np.ndarray:
    """Return a parameter in its layout on disk."""
    shape = hf_shape(name, value.shape)
    if input_axes(name):
        return np.ascontiguousarray(value.reshape(shape[::-1]).T)
    return value.reshape(shape)


def input_axes(name: str) -> int | None:
    """Return the number of leading axes that are inputs; None for tensors with the same axes."""
    for suffix, inputs in LAYOUTS:
        if name.endswith(suffix):
            return inputs
    raise ValueError(f"parameter {name} has no layout; add one to layout.LAYOUTS")
