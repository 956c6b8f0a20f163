"""Estimate the memory of a training step and of scoring from sizes, without compiling.

Per device, with P parameters of which a device holds the share that the mesh gives it:

- parameters: 4 P bytes, since they are float32 (mixed precision, Micikevicius et al. 2018,
  arXiv:1710.03740); in bfloat16 a copy of 2 P bytes during the step;
- optimizer: 8 P bytes for the two moments of AdamW (Rajbhandari et al. 2020, arXiv:1910.02054,
  section 3.1), 4 P more with averaged parameters;
- gradients: 4 P bytes, and 4 P more to add up micro-batches;
- activations: the arrays that the backward pass reads, counted layer by layer as in Korthikanti et
  al. 2022 (arXiv:2205.05198, section 4), here for pre-norm layers with a gated MLP and attention
  that stores no scores; see `layer_bytes`;
- head: float32 logits of one chunk of targets, and their gradient.

Parameters that an adapter or `optimizer.train` freezes have no optimizer state and no gradients.

For `atp_large` on slices of v5e, v6e and v5p the sum is between the memory that the compiler
reports and a third more (tests/training/planning/test_arithmetic.py).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlmjax.config.run import RunConfig
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.attention import splash_block
from mlmjax.parallel import sharding
from mlmjax.scoring.engine import rows_per_device
from mlmjax.training.adapters import split_trained, trained_patterns
from mlmjax.training.flops import peak_flops, update_flops
from mlmjax.training.loss import CHUNK_ACCELERATOR
from mlmjax.training.optimizer import optimizer_of
from mlmjax.training.planning.compilation import (
    PROGRAMS,
    bound_targets,
    chosen_attention,
    count_answers,
)
from mlmjax.training.planning.topology import FRACTION, GIB, Topology
from mlmjax.training.step import split_parameters

_WIDTHS = {"float32": 4, "bfloat16": 2}
LOOP_COPIES = 2
WORKSPACE = 0.5 * 2**30
"""Bytes for the libraries' workspaces and the programs themselves."""


def layer_bytes(model: ModelConfig, dtype: str, remat: str) -> float:
    """Return the bytes per token that one layer keeps for the backward pass.

    With hidden size h and MLP size i, in the precision of the products: `none` keeps inputs and
    outputs of norms, products and gate (10 h, 4 i), and in float32 norms and rotary positions
    (3 h). `dots` keeps the layer's input and the products (6 h, 2 i), `layer` only the input (h).
    These two run as a loop over layers, in which the TPU compilers keep up to two copies.

    >>> large = ModelConfig(hidden_size=1024, intermediate_size=2624, num_attention_heads=16)
    >>> [layer_bytes(large, "bfloat16", remat) for remat in ("none", "dots", "layer")]
    [53760.0, 45568.0, 4096.0]
    """
    width, hidden, inner = _WIDTHS[dtype], model.hidden_size, model.intermediate_size
    if remat == "none":
        return float(width * (10 * hidden + 4 * inner) + 4 * 3 * hidden)
    return float(LOOP_COPIES * width * (hidden if remat == "layer" else 6 * hidden + 2 * inner))


