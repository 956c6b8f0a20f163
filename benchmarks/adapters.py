"""Measure an update of an adapter against one of the whole model: memory, time, size on disk.

    python benchmarks/adapters.py [--size base|small] [--rounds 5]

The model has random weights, because neither figure depends on them. Updates of all ways alternate,
so that whatever else the machine does is shared by all. The figures of memory are exact, the times
are those of this machine. Prints JSON.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from mlmjax.config.run import AdapterConfig, OptimizerConfig, ScheduleConfig
from mlmjax.data.batch import ATP, Batch
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import ModernBertForMaskedLM, abstract_model, parameters, with_adapter
from mlmjax.training.adapters import trained_patterns
from mlmjax.training.optimizer import make_optimizer
from mlmjax.training.run.initial_model import PUBLISHED
from mlmjax.training.step import create_frozen_state, make_train_step

SIZES = {
    "base": {},
    "small": {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 8,
              "num_attention_heads": 4, "vocab_size": 16384},
}  # fmt: skip
CHOSEN = ("*bias", "*norm*")


def make_batch(rows, length, vocabulary):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, vocabulary, (rows, length)).astype(np.int32)
    ones, positions = (
        np.ones_like(ids),
        np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape),
    )
    where = np.full((rows, 1), length - 2, np.int32)
    return Batch(ids, ones, positions, where, ids[:, :1], np.full((rows, 1), ATP, np.int32))


def total_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def measure(size, rows, length, rounds):
    config = ModelConfig(**{"pad_token_id": 0, **SIZES[size]})
    model = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
    adapted = with_adapter(model, AdapterConfig(rank=8))
    ways = {
        "whole": (model, None),
        "lora": (adapted, trained_patterns(adapted)),
        "bias_norm": (model, CHOSEN),
    }
    optimizer = make_optimizer(OptimizerConfig(), ScheduleConfig(), 1000)
    batch, runs, found = make_batch(rows, length, config.vocab_size), {}, {}
    for way, (trained, patterns) in ways.items():
        graphdef, state, frozen = create_frozen_state(trained, optimizer, patterns)
        step = make_train_step(graphdef, optimizer)
        compiled = step.__wrapped__.lower(state, batch, frozen).compile()
        found[way] = {
            "optimizer_bytes": total_bytes(state.opt_state),
            "gradient_bytes": total_bytes(state.params),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "seconds": [],
        }
        runs[way] = [step, step(state, batch, frozen)[0], frozen]
    for _ in range(rounds):
        for way, run in runs.items():
            step, state, frozen = run
            began = time.perf_counter()
            state, metrics = step(state, batch, frozen)
            jax.block_until_ready(metrics)
            found[way]["seconds"].append(time.perf_counter() - began)
            run[1] = state
    for one in found.values():
        one["median_seconds"] = statistics.median(one["seconds"])
        one["state_bytes"] = one["optimizer_bytes"] + one["gradient_bytes"]
    whole = found["whole"]
    for one in found.values():
        for key in ("state_bytes", "temporary_bytes", "median_seconds"):
            one[f"{key}_of_whole"] = round(one[key] / whole[key], 4)
    return found


def adapter_bytes(name, width):
    """Return the bytes of an adapter of rank 8 of a published model, in values of this width."""
    config = replace(ModelConfig.from_hf(PUBLISHED[name]), adapter=AdapterConfig(rank=8))
    shapes = parameters(abstract_model("ModernBertForMaskedLM", config))
    return width * sum(leaf.size for name, leaf in shapes.items() if ".lora_" in name)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    large = "answerdotai/ModernBERT-large"
    result = {
        **vars(given),
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "ways": measure(given.size, given.rows, given.length, given.rounds),
        "adapter_of_large_bytes": {
            "float32": adapter_bytes(large, 4), "bfloat16": adapter_bytes(large, 2),
        },
    }  # fmt: skip
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
