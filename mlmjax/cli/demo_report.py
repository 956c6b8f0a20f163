"""Write the demo's page: one HTML file with its pictures inside, no script and no network."""

from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mlmjax.reporting import charts
from mlmjax.reporting.accuracy import Method, accuracy_figure, confusion_figure
from mlmjax.reporting.charts import ACCENT, INK, OTHER, embedded_picture
from mlmjax.reporting.pages import render, stylesheet


class Answer(NamedTuple):
    """One text and the probability of every label; `gold` is None if it is unknown."""

    text: str
    probabilities: Mapping[str, float]
    gold: str | None = None

    def best(self) -> list[tuple[str, float]]:
        """Return the three most probable labels with their probabilities."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:3]


def page(
    *,
    methods: Sequence[Method],
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
            accuracy_figure(methods), "accuracy of each method on the test texts"
        ),
        curve=embedded_picture(curve_figure(curve), "loss and accuracy over the training updates"),
        confusion=embedded_picture(
            confusion_figure(labels, confusion, "subject"), "confusion matrix"
        ),
        **texts,
    )


@charts.own_style()
def curve_figure(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss and accuracy of the training and held-out texts over the updates."""
    figure, panels = charts.new_figure(2.9, 1, 2)
    titles = {"loss_atp": "loss at the answer", "answer_accuracy": "correct answers"}
    splits = (
        ("train", "training texts", {"color": OTHER}),
        ("validation", "held-out texts", {"color": ACCENT, "marker": "o", "markersize": 4}),
    )
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for split, name, style in splits:
            points = [
                (line["step"], line[key])
                for line in curve
                if line["split"] == split and line.get(key) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.6, **style)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("updates", color=INK)
        axes.set_ylim(bottom=0)
    panels[1].set_ylim(0, 1.02)
    charts.set_percent_ticks(panels[1], "y")
    if panels[0].lines:
        panels[0].legend(frameon=False, fontsize=9)
    return figure
