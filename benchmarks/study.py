"""Hold what a study of a classifier shares: data, figures and a Markdown table."""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from mlmjax import Classifier
from mlmjax.statistics.metrics import wilson_interval

HEADER = """
| part | what | measure | value | 95 % interval | n | |
|---|---|---|---|---|---|---|"""

TOPICS = ["World", "Sports", "Business", "Technology"]
"""AG News with a word of one token in the place of "Sci/Tech"."""

ASKED = "Name the topic of the text: World, Sports, Business or Technology."
CHOSEN = "Which topic is the text about?"
WORDS = {"answer": "words", "instruction": ASKED}
LETTERS = {"answer": "letters", "instruction": CHOSEN}


class Figures:
    """Collect the figures of one part of a study, and print each."""

    def __init__(self, part: str):
        self.part = part
        self.rows: list[dict] = []

    def add(self, what: str, measure: str, value: float, n: int | None = None, **more) -> None:
        """Keep a figure; with `n`, it is a share of n rows and gets a Wilson interval."""
        row = {"part": self.part, "what": what, "measure": measure, "value": float(value), "n": n}
        if n is not None:
            row["interval"] = list(wilson_interval(round(value * n), n))
        self.rows.append(row | more)
        print(line(self.rows[-1]), flush=True)

    def accuracy(self, what: str, given, gold, **more) -> None:
        """Keep the share of right answers."""
        given = np.asarray(given)
        self.add(what, "accuracy", np.mean(given == np.asarray(gold)), len(given), **more)


class Study(Figures):
    """Hold the data, the model and the figures so far."""

    def __init__(self, data: Path, model: str, out: Path):
        super().__init__("")
        self.data, self.model, self.out = data, model, out

    def read(self, name: str) -> list[dict]:
        return pq.read_table(self.data / f"{name}.parquet").to_pylist()

    def topics(self, name: str, limit: int | None = None) -> tuple[list[str], list[str]]:
        """Return drawn texts and topics of AG News; those of `train` are not in dev."""
        rows = self.read(f"ag_news_{name}")
        for row in rows:
            row["text"] = row.get("text") or f"{row['title']} {row['description']}"
        if name.endswith("train"):
            known = set(self.topics("sample5k_dev")[0])
            rows = [row for row in rows if row["text"] not in known]
        rows = draw(rows, limit)
        names = {"Sci/Tech": "Technology"}
        topics = [names.get(row["label_text"], row["label_text"]) for row in rows]
        return [row["text"] for row in rows], topics

    def classifier(self, **options) -> Classifier:
        options = {"labels": TOPICS, "max_length": 128, **WORDS} | options
        return Classifier(self.model, progress=False, **options)

    def fitted(self, way: str, **options) -> Classifier:
        """Return the classifier of AG News that `fitting` saved: words, letters or head."""
        folder = self.out / f"fitted-{way}"
        if not folder.exists():
            sys.exit(f"{folder}: is missing; run the part fitting first")
        return Classifier(str(folder), progress=False, **options)


def draw(rows: list, limit: int | None, seed: int = 0) -> list:
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    return [rows[i] for i in order[:limit]]


def line(row: dict) -> str:
    """Return one row of the Markdown table."""
    value, interval = row["value"], ""
    if row["n"] is not None:
        value, (low, high) = f"{value:.1%}", row["interval"]
        interval = f"{low:.1%} to {high:.1%}"
    else:
        value = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
    known = ("part", "what", "measure", "value", "n", "interval", "history")
    more = ", ".join(
        f"{key} {found:.3g}" if isinstance(found, float) else f"{key} {found}"
        for key, found in row.items()
        if key not in known
    )
    what = row["what"].replace("|", "\\|")
    cells = (row["part"], what, row["measure"], value, interval, row["n"] or "", more)
    return "| " + " | ".join(map(str, cells)) + " |"
