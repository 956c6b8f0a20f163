"""Fill Jinja2 templates: Markdown and HTML pages that no text in them can break."""

from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

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
    for name in ("cell", "fenced", "literal", "number", "percent", "score", "share"):
        environment.filters[name] = getattr(markdown, name)
    environment.globals.update(LONG=markdown.LONG_CELL, METRIC_NAMES=markdown.METRIC_NAMES)
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
