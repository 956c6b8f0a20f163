"""Write Markdown that no text in it can break, and numbers for people."""

import re
import unicodedata

CELL, LONG_CELL = 100, 400
"""Characters shown of a name, and of a message or a path."""

METRIC_NAMES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "mcc": "MCC"}
"""What people call the metrics of results."""

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
_MARKDOWN = re.compile(r"[^\w\s.,;:/␣…⟨⟩=+?-]", flags=re.ASCII)


def visible(text: str, keep: str = "") -> str:
    r"""Write invisible characters, and those that move others, as their code points.

    >>> visible("a b\n\u202e", keep="\n"), visible("\x1b[0m")
    ('a b\n⟨U+202E⟩', '⟨U+001B⟩[0m')
    """
    return "".join(
        c
        if c == " " or c in keep or unicodedata.category(c) not in _UNSEEN
        else f"⟨U+{ord(c):04X}⟩"
        for c in text
    )


def shortened(text: str, length: int) -> str:
    """Remove the middle of a text that is longer than `length` characters.

    >>> shortened("abcdefghij", 5)
    'ab…ij'
    """
    half, odd = divmod(length - 1, 2)
    return text if len(text) <= length else f"{text[: half + odd]}…{text[-half:]}"


def cell(text: object, length: int = CELL) -> str:
    r"""Return text as code that cannot change the line or table around it.

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


def literal(value: object) -> str:
    """Return texts, or lists and tables of them, as Python that ends no code block.

    >>> literal(["a", "```"])
    "['a', '\\\\x60\\\\x60\\\\x60']"
    """
    return repr(value).replace("`", r"\x60")


def number(value: int) -> str:
    """Return a whole number with separators of thousands."""
    return f"{value:,}"


def score(value: float) -> str:
    """Return a score or an error between -1 and 1."""
    return f"{value:.4f}"


def percent(value: float | None) -> str:
    """Return a share as a percentage; nothing for None."""
    return "" if value is None else f"{value:.2%}"


def share(part: float, whole: float) -> str:
    """Return a part of a whole as a percentage, of nothing 0 %."""
    return percent(part / whole if whole else 0)
