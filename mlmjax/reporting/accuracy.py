"""Draw the accuracy of several methods, and what a classifier confuses."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mlmjax.reporting import charts
from mlmjax.reporting.charts import ACCENT, INK, OTHER, WIDTH

LABEL = 24
"""Characters of a label that a picture shows."""


class Method(NamedTuple):
    """One bar of the accuracy picture: its name, accuracy and 95 % interval if known."""

    name: str
    accuracy: float
    interval: tuple[float, float] | None = None
    is_ours: bool = False


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
def confusion_figure(labels: Sequence[str], confusion: np.ndarray, noun: str = "label") -> Figure:
    """Draw counts of texts by correct label (rows) and predicted label (columns).

    `noun` is what the axes call a label.
    """
    figure, axes = charts.new_figure(WIDTH * 0.82)
    names = [charts.picture_label(label, LABEL) for label in labels]
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="GnBu", vmin=0, vmax=1)
    for row, column in np.argwhere(confusion > 0):
        color = "white" if shares[row, column] > 0.6 else INK
        count = str(confusion[row, column])
        axes.text(column, row, count, ha="center", va="center", color=color)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)
    axes.set_xlabel(f"predicted {noun}", color=INK)
    axes.set_ylabel(f"correct {noun}", color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
