"""Markdown that no text in it can break: cells, code blocks, tables, numbers."""

import re
from collections.abc import Iterable, Sequence

from mlmjax.rows_charts import shortened, visible

CELL, LONG_CELL = 100, 400
"""Characters shown of a name, and of a message or a path."""

_MARKDOWN = re.compile(r"[^\w\s.,;:/␣…⟨⟩=+?-]", flags=re.ASCII)


def cell(text: object, length: int = CELL) -> str:
    r"""Return text for a table or a line: one line, code, without power over what is around it.

    >>> cell("task_1"), cell("a|`b`\n")
    ('`task_1`', '<code>a&#124;&#96;b&#96;⟨U+000A⟩</code>')
    """
    shown = shortened(visible(str(text)), length)
    if "`" not in shown and "|" not in shown and shown.strip():
        return f"`{shown}`"
    escaped = _MARKDOWN.sub(
        lambda found: f"&#{ord(found[0])};" if ord(found[0]) < 128 else found[0], shown
    )
    return f"<code>{escaped}</code>"


def fenced(text: str) -> str:
    r"""Return text as a code block whose fence is longer than any in it.

    >>> fenced("``` <b>").splitlines()[0]
    '````text'
    """
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{visible(text, keep=chr(10))}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; columns whose head ends in `:` are numbers, which stand at the right."""
    names = [name.removesuffix(":") for name in head]
    rule = ["--:" if name.endswith(":") else "---" for name in head]
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, rule, *rows))


def number(value: int) -> str:
    """Return a number with its thousands set apart."""
    return f"{value:,}"


def share(part: float, whole: float) -> str:
    """Return a part of a whole in per cent; of nothing, nothing."""
    return f"{part / whole if whole else 0:.2%}"
