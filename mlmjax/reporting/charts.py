"""Draw every picture in one style, as SVG that can be read on a phone and in dark mode."""

import io
import warnings
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.figure import Figure

from mlmjax.reporting.markdown import shortened, visible

INK, FAINT, ACCENT, OTHER, WARN = "#1f2933", "#9aa5b1", "#0f766e", "#94a3b8", "#b45309"
SERIES = {
    ACCENT: "#2dd4bf",
    WARN: "#fbbf24",
    "#1d4ed8": "#93b4ff",
    "#9f1239": "#fb7185",
    "#6d28d9": "#b79bf7",
    "#0e7490": "#22d3ee",
    "#4d7c0f": "#a3e635",
    "#be185d": "#f472b6",
}
"""Colours that a picture tells apart, each with its colour in dark mode."""

ON_DARK, ON_LIGHT = "#fffffe", "#101820"
"""Text on a colour of this table, and on a lighter colour, which dark mode keeps."""

IN_THE_DARK = {
    INK: "#e4e7eb",
    FAINT: "#7b8794",
    OTHER: "#64748b",
    "#475569": "#8ea0b8",
    ON_DARK: "#101820",
    **SERIES,
}
"""What replaces a colour where the reader prefers a dark page."""

WIDTH = 5.0
"""Inches. They are 360 units of the picture, which are pixels on a narrow phone."""

SIZE = 12.5
"""Units of every text, so that it is legible where a phone shows the picture."""

_STYLE = {
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.labelsize": SIZE,
    "font.size": SIZE,
    "legend.fontsize": SIZE,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "mlmjax",
    "text.color": INK,
    **{f"{axis}tick.color": FAINT for axis in "xy"},
    **{f"{axis}tick.labelcolor": INK for axis in "xy"},
    **{f"{axis}tick.labelsize": SIZE for axis in "xy"},
}
_SVG = "{http://www.w3.org/2000/svg}"


def own_style() -> Any:
    """Ignore the user's matplotlib settings, as a context or a decorator."""
    return style.context(["default", _STYLE])


def new_figure(
    height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Return an empty figure of the page's width and its axes, as `Figure.subplots` does.

    `height` is in inches.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for one in np.ravel(axes):
        one.spines[["top", "right"]].set_visible(False)
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
        list(handles.values()), list(handles), loc="outside lower left", **options
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def picture_label(text: str, length: int) -> str:
    """Return text for a picture, which the reader's fonts draw: at most `length` characters.

    >>> picture_label("日本語 <b>", 6)
    '日本語…b>'
    """
    return shortened(visible(text), length)


@own_style()
def svg(figure: Figure, description: str) -> str:
    """Return a picture as an `<svg>` element, with text as text; equal pictures are equal.

    It has no width of its own, so that it fills the place where it is shown. `description` is for
    readers who cannot see it.
    """
    drawn = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        # Text stays text, and the reader's fonts draw it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(drawn, format="svg", transparent=True, metadata=metadata)
    root = ElementTree.fromstring(drawn.getvalue())
    for place in root.findall(f"{_SVG}metadata") + root.findall(f"{_SVG}defs"):
        root.remove(place)
    for element in root.iter():
        _simplify(element)
    used = {value for element in root.iter() for value in element.attrib.values()}
    shape = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update(
        {
            "xmlns": _SVG.strip("{}"),
            "viewBox": shape,
            "class": "chart",
            "role": "img",
            "aria-label": description,
            "font-family": "system-ui, 'Segoe UI', Roboto, Arial, 'DejaVu Sans', sans-serif",
            "stroke-linejoin": "round",
        }
    )
    colors = ElementTree.Element("style")
    colors.text = f"@media (prefers-color-scheme: dark) {{ {' '.join(_dark_rules(used))} }}"
    root.insert(0, colors)
    return ElementTree.tostring(root, encoding="unicode")


def _simplify(element: ElementTree.Element) -> None:
    """Drop prefixes, fonts and names that nothing refers to; make attributes of the style."""
    element.tag = element.tag.removeprefix(_SVG)
    for name in list(element.attrib):
        if name.startswith("{"):
            element.attrib[name.partition("}")[2]] = element.attrib.pop(name)
    if element.tag in ("g", "svg"):
        element.attrib.pop("id", None)
    for rule in filter(None, element.attrib.pop("style", "").split("; ")):
        name, _, value = rule.partition(": ")
        if name != "font-family":
            element.attrib[name] = value.rstrip(";")


def _dark_rules(used: Set[str]) -> list[str]:
    """Return CSS that replaces the colours that were drawn."""
    return [
        f'.chart [{what}="{light}"] {{ {what}: {dark} }}'
        for light, dark in IN_THE_DARK.items()
        if light in used
        for what in ("fill", "stroke")
    ]


def save(figure: Figure, path: Path, description: str) -> None:
    """Write a picture as an SVG file."""
    path.write_text(svg(figure, description) + "\n", encoding="utf-8")


def embedded_picture(figure: Figure, description: str) -> Markup:
    """Return a picture as an `<svg>` element of an HTML page."""
    return Markup(svg(figure, description))
