"""Read CSV files: find out how a file is written, say it, and never merge records in silence."""

import csv
import re
from collections import deque
from collections.abc import Collection, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

from mlmjax.config.columns import Column, columns_read
from mlmjax.config.data import CsvDialect
from mlmjax.data.formats.lines import Note
from mlmjax.errors import InputError, counted

if TYPE_CHECKING:
    import _csv

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SAMPLE = 50
"""Lines that are read to find out how a file is written."""

_SEPARATOR_LINE = re.compile(r'"?sep=([^\s"])"?[\r\n]*', re.IGNORECASE)
"""A first line by which spreadsheets name the separator."""


class Row(NamedTuple):
    """Hold the fields of a record, and its first line, from 1."""

    fields: list[str]
    line: int


def read_rows(
    lines: Iterator[str],
    where: str,
    *,
    default: str,
    given: CsvDialect | None,
    columns: Collection[Column] | None,
    note: Note,
) -> Iterator[Row]:
    """Yield the rows of a CSV file, the header first; blank lines are left out.

    `default` is the separator that the name of the file implies, `columns` are those that the
    header should have. `note` gets what was found out. Raises `InputError` for a file whose
    separator is in doubt, for broken quotes, and for merged lines as
    `CsvDialect.merged_lines` says.
    """
    sample, lines = _sample(lines)
    dialect = given or CsvDialect()
    named = _SEPARATOR_LINE.fullmatch(sample[0]) if len(sample) > 1 else None
    before = 0 if named is None else 1  # lines before the header
    if named is not None:
        del sample[0]
        dialect = dialect.model_copy(update={"separator": dialect.separator or named[1]})
        note(
            f"{where} line 1: names the separator {dialect.separator!r}; "
            f"{dialect.setting('separator')} sets one"
        )
    if dialect.separator is None and sample:
        dialect = _detect(sample, where, default, dialect, columns, note)
    is_spaced = _has_spaced_quotes(sample, dialect)
    if is_spaced:
        note(f"{where}: spaces between a separator and the next field are left out")
    taken: deque[str] = deque()  # the lines of the current record

    def remember() -> Iterator[str]:
        for line in chain(sample, lines):
            taken.append(line)
            yield line

    reader = _reader(remember(), dialect, strict=True, skip_spaces=is_spaced)
    line, width = 1 + before, 0
    merged: list[tuple[int, int]] = []
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{where} line {line}: is not valid CSV ({error}); expected fields with separators "
                "or line ends to be quoted, and quotes in them to be doubled; say by "
                f"{dialect.KEY} how the file is written otherwise"
            ) from error
        if row is None:
            break
        last, width = reader.line_num + before, width or len(row)
        if last > line:
            _check_merged(list(taken), width, dialect, f"{where} line {line}", last)
            merged.append((line, last))
        taken.clear()
        if row:
            yield Row(row, line)
        line = last + 1
    if merged:
        first, last = merged[0]
        note(
            f"{where}: {counted(len(merged), 'record')} of several lines (quoted line breaks), the "
            f"first on lines {first} to {last}; {dialect.setting('merged_lines', 'refuse')} "
            "rejects them"
        )


def _sample(lines: Iterator[str]) -> tuple[list[str], Iterator[str]]:
    """Take the first lines; an error among them is raised by the iterator of the others."""
    sample: list[str] = []
    try:
        for line in islice(lines, _SAMPLE):
            sample.append(line)
    except (OSError, ValueError) as error:
        return sample, _raise(error)
    return sample, lines


def _raise(error: Exception) -> Iterator[str]:
    raise error
    yield


