"""Compare six ways to classify on labelled sets: accuracy, and calibration before and after.

Run `python benchmarks/ways_to_answer.py --data FOLDER --out results.jsonl`. Each result is one line
of the file; what is there is not computed again. `--sweep` tries learning rates instead, and looks
at held-out rows only. `--table` prints the tables of a file.
"""

import argparse
import json
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from labelled_sets import SETS, read_set

from mlmjax import Classifier, InputError
from mlmjax.evaluation.suite.entrants import tfidf_regression
from mlmjax.statistics.calibration import temperature_calibration
from mlmjax.statistics.reliability import calibration


class Way(NamedTuple):
    """Say how a classifier answers, how it is fitted, and which rates the sweep tries.

    `rate` is the one of `rates` that had the best mean accuracy on held-out rows in the sweep.
    """

    classifier: dict[str, Any]
    fit: dict[str, Any]
    rate: float
    rates: tuple[float, ...]


WAYS = {
    "words": Way({"answer": "words"}, {}, 1e-3, (3e-4, 1e-3, 3e-3)),
    "letters": Way({"answer": "letters"}, {}, 1e-3, (3e-4, 1e-3, 3e-3)),
    "head": Way({"head": "classification"}, {}, 1e-3, (3e-4, 1e-3, 3e-3)),
    "LoRA": Way(
        {"answer": "words"}, {"adapter": {"kind": "lora", "rank": 8}}, 3e-3, (1e-3, 3e-3, 1e-2)
    ),
    "bias only": Way({"answer": "words"}, {"train": ["*bias", "*norm*"]}, 1e-3, (1e-3, 3e-3, 1e-2)),
    "ordered words": Way({"answer": "words", "ordered": True}, {}, 1e-3, ()),
}
UNTRAINED = ("words", "letters")
ORDERED_SETS = ("five levels",)
SWEPT_SETS = ("questions", "newsgroups")
FITTED = {"epochs": 3, "batch_size": 8}
HELD_OUT = 128


class Cell(NamedTuple):
    set: str
    way: str
    seed: int
    rate: float | None = None


def cells(sets: Iterable[str], seeds: int) -> Iterator[Cell]:
    """Yield what is measured, set by set and way by way, so that all seeds share programs."""
    for name in sets:
        for seed in range(seeds):
            yield Cell(name, "TF-IDF", seed)
            yield Cell(name, "commonest label", seed)
        for way, options in WAYS.items():
            if way != "ordered words" or name in ORDERED_SETS:
                yield from (Cell(name, way, seed, options.rate) for seed in range(seeds))
            if way in UNTRAINED:
                yield Cell(name, f"{way}, zero-shot", 0)


def sweep_cells() -> Iterator[Cell]:
    """Yield every rate of every way on two sets, one seed."""
    for name in SWEPT_SETS:
        for way, options in WAYS.items():
            yield from (Cell(name, way, 0, rate) for rate in options.rates)


