"""Measure `mlmjax.embed` against sentence_transformers: texts per second of the same model.

    python benchmarks/embedding.py [--size base|small] [--texts 384] [--rounds 5]

The model has random weights, because speed does not depend on them. The texts are paragraphs of the
bundled textbooks and their first sentences, so that lengths differ. Each side runs in a process of
its own, turn by turn, so that whatever else the machine does is shared by both. Each process embeds
all texts once to warm up, and once for the figure. Both sides' vectors are compared. Prints JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path

import numpy as np

SIZES = {
    "base": {},
    "small": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4,
              "num_attention_heads": 4},
}  # fmt: skip
MOST = 1e-4
"""The largest difference between the vectors of both sides."""


def texts_of(count):
    """Return half paragraphs and half sentences."""
    bundled = resources.files("mlmjax") / "assets" / "openstax" / "train.jsonl"
    lines = bundled.read_text(encoding="utf-8").splitlines()[: count // 2]
    paragraphs = [json.loads(line)["text"] for line in lines]
    return [*paragraphs, *(text.partition(". ")[0] for text in paragraphs)]


def ours(folder, texts):
    from mlmjax.scoring.vectors.embedding import Embedder

    embedder = Embedder.from_pretrained(folder)
    return lambda: embedder.embed(texts)


def theirs(folder, texts):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return lambda: model.encode(texts, show_progress_bar=False)


def write_model(size, folder):
    from flax import nnx

    from mlmjax.model.architecture import ModelConfig
    from mlmjax.model.modernbert import ModernBertModel
    from mlmjax.scoring.vectors.embedding import Embedder
    from mlmjax.text.tokenizer import Tokenizer

    config = ModelConfig(**SIZES[size])
    model = ModernBertModel(config, rngs=nnx.Rngs(0))
    Embedder(model, Tokenizer.from_pretrained(), pooling="mean").save_pretrained(folder)


def measure(side, folder, count):
    texts = texts_of(count)
    run = {"ours": ours, "theirs": theirs}[side](folder, texts)
    run()
    start = time.perf_counter()
    vectors = run()
    seconds = time.perf_counter() - start
    np.save(folder.parent / f"{side}.npy", vectors)
    return len(texts) / seconds


def compare(size, count, rounds):
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "model"
        write_model(size, folder)
        rates = {"ours": [], "theirs": []}
        for _ in range(rounds):
            for side, found in rates.items():
                command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
                done = subprocess.run(
                    [*command, "--texts", str(count)], check=True, stdout=subprocess.PIPE, text=True
                )
                found.append(float(done.stdout.splitlines()[-1]))
        vectors = [np.load(folder.parent / f"{side}.npy") for side in rates]
        difference = float(np.abs(vectors[0] - vectors[1]).max())
        assert difference <= MOST, f"the vectors differ by {difference}"
    ratios = [one / other for one, other in zip(*rates.values(), strict=True)]
    return {
        "size": size,
        "texts": len(vectors[0]),
        "texts_per_second": {side: statistics.median(found) for side, found in rates.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "difference": difference,
        "load": os.getloadavg(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--texts", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(measure(given.side, given.folder, given.texts))
    else:
        print(json.dumps(compare(given.size, given.texts, given.rounds), indent=2))


if __name__ == "__main__":
    main()
