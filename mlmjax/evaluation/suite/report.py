"""Write the results of a suite as JSON, Markdown and a picture."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mlmjax.config.suite import Planned
from mlmjax.data.contamination import Contamination
from mlmjax.evaluation.suite.entrants import Setting
from mlmjax.evaluation.suite.results import Result
from mlmjax.evaluation.suite.rows import Rows
from mlmjax.reporting import charts
from mlmjax.reporting.charts import FAINT, INK, OTHER, SERIES, picture_label
from mlmjax.reporting.markdown import LONG_CELL, METRIC_NAMES, cell, number
from mlmjax.reporting.pages import render
from mlmjax.statistics.metrics import (
    classification_metrics,
    macro_f1,
    mcc,
    mean_interval,
    wilson_interval,
)
from mlmjax.storage import write_whole

JSON, MARKDOWN, PICTURE = "suite.json", "suite.md", "suite.svg"
_BOOTSTRAPPED = {"macro_f1": macro_f1, "mcc": mcc}
_MARKS = "oDs^vP"
_SHOWS = "Score of each method on each task with its 95 % interval"


@dataclass(frozen=True)
class Line:
    """One line of a table: a method on a model, on one task.

    `score` is the mean of `scores`, one for each seed, in the task's own `metric`; `spread` is
    their sample standard deviation and `ci95` the interval of the mean over the rows. `majority` is
    the score of the most common label of the training rows (zero-shot: of the test rows) and
    `chance` the accuracy of guessing. `ece` is the calibration error and `order_changed` the share
    of answers that change with the order of the options, means over seeds, None if not measured.
    `tried` are the settings with their scores on validation rows, `diverged` counts seeds without a
    score.
    """

    task: str
    kind: str
    tables: tuple[int, ...]
    method: str
    model: str
    metric: str
    score: float | None
    spread: float | None
    ci95: tuple[float, float] | None
    scores: list[float]
    n: int
    chosen: dict[str, float] | None
    tried: list[dict[str, float | None]]
    diverged: int
    shortened: int
    left_out: int
    train: int
    validation: int
    held_out: bool
    majority: float
    chance: float
    ece: float | None
    order_changed: float | None
    published: float | None
    contamination: str
    trained_on: list[str]


def summarize(
    planned: Planned,
    rows: Rows,
    results: Sequence[Result],
    *,
    model: str,
    method: str,
    published: float | None = None,
    known: Contamination | None = None,
    chosen: Setting | None = None,
    tried: Mapping[Setting, float | None] | None = None,
) -> Line:
    """Return the line of one method on one task from its result per seed."""
    entry, task = planned
    whole = [result for result in results if result.diverged is None]
    scores = [float(result.metrics[task.metric]) for result in whole]
    commonest = Counter(question.gold for question in rows.train or rows.test).most_common()
    # Of equally common labels the first one, whatever the order of the rows.
    best = min(gold for gold, count in commonest if count == commonest[0][1])
    gold = [str(question.gold) for question in rows.test]
    majority = classification_metrics(gold, [str(best)] * len(gold))[task.metric]
    return Line(
        task=task.name,
        kind=entry.kind,
        tables=entry.tables,
        method=method,
        model=model,
        metric=task.metric,
        score=_mean(scores),
        spread=statistics.stdev(scores) if len(scores) > 1 else None,
        ci95=_interval(task.metric, whole) if whole else None,
        scores=scores,
        n=len(rows.test),
        chosen=chosen._asdict() if chosen else None,
        tried=[
            {**setting._asdict(), "validation": value} for setting, value in (tried or {}).items()
        ],
        diverged=len(results) - len(whole),
        shortened=max((result.shortened for result in whole), default=0),
        left_out=rows.left_out,
        train=len(rows.train),
        validation=len(rows.validation),
        held_out=rows.held_out,
        majority=float(majority),  # type: ignore[arg-type]
        chance=statistics.fmean(1 / len(question.row["options"]) for question in rows.test),
        ece=_mean(found["ece"] for result in whole if (found := result.metrics["calibration"])),
        order_changed=_mean(result.order["changed"] for result in whole if result.order),
        published=published,
        contamination=known.status if known else "",
        trained_on=known.trained_on if known else [],
    )


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


def _interval(metric: str, results: Sequence[Result]) -> tuple[float, float]:
    """Return the interval of the mean over seeds, which all answer the same rows.

    For accuracy it is Wilson's, as if seeds agreed on every row, which is never too narrow; for
    other metrics a bootstrap over the rows.
    """
    if len(results) == 1:
        low, high = results[0].metrics[f"{metric}_ci95"]
        return low, high
    n = len(results[0].predictions)
    if metric == "accuracy":
        mean = statistics.fmean(result.metrics["accuracy"] for result in results)
        return wilson_interval(mean * n, n)
    gold = [p.gold for p in results[0].predictions]
    predicted = [[p.prediction for p in result.predictions] for result in results]
    return mean_interval(gold, predicted, _BOOTSTRAPPED[metric])


def write_report(
    out: Path,
    about: Mapping[str, Any],
    lines: Sequence[Line],
    missing: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Write `suite.json`, `suite.md` and `suite.svg`; return the content of the first."""
    results = {**about, "lines": [asdict(line) for line in lines], "missing": list(missing)}
    text = json.dumps(results, ensure_ascii=False, indent=2, allow_nan=False)
    averages, shared = _averages([line for line in lines if line.kind == "fine-tune"])
    page = render(
        "evaluation/suite/report.md.j2",
        results=results,
        lines=lines,
        averages=averages,
        shared=shared,
        tried=[line for line in lines if line.tried],
        notes=list(_notes(lines, about["sweep"]["max_length"])),
        picture=PICTURE,
        picture_shows=_SHOWS,
    )
    write_whole(out / JSON, f"{text}\n".encode())
    charts.save(scores_picture(lines), out / PICTURE, _SHOWS)
    write_whole(out / MARKDOWN, page.encode())
    return results


