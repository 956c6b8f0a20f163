"""Compare words, letters and a classification head on labelled sets, zero-shot and fitted.

Run `python benchmarks/ways_to_answer.py --data FOLDER --out results.jsonl`. Each result is one line
of the file; what is there is not computed again. `--table` prints the tables of a file.
"""

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from labelled_sets import SETS, read_set

from mlmjax import Classifier
from mlmjax.evaluation.suite.entrants import tfidf_regression

WAYS = {
    "words": {"answer": "words"},
    "letters": {"answer": "letters"},
    "head": {"head": "classification"},
}
FITTED = {"epochs": 3, "train_batch_size": 8, "max_length": 256}


def measure(way: str, trained, tested, seed: int, options: dict) -> dict:
    """Return the accuracy of one way on the test rows, and what its training said."""
    texts, gold = tested
    if way == "TF-IDF":
        return {"accuracy": share_right(tfidf_regression(*trained, texts), gold)}
    if way == "commonest label":
        commonest = Counter(trained[1]).most_common(1)[0][0]
        return {"accuracy": share_right([commonest] * len(gold), gold)}
    kind, _, fitted = way.partition(", ")
    labels = list(SETS[options["set"]].labels.values())
    rates = {} if fitted == "zero-shot" else {"learning_rate": options["rate"]}
    classifier = Classifier(
        options["model"], labels, **WAYS[kind], **FITTED, **rates, seed=seed, progress=False
    )
    found: dict = {}
    if fitted == "fitted":
        classifier.fit(*trained)
        found["losses"] = [entry["loss"] for entry in classifier.history_]
    return {"accuracy": share_right(classifier.predict(texts), gold), **found}


def share_right(given, gold) -> float:
    return float(np.mean(np.asarray(given) == np.asarray(gold)))


def cells(seeds: int):
    """Yield `(seed, set, way)`: all sets by one way, then by the next, seed by seed."""
    for seed in range(seeds):
        for way in ("TF-IDF", "commonest label"):
            yield from ((seed, name, way) for name in SETS)
        for name in SETS:
            yield from ((seed, name, f"{way}, fitted") for way in ("words", "letters"))
            if not seed:
                yield from ((seed, name, f"{way}, zero-shot") for way in ("words", "letters"))
        yield from ((seed, name, "head, fitted") for name in SETS)


def run(given: argparse.Namespace) -> None:
    known = {(one["seed"], one["set"], one["way"]) for one in read_lines(given.out)}
    for seed, name, way in cells(given.seeds):
        if (seed, name, way) in known:
            continue
        started = time.perf_counter()
        trained, tested = read_set(given.data, name, given.rows, given.test_rows, seed)
        options = {"set": name, "rate": given.rate, "model": given.model}
        row = {"seed": seed, "set": name, "way": way, "n": len(tested[0]), "rate": given.rate}
        row |= measure(way, trained, tested, seed, options)
        row["seconds"] = round(time.perf_counter() - started, 1)
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def print_tables(rows: list[dict]) -> None:
    """Print mean accuracy by set and way, with the smallest and the largest of the seeds.

    Sets without any fit are left out. The last row is the mean over sets that have all ways.
    """
    found = defaultdict(list)
    for row in rows:
        found[row["set"], row["way"]].append(row["accuracy"])
    ways = [f"{way}, fitted" for way in WAYS]
    ways += ["words, zero-shot", "letters, zero-shot", "TF-IDF", "commonest label"]
    ways = [way for way in ways if any(way == row["way"] for row in rows)]
    names = [name for name in SETS if any(found[name, way] for way in ways if "fitted" in way)]
    print("| set | labels |", " | ".join(ways), "|")
    print("|---|---|" + "---|" * len(ways))
    for name in names:
        shown = [cell(found[name, way]) for way in ways]
        print(f"| {name} | {len(SETS[name].labels)} |", " | ".join(shown), "|")
    whole = [name for name in names if all(found[name, way] for way in ways)]
    means = [np.mean([np.mean(found[name, way]) for name in whole]) for way in ways]
    print(f"| mean of {len(whole)} | |", " | ".join(f"{mean:.1%}" for mean in means), "|")


def cell(shares: list[float]) -> str:
    if len(shares) < 2:
        return f"{shares[0]:.1%}" if shares else ""
    return f"{np.mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mlmjax-small")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print_tables(read_lines(given.out))
    elif given.data is None:
        sys.exit("--data: is missing; give the folder that holds eval/")
    else:
        run(given)


if __name__ == "__main__":
    main()
