"""Write the demo's page: one HTML file with its pictures inside, no script and no network."""

from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mlmjax.reporting import charts
from mlmjax.reporting.charts import ACCENT, INK, OTHER, WIDTH, embedded_picture
from mlmjax.reporting.pages import render, stylesheet


class Method(NamedTuple):
    """One bar of the accuracy picture: its name, accuracy and 95 % interval if known."""

    name: str
    accuracy: float
    interval: tuple[float, float] | None = None
    is_ours: bool = False


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
        confusion=embedded_picture(confusion_figure(labels, confusion), "confusion matrix"),
        **texts,
    )


@charts.own_style()
def accuracy_figure(methods: Sequence[Method]) -> Figure:
    """Draw one horizontal bar per method, in their order."""
    figure, axes = charts.new_figure(0.42 * len(methods) + 0.7)
    for row, method in enumerate(methods):
        axes.barh(row, method.accuracy, color=ACCENT if method.is_ours else OTHER, height=0.62)
        end = method.accuracy
        if method.interval is not None:
            axes.plot(method.interval, [row, row], color=INK, linewidth=1.3, solid_capstyle="butt")
            end = method.interval[1]
        axes.text(end + 0.012, row, f"{method.accuracy:.1%}", va="center", color=INK)
    axes.set_yticks(range(len(methods)), [method.name for method in methods])
    axes.set_ylim(len(methods) - 0.45, -0.55)
    axes.set_xlim(0, 1)
    charts.set_percent_ticks(axes, "x")
    charts.hide_left_axis(axes)
    return figure


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


@charts.own_style()
def confusion_figure(labels: Sequence[str], confusion: np.ndarray) -> Figure:
    """Draw counts of texts by correct subject (rows) and predicted subject (columns)."""
    figure, axes = charts.new_figure(WIDTH * 0.82)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="GnBu", vmin=0, vmax=1)
    for row, column in np.argwhere(confusion > 0):
        color = "white" if shares[row, column] > 0.6 else INK
        count = str(confusion[row, column])
        axes.text(column, row, count, ha="center", va="center", color=color)
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted subject", color=INK)
    axes.set_ylabel("correct subject", color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
