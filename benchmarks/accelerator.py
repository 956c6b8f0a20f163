"""Measure attention, training, scoring and latency on this machine's accelerator.

    python benchmarks/accelerator.py --out DIR [--size large] [--tokens 16384] [--only PART ...]

The weights are random. The script prints Markdown tables and writes `DIR/accelerator.md` and
`DIR/accelerator.json`. If torch with CUDA is installed, it also measures transformers (sdpa, plain
and compiled) on the same shapes. `--size tiny` is for trying the script, also on a CPU.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlmjax import ModelConfig, ModernBertForMaskedLM
from mlmjax.config.run import OptimizerConfig, ScheduleConfig
from mlmjax.data.batch import MLM, UNUSED, Batch
from mlmjax.errors import InputError
from mlmjax.model.attention import attend, choose_implementation
from mlmjax.parallel.sharding import platform
from mlmjax.training.flops import forward_flops, peak_flops, training_flops
from mlmjax.training.optimizer import make_optimizer
from mlmjax.training.run.initial_model import PUBLISHED
from mlmjax.training.step import create_train_state, make_train_step

LENGTHS = (512, 2048, 8192)
SEGMENTS = 256
"""Tokens of a packed example."""
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 1,
}
Row = dict[str, Any]


def seconds(act: Callable[[], Any], repeats: int = 10) -> float:
    """Return the median seconds of a call that returns arrays, after a first call compiled it."""
    jax.block_until_ready(act())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(act())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def attention(config: ModelConfig, tokens: int) -> Iterator[Row]:
    """Measure every attention implementation that runs here, without and with gradients."""
    ways = dict.fromkeys(
        ("dense", "banded", choose_implementation("auto", platform(), "bfloat16", config.head_dim))
    )
    for length, window, way in itertools.product(LENGTHS, (config.window, None), ways):
        if way == "dense" and length > 2048:
            continue
        shape = max(1, tokens // length), config.num_attention_heads, length, config.head_dim
        arrays = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3)]
        ids = np.broadcast_to(segments(length), (shape[0], length))
        path = partial(attend, segment_ids=jnp.asarray(ids), window=window, implementation=way)
        forward = jax.jit(path)
        both = jax.jit(
            jax.grad(lambda *x, path=path: path(*x).astype(jnp.float32).sum(), (0, 1, 2))
        )
        row = {"length": length, "window": window or "all", "way": way}
        try:
            one, two = (seconds(partial(f, *arrays)) for f in (forward, both))
            yield {**row, "forward_ms": one * 1e3, "with_backward_ms": two * 1e3}
        except (InputError, jax.errors.JaxRuntimeError) as error:
            yield {**row, "refused": str(error).splitlines()[0][:100]}


def segments(length: int) -> np.ndarray:
    """Return segment ids of packed examples, `[length]`."""
    return np.arange(length) // SEGMENTS + 1


def packed_batch(config: ModelConfig, rows: int, length: int) -> Batch:
    """Return packed rows, 30 % of whose tokens are targets."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, config.vocab_size - 1000, (rows, length), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32) % SEGMENTS, ids.shape)
    count = int(0.3 * length)
    targets = np.full((3, rows, length), UNUSED, np.int32)
    for row in range(rows):
        places = np.sort(rng.choice(length, count, replace=False))
        targets[:, row, :count] = places, ids[row, places], np.full(count, MLM)
    numbers = np.broadcast_to(segments(length), ids.shape).astype(np.int32)
    return Batch(ids, numbers, positions.copy(), *targets)


