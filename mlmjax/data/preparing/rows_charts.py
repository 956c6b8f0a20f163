"""Pictures of prepared rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlmjax.reporting.charts import ACCENT, INK, OTHER, WIDTH, picture_label, plain

_REASONS = ["#b45309", "#e9b872", "#9f1239", "#f0a3b0", "#6d28d9", "#c4b5ec", "#475569", "#cbd5e1"]
_BINS = 64
_SHOWN_INSIDE, _NARROW = 0.025, 0.06


def bars(counts: Sequence[tuple[str, int]], total: int, rest: str | None, title: str) -> Figure:
    """Draw one horizontal bar per name, the first on top, with its count and its share of `total`;
    `rest` says below them what is not drawn, if there is anything.
    """
    names = [name for name, _ in counts]
    values = [value for _, value in counts]
    figure = Figure(figsize=(WIDTH, 0.21 * len(names) + 1.2), layout="constrained")
    axes = _axes(figure, title)
    axes.barh(range(len(names)), values, color=ACCENT, height=0.7)
    most = max(values, default=1)
    for row, value in enumerate(values):
        axes.text(
            value + most * 0.01,
            row,
            f"{value:,} ({value / total:.1%})",
            va="center",
            fontsize=7.5,
            color=INK,
        )
    axes.set_yticks(
        range(len(names)),
        [picture_label(name, 44) for name in names],
        parse_math=False,
        fontsize=7.5,
    )
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, most * 1.25)
    axes.set_xlabel("\n".join(filter(None, ["examples", rest])), color=INK, fontsize=9)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def lengths(counts: np.ndarray) -> Figure:
    """Draw how many examples have how many tokens; `counts[kind, n]` as of `census.Counted`."""
    longest = counts.shape[1] - 1
    width = max(1, -(-longest // _BINS))
    starts = np.arange(1, longest + 1, width)
    binned = np.add.reduceat(counts, starts, axis=1)
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    axes = _axes(figure, "Examples by their number of tokens, training split")
    below = np.zeros(len(starts), np.int64)
    for kind, name, color in ((0, "with an answer", ACCENT), (1, "without", OTHER)):
        if binned[kind].any():
            where = {"align": "edge", "width": width * 0.92, "bottom": below}
            axes.bar(starts - 0.5, binned[kind], color=color, label=name, **where)
            below = below + binned[kind]
    axes.set_xlim(0, longest + 1)
    axes.set_xlabel(f"tokens of an example (rows hold {longest:,})", color=INK, fontsize=9)
    axes.set_ylabel("examples", color=INK, fontsize=9)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if axes.patches:
        axes.legend(frameon=False, fontsize=9)
    return figure


def fates(sources: Mapping[str, Mapping[str, int]], kept: Sequence[str]) -> Figure:
    """Draw for each source what became of its records, in shares; `kept` are no reasons to drop.

    What is left after the reasons that fit in the legend is called other reasons.
    """
    totals: dict[str, int] = {}
    for fate in sources.values():
        for name, value in fate.items():
            totals[name] = totals.get(name, 0) + value
    reasons = sorted((n for n in totals if n not in kept), key=lambda n: (-totals[n], n))
    named, rest = reasons[: len(_REASONS)], reasons[len(_REASONS) :]
    if rest:
        named, rest = reasons[: len(_REASONS) - 1], reasons[len(_REASONS) - 1 :]
    parts = [
        *((name, [name], color) for name, color in zip(kept, (ACCENT, "#99d3cd"), strict=False)),
        *((name, [name], color) for name, color in zip(named, _REASONS, strict=False)),
        *([("other reasons", rest, _REASONS[-1])] if rest else []),
    ]
    figure = Figure(figsize=(WIDTH, 0.38 * len(sources) + 1.8), layout="constrained")
    axes = _axes(figure, "What became of the records of each source, both splits together")
    whole = np.maximum([sum(fate.values()) for fate in sources.values()], 1)
    left = np.zeros(len(sources))
    legend: dict[str, Any] = {}
    for title, members, color in parts:
        share = [sum(fate.get(n, 0) for n in members) for fate in sources.values()] / whole
        if not share.any():
            continue
        drawn = axes.barh(range(len(sources)), share, left=left, color=color, height=0.66)
        legend[picture_label(title, 44)] = drawn
        for row in np.flatnonzero(share >= _SHOWN_INSIDE).tolist():
            inside = "white" if _is_dark(color) else INK
            at = left[row] + share[row] / 2
            size = 8 if share[row] >= _NARROW else 6.5
            axes.text(
                at, row, f"{share[row]:.0%}", ha="center", va="center", fontsize=size, color=inside
            )
        left = left + share
    names = [
        f"{picture_label(name, 26)}\n{sum(fate.values()):,} records"
        for name, fate in sources.items()
    ]
    axes.set_yticks(range(len(sources)), names, parse_math=False, fontsize=8)
    axes.set_ylim(len(sources) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6), [f"{tick:.0%}" for tick in np.linspace(0, 1, 6)])
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    box = figure.legend(
        list(legend.values()),
        list(legend),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    for text in box.get_texts():
        text.set_parse_math(False)
    return figure


def _axes(figure: Figure, title: str) -> Axes:
    axes = figure.subplots()
    plain(axes)
    figure.suptitle(title, color=INK, fontsize=10)
    return axes


def _is_dark(color: str) -> bool:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue < 140
