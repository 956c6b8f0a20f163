"""A task over a few reviews, and its table."""

import csv
import json

from mlmjax.config.task import Task

ROWS = [
    {"text": "a fine film", "label": "good"},
    {"text": "two hours lost", "label": "bad"},
    {"text": "I would see it again", "label": "good"},
    {"text": "see, it is not for me", "label": "bad"},
    {"text": "fine acting, dull plot", "label": "bad"},
]


REVIEWS = """
name = "reviews"
data = "reviews.csv"
prompt = "Is the review good?\\n{text}\\n{options}Answer: [unused0] [MASK]"
shorten = { text = "tail" }
answer = "label"
labels = ["bad", "good"]
"""


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def task(**changes):
    """Return a task over `rows.jsonl` with the keys of the reviews."""
    values = {"name": "t", "prompt": "{text} {options}[unused0] [MASK]", "answer": "label"}
    return Task(**{**values, "labels": ("bad", "good"), **changes})
