"""Write tables and a picture of what tools/small_experiments.py left in its working folder."""

import json
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mlmjax.reporting import charts

NAMES = {"atp": "ATP only", "atp-mlm": "80 ATP + 20 MLM", "atp-dummy": "80 ATP + 20 dummy"}
SEEDS = (0, 1, 2)
PRETRAINED = "runs/small-mlm/export"
SHIPPED, UNTRAINED = "mlmjax-small", "untrained"
FITTED = ("small_fine_tune", "small_from_scratch")
ABOUT = """# The small model in tables

Accuracy in percent. Tasks are the files with their names in `mlmjax/assets/tasks`; those with
`_words` are in `configs/tasks/words`. After ±: the standard deviation over three seeds."""


def write_tables(work: Path, out: Path) -> None:
    """Write `results.json`, `tables.md` and `curves.svg`.

    Curves and suites that WORK does not hold stay unchanged in `results.json`.
    """
    known = out / "results.json"
    found = json.loads(known.read_text()) if known.exists() else {}
    curves, held_out, suites = (
        found.setdefault(name, {}) for name in ("curves", "held_out", "suites")
    )
    for name in ("small_zero_shot", *FITTED):
        path = work / "results" / name / "suite.json"
        if path.exists():
            suites[name] = json.loads(path.read_text())
    for name in (
        "small-mlm",
        "small-atp",
        *(f"small-{m}-{s}" for m, s in product(NAMES, SEEDS)),
    ):
        path = work / "runs" / name / "metrics.jsonl"
        if path.exists():
            curves[name] = curve(path)
            held_out[name] = last_answers(path.with_name("validation.json"), curves[name])
    known.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tables = []
    if all(run in held_out for run in mixed_runs()):
        tables.append(("Held-out answers", table_of_mixtures(held_out)))
    if "small_zero_shot" in suites:
        tables.append(("Zero-shot", table_1(suites["small_zero_shot"]["lines"])))
    if all(name in suites for name in FITTED):
        lines = [line for name in FITTED for line in suites[name]["lines"]]
        tables.append(("Fine-tuned", table_3(lines)))
    parts = [ABOUT, *(f"## {title}\n\n{table}" for title, table in tables)]
    (out / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    charts.save(draw(curves), out / "curves.svg", "Held-out losses of mlmjax-small and mixtures")


def export(mixture: str, seed: int) -> str:
    """Return the folder of an instructed model."""
    return f"runs/small-{mixture}-{seed}/export"


def curve(path: Path) -> list[dict[str, Any]]:
    """Return the losses of a run."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys = ("step", "split", "loss", "loss_atp", "loss_dummy", "loss_mlm", "answer_accuracy")
    return [{key: row[key] for key in keys if row.get(key) is not None} for row in rows]


def last_answers(path: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the final figures of a run on all held-out answers: `n`, `accuracy`, `losses`, ....

    A curve has the loss of the examples that other objectives left unchanged, which are all of them
    in a run with one objective.
    """
    found = json.loads(path.read_text())
    sources = found["per_source"]
    losses = sources or {"all": [row for row in rows if row["split"] == "validation"][-1]}
    kept = {
        name: {key: value for key, value in source.items() if key.startswith("loss_")}
        for name, source in losses.items()
    }
    names = ("step", "n", "accuracy", "accuracy_ci95", "majority", "per_task_majority")
    return {**{name: found[name] for name in names if name in found}, "losses": kept}


def mixed_runs() -> dict[str, str]:
    """Return the mixture of every run of stage `mix`."""
    return {export(*one).split("/")[1]: one[0] for one in product(NAMES, SEEDS)}


def table_of_mixtures(held_out: dict[str, dict[str, Any]]) -> str:
    """Return the mixtures' final figures on held-out answers, as means and ranges of seeds."""
    head = ["mixture", "n", "loss of answers (range of seeds)", "right, % (range of seeds)"]
    rows = []
    for mixture, name in NAMES.items():
        ends = [held_out[run] for run, found in mixed_runs().items() if found == mixture]
        losses = [source["loss_atp"] for end in ends for source in end["losses"].values()]
        right = [end["accuracy"] for end in ends]
        loss = f"{statistics.fmean(losses):.2f} ({min(losses):.2f} to {max(losses):.2f})"
        low, high = percent(min(right)), percent(max(right))
        accuracy = f"{percent(statistics.fmean(right))} ({low} to {high})"
        rows.append([name, f"{ends[0]['n']:,}", loss, accuracy])
    return markdown(head, rows)


def table_1(lines: Sequence[dict[str, Any]]) -> str:
    """Return the accuracy of every mixture on every task, as the mean and range of seeds.

    An interval is that of one model's accuracy over the rows.
    """
    asked = {line["model"] for line in lines}
    mixtures = [mixture for mixture in NAMES if export(mixture, SEEDS[0]) in asked]
    head = ["task", "n", "chance", "majority", "un-instructed (95 %)"]
    head += [f"{NAMES[mixture]}: mean (range of seeds)" for mixture in mixtures]
    head += ["mlmjax-small (95 %)"]
    rows = []
    for task in dict.fromkeys(line["task"] for line in lines):
        own = {line["model"]: line for line in lines if line["task"] == task}
        plain, shipped = own[PRETRAINED], own[SHIPPED]
        row = [task, f"{plain['n']:,}", percent(plain["chance"]), percent(plain["majority"])]
        row.append(f"{percent(plain['score'])} ({interval(plain)})")
        for mixture in mixtures:
            scores = [own[one]["score"] for seed in SEEDS if (one := export(mixture, seed)) in own]
            low, high = percent(min(scores)), percent(max(scores))
            row.append(f"{percent(statistics.fmean(scores))} ({low} to {high})")
        rows.append([*row, f"{percent(shipped['score'])} ({interval(shipped)})"])
    return markdown(head, rows)


def table_3(lines: Sequence[dict[str, Any]]) -> str:
    """Return the accuracy of every method fine-tuned on every task, with the deviation of seeds."""
    names = {SHIPPED: "mlmjax-small", UNTRAINED: "from scratch"}
    head = ["task", "method", "start", "trained on", "n", "accuracy (95 %)", "seeds ±"]
    head += ["epochs x rate"]
    rows: list[list[str]] = []
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    for line in sorted(lines, key=lambda line: tasks.index(line["task"])):
        if not line["model"] and [row for row in rows if row[:2] == [line["task"], line["method"]]]:
            continue  # TF-IDF needs no network and is in both suites
        chosen = line["chosen"]
        setting = f"{chosen['epochs']:g} x {chosen['learning_rate']:g}" if chosen else ""
        spread = "" if line["spread"] is None else percent(line["spread"])
        score = "diverged" if line["score"] is None else percent(line["score"])
        row = [line["task"], line["method"], names.get(line["model"], "")]
        row += [f"{line['train']:,}", f"{line['n']:,}", f"{score} ({interval(line)})"]
        rows.append([*row, spread, setting])
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    """Return a share as percent with one decimal.

    >>> percent(0.1234)
    '12.3'
    """
    return f"{100 * share:.1f}"


def interval(line: dict[str, Any]) -> str:
    """Return the interval of a suite's line as text."""
    return " to ".join(percent(end) for end in line["ci95"]) if line["ci95"] else ""


@charts.own_style()
def draw(curves: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw the held-out losses: of pretraining, of instruction, and of each mixture and seed."""
    mixed = mixed_runs()
    colors = dict(zip(NAMES, charts.SERIES, strict=False))
    figure, panels = charts.new_figure(8.4, 3)
    pretraining, instruction, mixtures = panels
    lines: dict[str, Any] = {}
    for name, rows in curves.items():
        is_mlm = name.startswith("small-mlm")
        key = "loss_mlm" if is_mlm else "loss_atp"
        held_out = [row for row in rows if row["split"] == "validation" and key in row]
        points = zip(*((row["step"], row[key]) for row in held_out), strict=True)
        if mixture := mixed.get(name):
            style = {"color": colors[mixture], "marker": "."}
            (lines[NAMES[mixture]],) = mixtures.plot(*points, **style)
        else:
            axes = pretraining if is_mlm else instruction
            axes.plot(*points, marker=".", color=charts.INK)
    pretraining.set(ylabel="held-out MLM loss", xlabel="updates of 2,048 tokens")
    instruction.set(ylabel="loss of answers", xlabel="updates of 4,096 tokens")
    mixtures.set(ylabel="loss, three seeds", xlabel="updates of 4,096 tokens")
    charts.add_legend(figure, lines)
    return figure
