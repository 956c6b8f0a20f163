"""Read the records of an untrusted data file: parquet, JSONL, CSV or plain text."""

import csv
import functools
import io
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import pyarrow as pa

from mlmjax.config.columns import Column, alternatives_of, columns_read, names_in
from mlmjax.config.data import CsvDialect
from mlmjax.config.labels import drop_advice
from mlmjax.data.formats.csv_files import read_rows
from mlmjax.data.formats.lines import (
    MAX_LINE_BYTES,
    READ_AHEAD,
    Note,
    note_once,
    number_lines,
    open_as_utf8,
)
from mlmjax.errors import InputError, MissingColumnError, first_line, suggest_name
from mlmjax.storage import check_regular, parse_object, unique_keys

log = logging.getLogger(__name__)

TEXT_BLOCK = 64 * 2**10
"""Characters after which a document of a `.txt` file ends at the next blank line."""

_COMPRESSION = {".zst": "zstd", ".gz": "gzip"}
_PARQUET_BATCH = 512

BROKEN_RECORD = "broken record"
BROKEN_FILE = "rest of a broken file"

Broken = Callable[[str, InputError], None]
"""Gets `BROKEN_RECORD` or `BROKEN_FILE`, and raises the error, or counts it to read on."""


def stop(what: str, error: InputError) -> None:
    """Raise the error."""
    raise error


DropAdvice = Callable[[Any], str]
"""Says how rows with a label are left out, in the words of who reads the file."""


class Wanted(NamedTuple):
    """Say which columns to read of a file, and how it is written; `note` gets what is found."""

    columns: Collection[Column] | None
    optional: Collection[Column]
    csv: CsvDialect | None
    encoding: str | None
    note: Note
    drop_advice: DropAdvice


class Record(NamedTuple):
    """Hold the fields of a row of a data file, and its place for errors."""

    fields: dict[str, Any]
    where: str


def read_file(
    path: str | Path,
    columns: Collection[Column] | None = None,
    *,
    optional: Collection[Column] = (),
    named: Collection[str] = (),
    unnamed: Collection[str] = (),
    csv: CsvDialect | None = None,
    encoding: str | None = None,
    broken: Broken = stop,
    noted: set[str] | None = None,
    advise: DropAdvice = drop_advice,
) -> Iterator[Record]:
    """Stream the records of one file, whose format follows from its name.

    `.parquet`; `.jsonl`, `.ndjson`, `.json` (one object per line); `.csv`, `.tsv` (a header, then
    rows); `.txt` (documents of at least `TEXT_BLOCK` characters that end at a blank line, field
    `text`). All but parquet may be compressed: `.zst`, `.gz`. `columns` are the needed ones (None:
    all); records may lack other columns. `optional` columns are read where they are. Class numbers
    in the columns `named` become names if a parquet file of `datasets` stores these, except those
    in `unnamed`. `csv` says how a CSV file is written, `encoding` how any text file is; what they
    leave out is detected, and logged where it is unusual. What is in `noted` is not logged again:
    give one set to all readings of a file. `advise` says how rows of an unknown class are left out.

    `broken` gets the errors of a record, and of a file whose rest cannot be read. What it does not
    raise is skipped. A line of a CSV file that is not text breaks the rest, because it may be part
    of several records.

    Raises `InputError` with file and line or row for a file that cannot be read as described.
    Errors of the disk or the network are always raised.
    """
    path = Path(path)
    note = note_once(log, set() if noted is None else noted)
    wanted = Wanted(columns, optional, csv, encoding, note, advise)
    kind, compression = _kind_of(path)
    read = _READERS.get(kind)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file")
    if read is None or (compression and kind == ".parquet"):
        raise InputError(
            f"{path}: unknown kind of file; expected a name that ends in {', '.join(_READERS)}, "
            "the text formats also with .zst or .gz"
        )
    try:
        check_regular(path)
        log.debug("%s: reading %s bytes", path, f"{path.stat().st_size:,}")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: is empty; expected {kind[1:]} records")
        if kind == ".parquet":
            yield from _read_parquet(path, wanted, named, unnamed, broken)
        else:
            raw = pa.input_stream(str(path), compression=compression)
            with io.BufferedReader(raw, READ_AHEAD) as stream:
                yield from read(stream, str(path), wanted, broken)
    except (OSError, pa.ArrowException) as error:
        (where,) = getattr(error, "__notes__", [path])
        what = getattr(error, "strerror", None) or first_line(error)
        failure = InputError(f"{where}: cannot be read: {what}")
        if getattr(error, "errno", None) is not None:  # It is the system's, not the file's.
            raise failure from error
        broken(BROKEN_FILE, failure)
    except InputError as error:
        broken(BROKEN_FILE, error)


