"""Measure the encoder of ModernBERT-base in float32, bfloat16 and int8 on a CPU.

    python benchmarks/int8.py [--size base|small] [--rows 8] [--tokens 128] [--rounds 9]

In int8, each weight is rounded once to 127 steps per output, and each product rounds its input to
127 steps per token and sums in int32; all else is bfloat16. The weights are random, because speed
does not depend on them. Ways alternate, so that whatever else the machine does is shared by all.
Prints for each way the least CPU time of a forward pass, and the mean error of the vectors relative
to their mean size in float32.
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlmjax.model.architecture import ModelConfig
from mlmjax.model.layers import Linear
from mlmjax.model.modernbert import ModernBertModel

SIZES = {
    "base": {},
    "small": {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4,
              "num_attention_heads": 4, "vocab_size": 1024, "pad_token_id": 0,
              **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)},
}  # fmt: skip
STEPS = 127.0


def rounded(x, axis):
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axis, keepdims=True), 1e-12) / STEPS
    return jnp.round(x / scale).astype(jnp.int8), scale


class Int8Linear(nnx.Module):
    """A product of int8 inputs and weights, in the place of a `Linear`."""

    def __init__(self, linear):
        weight = linear.weight[...]
        self.outputs = weight.shape[linear.axes :]
        flat = weight.reshape(math.prod(weight.shape[: linear.axes]), -1)
        steps, scale = rounded(flat, 0)
        self.weight, self.scale = nnx.Param(steps), nnx.Param(scale)

    def __call__(self, x):
        inputs, _ = self.weight.shape
        leading = x.shape[: x.ndim - 1]
        while math.prod(x.shape[len(leading) :]) < inputs:
            leading = leading[:-1]
        steps, scale = rounded(x.astype(jnp.float32).reshape(-1, inputs), 1)
        dimensions = (((1,), (0,)), ((), ()))
        out = jax.lax.dot_general(
            steps, self.weight[...], dimensions, preferred_element_type=jnp.int32
        )
        out = out.astype(jnp.float32) * scale * self.scale[...]
        return out.reshape(*leading, *self.outputs)


def make(size, kind):
    options = {"dtype": "float32" if kind == "float32" else "bfloat16"}
    model = ModernBertModel(ModelConfig(**SIZES[size]), rngs=nnx.Rngs(0), **options)
    for layer in model.model.layers if kind == "int8" else ():
        for part in (layer.attn, layer.mlp):
            for name, linear in list(vars(part).items()):
                if isinstance(linear, Linear):
                    setattr(part, name, Int8Linear(linear))
    graph, state = nnx.split(model)
    if kind == "bfloat16":  # as the engine does, once
        state = jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, state
        )
    run = jax.jit(lambda state, ids: nnx.merge(graph, state).encode(ids))
    return lambda ids: run(state, ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    runs = {kind: make(given.size, kind) for kind in ("float32", "bfloat16", "int8")}
    ids = np.random.default_rng(0).integers(2, 1000, (given.rows, given.tokens)).astype(np.int32)
    vectors = {kind: np.asarray(run(ids), np.float32) for kind, run in runs.items()}
    times = {kind: [] for kind in runs}
    for _ in range(given.rounds):
        for kind, run in runs.items():
            start = time.process_time()
            run(ids).block_until_ready()
            times[kind].append(time.process_time() - start)
    exact = vectors["float32"]
    for kind, found in times.items():
        error = np.abs(vectors[kind] - exact).mean() / np.abs(exact).mean()
        print(f"{kind:8} {min(found) * 1e3:8.1f} ms of CPU  error {error:.4f}")


if __name__ == "__main__":
    main()