def estimate(config: RunConfig, model: Any, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Estimate the programs of a run on a mesh of these sizes; bytes are those of one device."""
    _, params = split_parameters(model)
    trained, _ = split_trained(params, trained_patterns(model, config.optimizer.train))
    notes = ["memory is an estimate by arithmetic; nothing was compiled"]
    training = _estimate_training(config, model.config, params, trained, sizes, notes)
    return {
        "training": training,
        "scoring": _estimate_scoring(config, model.config, params),
        "assumptions": notes,
    }


def estimate_plan(config: RunConfig, model: Any, topology: Topology) -> dict[str, Any]:
    """Return what `compile_run` returns for GPUs or TPUs, without compiling.

    `model` is abstract. Each program has `estimate`, the parts of its memory, and no collectives.
    """
    sizes = sharding.mesh_shape(config.mesh, topology.devices)
    limit = topology.memory or 0.0
    found = estimate(config, model, sizes)
    for name in PROGRAMS:
        found[name]["fits"] = found[name]["memory"]["total"] <= limit
    peak = peak_flops(topology.device, config.dtype)
    training, used = found["training"], math.prod(sizes.values())
    training["seconds_at_peak"] = training["model_flops"] / (peak * used) if peak else None
    if topology.platform == "gpu":
        _, memory = topology.gpu
        found["assumptions"] += [
            f"the limit is {limit / memory:.0%} of {memory / GIB:.1f} GiB, the share that JAX "
            f"takes; {FRACTION}=0.9 raises it to {0.9 * memory / GIB:.1f} GiB"
        ]
    attention = config.attention
    chosen = chosen_attention(config, model, topology)
    blocks = [splash_block(config.data.seq_length, wanted) for wanted in config.splash_blocks]
    machine = {
        "topology": topology.name,
        "device": topology.device,
        "devices": topology.devices,
        "used": used,
        "attention": attention,
        "attention_chosen": chosen,
        "splash_blocks": blocks if chosen == "splash" else None,
        "mesh": sizes,
        "memory": int(limit),
        "peak_flops": peak,
        "jax": jax.__version__,
        "compiler": "nothing compiled",
        "memory_by": "arithmetic",
    }
    return {"machine": machine, **found}


def _estimate_training(
    config: RunConfig,
    model: ModelConfig,
    params: Any,
    trained: Any,
    sizes: Mapping[str, int],
    notes: list[str],
) -> dict[str, Any]:
    data, devices = config.data, math.prod(sizes.values())
    own, whole = _bytes_held(params, sizes), _bytes_held(params, {})
    changed = _bytes_held(trained, sizes)
    optimizer = optimizer_of(config)
    share = changed / _bytes_held(trained, {})
    moments = _total_bytes(jax.eval_shape(optimizer.init, trained)) * share
    rows = data.batch_size // data.accumulate / (sizes["data"] * sizes["fsdp"])
    tokens = rows * data.seq_length / sizes["tensor"]
    copy = own * (_WIDTHS[config.dtype] / 4) if config.dtype != "float32" else 0.0
    largest = max(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)) * 4.0
    kept = tokens * model.num_hidden_layers * layer_bytes(model, config.dtype, config.remat)
    # The backward pass holds everything of the layer that it works on.
    kept += tokens * layer_bytes(model, config.dtype, "none")
    width = bound_targets(config, notes) if config.head == "mlm" else 1
    targets = min(rows * width, CHUNK_ACCELERATOR)
    head = 3.0 * 4 * targets * (model.vocab_size if config.head == "mlm" else 1)
    head += rows * width * model.hidden_size * _WIDTHS[config.dtype] * 2
    parts = {
        "gradients": changed * (2 if data.accumulate > 1 else 1),
        "compute_copy": copy + (2 * largest if own < whole else 0.0),
        "activations": kept,
        "head": head,
        "workspace": WORKSPACE,
    }
    flops = update_flops(
        model,
        np.full(data.batch_size, data.seq_length),
        count_answers(config),
        model.num_labels if config.head == "classification" else model.vocab_size,
        sharding.named_leaves(trained),
    )
    return {
        "rows": data.batch_size,
        "seq_length": data.seq_length,
        "accumulate": data.accumulate,
        "remat": config.remat,
        "tokens_per_device": data.batch_size * data.seq_length // devices,
        "model_flops": flops,
        "parameters": int(own),
        "optimizer_state": int(moments),
        **_as_program(own + moments, parts),
    }


def _estimate_scoring(config: RunConfig, model: ModelConfig, params: Any) -> dict[str, Any]:
    length = model.max_position_embeddings
    rows = rows_per_device(length, "gpu")
    width, held = _WIDTHS[config.dtype], _bytes_held(params, {})
    copy = held * width / 4 if config.dtype != "float32" else 0.0
    # A forward pass frees a layer's arrays as it goes, so two layers' worth are alive.
    alive = 2 * rows * length * layer_bytes(model, config.dtype, "none")
    parts = {"compute_copy": copy, "activations": alive, "workspace": WORKSPACE}
    return {
        "rows": rows,
        "seq_length": length,
        "devices": 1,
        "what_helps": "give fewer rows at a time (batch_size; without it they are halved until "
        "they fit), or shorter prompts",
        "parameters": int(held),
        **_as_program(held, parts),
    }


def _as_program(state: float, parts: Mapping[str, float]) -> dict[str, Any]:
    """Return the keys of a compiled program, with `estimate` for what they are made of."""
    rest = sum(parts.values())
    memory = {"outputs": 0, "outputs_in_arguments": 0, "code": 0, "temporaries": int(rest)}
    return {
        "fits": None,
        "memory": {**memory, "arguments": int(state), "total": int(state + rest)},
        "estimate": {name: int(size) for name, size in parts.items()},
        "seconds": {},
    }


def _total_bytes(tree: Any) -> float:
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves))


def _bytes_held(params: Any, sizes: Mapping[str, int]) -> float:
    """Return the bytes of parameters on one device of a mesh; of all of them without sizes."""
    if not sizes:
        return _total_bytes(params)
    specs = jax.tree.leaves(sharding.parameter_specs(sizes, params))
    total = 0.0
    for leaf, spec in zip(jax.tree.leaves(params), specs, strict=True):
        axes = [axis for entry in spec if entry for axis in np.atleast_1d(entry).tolist()]
        total += _total_bytes(leaf) / math.prod(sizes[axis] for axis in axes)
    return total
