"""Measure a shortlist of labels: how often it holds the right label, and what it saves.

    python benchmarks/shortlist.py SCIQ.parquet [--model mlmjax-small] [--texts 500] [--ask 0]

The file has the columns of SciQ. A text is a passage with its question, and the labels are all
answers and distractors of the file. Recall is the share of texts whose right answer is among the
nearest k labels. `--ask` also answers that many texts, with all labels in rounds and with a
shortlist. Prints JSON.
"""

import argparse
import json
import time

import numpy as np
import pyarrow.parquet as pq

from mlmjax.classification.classifier import Classifier
from mlmjax.scoring.vectors.embedding import Embedder
from mlmjax.weights.pretrained import load_pretrained

SIZES = (10, 50, 100, 200, 400)
TERMS = ("correct_answer", "distractor1", "distractor2", "distractor3")


def read(path, count):
    rows = [row for row in pq.read_table(path).to_pylist() if row["support"].strip()]
    labels = sorted({row[name].strip() for row in rows for name in TERMS if row[name].strip()})
    texts = [f"{row['support']} {row['question']}" for row in rows[:count]]
    return texts, [row["correct_answer"].strip() for row in rows[:count]], labels


def ranks(near, truth, labels):
    right = near[np.arange(len(truth)), [labels.index(one) for one in truth]]
    return (near > right[:, None]).sum(axis=1)


def recall(model, texts, truth, labels):
    embedder = Embedder.from_pretrained(model, truncate=True)
    start = time.perf_counter()
    found, shown = embedder.embed(texts), embedder.embed(labels)
    seconds = time.perf_counter() - start
    near = found @ (shown / np.linalg.norm(shown, axis=1, keepdims=True)).T
    place = ranks(near, truth, labels)
    figures = {k: round(float((place < k).mean()), 3) for k in SIZES}
    return figures | {"seconds_to_embed": round(seconds, 1)}


def ask(parts, texts, truth, labels, shortlist):
    classifier = Classifier.from_pretrained(
        parts, labels, answer="letters", shortlist=shortlist, progress=False
    )
    classifier.predict(texts[:1])
    before, start = classifier.prompts, time.perf_counter()
    answers = classifier.predict(texts)
    return {
        "prompts_per_text": (classifier.prompts - before) / len(texts),
        "seconds_per_text": round((time.perf_counter() - start) / len(texts), 2),
        "right": int((answers == np.array(truth)).sum()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--model", default="mlmjax-small")
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--ask", type=int, default=0)
    given = parser.parse_args()
    texts, truth, labels = read(given.file, given.texts)
    figures = {"texts": len(texts), "labels": len(labels)}
    figures["recall"] = recall(given.model, texts, truth, labels)
    for size in (None, SIZES[1]) if given.ask else ():
        name = "rounds" if size is None else f"shortlist_{size}"
        few = slice(given.ask)
        figures[name] = ask(load_pretrained(given.model), texts[few], truth[few], labels, size)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
