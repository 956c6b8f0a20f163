"""The picture of a suite: every score with its interval, beside what needs no model."""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from mlmjax.cli.demo_report import FAINT, INK, WIDTH, plain
from mlmjax.evaluation.suite.suite_lines import Line
from mlmjax.reporting.charts import own_style, picture_label

_COLORS = ["#0f766e", "#b45309", "#1d4ed8", "#9f1239", "#6d28d9", "#0e7490", "#4d7c0f", "#be185d"]
_NO_MODEL = "#64748b"
_MARKS = "oDs^vP"


def scores_picture(lines: Sequence[Line]) -> bytes:
    """Draw one point per task, method and model with its 95 % interval, as PNG.

    A colour is a model, a mark a method; the short upright stroke is the majority label.
    """
    with own_style():
        figure = _figure(lines)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _figure(lines: Sequence[Line]) -> Figure:
    tasks = list(dict.fromkeys((line.task, line.kind, line.metric) for line in lines))
    series = list(dict.fromkeys((line.method, line.model) for line in lines))
    models = [model for model in dict.fromkeys(model for _, model in series) if model]
    methods = list(dict.fromkeys(method for method, _ in series))
    height = 0.17 * len(lines) + 0.16 * len(tasks) + 0.22 * len(series) + 1.1
    figure = Figure(figsize=(WIDTH, max(2.2, height)), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    y, ticks, names, shown = 0.0, [], [], {}
    lowest = 0.0
    for task in tasks:
        own = [line for line in lines if (line.task, line.kind, line.metric) == task]
        top = y
        for line in own:
            if line.score is not None:
                color = _COLORS[models.index(line.model) % 8] if line.model else _NO_MODEL
                mark = _MARKS[methods.index(line.method) % len(_MARKS)]
                if line.ci95:
                    axes.plot(line.ci95, [y, y], color=color, linewidth=1.4, alpha=0.6)
                    lowest = min(lowest, line.ci95[0])
                (point,) = axes.plot(
                    line.score, y, mark, color=color, markersize=5, markeredgewidth=0
                )
                shown[line.method, line.model] = point
            y += 1
        (stroke,) = axes.plot(
            [own[0].majority] * 2, [top - 0.5, y - 0.5], color=INK, linewidth=1, linestyle=":"
        )
        shown["majority label", ""] = stroke
        ticks.append((top + y - 1) / 2)
        what = {"accuracy": "", "macro_f1": ", macro-F1", "mcc": ", MCC"}[task[2]]
        names.append(f"{picture_label(task[0], 30)}\n{task[1]}{what}")
        axes.axhline(y, color=FAINT, linewidth=0.4)
        y += 1
    axes.set_yticks(ticks, names, parse_math=False, fontsize=7.5)
    axes.set_ylim(max(y, 1) - 0.5, -1)
    axes.set_xlim(min(0.0, lowest - 0.02), 1)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.4, alpha=0.6)
    axes.set_xlabel("score (the task's headline) and its 95 % interval", color=INK, fontsize=9)
    if shown:
        legend = figure.legend(
            list(shown.values()),
            [
                f"{method}, {picture_label(model, 60)}" if model else method
                for method, model in shown
            ],
            loc="outside lower center",
            frameon=False,
            fontsize=8,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure
