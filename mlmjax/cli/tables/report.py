"""Write the page of `mlmjax fit`: one HTML file with its pictures inside."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlmjax.evaluation.report import diagram
from mlmjax.reporting.accuracy import (
    Method,
    accuracy_figure,
    confusion_figure,
    confusion_fits,
    top_confusions,
)
from mlmjax.reporting.charts import embedded_picture
from mlmjax.reporting.markdown import shortened, visible
from mlmjax.reporting.pages import render, stylesheet

SHOWN_MISTAKES = 12
EXCERPT = 400
"""Characters of a text that the page shows."""


class Mistake(NamedTuple):
    """Describe a test row with a wrong answer."""

    where: str
    text: str
    gold: str
    predicted: str
    probability: float


def fit_page(
    *,
    figures: Mapping[str, Any],
    methods: Sequence[Method],
    rows: Sequence[tuple[str, str, str]],
    probabilities: np.ndarray,
    verdicts: Sequence[str],
    again: str | None,
    classify: str,
) -> str:
    """Return the page as HTML; every text in it is escaped.

    `rows` has the place, the text and the label of each test row; `probabilities` are
    `[rows, labels]`. `verdicts` speak against the classifier, `again` is a command to try then.
    """
    labels = figures["labels"]
    where, texts, gold = zip(*rows, strict=True)
    best = probabilities.argmax(axis=1)
    sure = probabilities.max(axis=1)
    right = np.array([labels[i] == truth for i, truth in zip(best, gold, strict=True)])
    wrong = [i for i in np.argsort(-sure, kind="stable").tolist() if not right[i]]
    counts, confusion = np.array(figures["confusion"]), None
    if confusion_fits(counts):
        figure = confusion_figure(labels, counts)
        confusion = embedded_picture(figure, "counts of test rows by correct and predicted label")
    return render(
        "cli/tables/report.html.j2",
        style=stylesheet(),
        figures=figures,
        verdicts=verdicts,
        again=again,
        methods=methods,
        accuracy=embedded_picture(
            accuracy_figure(methods), "accuracy of each method on the test rows"
        ),
        reliability=embedded_picture(
            diagram(sure, right), "share of correct answers by the probability of the answer"
        ),
        confusion=confusion,
        confusions=top_confusions([visible(label) for label in labels], counts),
        wrong=len(wrong),
        mistakes=[
            Mistake(
                where[i],
                shortened(visible(texts[i], keep="\n"), EXCERPT),
                gold[i],
                labels[int(best[i])],
                float(sure[i]),
            )
            for i in wrong[:SHOWN_MISTAKES]
        ],
        classify=classify,
    )