def training(config: ModelConfig, tokens: int) -> Iterator[Row]:
    """Measure updates on packed rows of 1024 and 8192 tokens with each `remat`."""
    peak = peak_flops(jax.devices()[0].device_kind, "bfloat16")
    optimizer = make_optimizer(OptimizerConfig(), ScheduleConfig(), 1000)
    for length, remat in itertools.product((1024, 8192), ("none", "dots", "layer")):
        batch = packed_batch(config, max(1, tokens // length), length)
        model = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, remat=remat)
        graphdef, state = create_train_state(model, optimizer)
        step = make_train_step(graphdef, optimizer)
        row: Row = {"length": length, "remat": remat}

        def update(batch: Batch = batch, step: Any = step, carry: list[Any] = [state]) -> Any:  # noqa: B006
            carry[0], metrics = step(carry[0], batch)
            return metrics

        try:
            took = seconds(update)
        except jax.errors.JaxRuntimeError as error:
            yield {**row, "refused": str(error).splitlines()[0][:100]}
            continue
        flops = training_flops(config, batch) / took
        rate = batch.input_ids.size / took
        yield {**row, "seconds": took, "tokens_per_s": rate, "tflops": flops / 1e12,
               "mfu": flops / peak if peak else None}  # fmt: skip


def scoring(config: ModelConfig, tokens: int) -> Iterator[Row]:
    """Measure the encoder with the head at one slot per row, and the latency of few rows."""
    peak = peak_flops(jax.devices()[0].device_kind, "bfloat16")
    model = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    graphdef, state = nnx.split(model)

    @jax.jit
    def slot(state: Any, ids: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return model.mlm_logits(model.encode(ids)[:, -2])

    theirs = torch_sides(config)
    shapes = [(max(1, tokens // n), n) for n in LENGTHS] + [(n, 256) for n in (1, 2, 4, 8)]
    for rows, length in shapes:
        ids = np.random.default_rng(0).integers(1000, 2000, (rows, length), dtype=np.int32)
        took = seconds(partial(slot, state, ids))
        flops = forward_flops(config, [length] * rows, rows, config.vocab_size) / took
        row: Row = {"rows": rows, "length": length, "ms": took * 1e3,
                    "tokens_per_s": rows * length / took,
                    "mfu": flops / peak if peak else None}  # fmt: skip
        for name, measure in theirs.items():
            row[f"{name}_ratio"] = measure(ids) / took
        yield row


def torch_sides(config: ModelConfig) -> dict[str, Callable[[np.ndarray], float]]:
    """Return transformers, plain and compiled, as functions from ids to median seconds."""
    try:
        import torch
        import transformers
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    theirs = transformers.ModernBertConfig(**{**config.to_hf(), "reference_compile": False})
    model = transformers.ModernBertForMaskedLM._from_config(theirs, attn_implementation="sdpa")
    model = model.to("cuda", torch.bfloat16).eval()

    def measure(run: Any, ids: np.ndarray) -> float:
        inputs = torch.from_numpy(ids).long().cuda()
        found = []
        with torch.inference_mode():
            for _ in range(13):
                torch.cuda.synchronize()
                start = time.perf_counter()
                run(input_ids=inputs, attention_mask=torch.ones_like(inputs))
                torch.cuda.synchronize()
                found.append(time.perf_counter() - start)
        return statistics.median(found[3:])

    return {"sdpa": partial(measure, model), "compiled": partial(measure, torch.compile(model))}


PARTS = {"attention": attention, "training": training, "scoring": scoring}


def table(rows: list[Row]) -> str:
    """Return a Markdown table of rows, whose keys may differ."""
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:,.3g}" if isinstance(value, float) else str(value)

    lines = [keys, ["---"] * len(keys), *([cell(row.get(key)) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure the parts; print and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=["tiny", "base", "large"], default="large")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a batch")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    chosen = parser.parse_args()
    name = f"answerdotai/ModernBERT-{chosen.size}"
    config = ModelConfig.from_hf(TINY if chosen.size == "tiny" else PUBLISHED[name])
    device = jax.devices()[0]
    about = {"device": device.device_kind, "size": chosen.size, "tokens": chosen.tokens,
             "date": time.strftime("%Y-%m-%d"), "jax": version("jax")}  # fmt: skip
    chosen.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Row]] = {}
    text = ", ".join(f"{key} {value}" for key, value in about.items()) + "."
    for part in chosen.only:
        found[part] = []
        for row in PARTS[part](config, chosen.tokens):
            found[part].append(row)
            print(part, row, flush=True)
        text += f"\n\n{part}\n\n{table(found[part])}"
        # Write after each part, because time on a lent machine may end.
        (chosen.out / "accelerator.md").write_text(text + "\n")
        (chosen.out / "accelerator.json").write_text(
            json.dumps({**about, **found}, indent=1) + "\n"
        )
    print(text)


if __name__ == "__main__":
    main()
