"""Report the ratios: a table, the figures behind it as JSON, and a picture.

    python benchmarks/speed/report.py speed.json speed.svg

This draws the picture of stored figures again.
"""

import json
import platform
import statistics
import sys
import textwrap
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from cases import GROWTH, KEPT, STREAM, Case
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from measure import Figures

from mlmjax.reporting import charts
from mlmjax.reporting.charts import ACCENT, FAINT, INK, OTHER, WARN

PACKAGES = ("mlmjax", "jax", "flax", "torch", "transformers")
CLOSE = 2e-5
"""The largest difference of a probability between the sides in float32."""


def compare(name: str, case: Case, runs: list[Figures], **counts: int) -> dict[str, Any]:
    """Return the ratios of a case, round by round, and the other figures of both sides.

    `counts` fill the fields of titles. Raises `SystemExit` if the sides give different answers.
    """
    sides = {
        side: [r for r in runs if r["side"] == side and r["function"] == function]
        for side, function in (("ours", case.ours), ("theirs", case.theirs))
    }
    ours, theirs = ([run[case.figure] for run in side] for side in sides.values())
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    if case.figure == "peak_mib":
        ratios = [1 / ratio for ratio in ratios]
    difference = None
    if "answers" in sides["ours"][0]:
        both = [np.array(side[0]["answers"]) for side in sides.values()]
        difference = float(np.abs(both[0] - both[1]).max())
        if "bfloat16" not in case.ours and difference > CLOSE:
            raise SystemExit(f"{name}: the sides differ by {difference}")
    return {
        "case": name,
        "title": case.title.format(**counts),
        "figure": case.figure,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "goal": case.goal,
        "stretch": case.stretch,
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "largest_difference": difference,
        **{
            f"{key}_{side}": statistics.median([run[key] for run in found if key in run])
            for side, found in sides.items()
            for key in ("peak_mib", "padding", "first", "gemm_gflops")
            if any(key in run for run in found)
        },
    }


def find_goal(row: dict[str, Any]) -> str:
    """Return which goal a row reached."""
    better = -1 if row["figure"] == "peak_mib" else 1
    if better * row["ratio"] >= better * row["stretch"]:
        return "stretch"
    return "goal" if better * row["ratio"] >= better * row["goal"] else "**behind**"


COLUMNS = (
    "case",
    "ours",
    "theirs",
    "ratio (rounds)",
    "goal / stretch",
    "reached",
    "padding ours / theirs",
    "peak MiB ours / theirs",
    "first call beyond the others, s",
)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a row of the table."""
    unit = "MiB" if row["figure"] == "peak_mib" else "s"

    def both(key: str, form: str) -> str:
        values = [row.get(f"{key}_{side}") for side in ("ours", "theirs")]
        return " / ".join("-" if value is None else format(value, form) for value in values)

    return (
        row["title"],
        f"{row['ours']:,.3g} {unit}",
        f"{row['theirs']:,.3g} {unit}",
        f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})",
        f"{row['goal']} / {row['stretch']}",
        find_goal(row),
        both("padding", ".0%"),
        both("peak_mib", ",.0f"),
        both("first", ".1f"),
    )


def describe_ours(runs: list[Figures]) -> list[str]:
    """Return sentences about what was measured on our side only."""
    found = {run["function"]: run for run in runs if run["side"] == "ours"}
    lines = []
    if STREAM in found:
        run = found[STREAM]
        lines.append(
            f"{run['texts']:,} texts of random lengths, after warm-up, caused "
            f"{run['compilations']} compilations (goal 0; {run['programs']} programs)."
        )
    if all(name in found for name in GROWTH):
        long, short = (found[name]["seconds"] for name in GROWTH)
        kept = (8192 / long) / (512 / short)
        lines.append(
            f"Local attention at 8192 keeps {kept:.2f} of its tokens/s at 512 (goal {KEPT})."
        )
    return lines


def write_report(out: Path, rows: list[dict[str, Any]], runs: list[Figures]) -> None:
    """Write `speed.json`, `speed.md` and `speed.svg` next to `runs.jsonl`; print the table."""
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
    (out / "speed.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    versions = ", ".join(f"{name} {value}" for name, value in about.items())
    peaks = {
        side: [run["gemm_gflops"] for run in runs if run["side"] == side and "gemm_gflops" in run]
        for side in ("ours", "theirs")
    }
    peak = " and ".join(
        f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}) by {name}"
        for name, values in (("XLA", peaks["ours"]), ("torch", peaks["theirs"]))
        if values
    )
    text = "\n\n".join(
        [
            f"{versions}.",
            f"A float32 product of 1024 x 768 x 2304 in the same processes, GFLOP/s: {peak}.",
            table(rows),
            *describe_ours(runs),
        ]
    )
    (out / "speed.md").write_text(text + "\n")
    charts.save(picture(rows), out / "speed.svg", PICTURE)
    print(text)


PICTURE = "Speed and memory of mlmjax compared with transformers, case by case"
PANELS = {
    False: "times as fast as transformers (log)",
    True: "share of transformers' memory (log)",
}
TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32)


@charts.own_style()
def picture(rows: list[dict[str, Any]]) -> Figure:
    """Draw the ratios on logarithmic axes next to the goals: speed, and memory below it."""
    panels = [
        (label, found)
        for memory, label in PANELS.items()
        if (found := [row for row in rows if (row["figure"] == "peak_mib") == memory])
    ]
    heights = [0.8 * len(found) + 0.9 for _, found in panels]
    figure, every = charts.new_figure(
        sum(heights) + 1, len(panels), squeeze=False, height_ratios=heights
    )
    for axes, (label, found) in zip(every[:, 0], panels, strict=True):
        legend = draw_ratios(axes, found)
        axes.set_xlabel(label)
    charts.add_legend(figure, legend)
    return figure


def draw_ratios(axes: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw a bar from 1 to each ratio, with its rounds and goals; return the legend."""
    values = [value for row in rows for value in (*row["ratios"], row["goal"], row["stretch"], 1)]
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.4, max(values) * 1.9)
    for place, row in enumerate(rows):
        title = textwrap.fill(row["title"], 44)
        at = axes.get_yaxis_transform()
        axes.text(0.01, place - 0.2, title, va="bottom", transform=at, linespacing=1.0)
        axes.barh(place, row["ratio"] - 1, left=1, color=OTHER, height=0.24)
        (rounds,) = axes.plot(
            row["ratios"], [place] * len(row["ratios"]), "|", color=INK, markersize=11
        )
        (goal,) = axes.plot(row["goal"], place, "D", color=WARN, markersize=5)
        (stretch,) = axes.plot(row["stretch"], place, "*", color=ACCENT, markersize=9)
        end = max(*row["ratios"], row["goal"], row["stretch"], 1)
        axes.annotate(
            f"{row['ratio']:.2f}", (end, place), (8, 0), textcoords="offset points", va="center"
        )
    equal = axes.axvline(1, color=FAINT, linewidth=1.2, zorder=0)
    ticks = [tick for tick in TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.6, -0.9)
    axes.set_ylabel("case")
    charts.hide_left_axis(axes)
    return {"1 = equal": equal, "one round": rounds, "goal": goal, "stretch goal": stretch}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    charts.save(picture(json.loads(source.read_text())["rows"]), target, PICTURE)
