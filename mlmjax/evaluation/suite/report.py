"""What a suite found, written as JSON, as Markdown and as a picture."""

import io
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mlmjax.config.suite import Planned
from mlmjax.data.contamination import Contamination
from mlmjax.evaluation.suite.results import Result
from mlmjax.evaluation.suite.rows import Rows
from mlmjax.evaluation.suite.sweep import Setting
from mlmjax.reporting.charts import FAINT, INK, WIDTH, own_style, picture_label, plain
from mlmjax.reporting.markdown import cell, number, table
from mlmjax.statistics.metrics import (
    classification_metrics,
    macro_f1,
    mcc,
    mean_interval,
    wilson_interval,
)
from mlmjax.storage import write_whole

_BOOTSTRAPPED = {"macro_f1": macro_f1, "mcc": mcc}


@dataclass(frozen=True)
class Line:
    """One line of a table: a method on a model, on one task.

    `score` is the mean of `scores`, one for each seed, in the task's own `metric`; `spread` their
    sample standard deviation. `ci95` is of the mean, over the rows. `majority` is the score of the
    label that is commonest in training (zero-shot: in the rows asked) and `chance` the accuracy of
    guessing. `ece` is the calibration error and `order_changed` the share of answers that change
    with the order of the options, means over seeds, None where there is none. `tried` are the
    settings with their scores on validation rows, `diverged` the seeds that have no score.
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


def line_of(
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
    """Sum up the results of one method on one task, one for each seed."""
    entry, task = planned
    whole = [result for result in results if result.predictions]
    scores = [float(result.metrics[task.metric]) for result in whole]
    commonest = Counter(question.gold for question in rows.train or rows.test).most_common()
    # Of equally common ones the first label, whatever order the rows are in.
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
        score=statistics.fmean(scores) if scores else None,
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
    """Return the interval of the mean over seeds: they are asked the same rows.

    Of accuracy it is Wilson's for the mean share over the rows, as if seeds agreed on every row,
    which is never too narrow; of the others a bootstrap over the rows.
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


JSON, MARKDOWN, PICTURE = "suite.json", "suite.md", "suite.png"
_SHOWN = {"accuracy": "accuracy", "macro_f1": "macro-F1", "mcc": "MCC"}


