"""The page of an evaluation: what was asked, what came out, and how far it can be trusted."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mlmjax.config.task import Task
from mlmjax.data.contamination import Contamination
from mlmjax.reporting.charts import ACCENT, FAINT, INK, OTHER, WARN, WIDTH, own_style, plain, save
from mlmjax.reporting.markdown import LONG_CELL, cell, fenced, number, table
from mlmjax.statistics.metrics import wilson_interval
from mlmjax.statistics.reliability import BINS, Bin, confidence, equal_width


def diagram(sure: np.ndarray, right: np.ndarray, bins: int = BINS) -> Figure:
    """Draw accuracy by confidence over bins of equal width, and how many rows each bin has.

    Calibrated answers lie on the dashed line; below it a model is too sure. Lines are 95 % Wilson
    intervals of the accuracy.
    """
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    top, below = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    found = equal_width(sure, right, bins)
    top.plot([0, 1], [0, 1], color=OTHER, linestyle="--", linewidth=1.2, label="calibrated")
    width = 0.92 / bins
    for one in found:
        if one.confidence is None or one.accuracy is None:
            continue
        middle = (one.low + one.high) / 2
        top.bar(middle, one.accuracy, width=width, color=ACCENT, alpha=0.3)
        low, high = wilson_interval(round(one.accuracy * one.rows), one.rows)
        top.plot([one.confidence] * 2, [low, high], color=ACCENT, linewidth=1.4)
        top.plot(one.confidence, one.accuracy, color=ACCENT, marker="o", markersize=5)
    ticks = np.linspace(0, 1, 6)
    top.set_ylim(0, 1.02)
    top.set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
    top.set_ylabel("answers right", color=INK)
    top.set_title(f"Reliability of {len(sure):,} answers", loc="left", fontsize=10, color=INK)
    top.legend(frameon=False, fontsize=9, loc="upper left")
    middles = [(one.low + one.high) / 2 for one in found]
    below.bar(middles, [one.rows for one in found], width=width, color=ACCENT, alpha=0.3)
    for value, style in (
        (sure, {"color": INK, "label": "mean probability"}),
        (right, {"color": WARN, "label": "accuracy", "linestyle": "--"}),
    ):
        below.axvline(float(value.mean()), linewidth=1.6, **style)
    below.legend(frameon=False, fontsize=9, loc="upper left")
    below.set_xlim(0, 1)
    below.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    below.set_ylabel("rows", color=INK)
    below.yaxis.set_major_formatter("{x:,.0f}")
    below.set_xlabel("probability of the answer", color=INK)
    below.yaxis.get_major_locator().set_params(integer=True)
    for axes in (top, below):
        plain(axes)
        axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.5)
        axes.set_axisbelow(True)
    return figure


REPORT, PICTURE = "report.md", "reliability.png"
NAMES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "mcc": "MCC"}
LABELS_NAMED = 30


def write_evaluation_report(
    folder: Path,
    task: Task,
    results: Mapping[str, Any],
    log_probs: np.ndarray,
    gold: Sequence[int] | np.ndarray,
    known: Contamination,
) -> None:
    """Write `report.md` and `reliability.png` of an evaluation into its folder.

    `log_probs` `[rows, labels]` and `gold`, an index per row, are those `results` was made from.
    """
    sure, right = confidence(log_probs, gold)
    with own_style():
        save(diagram(sure, right), folder / PICTURE)
    text = page(task, results, equal_width(sure, right), known)
    (folder / REPORT).write_text(text, encoding="utf-8")


def page(task: Task, results: Mapping[str, Any], bins: Sequence[Bin], known: Contamination) -> str:
    """Return the Markdown of an evaluation; text from the task and its rows has no power in it."""
    parts = [
        f"# Evaluation: {cell(task.name)}",
        *_headline(results),
        *_asked(task, results),
        *_calibration(results, bins),
        *_orders(results["order_sensitivity"]),
        *_groups(results),
        *_contamination(known),
    ]
    return "\n\n".join(parts) + "\n"


def _headline(results: Mapping[str, Any]) -> Iterator[str]:
    metric = results["metric"]
    low, high = results[f"{metric}_ci95"]
    yield (
        f"**{NAMES[metric]} {results[metric]:.4f}** (95 % interval {low:.4f} to {high:.4f}) on "
        f"{number(results['n'])} rows. The interval tells what other rows of the same kind would "
        "change; not what another prompt or another training run would."
    )
    rows = [
        [
            NAMES[name] + (" (the task's headline)" if name == metric else ""),
            f"{results[name]:.4f}",
            "{:.4f} to {:.4f}".format(*results[f"{name}_ci95"]),
        ]
        for name in NAMES
    ]
    rows.append(["always the commonest answer", f"{results['majority']:.4f}", ""])
    rows.append(["a guess among the options", f"{results['chance']:.4f}", ""])
    yield table(["figure", "value:", "95 % interval:"], rows)


def _asked(task: Task, results: Mapping[str, Any]) -> Iterator[str]:
    yield "## What was asked"
    yield "\n".join(
        [
            *([f"- task: {cell(task.description, LONG_CELL)}"] if task.description else []),
            f"- protocol: {cell(results['protocol'])}",
            f"- rows answered: {number(results['n'])}; texts cut to fit: "
            f"{number(results['shortened'])}; left out by their label: "
            f"{number(results['dropped'])}; blank after cleaning: {number(results['blank'])}",
            f"- {_labels(task)}",
        ]
    )
    yield "The prompt:"
    yield fenced(task.prompt)


def _labels(task: Task) -> str:
    if not task.label_names:
        return "each row has its own options"
    named = ", ".join(cell(name) for name in task.label_names[:LABELS_NAMED])
    more = len(task.label_names) - LABELS_NAMED
    return f"labels: {named}" + (f" and {more} more" if more > 0 else "")


def _calibration(results: Mapping[str, Any], bins: Sequence[Bin]) -> Iterator[str]:
    found = results["calibration"]
    gap = found["confidence"] - results["accuracy"]
    yield "## Calibration"
    yield (
        f"The answers have a mean probability of {found['confidence']:.2%}, and "
        f"{results['accuracy']:.2%} of them are right: {abs(gap):.2%} too "
        f"{'sure' if gap > 0 else 'unsure'} on average. Probabilities are over the labels of the "
        "row; the guide says what the figures mean."
    )
    yield table(
        ["figure", "value:"],
        [
            ["negative log-likelihood (nats)", f"{found['nll']:.4f}"],
            ["Brier score (0 to 2)", f"{found['brier']:.4f}"],
            ["expected calibration error, 15 bins of equal width", f"{found['ece']:.4f}"],
            ["the same, 15 bins of equal numbers of rows", f"{found['ece_equal_mass']:.4f}"],
        ],
    )
    yield f"![Accuracy by the probability of the answer, and how many rows]({PICTURE})"
    yield table(
        ["probability of the answer", "rows:", "its mean:", "answers right:"],
        [
            [
                f"{one.low:.1%} to {one.high:.1%}",
                number(one.rows),
                f"{one.confidence:.2%}",
                f"{one.accuracy:.2%}",
            ]
            for one in bins
            if one.rows
        ],
    )


def _orders(found: Mapping[str, Any] | None) -> Iterator[str]:
    yield "## Order of the options"
    if found is None:
        yield "Not asked: the answers are no letters of options, or it was turned off."
        return
    low, high = found["changed_ci95"]
    yield (
        f"{number(found['rows'])} rows were asked under up to {found['shifts']} cyclic orders of "
        f"their options. **{found['changed']:.2%}** of them change their answer (95 % interval "
        f"{low:.2%} to {high:.2%}). By where the right option stands the accuracy differs by up to "
        f"{found['position_spread']:.2%}, of which a part is chance where the rows are few; with "
        f"the probabilities averaged over the orders it is {found['pooled_accuracy']:.2%}."
    )
    names = ["as given", *(f"order {i + 1}" for i in range(1, found["shifts"]))]
    yield table(
        ["asked", "rows:", "answers right:"],
        [
            [name, number(one["rows"]), _per_cent(one["accuracy"])]
            for name, one in zip(names, found["accuracy_by_shift"], strict=True)
        ],
    )
    yield table(
        ["the right option is", "times asked:", "answers right:"],
        [
            [f"number {i}", number(one["rows"]), _per_cent(one["accuracy"])]
            for i, one in enumerate(found["accuracy_by_position"], 1)
        ],
    )


def _groups(results: Mapping[str, Any]) -> Iterator[str]:
    if not results["per_group"]:
        return
    yield "## Groups"
    yield f"The mean accuracy over groups is {results['macro_accuracy']:.4f}."
    yield table(
        ["group", "rows:", "accuracy:"],
        [
            [cell(name), number(int(group["n"])), f"{group['accuracy']:.4f}"]
            for name, group in results["per_group"].items()
        ],
    )


def _contamination(known: Contamination) -> Iterator[str]:
    yield "## Contamination"
    yield f"What the model's folder tells of its training: **{known.status}**."
    if told := [*known.trained_on, *known.remarks]:
        yield "\n".join(f"- {cell(line, LONG_CELL)}" for line in told)


def _per_cent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
