"""Read labels and texts from files, standard input or the command line."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mlmjax.config.data import CsvOptions
from mlmjax.data.formats.lines import note_once, number_lines, open_as_utf8
from mlmjax.errors import InputError, read_failed

log = logging.getLogger(__name__)


def read_labels(argument: str) -> list[str] | dict[str, str]:
    """Read labels from `"a,b,c"` or from a file of `label` or `label<TAB>description` lines.

    >>> read_labels("sports, world")
    ['sports', 'world']
    """
    if not os.path.exists(argument) or os.path.isdir(argument):
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
    labels: dict[str, str] = {}
    for number, line in _lines(argument, "give a text file, one label per line"):
        if not line.strip():
            continue
        name, _, description = (part.strip() for part in line.partition("\t"))
        if not name or name in labels:
            found = "the label is blank" if not name else f"the label {name!r} is repeated"
            raise InputError(f"{argument} line {number}: {found}; expected distinct labels")
        labels[name] = description
    return labels if any(labels.values()) else list(labels)


def read_lines(
    file: str, encoding: str | None = None, noted: set[str] | None = None
) -> Iterator[str]:
    """Yield the lines of a file or of standard input (`-`); reject blank lines.

    `encoding` and `noted` are those of `read_file`.
    """
    where, number = "standard input" if file == "-" else file, 0
    advice = "give a text file, one entry per line"
    for number, line in _lines(file, advice, encoding, set() if noted is None else noted):
        if not line.strip():
            raise InputError(
                f"{where} line {number}: the text is blank; remove the line or write a text"
            )
        yield line
    if not number:
        raise InputError(f"{where}: is empty; give at least one text, one per line")


def check_csv(file: str, csv: CsvOptions | None) -> None:
    """Raise `InputError` for `--csv` about a file that is no CSV file by its name."""
    from mlmjax.data.reading.files import is_csv  # here, because it loads pyarrow

    if csv is not None and csv.model_fields_set and not is_csv(file):
        where = "standard input" if file == "-" else file
        raise InputError(
            f"--csv: says how a CSV file is written; {where} is none by its name; leave --csv out, "
            "or give a file that ends in .csv or .tsv"
        )


def is_read_once(file: str) -> bool:
    """Tell whether a file is standard input or a pipe, which cannot be read again."""
    return file == "-" or (os.path.exists(file) and not os.path.isfile(file))


def _lines(
    file: str, advice: str, encoding: str | None = None, noted: set[str] | None = None
) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a file, without their ends."""
    where = "standard input" if file == "-" else file
    if file == "-" and (sys.stdin is None or sys.stdin.closed):
        raise InputError("standard input: is closed; give a file, or pipe one text per line")
    note = note_once(log, set() if noted is None else noted)
    try:
        with _open(file) as stream:
            text = open_as_utf8(stream, where, encoding, note)
            for number, line in number_lines(text, where, note, _raise, nul=True):
                yield number, line.rstrip("\r\n")
    except OSError as error:
        raise read_failed(Path(where), error, advice) from error


@contextmanager
def _open(file: str) -> Iterator[Any]:
    if file == "-":
        yield sys.stdin.buffer
        return
    from mlmjax.reporting.terminal import working  # here, because it loads jax

    # A pipe opens when somebody writes to it.
    with working(f"waiting for {file}") if is_read_once(file) else nullcontext():
        stream = open(file, "rb")  # noqa: SIM115
    with stream:
        yield stream


def _raise(error: InputError) -> None:
    raise error
