"""Read the texts of `classify` and `embed`, and write answers as JSON lines, CSV or parquet."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import click

from mlmjax.cli.tables.inputs import is_read_once, read_lines
from mlmjax.config.columns import as_written, is_missing, look_up
from mlmjax.config.data import CsvDialect, CsvOptions
from mlmjax.errors import InputError
from mlmjax.reporting.terminal import count_progress
from mlmjax.storage import check_regular, write_to
from mlmjax.text.checks import check_filled, for_each_row

DIGITS = 6
"""Significant digits of a probability, more than any model gives reliably."""

ENDINGS = (".jsonl", ".csv", ".parquet")
_PART = 1024
"""Rows of a table that are checked, or written to a parquet file, together."""


class Item(NamedTuple):
    """Hold a text to classify, and its line number or id."""

    key: Any
    text: str


def check_options(file: str, text: str | None, id_: str | None, out: str | None) -> None:
    """Raise `InputError` for options of `classify` that do not suit the file or each other."""
    is_table = file != "-" and _has_columns(file)
    if is_table and text is None:
        raise InputError(
            f"{file}: is a table, so its lines are not the texts; name the column of the texts "
            "with --text COLUMN (or give a .txt file with one text per line)"
        )
    if id_ is not None and text is None:
        raise InputError("--id: names a column of a table; give --text COLUMN too, or leave it out")
    if text is not None and not is_table:
        where = "standard input" if file == "-" else file
        raise InputError(
            f"{where}: --text names a column of a table; expected a file that ends in .csv, .tsv, "
            ".jsonl or .parquet (leave --text out for a file with one text per line)"
        )
    if is_table:
        check_regular(Path(file))
    if out is not None:
        check_out(out, file)


def check_out(out: str, file: str, endings: Sequence[str] = ENDINGS) -> None:
    """Raise `InputError` unless `out` is a new file with one of these endings, or may be one."""
    if Path(out).suffix.lower() not in endings:
        raise InputError(f"--out {out}: expected a file that ends in {', '.join(endings)}")
    if Path(out).is_dir() or not Path(out).absolute().parent.is_dir():
        raise InputError(f"--out {out}: is a folder or in no folder; expected a file to write")
    if os.path.exists(out) and os.path.exists(file) and os.path.samefile(out, file):
        raise InputError(f"--out {out}: is the file of the texts; give another name")


def _has_columns(file: str) -> bool:
    from mlmjax.data.reading.files import has_columns  # here, because it loads pyarrow

    return has_columns(file)


def open_items(
    file: str, text: str | None, id_: str | None, encoding: str | None, csv: CsvOptions | None
) -> tuple[Callable[[], Iterator[Item]], int]:
    """Return what reads the lines of a text file or the rows of a table, and their number.

    All texts are checked first: `InputError` lists bad ones. Of a file that can be read only once
    nothing is checked here, and the number is 0.
    """
    noted: set[str] = set()

    def read() -> Iterator[Item]:
        if text is None:
            return starmap(Item, enumerate(read_lines(file, encoding, noted), start=1))
        return read_items(file, text, id_, encoding, noted, csv)

    total = 0
    if not is_read_once(file):
        with count_progress("texts checked") as progress:
            for _ in read():
                progress(total := total + 1, 0)
    return read, total


def read_items(
    file: str,
    text: str,
    id_: str | None,
    encoding: str | None = None,
    noted: set[str] | None = None,
    csv: CsvDialect | None = None,
) -> Iterator[Item]:
    """Yield the texts of a table with the number of their line, or row, or with their id.

    `encoding`, `noted` and `csv` are those of `read_file`. Raises `InputError` that lists rows
    without a text.
    """
    from mlmjax.data.reading.files import read_file

    records = read_file(
        file, [text] if id_ is None else [text, id_], csv=csv, encoding=encoding, noted=noted
    )
    count = 0
    while part := [record for _, record in zip(range(_PART), records, strict=False)]:
        named = [(record.where, record) for record in part]
        yield from for_each_row(lambda record: _item(record.fields, record.where, text, id_), named)
        count += len(part)
    if not count:
        raise InputError(f"{file}: has no rows; give at least one text")


def _item(fields: Mapping[str, Any], where: str, text: str, id_: str | None) -> Item:
    value = look_up(fields, text)
    check_filled("" if is_missing(value) else value, f"column {text!r}")
    if id_ is None:
        return Item(int(where.rpartition(" ")[2]), value)
    key = look_up(fields, id_)
    key = None if is_missing(key) else key  # NaN is no JSON
    if key is not None and not isinstance(key, str | int | float):
        raise InputError(f"column {id_!r} is {key!r:.60}; expected text or a number as id")
    return Item(key, value)


def rounded(value: float) -> float:
    """Return a number with 6 significant digits.

    >>> rounded(0.123456789), rounded(1.23456789e-9)
    (0.123457, 1.23457e-09)
    """
    return float(f"{value:.{DIGITS}g}")


def shape_answer(
    answer: Mapping[str, Any], item: Item, key: str, *, echo: bool, full: bool
) -> dict[str, Any]:
    """Return an answer with its line or id, the text if `echo`, and short numbers unless `full`."""
    shaped = {key: item.key} | ({"text": item.text} if echo else {}) | dict(answer)
    if not full:
        shaped["probability"] = rounded(answer["probability"])
        every = answer["probabilities"].items()
        shaped["probabilities"] = {name: rounded(value) for name, value in every}
    return shaped


def write_answers(answers: Iterable[Mapping[str, Any]], out: str | None) -> int:
    """Write answers to a file whole or not at all, or to stdout; return their number.

    The format follows from the name. CSV and parquet have one column for each label's probability.
    """
    count = 0

    def counted() -> Iterator[Mapping[str, Any]]:
        nonlocal count
        for answer in answers:
            count += 1
            yield answer

    if out is None:
        for answer in counted():
            click.echo(json.dumps(answer, ensure_ascii=False))
    else:
        with write_to(Path(out)) as path:
            _WRITERS[Path(out).suffix.lower()](counted(), path)
    return count


def _write_jsonl(answers: Iterable[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for answer in answers:
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")


def _write_csv(answers: Iterable[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = None
        for answer in answers:
            row = _flat(answer)
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)


def _write_parquet(answers: Iterable[Mapping[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = (_flat(answer) for answer in answers)
    writer = None
    try:
        while part := [row for _, row in zip(range(_PART), rows, strict=False)]:
            if writer is None:
                # A first part without any answer, or with ids of one kind, decides nothing.
                text = {"id", "text", "label", "labels"}
                schema = pa.schema(
                    (name, pa.string() if name in text else _number(name, pa)) for name in part[0]
                )
                writer = pq.ParquetWriter(path, schema)
            writer.write_table(pa.Table.from_pylist(part, schema))
    finally:
        if writer is not None:
            writer.close()


def _number(name: str, pa: Any) -> Any:
    return pa.int64() if name == "line" else pa.float64()


def _flat(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer as a row of a table.

    >>> _flat({"line": 2, "label": "a", "probability": 0.9, "probabilities": {"a": 0.9, "b": 0.1}})
    {'line': 2, 'label': 'a', 'probability': 0.9, 'probability_a': 0.9, 'probability_b': 0.1}
    """
    row = {name: value for name, value in answer.items() if name != "probabilities"}
    if row.get("id") is not None:
        row["id"] = as_written(row["id"])
    if "labels" in row:
        row["labels"] = json.dumps(row["labels"], ensure_ascii=False)
    every = answer["probabilities"].items()
    return row | {f"probability_{label}": value for label, value in every}


_WRITERS: dict[str, Callable[[Iterable[Mapping[str, Any]], Path], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
