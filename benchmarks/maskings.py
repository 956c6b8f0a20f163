"""Train small models with different maskings, and compare them under one common masking.

Run `python benchmarks/maskings.py --text FILE.jsonl.zst --out maskings.jsonl`. All models have the
size of `mlmjax-small`, begin from random weights, and see the same rows in the same order. Each
training is one line of the file; what is there is not computed again. `--table` prints the table.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlmjax import Tokenizer, load_pretrained, run_training
from mlmjax.cli.main import run
from mlmjax.config.run import parse_config
from mlmjax.data.reading.files import read_file

LENGTH, ROWS = 256, 8
TRAINED_RECORDS, HELD_OUT_RECORDS, HELD_OUT_ROWS = 250, 120, 128
RATE = 0.3
HELD_OUT_RATE = 0.15
MASKINGS = {
    "token": {"masking": "token"},
    "weights": {"masking": "weights", "mask_table": "frequency.jsonl"},
    "phrases": {"masking": "phrases", "mask_table": "phrases.jsonl"},
    "loss": {"masking": "loss"},
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def write_texts(given: argparse.Namespace, folder: Path) -> list[str]:
    """Write the texts to train on and the tables that count them; return the held-out texts."""
    texts = [record.fields["text"] for record in read_file(given.text, None)]
    lines = [json.dumps({"text": text}) for text in texts[:TRAINED_RECORDS]]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    for by, name in (("frequency", "frequency.jsonl"), ("pmi", "phrases.jsonl")):
        source, out = str(folder / "texts.jsonl"), str(folder / name)
        if run(["mask-table", source, "--by", by, "--out", out]) != 0:
            raise SystemExit(1)
    return texts[-HELD_OUT_RECORDS:]


def configure(folder: Path, masking: str, seed: int, updates: int) -> Any:
    objective = {"mlm_share": 1.0, "mlm_rate": RATE, **MASKINGS[masking]}
    if "mask_table" in objective:
        objective["mask_table"] = str(folder / objective["mask_table"])
    small = json.loads((resources.files("mlmjax") / "assets/small/config.json").read_text())
    return parse_config(
        {
            "out": str(folder / f"{masking}-{seed}"),
            "seed": seed,
            "steps": updates,
            "model": {name: small[name] for name in SIZES},
            "data": {
                "rows": str(folder / "rows"),
                "seq_length": LENGTH,
                "batch_size": ROWS,
                "validation_rows": 32,
                "sources": [{"path": str(folder / "texts.jsonl"), "text": "text"}],
            },
            "objective": objective,
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"warmup": 0.1, "decay": 0.2},
            "evaluation": {"every": updates // 8},
        }
    )


def held_out_rows(texts: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of ids and a mask of those that are asked for, both `[rows, seq]`."""
    inner = LENGTH - tokenizer.outer
    rows = [ids for text in texts if len(ids := tokenizer.encode_plain(text)[:inner]) == inner]
    ids = np.array([tokenizer.wrap(row) for row in rows[:HELD_OUT_ROWS]], np.int32)
    chosen = np.random.default_rng(0).random(ids.shape) < HELD_OUT_RATE
    return ids, chosen & ~np.isin(ids, list(tokenizer.special_ids))


def mean_loss(folder: Path, texts: list[str]) -> tuple[float, float]:
    """Return loss and accuracy at masked tokens of the held-out texts."""
    model, tokenizer = load_pretrained(folder / "export")
    ids, chosen = held_out_rows(texts, tokenizer)

    @nnx.jit
    def answers(model: Any, ids: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jax.nn.log_softmax(model(jnp.where(chosen, tokenizer.mask_id, ids)))
        found = jnp.take_along_axis(scores, ids[..., None], axis=-1)[..., 0]
        return (found * chosen).sum(), ((scores.argmax(axis=-1) == ids) & chosen).sum()

    parts = [
        answers(model, ids[at : at + ROWS], chosen[at : at + ROWS])
        for at in range(0, len(ids), ROWS)
    ]
    total = chosen.sum()
    return float(-sum(one for one, _ in parts) / total), float(sum(two for _, two in parts) / total)


def cells(seeds: int) -> Iterator[tuple[str, int]]:
    for seed in range(seeds):
        yield from ((name, seed) for name in MASKINGS)


def train_all(given: argparse.Namespace) -> None:
    known = {(row["masking"], row["seed"]) for row in read_lines(given.out)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held_out = write_texts(given, folder)
        for masking, seed in cells(given.seeds):
            if (masking, seed) in known:
                continue
            started = time.perf_counter()
            config = configure(folder, masking, seed, given.updates)
            run_training(config)
            loss, accuracy = mean_loss(Path(config.out), held_out)
            row = {
                "masking": masking,
                "seed": seed,
                "tokens": given.updates * ROWS * LENGTH,
                "loss": loss,
                "accuracy": accuracy,
                "seconds": round(time.perf_counter() - started),
            }
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| masking | trainings | held-out loss | accuracy |")
    print("|---|---|---|---|")
    for name in MASKINGS:
        own = [row for row in rows if row["masking"] == name]
        if own:
            losses = [row["loss"] for row in own]
            spread = f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
            right = statistics.mean(row["accuracy"] for row in own)
            print(f"| {name} | {len(own)} | {spread} | {right:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="records with a text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        if given.text is None:
            parser.error("--text: is missing; give a file of records with a text")
        train_all(given)
    print_table(read_lines(given.out))


if __name__ == "__main__":
    main()
