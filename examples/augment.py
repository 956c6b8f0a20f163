"""Augment labelled texts: mask some words of each, and let the model fill them again.

    python examples/augment.py --data reviews.csv --model answerdotai/ModernBERT-base

A new text keeps the label of its original. Read some of them first: a filled word may change what
the text says.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from common import HERE, load, read_labelled, run

from mlmjax import generate


def mask_words(text: str, share: float, rng: np.random.Generator) -> str:
    """Return a text with a share of its words masked, at least one."""
    words = text.split()
    count = max(1, round(share * len(words)))
    for at in rng.choice(len(words), count, replace=False):
        words[at] = "[MASK]"
    return " ".join(words)


def main() -> None:
    """Write the texts and their filled copies as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE / "reviews.csv", help="text, label")
    parser.add_argument("--model", help="a folder or a Hub id (default: the packaged model)")
    parser.add_argument("--out", type=Path, default=Path("augmented.csv"))
    parser.add_argument("--copies", type=int, default=2, help="new texts for each text")
    parser.add_argument("--share", type=float, default=0.2, help="the share of words to replace")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = read_labelled(arguments.data)

    rng = np.random.default_rng(arguments.seed)
    copies = [row for row in rows for _ in range(arguments.copies)]
    masked = [mask_words(row["text"], arguments.share, rng) for row in copies]
    model, tokenizer = load(arguments.model)
    # The surest masks first: each later one is predicted from the words filled before it.
    found = generate(
        model, tokenizer, masked, temperature=arguments.temperature, seed=arguments.seed
    )
    new = [
        {"text": one.text, "label": row["label"]} for one, row in zip(found, copies, strict=True)
    ]
    with arguments.out.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["text", "label"])
        table.writeheader()
        table.writerows([*rows, *new])
    print(f"{masked[0]} -> {new[0]['text']}")
    print(f"{arguments.out}: {len(rows)} texts and {len(new)} filled copies")


if __name__ == "__main__":
    run(main)