def _averages(lines: Sequence[Line]) -> tuple[list[tuple[str, str, float]], int]:
    """Average each method over the tasks that all methods have a score on."""
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for line in lines:
        own = scores.setdefault((line.method, line.model), {})
        if line.score is not None:
            own[line.task] = line.score
    shared = set.intersection(*map(set, scores.values())) if scores else set()
    if len(shared) < 2:
        return [], 0
    return [
        (*who, statistics.fmean(own[task] for task in shared)) for who, own in scores.items()
    ], len(shared)


def _notes(lines: Sequence[Line], max_length: int) -> Iterator[str]:
    """Yield what a score does not show: truncated rows, lost seeds, contamination.

    `max_length` is that of the sweep, which fine-tuned models keep to.
    """
    for line in lines:
        model = cell(line.model) if line.model else ""
        who = ", ".join(filter(None, [cell(line.task), line.method, model]))
        if line.diverged:
            yield f"{who}: {line.diverged} of the seeds diverged and are in no mean"
        if line.shortened:
            most = f"{max_length:,} tokens, the max_length of the sweep, or to "
            limit = f"{most if line.kind == 'fine-tune' else ''}what the model reads"
            yield f"{who}: the text of {number(line.shortened)} rows was truncated to {limit}"
        for finding in line.trained_on:
            yield f"{who}: the model was {cell(finding, LONG_CELL)}"
    for task, count in {line.task: line.left_out for line in lines if line.left_out}.items():
        yield (
            f"{cell(task)}: {number(count)} rows were left out (blank after cleaning, or with a "
            "label that the task drops)"
        )


@charts.own_style()
def scores_picture(lines: Sequence[Line]) -> Figure:
    """Draw one point per task, method and model with its 95 % interval.

    A colour is a model, a mark a method; the dotted vertical stroke is the majority label.
    """
    tasks: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        tasks.setdefault((line.task, line.kind, line.metric), []).append(line)
    series = list(dict.fromkeys((line.method, line.model) for line in lines))
    models = [model for model in dict.fromkeys(model for _, model in series) if model]
    methods = list(dict.fromkeys(method for method, _ in series))
    height = 0.2 * len(lines) + 0.4 * len(tasks) + 0.26 * len(series) + 1.2
    figure, axes = charts.new_figure(height)
    y, colors = 0.0, list(SERIES)
    legend: dict[str, Any] = {}
    for (task, kind, metric), own in tasks.items():
        what = "" if metric == "accuracy" else f", {METRIC_NAMES[metric]}"
        name = f"{picture_label(task, 26)}, {kind}{what}"
        axes.text(0, y, name, transform=axes.get_yaxis_transform(), va="center", parse_math=False)
        y += 1
        top = y
        for line in own:
            if line.score is not None:
                color = colors[models.index(line.model) % len(colors)] if line.model else OTHER
                mark = _MARKS[methods.index(line.method) % len(_MARKS)]
                if line.ci95:
                    axes.plot(line.ci95, [y, y], color=color, linewidth=1.4, alpha=0.6)
                (point,) = axes.plot(
                    line.score, y, mark, color=color, markersize=5, markeredgewidth=0
                )
                named = ", ".join(filter(None, [line.method, line.model]))
                legend[picture_label(named, 44)] = point
            y += 1
        (legend["majority label"],) = axes.plot(
            [own[0].majority] * 2, [top - 0.5, y - 0.5], color=INK, linewidth=1, linestyle=":"
        )
        axes.axhline(y, color=FAINT, linewidth=0.4)
        y += 1
    axes.set_yticks([])
    axes.set_ylim(max(y, 1) - 0.5, -0.7)
    lowest = min([0.0, *(line.ci95[0] for line in lines if line.ci95)])
    axes.set_xlim(lowest - 0.02, 1)
    charts.hide_left_axis(axes)
    axes.grid(axis="x", color=FAINT, linewidth=0.4, alpha=0.6)
    axes.set_xlabel("headline metric and its 95 % interval")
    axes.set_ylabel("task")
    if legend:
        charts.add_legend(figure, legend)
    return figure
