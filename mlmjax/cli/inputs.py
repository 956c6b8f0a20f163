"""Read labels and texts from files, standard input or the command line."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

from mlmjax.errors import InputError, read_failed


def read_labels(argument: str) -> list[str] | dict[str, str]:
    """Read labels from `"a,b,c"` or from a file of `label` or `label<TAB>description` lines.

    >>> read_labels("sports, world")
    ['sports', 'world']
    """
    if not os.path.isfile(argument):
        if "," not in argument:
            raise InputError(
                f"--labels {argument!r}: is neither a file nor a comma-separated list; give at "
                'least two labels, as in "sports,world", or the path of a labels file'
            )
        names = [name.strip() for name in argument.split(",")]
        if not all(names):
            raise InputError(
                f"--labels {argument!r}: label {names.index('') + 1} is blank; remove the extra "
                "comma, or give it a name"
            )
        return names
    with _open(argument) as stream:
        lines = stream.read().splitlines()
    labels: dict[str, str] = {}
    for number, line in enumerate(_decoded(lines, argument), start=1):
        if not line.strip():
            continue
        name, _, description = (part.strip() for part in line.partition("\t"))
        if not name or name in labels:
            found = "the label is blank" if not name else f"the label {name!r} is repeated"
            raise InputError(f"{argument}, line {number}: {found}; expected distinct labels")
        labels[name] = description
    return labels if any(labels.values()) else list(labels)


def read_lines(file: str) -> Iterator[str]:
    """Yield the lines of a file or of standard input (`-`); reject blank lines."""
    where, number = "standard input" if file == "-" else file, 0
    with _open(file) as stream:
        for number, line in enumerate(_decoded(stream, where), start=1):
            if not line.strip():
                raise InputError(
                    f"{where}, line {number}: the text is blank; remove the line or write a text"
                )
            yield line
    if not number:
        raise InputError(f"{where}: is empty; give at least one text, one per line")


def is_read_once(file: str) -> bool:
    """Tell whether a file is standard input or a pipe, which cannot be read again."""
    return file == "-" or (os.path.exists(file) and not os.path.isfile(file))


@contextmanager
def _open(file: str) -> Iterator[IO[bytes]]:
    if file == "-" and (sys.stdin is None or sys.stdin.closed):
        raise InputError("standard input: is closed; give a file, or pipe one text per line")
    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as stream:
            yield stream
    except OSError as error:
        advice = "give a text file, one entry per line"
        raise read_failed(Path(file), error, advice) from error


def _decoded(lines: Iterable[bytes], where: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            # Editors on Windows begin a file with a byte order mark.
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}, line {number}: is not UTF-8 text ({error.reason}); "
                "save the file as UTF-8"
            ) from error