def _has_spaced_quotes(sample: list[str], dialect: CsvDialect) -> bool:
    """Tell whether quotes that open fields follow a separator and spaces, as in `"a", "b"`.

    They do if every record of the sample is then valid, with as many fields as the header.
    """
    quote, spaced = dialect.quote, []
    if not quote or not any(f" {quote}" in line for line in sample):
        return False
    try:
        plain = list(_reader(iter(sample), dialect, strict=False))
        for row in _reader(iter(sample), dialect, strict=True, skip_spaces=True):
            spaced.append(row)
    except csv.Error:
        if len(spaced) < len(sample) - 1 or len(sample) < _SAMPLE:  # no record that is cut
            return False
    rows = spaced[:-1] if len(sample) == _SAMPLE else spaced
    opens = any(
        [field.lstrip(" ") for field in one] != [field.lstrip(" ") for field in other]
        for one, other in zip(plain, spaced, strict=False)
    )
    return opens and all(len(row) in (0, len(rows[0])) for row in rows)


def _reader(
    lines: Iterator[str], dialect: CsvDialect, *, strict: bool, skip_spaces: bool = False
) -> "_csv.Reader":
    return csv.reader(
        lines,
        delimiter=dialect.separator or ",",
        quotechar=dialect.quote or None,
        quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
        escapechar=dialect.escape,
        doublequote=dialect.escape is None,
        strict=strict,
        skipinitialspace=skip_spaces,
    )


def _detect(
    sample: list[str],
    where: str,
    default: str,
    dialect: CsvDialect,
    columns: Collection[Column] | None,
    note: Note,
) -> CsvDialect:
    """Return the dialect with the separator (and quote) of a file; note what is unusual.

    A separator must divide the header. Of several, the one that gives every line of the sample as
    many fields as the header, and the header the columns that are read. Raises `InputError` if
    that leaves several.
    """
    able, fitting = [], []
    for separator in SEPARATORS:
        one = dialect.model_copy(update={"separator": separator})
        try:
            header, *rows = _reader(iter(sample), one, strict=False)
        except (csv.Error, ValueError):
            continue
        if len(header) < 2:
            continue
        able.append(separator)
        rows = rows[:-1] if len(sample) == _SAMPLE else rows  # The sample may end in a record.
        has_columns = all(columns_read(column, header) is not None for column in columns or ())
        if has_columns and all(len(row) in (0, len(header)) for row in rows):
            fitting.append(separator)
    chosen = default
    if len(able) > 1 and len(fitting) != 1 and (fitting or default not in able):
        named = " or ".join(SEPARATORS[one] for one in fitting or able)
        raise InputError(
            f"{where} line 1: the fields may be separated by {named}; expected one separator: set "
            f"it, as in {dialect.setting('separator', ';')}"
        )
    if able:
        chosen = fitting[0] if fitting else default if default in able else able[0]
    found = dialect.model_copy(update={"separator": chosen})
    if chosen != default:
        note(
            f"{where}: the fields are separated by {SEPARATORS[chosen]}; "
            f"{dialect.setting('separator')} sets another separator"
        )
    header = sample[0].strip().split(chosen)
    if dialect.quote == '"' and all(len(n) > 1 and n[0] == n[-1] == "'" for n in header):
        key = dialect.setting("quote")
        note(f"{where}: the fields are quoted by '; {key} sets another quote")
        found = found.model_copy(update={"quote": "'"})
    return found


def _check_merged(lines: list[str], width: int, dialect: CsvDialect, where: str, last: int) -> None:
    """Raise `InputError` for merged lines that are refused, or look like records of their own."""
    if dialect.merged_lines == "allow":
        return
    separator = dialect.separator or ","
    alike = width > 1 and all(line.count(separator) + 1 == width for line in lines)
    if alike or dialect.merged_lines == "refuse":
        why = ", and each of them looks like a record" if alike else ""
        raise InputError(
            f"{where}: a quoted field ends only on line {last}, so {counted(len(lines), 'line')} "
            f"make one record{why}; close the quote, or set "
            f"{dialect.setting('merged_lines', 'allow')} if the text has line ends, or "
            f"{dialect.setting('quote', '')} if quotes are plain characters"
        )
