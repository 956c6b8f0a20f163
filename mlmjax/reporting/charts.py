"""One style for every picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import font_manager, style
from matplotlib.figure import Figure

from mlmjax.reporting.markdown import shortened, visible

INK, FAINT, ACCENT, OTHER, WARN = "#1f2933", "#9aa5b1", "#0f766e", "#94a3b8", "#b45309"
WIDTH = 7.4  # inches, which is the width of the page's column


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    return figure, axes


def plain(axes: Any) -> None:
    """Take the frame off a picture and grey its axes, as all pictures here have it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=9)


@contextmanager
def own_style() -> Iterator[None]:
    """Draw as these pictures are meant, whatever the user's matplotlib is set to."""
    with style.context("default"):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write a picture as PNG: the same picture, the same bytes."""
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def picture_label(text: str, length: int) -> str:
    """Return text for a picture: what its font does not have as numbers, and not too long."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    drawn = "".join(
        c if font.get_char_index(ord(c)) else f"⟨U+{ord(c):04X}⟩" for c in visible(text)
    )
    return shortened(drawn, length)
