"""What a suite found, written as JSON, as Markdown and as a picture."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlmjax.evaluation.suite.results import write_whole
from mlmjax.evaluation.suite.suite_charts import scores_picture
from mlmjax.evaluation.suite.suite_lines import Line
from mlmjax.reporting.markdown import cell, number, table

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
