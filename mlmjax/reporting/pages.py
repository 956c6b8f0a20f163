"""Pages from Jinja2 templates: Markdown and HTML that no text in them can break."""

import base64
import io
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from mlmjax.reporting import markdown


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mlmjax", ""),
        autoescape=lambda name: (name or "").endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (markdown.cell, markdown.fenced, markdown.number, markdown.share):
        environment.filters[function.__name__] = function
    environment.globals.update(table=markdown.table)
    return environment


def render(template: str, **values: Any) -> str:
    """Fill a template of the package, named by its path from `mlmjax/`.

    In a `.html.j2` template every value is escaped. In a `.md.j2` template, pass text of others
    through the filters `cell` or `fenced`. A value that is missing is an error.
    """
    return _environment().get_template(template).render(**values)


def stylesheet() -> Markup:
    """Return the one stylesheet of all HTML pages."""
    loader = _environment().loader
    assert loader is not None
    return Markup(loader.get_source(_environment(), "reporting/style.css")[0])


def embedded_picture(figure: Figure, description: str) -> Markup:
    """Return a picture as an `<img>` that carries its own data."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(description, data)
