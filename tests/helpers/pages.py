"""Code blocks of documents, and the commands in them as argument lists."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CALL, PART = "\x1d", "\x1f"
SHIM = f"""
record() {{ printf '%s' "$(printf '%s{PART}' "$@"; cat; printf '{CALL}')"; }}
mlmjax() {{ record mlmjax "$@"; }}
python() {{ record python "$@"; }}
pytest() {{ :; }}
"""


class Command(NamedTuple):
    """One call of a program: its arguments, and the text on its standard input."""

    program: str
    arguments: list[str]
    stdin: str


def blocks(language, text):
    """Return the code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def read_markdown(text):
    """Return the code blocks of a page, and its lines outside of them."""
    fence, blocks, outside = None, [], []
    for line in text.split("\n"):
        if fence is None and (opened := re.match(r"(`{3,}|~{3,})", line)):
            fence = opened[1]
            blocks.append([])
        elif fence is not None and re.fullmatch(rf" {{0,3}}{fence}{fence[0]}*[ \t]*", line):
            fence = None
        elif fence is not None:
            blocks[-1].append(line)
        else:
            outside.append(line)
    assert fence is None
    return ["\n".join(block) for block in blocks], outside


def commands(script):
    """Return the calls that a shell script would make, with loops and variables expanded."""
    done = subprocess.run(
        ["bash", "-euc", SHIM + script],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    calls = [call.split(PART) for call in done.stdout.split(CALL)[:-1]]
    return [Command(program, arguments, stdin) for program, *arguments, stdin in calls]