def write_report(
    out: Path,
    about: Mapping[str, Any],
    lines: Sequence[Line],
    missing: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Write `suite.json`, `suite.md` and `suite.png`, and return what stands in the first."""
    results = {**about, "lines": [asdict(line) for line in lines], "missing": list(missing)}
    text = json.dumps(results, ensure_ascii=False, indent=2, allow_nan=False)
    write_whole(out / JSON, f"{text}\n".encode())
    write_whole(out / PICTURE, scores_picture(lines))
    write_whole(out / MARKDOWN, markdown(results, lines).encode())
    return results


def markdown(results: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """Return the page: a table for each kind, averages, what was tried, and what is missing."""
    sweep, seeds = results["sweep"], results["seeds"]
    parts = [f"# Suite {cell(results['suite'])}", ""]
    if results["description"]:
        parts += [cell(results["description"], 400), ""]
    if results["limit"]:
        parts += [
            f"**Not the whole data**: {number(results['limit'])} rows at most of every part, drawn "
            "by a seed.",
            "",
        ]
    parts += ["![scores](suite.png)", ""]
    zero = [line for line in lines if line.kind == "zero-shot"]
    tuned = [line for line in lines if line.kind == "fine-tune"]
    if zero:
        parts += ["## Zero-shot", "", _table(zero), ""]
    if tuned:
        parts += ["## Fine-tuned", "", _table(tuned), "", *_averages(tuned)]
        parts += [
            f"Mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}. Batches of "
            f"{sweep['batch_size']} rows, weight decay {sweep['weight_decay']:g}, warm-up "
            f"{sweep['warmup']:.0%}, {sweep['max_length']} tokens at most. Of several settings the "
            "one with the best score on validation rows was chosen, by a seed that is not among "
            "the reported ones; no test row was read for it. * The task has no validation rows: "
            f"{sweep['held_out']:.0%} of its training rows were held out to choose on.",
            "",
        ]
    if lines:
        parts += [
            "Intervals are of the mean, over the rows. Majority is the score of always giving the "
            "commonest label of training (zero-shot: of the rows asked), chance the accuracy of "
            "guessing. ECE is the error of the probabilities (15 bins), order the share of "
            f"{results['order_rows']} test rows or fewer whose answer changes with the order of "
            "the options. Paper is what arXiv 2502.03793 reports of its own large model.",
            "",
        ]
    parts += _tried(tuned)
    parts += _notes(lines)
    if results["missing"]:
        rows = [
            (cell(one["task"]), _tables(one["tables"]), cell(one["reason"], 400))
            for one in results["missing"]
        ]
        parts += ["## Not run", "", table(["task", "table", "reason"], rows), ""]
    return "\n".join(parts)


def _table(lines: Sequence[Line]) -> str:
    is_tuned = any(line.kind == "fine-tune" for line in lines)
    head = ["task", "table", "method", "model", "metric", "score:", "95 %:", "n:", "majority:"]
    head += ["chance:", "ECE:", "order:", "paper:"]
    head += ["setting", "trained on:"] if is_tuned else ["contamination"]
    rows = []
    for line in lines:
        score = "diverged" if line.score is None else _percent(line.score)
        if line.spread is not None:
            score += f" ± {100 * line.spread:.2f}"
        row = [
            cell(line.task),
            _tables(line.tables),
            line.method,
            cell(line.model) if line.model else "",
            _SHOWN[line.metric],
            score,
            f"{_percent(line.ci95[0])} to {_percent(line.ci95[1])}" if line.ci95 else "",
            number(line.n),
            _percent(line.majority),
            _percent(line.chance),
            "" if line.ece is None else _percent(line.ece),
            "" if line.order_changed is None else _percent(line.order_changed),
            "" if line.published is None else f"{line.published:.2f}",
        ]
        if is_tuned:
            chosen = line.chosen
            setting = f"{chosen['epochs']} x {chosen['learning_rate']:g}" if chosen else ""
            row += [setting, number(line.train) + "\\*" * line.held_out]
        else:
            row += [line.contamination]
        rows.append(row)
    return table(head, rows)


def _averages(lines: Sequence[Line]) -> list[str]:
    """Average each method over the tasks that all of them have a score on."""
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for line in lines:
        own = scores.setdefault((line.method, line.model), {})
        if line.score is not None:
            own[line.task] = line.score
    shared = set.intersection(*map(set, scores.values()))
    if len(shared) < 2:
        return []
    rows = [
        (method, cell(model) if model else "", _percent(statistics.fmean(own[t] for t in shared)))
        for (method, model), own in scores.items()
    ]
    return [f"Mean over {len(shared)} tasks:", "", table(["method", "model", "mean:"], rows), ""]


def _tried(lines: Sequence[Line]) -> list[str]:
    tried = [line for line in lines if line.tried]
    if not tried:
        return []
    names = [f"{s['epochs']} x {s['learning_rate']:g}:" for s in tried[0].tried]
    rows = [
        [
            cell(line.task),
            line.method,
            cell(line.model),
            *(
                "diverged" if s["validation"] is None else _percent(s["validation"])
                for s in line.tried
            ),
            number(line.validation),
        ]
        for line in tried
    ]
    head = ["task", "method", "model", *names, "n:"]
    title = "## What was tried: epochs x learning rate, scores on validation rows"
    return [title, "", table(head, rows), ""]


def _notes(lines: Sequence[Line]) -> list[str]:
    """Say what a score does not show: cut and left-out rows, lost seeds, training on the task."""
    notes = []
    for line in lines:
        who = ", ".join(
            filter(None, [cell(line.task), line.method, line.model and cell(line.model)])
        )
        if line.diverged:
            notes.append(f"- {who}: {line.diverged} of the seeds diverged and are in no mean")
        if line.shortened:
            notes.append(f"- {who}: the text of {number(line.shortened)} of the rows was cut")
        notes += [f"- {who}: the model was {cell(one, 400)}" for one in line.trained_on]
    left_out = {line.task: line.left_out for line in lines if line.left_out}
    notes += [
        f"- {cell(task)}: {number(count)} rows were left out (blank after cleaning, or of labels "
        "that the task drops)"
        for task, count in left_out.items()
    ]
    return ["## Notes", "", *notes, ""] if notes else []


def _tables(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