def has_columns(path: str | Path) -> bool:
    """Tell whether a file's name is that of a table with columns, compressed or not.

    >>> has_columns("a.csv"), has_columns("a.JSONL.gz"), has_columns("a.txt"), has_columns("-")
    (True, True, False, False)
    """
    kind, _ = _kind_of(Path(path))
    return kind in _READERS and kind != ".txt"


def is_csv(path: str | Path) -> bool:
    """Tell whether a file's name is that of a CSV or TSV file, compressed or not."""
    return _READERS.get(_kind_of(Path(path))[0]) is _read_csv


def _kind_of(path: Path) -> tuple[str, str | None]:
    """Return the ending that names a file's format, and its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSION.get(suffixes[-1]) if suffixes else None
    return "".join(suffixes[-2:-1] if compression else suffixes[-1:]), compression


def require_columns(
    where: str,
    columns: Collection[Column] | None,
    present: Collection[str],
    optional: Collection[Column] = (),
) -> list[str]:
    """Return the columns of a file that will be read, sorted; with `optional` ones it has.

    Raises `InputError` for a column that is missing, with the nearest name and all others.
    """
    read: set[str] = set()
    for column in columns or ():
        found = columns_read(column, present)
        if found is None:
            *others, last = alternatives_of(column)
            missing = [n for n in names_in(last) if columns_read(n, present) is None]
            expected = " or ".join(map(repr, [*others, last] if others else missing[:1]))
            hint = suggest_name(missing[0], list(present))
            error = MissingColumnError(
                f"{where}: has no column {expected}; {hint}columns: {', '.join(present) or 'none'}"
            )
            error.columns = alternatives_of(column)
            raise error
        read.update(found)
    for column in optional:
        read.update(columns_read(column, present) or ())
    return sorted(read)


def _lines(
    stream: io.BufferedReader, where: str, wanted: Wanted, broken: Broken
) -> Iterator[tuple[int, str]]:
    reject = functools.partial(broken, BROKEN_RECORD)
    stream = open_as_utf8(stream, where, wanted.encoding, wanted.note)
    return number_lines(stream, where, wanted.note, reject)


def _read_jsonl(
    stream: io.BufferedReader, where: str, wanted: Wanted, broken: Broken
) -> Iterator[Record]:
    way_out = None
    for number, line in _lines(stream, where, wanted, broken):
        if text := line.strip():
            way_out = _way_out(text, where) if way_out is None else ""
            here = f"{where} line {number}"
            try:
                advice = f"expected one object per line{way_out}"
                fields = parse_object(line, here, advice, object_pairs_hook=unique_keys)
                require_columns(here, wanted.columns, fields)
            except InputError as error:
                broken(BROKEN_RECORD, error)
            else:
                yield Record(fields, here)


def _way_out(first: str, where: str) -> str:
    """Say how a file is converted whose first line begins one JSON value of several lines.

    >>> _way_out("[", "my.json")
    "; a file that is one JSON list is converted by jq -c '.[]' my.json > my.jsonl"
    >>> _way_out('{"text": "a"}', "my.json")
    ''
    """
    if first.startswith("["):
        what, path = "one JSON list", ".[]"
    elif first == "{":
        what, path = "JSON over several lines", "."
    else:
        return ""
    new = f"{Path(where).name.partition('.')[0]}.jsonl"
    return f"; a file that is {what} is converted by jq -c '{path}' {quote(where)} > {quote(new)}"


def _read_csv(
    stream: io.BufferedReader, where: str, wanted: Wanted, broken: Broken
) -> Iterator[Record]:
    # The limit belongs to the whole csv module, so it is never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    is_tabbed = ".tsv" in map(str.lower, Path(where).suffixes)
    lines = (line for _, line in _lines(stream, where, wanted, stop))
    header: list[str] = []
    default = "\t" if is_tabbed else ","
    for row, line in read_rows(
        lines, where, default=default, given=wanted.csv, columns=wanted.columns, note=wanted.note
    ):
        here = f"{where} line {line}"
        if not header:
            header = row
            _check_distinct(header, f"{here}: the header has")
            require_columns(here, wanted.columns, header)
        elif len(row) != len(header):
            what = f"has {len(row)} fields, the header has {len(header)}: {', '.join(header)}"
            broken(BROKEN_RECORD, InputError(f"{here}: {what}"))
        else:
            yield Record(dict(zip(header, row, strict=True)), here)


def _check_distinct(names: Sequence[str], what: str) -> None:
    if doubled := sorted(name for name in names if names.count(name) > 1):
        raise InputError(f"{what} {doubled[0]!r} twice; rename one")


def _read_text(
    stream: io.BufferedReader, where: str, wanted: Wanted, broken: Broken
) -> Iterator[Record]:
    require_columns(where, wanted.columns, ["text"])
    block: list[str] = []
    size, start = 0, 1
    for number, line in _lines(stream, where, wanted, broken):
        block.append(line)
        size += len(line)
        # A text without blank lines is cut at the end of a line, so that memory stays bounded.
        if size >= TEXT_BLOCK and (not line.strip() or size >= 16 * TEXT_BLOCK):
            yield Record({"text": "".join(block)}, f"{where} line {start}")
            block, size, start = [], 0, number + 1
    if block:
        yield Record({"text": "".join(block)}, f"{where} line {start}")


def _read_parquet(
    path: Path, wanted: Wanted, named: Collection[str], unnamed: Collection[str], broken: Broken
) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        present = file.schema_arrow.names
        _check_distinct(present, f"{path}: has the column")
        needed = require_columns(str(path), wanted.columns, present, wanted.optional)
        known = class_names(file.schema_arrow.metadata)
        names = {column: known[column] for column in known.keys() & set(named)}
        row = 0
        batches = file.iter_batches(
            _PARQUET_BATCH, columns=None if wanted.columns is None else needed
        )
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pa.ArrowException) as error:
                error.add_note(f"{path} after row {row}")
                raise
            if batch is None:
                return
            for i in range(batch.num_rows):
                row += 1
                here = f"{path} row {row}"
                try:
                    fields = {
                        name: _value(column[i], f"{here}: column {name!r}")
                        for name, column in zip(batch.schema.names, batch.columns, strict=True)
                    }
                    fields = name_classes(fields, names, here, unnamed, wanted.drop_advice)
                except InputError as error:
                    broken(BROKEN_RECORD, error)
                else:
                    yield Record(fields, here)


def _value(scalar: pa.Scalar, where: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8; expected text") from error
    except (ValueError, OverflowError, LookupError, pa.ArrowException) as error:
        raise InputError(
            f"{where}: is {scalar.type} and cannot be read ({error}); expected text, a number or "
            "lists of them; convert the column"
        ) from error


def class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the class names that `datasets` stores in a parquet schema, by column.

    >>> class_names({b"huggingface": b'{"info": {"features": {"label": '
    ...              b'{"names": ["bad", "good"], "_type": "ClassLabel"}}}}'})
    {'label': ['bad', 'good']}
    """
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict)
            and feature.get("_type") == "ClassLabel"
            and isinstance(feature["names"], list)
            and all(isinstance(value, str) for value in feature["names"])
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def name_classes(
    fields: dict[str, Any],
    names: Mapping[str, list[str]],
    where: str,
    unnamed: Collection[str] = (),
    advise: DropAdvice = drop_advice,
) -> dict[str, Any]:
    """Replace class numbers by names, in columns that have names; leave `unnamed` numbers.

    >>> name_classes({"label": 1, "text": "fine"}, {"label": ["bad", "good"]}, "row 1")
    {'label': 'good', 'text': 'fine'}
    """
    for column in names.keys() & fields.keys():
        number = fields[column]
        if isinstance(number, int) and str(number) not in unnamed:
            if not 0 <= number < len(names[column]):
                raise InputError(
                    f"{where}: column {column!r} is class {number}; expected 0 to "
                    f"{len(names[column]) - 1} ({', '.join(names[column])}); {advise(number)}"
                )
            fields = {**fields, column: names[column][number]}
    return fields


_READERS: dict[str, Any] = {
    ".parquet": _read_parquet,
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_jsonl),
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    ".txt": _read_text,
}
