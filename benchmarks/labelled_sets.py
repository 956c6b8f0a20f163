"""Read small labelled sets of public data, whose labels are one token each."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from mlmjax.config.task import newsgroup

GROUPS = {
    "comp.graphics": "graphics",
    "rec.autos": "cars",
    "rec.sport.hockey": "hockey",
    "sci.med": "medicine",
    "sci.space": "space",
    "talk.politics.guns": "guns",
    "misc.forsale": "sale",
    "soc.religion.christian": "religion",
}
SUBJECTS = {
    "high_school_biology": "biology",
    "high_school_chemistry": "chemistry",
    "high_school_geography": "geography",
    "high_school_psychology": "psychology",
    "marketing": "marketing",
    "nutrition": "nutrition",
    "philosophy": "philosophy",
    "astronomy": "astronomy",
}
TOPICS = {"World": "World", "Sports": "Sports", "Business": "Business", "Sci/Tech": "Technology"}
QUESTIONS = {
    "ABBR": "expression",
    "ENTY": "entity",
    "DESC": "description",
    "HUM": "person",
    "LOC": "location",
    "NUM": "number",
}
LEVELS = dict(zip("01234", ["terrible", "bad", "okay", "good", "great"], strict=True))
TRUTH = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}


class LabelledSet(NamedTuple):
    """Name the files of a set, its labels by the value of a column, and how a row is read.

    Without `test` the rows of `train` are divided.
    """

    train: str
    test: str | None
    column: str
    labels: dict[str, str]
    read: Callable[[dict], str] = lambda row: row["text"]


def _news(row: dict) -> str:
    return row.get("text") or f"{row['title']} {row['description']}"


def _pair(row: dict) -> str:
    return f"{row['sentence1']}\n{row['sentence2']}"


SETS = {
    "questions": LabelledSet("trec_train", "trec_test", "label", QUESTIONS),
    "reviews": LabelledSet("sst2_train", "sst2_test", "label", {"0": "negative", "1": "positive"}),
    "five levels": LabelledSet("sst5_train", "sst5_test", "label", LEVELS),
    "news": LabelledSet("ag_news_sample5k_train", "ag_news_test", "label_text", TOPICS, _news),
    "newsgroups": LabelledSet(
        "20newsgroups_bydate_train",
        "20newsgroups_bydate_test",
        "label",
        GROUPS,
        lambda row: newsgroup(row["text"]),
    ),
    "subjects": LabelledSet("mmlu_test", None, "subject", SUBJECTS, lambda row: row["question"]),
    "paraphrases": LabelledSet(
        "mrpc_train", "mrpc_test", "label", {"0": "different", "1": "same"}, _pair
    ),
    "entailment": LabelledSet("mnli_train_olora", "mnli_dev_olora", "label", TRUTH),
}
MOST_WORDS = 32
Rows = tuple[list[str], list[str]]


def read_set(data: Path, name: str, train: int, test: int, seed: int) -> tuple[Rows, Rows]:
    """Return training rows drawn by the seed, and test rows that are the same for every seed."""
    one = SETS[name]
    rows, tested = _read(data, one, one.train), []
    if one.test is not None:
        tested = _drawn(_read(data, one, one.test), test, 0)
    else:
        rows = _drawn(rows, None, 0)
        tested, rows = rows[:test], rows[test:]
    known = {text for text, _ in tested}
    trained = _drawn([row for row in rows if row[0] not in known], train, seed + 1)
    return _columns(trained), _columns(tested)


def _read(data: Path, one: LabelledSet, file: str) -> list[tuple[str, str]]:
    rows = pq.read_table(data / "eval" / f"{file}.parquet").to_pylist()
    named = [(_start(one.read(row)), one.labels.get(str(row[one.column]))) for row in rows]
    return [(text, label) for text, label in named if label is not None and text.strip()]


def _start(text: str) -> str:
    """Return the first words of a text, so that every way to answer reads the same ones."""
    return " ".join(text.split()[:MOST_WORDS])


def _drawn(rows: list, count: int | None, seed: int) -> list:
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    return [rows[i] for i in order[:count]]


def _columns(rows: list[tuple[str, str]]) -> Rows:
    return [text for text, _ in rows], [label for _, label in rows]
