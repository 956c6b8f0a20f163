"""Read the records of an untrusted data file: parquet, JSONL, CSV or plain text."""

import csv
import io
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from mlmjax.config.columns import Column, alternatives_of, columns_read, names_in
from mlmjax.config.data import CsvDialect
from mlmjax.config.tables import suggest_name
from mlmjax.data.formats.csv_files import read_rows
from mlmjax.errors import InputError, first_line
from mlmjax.storage import check_regular, parse_object, unique_keys

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 32 * 2**20
"""A longer line (or CSV field) is an error, so that one hostile line cannot fill memory."""

TEXT_BLOCK = 64 * 2**10
"""Characters after which a document of a `.txt` file ends at the next blank line."""

_READ_AHEAD = 2**14
"""Bytes that may be lost before the place where a compressed file is damaged."""

_COMPRESSION = {".zst": "zstd", ".gz": "gzip"}
_PARQUET_BATCH = 512

BROKEN_RECORD = "broken record"
BROKEN_FILE = "rest of a broken file"

Broken = Callable[[str, InputError], None]
"""Gets `BROKEN_RECORD` or `BROKEN_FILE`, and raises the error, or counts it to read on."""


def stop(what: str, error: InputError) -> None:
    """Raise the error."""
    raise error


class Wanted(NamedTuple):
    """Say which columns to read of a file, and how it is written if it is CSV."""

    columns: Collection[Column] | None
    optional: Collection[Column]
    csv: CsvDialect | None


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
    broken: Broken = stop,
) -> Iterator[Record]:
    """Stream the records of one file, whose format follows from its name.

    `.parquet`; `.jsonl`, `.ndjson`, `.json` (one object per line); `.csv`, `.tsv` (a header, then
    rows); `.txt` (documents of at least `TEXT_BLOCK` characters that end at a blank line, field
    `text`). All but parquet may be compressed: `.zst`, `.gz`. `columns` are the needed ones (None:
    all); records may lack other columns. `optional` columns are read where they are. Class numbers
    in the columns `named` become names if a parquet file of `datasets` stores these, except those
    in `unnamed`. `csv` says how a CSV file is written; what it leaves out is detected.

    `broken` gets the errors of a record, and of a file whose rest cannot be read. What it does not
    raise is skipped. A line of a CSV file that is not text breaks the rest, because it may be part
    of several records.

    Raises `InputError` with file and line or row for a file that cannot be read as described.
    Errors of the disk or the network are always raised.
    """
    path, wanted = Path(path), Wanted(columns, optional, csv)
    kind, compression = _kind_of(path)
    read = _READERS.get(kind)
    if read is None or (compression and kind == ".parquet"):
        raise InputError(
            f"{path}: unknown kind of file; expected a name that ends in {', '.join(_READERS)}, "
            "the text formats also with .zst or .gz"
        )
    try:
        check_regular(path)
        if path.stat().st_size == 0:
            raise InputError(f"{path}: is empty; expected {kind[1:]} records")
        if kind == ".parquet":
            yield from _read_parquet(path, wanted, named, unnamed, broken)
        else:
            raw = pa.input_stream(str(path), compression=compression)
            with io.BufferedReader(raw, _READ_AHEAD) as stream:
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
            raise InputError(
                f"{where}: has no column {expected}; {hint}columns: {', '.join(present) or 'none'}"
            )
        read.update(found)
    for column in optional:
        read.update(columns_read(column, present) or ())
    return sorted(read)


def _lines(stream: io.BufferedReader, where: str, broken: Broken) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, from 1, without a byte order mark at the start.

    Lines end in a line feed, or (in files of old Macs) in a carriage return; this is logged.
    """
    try:
        start = stream.peek(_READ_AHEAD)
    except OSError as error:
        error.add_note(f"{where} line 1")
        raise
    is_old = b"\r" in start[:-1] and b"\n" not in start
    if is_old:
        log.warning("%s: lines end in a carriage return, as on old Macs", where)
    read = _OldLines(stream).readline if is_old else stream.readline
    for number in count(1):
        here = f"{where} line {number}"
        try:
            line = read(MAX_LINE_BYTES + 1)
            is_long = len(line) > MAX_LINE_BYTES
            rest = line
            while is_long and rest and not rest.endswith((b"\n", b"\r")) and broken is not stop:
                rest = read(MAX_LINE_BYTES)
        except OSError as error:
            error.add_note(here)
            raise
        if not line:
            return
        if is_long:
            what = f"is longer than {MAX_LINE_BYTES >> 20} MiB; expected one record per line"
        elif b"\0" in line:
            what = "holds a NUL byte; expected UTF-8 text (is it binary, or UTF-16?)"
        else:
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                continue
            except UnicodeDecodeError as error:
                what = (
                    f"is not UTF-8 (byte {error.start + 1} of the line is "
                    f"0x{line[error.start]:02x}); convert the file to UTF-8"
                )
        broken(BROKEN_RECORD, InputError(f"{here}: {what}"))


class _OldLines:
    """Read lines that end in a carriage return."""

    def __init__(self, stream: io.BufferedReader):
        self._stream, self._rest = stream, b""

    def readline(self, limit: int) -> bytes:
        """Return the next line, or `limit` bytes of it; empty at the end of the file."""
        parts = [self._rest]
        size = len(self._rest)
        while b"\r" not in parts[-1] and size < limit:
            part = self._stream.read1(_READ_AHEAD)
            if not part:
                break
            parts.append(part)
            size += len(part)
        text = b"".join(parts)
        end = min(text.find(b"\r") + 1 or len(text), limit)
        line, self._rest = text[:end], text[end:]
        return line


def _read_jsonl(
    stream: io.BufferedReader, where: str, wanted: Wanted, broken: Broken
) -> Iterator[Record]:
    for number, line in _lines(stream, where, broken):
        if line.strip():
            here = f"{where} line {number}"
            try:
                advice = "expected one object per line (broken = 'skip' leaves it out)"
                fields = parse_object(line, here, advice, object_pairs_hook=unique_keys)
                require_columns(here, wanted.columns, fields)
            except InputError as error:
                broken(BROKEN_RECORD, error)
            else:
                yield Record(fields, here)


def _read_csv(
    stream: io.BufferedReader, where: str, wanted: Wanted, broken: Broken
) -> Iterator[Record]:
    # The limit belongs to the whole csv module, so it is never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    is_tabbed = ".tsv" in map(str.lower, Path(where).suffixes)
    lines = (line for _, line in _lines(stream, where, stop))
    header: list[str] = []
    for row, line in read_rows(
        lines, where, "\t" if is_tabbed else ",", wanted.csv, wanted.columns
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
    for number, line in _lines(stream, where, broken):
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
                    fields = name_classes(fields, names, here, unnamed)
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
                    f"{len(names[column]) - 1} ({', '.join(names[column])}); "
                    f'drop_labels = ["{number}"] leaves such rows out'
                )
            fields = {**fields, column: names[column][number]}
    return fields


_READERS: dict[str, Any] = {
    ".parquet": _read_parquet,
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_jsonl),
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    ".txt": _read_text,
}
