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
