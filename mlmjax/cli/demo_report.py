"""Write the demo's page: one HTML file with its pictures inside, no script and no network."""

from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mlmjax.reporting import charts
from mlmjax.reporting.accuracy import Method, accuracy_figure, confusion_figure
from mlmjax.reporting.charts import ACCENT, FAINT, OTHER, WARN, embedded_picture
from mlmjax.reporting.pages import render, stylesheet


class Answer(NamedTuple):
    """One text and the probability of every label; `gold` is None if it is unknown."""

    text: str
    probabilities: Mapping[str, float]
    gold: str | None = None

    def best(self) -> list[tuple[str, float]]:
        """Return the three most probable labels with their probabilities."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:3]


class Efficiency(NamedTuple):
    """The accuracy of the model and of TF-IDF with some number of labels per subject."""

    labels: int
    ours: Method
    tfidf: Method


def page(
    *,
    methods: Sequence[Method],
    efficiency: Sequence[Efficiency],
    curve: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    confusion: np.ndarray,
    **texts: Any,
) -> str:
    """Return the page as HTML; every text in it is escaped.

    `curve` is the run's metrics.jsonl; `confusion` counts texts, `[gold label, predicted label]`.
    `texts` are the other values of the template.
    """
    return render(
        "cli/demo_report.html.j2",
        style=stylesheet(),
        methods=methods,
        labels=labels,
        tested=int(confusion.sum()),
        label_list=quote(",".join(labels)),
        accuracy=embedded_picture(
            accuracy_figure(methods, "test texts"), "accuracy of each method on the test texts"
        ),
        efficiency=efficiency,
        compared=efficiency_sentence(efficiency),
        efficiency_picture=embedded_picture(
            efficiency_figure(efficiency), "accuracy by the number of labels per subject"
        ),
        curve=embedded_picture(curve_figure(curve), "loss and accuracy over the training updates"),
        confusion=embedded_picture(
            confusion_figure(labels, confusion, "subject"), "confusion matrix"
        ),
        **texts,
    )


def efficiency_sentence(points: Sequence[Efficiency]) -> str:
    """Say with how many labels one of the two is ahead, by their 95 % intervals.

    >>> ours, tfidf = Method("", 0.6, (0.5, 0.7)), Method("", 0.3, (0.2, 0.4))
    >>> efficiency_sentence([Efficiency(8, ours, tfidf), Efficiency(75, ours, ours)])
    'The language model is clearly ahead with 8 labels per subject. With 75, neither is: the 95 % \
intervals overlap.'
    """
    ahead: list[str] = []
    behind: list[str] = []
    even: list[str] = []
    for point in points:
        ours, tfidf = (one.interval or (one.accuracy,) * 2 for one in (point.ours, point.tfidf))
        found = ahead if ours[0] > tfidf[1] else behind if ours[1] < tfidf[0] else even
        found.append(str(point.labels))
    said = [
        f"{name} is clearly ahead with {_listed(numbers)} labels per subject."
        for name, numbers in (("The language model", ahead), ("TF-IDF", behind))
        if numbers
    ]
    if even:
        rest = ", neither is:" if said else " labels per subject, neither is clearly ahead:"
        said.append(f"With {_listed(even)}{rest} the 95 % intervals overlap.")
    return " ".join(said)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


@charts.own_style()
def efficiency_figure(points: Sequence[Efficiency]) -> Figure:
    """Draw the accuracy of the model and of TF-IDF by the number of labels per subject."""
    figure, axes = charts.new_figure(3.6)
    numbers = [point.labels for point in points]
    lines = {}
    for name, methods, style in (
        ("language model", [point.ours for point in points], {"color": ACCENT, "marker": "o"}),
        ("TF-IDF", [point.tfidf for point in points], {"color": WARN, "marker": "s"}),
    ):
        shares = [one.accuracy for one in methods]
        (lines[name],) = axes.plot(numbers, shares, linewidth=1.8, **style)
        for number, one in zip(numbers, methods, strict=True):
            if one.interval is not None:
                axes.plot([number] * 2, one.interval, color=style["color"], linewidth=1.2)
    axes.set_xticks(numbers)
    axes.set_xlabel("labelled texts per subject")
    axes.set_ylabel("correct answers")
    axes.set_ylim(0, 1.02)
    charts.set_percent_ticks(axes, "y")
    axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.5)
    charts.add_legend(figure, lines)
    return figure


@charts.own_style()
def curve_figure(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss and accuracy of the training and held-out texts over the updates."""
    figure, panels = charts.new_figure(4.6, 2, sharex=True)
    names = {"loss_atp": "loss at the answer", "answer_accuracy": "correct answers"}
    splits = (
        ("train", "training texts", {"color": OTHER}),
        ("validation", "held-out texts", {"color": ACCENT, "marker": "o", "markersize": 4}),
    )
    lines: dict[str, Any] = {}
    for axes, (key, title) in zip(panels, names.items(), strict=True):
        for split, name, style in splits:
            points = [
                (line["step"], line[key])
                for line in curve
                if line["split"] == split and line.get(key) is not None
            ]
            if points:
                (lines[name],) = axes.plot(*zip(*points, strict=True), linewidth=1.6, **style)
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
    panels[1].set_xlabel("updates of the model")
    panels[1].set_ylim(0, 1.02)
    charts.set_percent_ticks(panels[1], "y")
    if lines:
        charts.add_legend(figure, lines)
    return figure
