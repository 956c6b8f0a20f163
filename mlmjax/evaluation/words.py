"""Show which words led to wrong answers: one page of coloured texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlmjax.config.task import Task
from mlmjax.evaluation.questions import Question
from mlmjax.reporting.markdown import number
from mlmjax.reporting.pages import render, stylesheet
from mlmjax.scoring.masks.importance import Word, coloured, importance_in_rows
from mlmjax.scoring.scorers import RowScorer
from mlmjax.storage import write_whole

PAGE = "words.html"


class Explained(NamedTuple):
    """A wrong answer, and for each field of its row the importance of its words."""

    where: str
    gold: str
    predicted: str
    probability: float
    fields: dict[str, tuple[str, list[Word]]]


def explain_mistakes(
    scorer: RowScorer,
    questions: Sequence[Question],
    labels: Sequence[str],
    log_probs: np.ndarray,
    count: int,
) -> list[Explained]:
    """Return the wrong answers that the model was surest of, at most `count`, with their words.

    `log_probs` `[questions, labels]` are those that the scorer gave. The importance of a word is
    the log probability of the answer less that with the word masked.
    """
    best, sure = log_probs.argmax(axis=1), log_probs.max(axis=1)
    order = np.argsort(-sure, kind="stable").tolist()
    wrong = [i for i in order if best[i] != questions[i].gold][:count]
    if not wrong:
        return []
    rows = [questions[i].row for i in wrong]
    columns = [scorer.labels.index(labels[best[i]]) for i in wrong]
    return [
        Explained(
            f"Row {number(questions[i].index + 1)}",
            labels[questions[i].gold],
            labels[best[i]],
            float(np.exp(sure[i])),
            {name: (questions[i].row[name], words) for name, words in fields.items()},
        )
        for i, fields in zip(wrong, importance_in_rows(scorer, rows, columns), strict=True)
    ]


def write_words(folder: Path, task: Task, mistakes: Sequence[Explained]) -> None:
    """Write `words.html` into the folder of an evaluation; every text in it is escaped."""
    page = render(
        "evaluation/words.html.j2",
        style=stylesheet(),
        task=task.name,
        mistakes=mistakes,
        coloured=coloured,
    )
    write_whole(folder / PAGE, page.encode())
