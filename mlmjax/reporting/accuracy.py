"""Draw the accuracy of several methods, and what a classifier confuses."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mlmjax.reporting import charts
from mlmjax.reporting.charts import ACCENT, INK, OTHER, SIZE

LABEL = 16
"""Characters of a label that a picture shows."""

ROOM = 220
"""Units of a picture that the columns of a confusion matrix may take."""


class Method(NamedTuple):
    """One bar of the accuracy picture: its name, accuracy and 95 % interval if known.

    `purpose` is a sentence that says what the bar is for.
    """

    name: str
    accuracy: float
    interval: tuple[float, float] | None = None
    is_ours: bool = False
    purpose: str = ""


@charts.own_style()
def accuracy_figure(methods: Sequence[Method], tested: str = "test rows") -> Figure:
    """Draw one horizontal bar per method, in their order; `tested` names what was tested."""
    figure, axes = charts.new_figure(0.53 * len(methods) + 0.75)
    for row, method in enumerate(methods):
        axes.text(0, row - 0.24, method.name, va="bottom", parse_math=False)
        axes.barh(row, method.accuracy, color=ACCENT if method.is_ours else OTHER, height=0.36)
        end = method.accuracy
        if method.interval is not None:
            axes.plot(method.interval, [row, row], color=INK, linewidth=1.3, solid_capstyle="butt")
            end = method.interval[1]
        axes.text(end + 0.012, row, f"{method.accuracy:.1%}", va="center")
    axes.set_yticks([])
    axes.set_ylim(len(methods) - 0.7, -0.85)
    axes.set_xlim(0, 1.18)
    charts.set_percent_ticks(axes, "x")
    charts.hide_left_axis(axes)
    axes.set_xlabel(f"{tested} with the correct label")
    axes.set_ylabel("method")
    return figure


def confusion_fits(confusion: np.ndarray) -> bool:
    """Say whether the counts of a confusion matrix can be read in a picture."""
    digits = len(str(int(confusion.max())))
    return len(confusion) * (digits * 0.65 * SIZE + 2) <= ROOM


@charts.own_style()
def confusion_figure(labels: Sequence[str], confusion: np.ndarray, noun: str = "label") -> Figure:
    """Draw counts of texts by correct label (rows) and predicted label (columns).

    `noun` is what the axes call a label.
    """
    figure, axes = charts.new_figure(0.3 * len(labels) + 2.2)
    names = [charts.picture_label(label, LABEL) for label in labels]
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    for row, column in np.argwhere(confusion > 0):
        # Half of the colour at most, so that the number on it has contrast in dark mode too.
        shade = 0.05 + 0.45 * shares[row, column]
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=ACCENT, alpha=shade))
        axes.text(column, row, str(confusion[row, column]), ha="center", va="center")
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)
    axes.set_xlabel(f"predicted {noun}")
    axes.set_ylabel(f"correct {noun}")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def top_confusions(names: Sequence[str], confusion: np.ndarray, most: int = 10) -> list[str]:
    """Return the most frequent confusions as lines.

    >>> top_confusions(["a", "b"], np.array([[3, 2], [0, 4]]))
    ['most frequent confusions', '     2  a taken for b']
    """
    wrong = confusion * (1 - np.eye(len(names), dtype=int))
    pairs = sorted(np.argwhere(wrong > 0).tolist(), key=lambda at: -wrong[tuple(at)])[:most]
    if not pairs:
        return ["no test row is confused"]
    shown = [f"{wrong[i, j]:6}  {names[i]} taken for {names[j]}" for i, j in pairs]
    return ["most frequent confusions", *shown]
