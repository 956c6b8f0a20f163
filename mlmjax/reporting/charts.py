"""Draw every picture in one style."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from matplotlib import font_manager, style
from matplotlib.figure import Figure

from mlmjax.reporting.markdown import shortened, visible

INK, FAINT, ACCENT, OTHER, WARN = "#1f2933", "#9aa5b1", "#0f766e", "#94a3b8", "#b45309"
WIDTH = 7.4  # inches, the width of a page's column


def own_style() -> Any:
    """Ignore the user's matplotlib settings, as a context or a decorator."""
    return style.context("default")


def new_figure(
    height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Return an empty figure of the page's width and its axes, as `Figure.subplots` does."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for one in np.ravel(axes):
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(FAINT)
        one.tick_params(color=FAINT, labelcolor=INK, labelsize=9)
    return figure, axes


def hide_left_axis(axes: Any) -> None:
    """Leave only the names of the rows at the left of horizontal bars."""
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def set_percent_ticks(axes: Any, axis: Literal["x", "y"]) -> None:
    """Mark an axis of shares from 0 % to 100 %."""
    ticks = np.linspace(0, 1, 6)
    getattr(axes, f"set_{axis}ticks")(ticks, [f"{tick:.0%}" for tick in ticks])


def add_legend(figure: Figure, handles: Mapping[str, Any], **options: Any) -> None:
    """Put a legend of `{label: handle}` below the axes, without formulas in labels."""
    legend = figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        frameon=False,
        fontsize=8,
        **options,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def picture_label(text: str, length: int) -> str:
    """Return text for a picture: at most `length` characters, all of them in its font."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    drawn = "".join(
        c if font.get_char_index(ord(c)) else f"⟨U+{ord(c):04X}⟩" for c in visible(text)
    )
    return shortened(drawn, length)


@own_style()
def png(figure: Figure) -> bytes:
    """Return a picture as PNG; equal pictures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write a picture as PNG."""
    path.write_bytes(png(figure))


def embedded_picture(figure: Figure, description: str) -> Markup:
    """Return a picture as an `<img>` that contains its own data."""
    data = base64.b64encode(png(figure)).decode("ascii")
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(description, data)
