"""Count how many small fits learn, and how many warn, over seeds and sets.

The fits are those of a new user: 500 short texts, a learning rate of 1e-3 and 3 epochs. Run
`python benchmarks/small_fits.py --data FOLDER --out fits.jsonl`. Each fit is one line of the file;
what is there is not computed again.
"""

import argparse
import json
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from labelled_sets import SETS, read_set

from mlmjax import Classifier
from mlmjax.statistics.metrics import wilson_interval

CHOSEN = ("reviews", "news", "questions", "paraphrases")


def fit(given: argparse.Namespace, name: str, seed: int) -> dict:
    """Fit once; a fit learns if its test accuracy is above the commonest label's by an interval."""
    started = time.perf_counter()
    trained, (texts, gold) = read_set(given.data, name, given.rows, given.test_rows, seed)
    classifier = Classifier(
        given.model, list(SETS[name].labels.values()), answer=given.answer, progress=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the summary has it
        classifier.fit(*trained, learning_rate=1e-3, epochs=3, seed=seed)
    correct = int(np.sum(classifier.predict(texts) == np.array(gold)))
    commonest = Counter(trained[1]).most_common(1)[0][0]
    majority = gold.count(commonest) / len(gold)
    summary = classifier.fit_summary_
    return {
        "set": name,
        "seed": seed,
        "answer": classifier.answer_,
        "accuracy": correct / len(gold),
        "majority": majority,
        "learned": wilson_interval(correct, len(gold))[0] > majority,
        "training_accuracy": summary.training.accuracy,
        "training_loss": summary.training.loss,
        "baseline_loss": summary.training.baseline_loss,
        "warning": summary.warning,
        "seconds": round(time.perf_counter() - started, 1),
    }


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def print_table(rows: list[dict]) -> None:
    print("| set | answer | fits | learned | warned | neither |")
    print("|---|---|---|---|---|---|")
    for name, answer in dict.fromkeys((row["set"], row["answer"]) for row in rows):
        own = [row for row in rows if (row["set"], row["answer"]) == (name, answer)]
        learned = sum(row["learned"] for row in own)
        warned = sum(row["warning"] is not None for row in own)
        silent = sum(not row["learned"] and row["warning"] is None for row in own)
        print(f"| {name} | {answer} | {len(own)} | {learned} | {warned} | {silent} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the folder that holds eval/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mlmjax-small")
    parser.add_argument("--answer", choices=("words", "letters"))
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=15)
    given = parser.parse_args()
    known = {(row["set"], row["seed"]) for row in read_lines(given.out)}
    for seed in range(given.seeds) if given.data else ():
        for name in CHOSEN:
            if (name, seed) not in known:
                row = fit(given, name, seed)
                print(json.dumps(row), flush=True)
                with given.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print_table(read_lines(given.out))


if __name__ == "__main__":
    main()