def measure(cell: Cell, given: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one cell; those of a sweep are of held-out rows alone."""
    wanted = given.rows + HELD_OUT
    (texts, labels), tested = read_set(given.data, cell.set, wanted, given.test_rows, cell.seed)
    trained = texts[: given.rows], labels[: given.rows]
    held_out = texts[given.rows :], labels[given.rows :]
    if cell.way == "TF-IDF":
        return {"accuracy": share_right(tfidf_regression(*trained, tested[0]), tested[1])}
    if cell.way == "commonest label":
        commonest = Counter(trained[1]).most_common(1)[0][0]
        return {"accuracy": share_right([commonest] * len(tested[1]), tested[1])}
    name, _, untrained = cell.way.partition(", ")
    classifier = Classifier(
        given.model, list(SETS[cell.set].labels.values()), **WAYS[name].classifier, progress=False
    )
    found: dict[str, Any] = {}
    if not untrained:
        classifier.fit(
            *trained, **FITTED, **WAYS[name].fit, learning_rate=cell.rate, seed=cell.seed
        )
        summary = classifier.fit_summary_
        found = {"training_loss": summary.training.loss, "warned": summary.warning is not None}
    held_scores, held_gold = answers(classifier, *held_out)
    found["held_out_accuracy"] = float(np.mean(held_scores.argmax(axis=1) == held_gold))
    if given.sweep:
        return found
    scores, gold = answers(classifier, *tested)
    found |= figures(scores, gold)
    try:
        cooled = temperature_calibration(held_scores, held_gold)
    except InputError:  # no temperature fits answers at chance
        return found
    return found | {"calibrated_ece": figures(cooled.apply(scores), gold)["ece"]}


def answers(
    classifier: Classifier, texts: list[str], labels: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return log probabilities `[texts, labels]` and the numbers of the right labels."""
    shares = classifier.predict_proba(texts).astype(np.float64)
    names = list(classifier.classes_)
    return np.log(np.maximum(shares, 1e-12)), np.array([names.index(label) for label in labels])


def figures(scores: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Return accuracy and calibration; for levels the mean distance and the ranked score, too."""
    shares = np.exp(scores)
    found = {"accuracy": float(np.mean(shares.argmax(axis=1) == gold))}
    measured = calibration(scores, gold)
    found |= {name: measured[name] for name in ("ece", "nll")}
    levels = np.arange(shares.shape[1])
    below = np.cumsum(shares, axis=1) - (levels >= gold[:, None])
    found["distance"] = float(np.mean(np.abs(shares @ levels - gold)))
    found["rps"] = float(np.mean((below[:, :-1] ** 2).sum(axis=1)) / (len(levels) - 1))
    return found


def share_right(answers: Any, gold: Any) -> float:
    return float(np.mean(np.asarray(answers) == np.asarray(gold)))


def run(given: argparse.Namespace) -> None:
    known = {Cell(*(one[key] for key in Cell._fields)) for one in read_lines(given.out)}
    for cell in sweep_cells() if given.sweep else cells(given.set or SETS, given.seeds):
        if cell in known:
            continue
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the summary has it
            row = cell._asdict() | measure(cell, given)
        row["seconds"] = round(time.perf_counter() - started, 1)
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Print the mean over seeds by set and way, with the smallest and the largest in brackets."""
    fitted = [way for way in WAYS if way != "ordered words"]
    others = [f"{way}, zero-shot" for way in UNTRAINED]
    print_table(rows, "accuracy", [*fitted, *others, "TF-IDF", "commonest label"])
    for key in ("ece", "calibrated_ece"):
        print(f"\n{key}\n")
        print_table(rows, key, fitted)
    levels = [row for row in rows if row["set"] in ORDERED_SETS]
    for key in ("accuracy", "distance", "rps"):
        print(f"\nlevels: {key}\n")
        print_table(levels, key, ["words", "ordered words"], "{:.3f}")


def print_table(
    rows: list[dict[str, Any]], key: str, ways: list[str], form: str = "{:.1%}"
) -> None:
    found = defaultdict(list)
    for row in rows:
        if key in row:
            found[row["set"], row["way"]].append(row[key])
    ways = [way for way in ways if any(found[name, way] for name in SETS)]
    fitted = [way for way in ways if way in WAYS] or ways
    names = [name for name in SETS if any(found[name, way] for way in fitted)]
    if not names:
        print("(not measured)")
        return
    print("| set | labels |", " | ".join(ways), "|")
    print("|---|---|" + "---|" * len(ways))
    for name in names:
        shown = [cell_text(found[name, way], form) for way in ways]
        print(f"| {name} | {len(SETS[name].labels)} |", " | ".join(shown), "|")
    whole = [name for name in names if all(found[name, way] for way in ways)]
    means = [np.mean([np.mean(found[name, way]) for name in whole]) for way in ways]
    print(f"| mean of {len(whole)} | |", " | ".join(form.format(mean) for mean in means), "|")


def cell_text(values: list[float], form: str) -> str:
    if len(values) < 2:
        return form.format(values[0]) if values else ""
    lowest, highest = form.format(min(values)), form.format(max(values))
    return f"{form.format(np.mean(values))} ({lowest} to {highest})"


def print_sweep(rows: list[dict[str, Any]]) -> None:
    """Print the mean accuracy on held-out rows by way and rate."""
    found = defaultdict(list)
    for row in rows:
        found[row["way"], row["rate"]].append(row["held_out_accuracy"])
    print("| way | rate | sets | held-out accuracy |")
    print("|---|---|---|---|")
    for (way, rate), shares in found.items():
        print(f"| {way} | {rate:g} | {len(shares)} | {np.mean(shares):.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the folder that holds eval/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mlmjax-small")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", choices=SETS, help="of these sets alone")
    parser.add_argument("--sweep", action="store_true", help="try learning rates")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        (print_sweep if given.sweep else print_tables)(read_lines(given.out))
    elif given.data is None:
        sys.exit("--data: is missing; give the folder that holds eval/")
    else:
        run(given)


if __name__ == "__main__":
    main()
