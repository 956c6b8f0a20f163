"""Write the page of an evaluation and its reliability diagram."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mlmjax.config.task import Task
from mlmjax.data.contamination import Contamination
from mlmjax.evaluation.summary import LEVELS
from mlmjax.evaluation.words import PAGE
from mlmjax.reporting import charts
from mlmjax.reporting.charts import ACCENT, FAINT, INK, OTHER, WARN
from mlmjax.reporting.markdown import score
from mlmjax.reporting.pages import render
from mlmjax.statistics.metrics import wilson_interval
from mlmjax.statistics.reliability import BINS, confidence, equal_width
from mlmjax.storage import write_whole

REPORT, PICTURE = "report.md", "reliability.svg"
DIAGRAM = "Share of correct answers by the probability of the answer, and rows of each bin"


def write_evaluation_report(
    folder: Path,
    task: Task,
    results: Mapping[str, Any],
    log_probs: np.ndarray,
    gold: Sequence[int] | np.ndarray,
    known: Contamination,
    *,
    has_words: bool = False,
) -> None:
    """Write `report.md` and `reliability.svg` of an evaluation into its folder.

    `results` were computed from `log_probs` `[rows, labels]` and `gold`, an index per row.
    `has_words` adds a link to `words.html`.
    """
    sure, right = confidence(log_probs, gold)
    charts.save(diagram(sure, right), folder / PICTURE, DIAGRAM)

    def interval(metric: str) -> str:
        return " to ".join(map(score, results[f"{metric}_ci95"]))

    page = render(
        "evaluation/report.md.j2",
        task=task,
        results=results,
        LEVELS=LEVELS,
        bins=equal_width(sure, right),
        known=known,
        interval=interval,
        picture=PICTURE,
        picture_shows=DIAGRAM,
        words=PAGE if has_words else None,
    )
    write_whole(folder / REPORT, page.encode())


@charts.own_style()
def diagram(sure: np.ndarray, right: np.ndarray, bins: int = BINS) -> Figure:
    """Draw accuracy by confidence over bins of equal width, and the rows of each bin.

    Calibrated answers lie on the dashed line; below it a model is too sure. Vertical lines are 95 %
    Wilson intervals of the accuracy.
    """
    figure, (top, below) = charts.new_figure(5.2, 2, height_ratios=[3, 1], sharex=True)
    found = equal_width(sure, right, bins)
    top.plot([0, 1], [0, 1], color=OTHER, linestyle="--", linewidth=1.2, label="calibrated")
    middles, width = [(one.low + one.high) / 2 for one in found], 0.92 / bins
    for middle, one in zip(middles, found, strict=True):
        if one.confidence is None or one.accuracy is None:
            continue
        top.bar(middle, one.accuracy, width=width, color=ACCENT, alpha=0.3)
        low, high = wilson_interval(round(one.accuracy * one.rows), one.rows)
        top.plot([one.confidence] * 2, [low, high], color=ACCENT, linewidth=1.4)
        top.plot(one.confidence, one.accuracy, color=ACCENT, marker="o", markersize=5)
    top.set_ylim(0, 1.02)
    charts.set_percent_ticks(top, "y")
    top.set_ylabel("correct answers")
    below.bar(middles, [one.rows for one in found], width=width, color=ACCENT, alpha=0.3)
    below.axvline(float(sure.mean()), linewidth=1.6, color=INK, label="mean probability")
    below.axvline(float(right.mean()), linewidth=1.6, color=WARN, label="accuracy", linestyle="--")
    below.set_xlim(0, 1)
    charts.set_percent_ticks(below, "x")
    below.set_ylabel("rows")
    below.yaxis.set_major_formatter("{x:,.0f}")
    below.set_xlabel("probability of the answer")
    below.yaxis.get_major_locator().set_params(integer=True)
    for axes in (top, below):
        axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.5)
        axes.set_axisbelow(True)
    shown = [*top.get_legend_handles_labels()[0], *below.get_legend_handles_labels()[0]]
    charts.add_legend(figure, {str(one.get_label()): one for one in shown})
    return figure
