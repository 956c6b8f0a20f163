"""Read texts and their labels from a table, and find the columns that hold them."""

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from mlmjax.config.columns import as_written, columns_read, is_missing, look_up, look_up_or_none
from mlmjax.config.data import CsvDialect
from mlmjax.config.labels import is_dropped, label_key
from mlmjax.data.reading.files import Record, is_csv, read_file, require_columns, stop
from mlmjax.errors import InputError, MissingColumnError, counted, suggest_name
from mlmjax.text.checks import check_text, for_each_row

TEXT_NAMES = (
    *("text", "texts", "sentence", "content", "body", "message", "comment", "review", "document"),
    *("utterance", "question", "query", "description"),
)
LABEL_NAMES = (
    *("label", "labels", "class", "category", "target", "topic", "intent", "sentiment"),
    *("label_text", "label_name"),
)
"""Names, in small letters, that make a column's use obvious."""

_MISSING = frozenset(("nan", "null", "none", "n/a", "na", "#n/a", "<na>", "nil", "?", "-"))
"""Labels, in small letters, by which programs write that there is none."""

_NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?")

FIRST_ROWS = 100
"""The rows whose columns are those of the table, because JSON lines may leave some out."""

MOST_DISTINCT = 0.5
"""The share of rows with a label of their own above which a column holds no labels."""


class Columns(NamedTuple):
    """Name the columns of a table; `said` tells which were found rather than given."""

    text: str
    label: str
    said: tuple[str, ...]


class LabelledTable(NamedTuple):
    """Hold the rows of a table: `where` names each in messages; `said` is for the user."""

    texts: list[str]
    labels: list[str]
    where: list[str]
    columns: Columns
    said: tuple[str, ...]

    def at(self, rows: Sequence[int]) -> tuple[list[str], list[str]]:
        """Return the texts and labels of some rows."""
        return [self.texts[i] for i in rows], [self.labels[i] for i in rows]


def _names(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of columns; those inside an object with its name before a dot.

    >>> list(_names({"id": 7, "data": {"text": "a", "meta": {}}}))
    ['id', 'data.text', 'data.meta']
    """
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{name}.{inner}" for inner in _names(value))
        else:
            yield name


def find_columns(
    where: str, present: Sequence[str], text: str | None = None, label: str | None = None
) -> Columns:
    """Return the columns of texts and labels: those given, else those that are obvious.

    A column is obvious if it is the only one with a usual name, or the only one that is left.
    Raises `InputError` that lists the columns.

    >>> find_columns("table.csv", ["id", "Body", "topic"])[:2]
    ('Body', 'topic')
    """
    require_columns(where, [name for name in (text, label) if name is not None], present)
    if len(present) < 2:
        raise InputError(
            f"{where}: has one column, {', '.join(present)}; expected one of texts and one of "
            "labels"
        )
    said = []
    taken: set[str] = set()
    for name in (text, label):
        taken.update((name is not None and columns_read(name, present)) or ())
    if label is None:
        left = [name for name in present if name not in taken]
        label = _obvious(where, left, LABEL_NAMES, "labels", "--label", text is not None)
        taken.add(label)
        said.append(f"column {label!r} holds the labels (--label names another)")
    if text is None:
        left = [name for name in present if name not in taken]
        text = _obvious(where, left, TEXT_NAMES, "texts", "--text", True)
        said.append(f"column {text!r} holds the texts (--text names another)")
    if text == label:
        raise InputError(f"{where}: --text and --label both name {text!r}; expected two columns")
    return Columns(text, label, tuple(reversed(said)))


def _obvious(
    where: str, left: Sequence[str], usual: Collection[str], what: str, option: str, is_last: bool
) -> str:
    found = [name for name in left if name.strip().lower().rpartition(".")[2] in usual]
    if len(found) == 1:
        return found[0]
    if is_last and len(left) == 1:
        return left[0]
    why = f"{', '.join(map(repr, found))} may" if found else "no column has a usual name and may"
    names = ", ".join(name or "one without a name" for name in left)
    raise InputError(
        f"{where}: which column holds the {what} is not clear: {why} hold them; columns: "
        f"{names or 'none'}; give {option} COLUMN"
    )


def read_labelled(
    path: str | Path,
    text: str | None = None,
    label: str | None = None,
    *,
    skip_blank: bool = False,
    drop_labels: Collection[str] = (),
    encoding: str | None = None,
    csv: CsvDialect | None = None,
) -> LabelledTable:
    """Read a table of texts, each with one label; white space around labels is removed.

    The format follows from the name; `encoding` and `csv` are those of `read_file`. A row with an
    earlier text and label again is left out, as are rows with a label of `drop_labels`, and with
    `skip_blank` rows without a text or a label; `said` counts them. Raises `InputError` that lists
    every row without a text or a label.
    """
    noted: set[str] = set()
    # They help to find the separator; a record of JSON lines may leave some out.
    given = [name for name in (text, label) if name is not None] if is_csv(path) else None
    records = read_file(path, given, csv=csv, encoding=encoding, noted=noted)
    first = islice(records, FIRST_ROWS)
    present = list(dict.fromkeys(name for record in first for name in _names(record.fields)))
    if not present:
        raise InputError(f"{path}: has no rows; expected a text and a label in each")
    columns = find_columns(str(path), present, text, label)
    wanted = [columns.text, columns.label]
    records = read_file(
        path,
        () if skip_blank else wanted,
        optional=wanted,
        named=[columns.label],
        unnamed=drop_labels,
        csv=csv,
        encoding=encoding,
        noted=noted,
        broken=stop if skip_blank else _advise_skip,
        advise=_drop_advice,
    )
    counts = dict.fromkeys(("blank", "dropped", "repeated"), 0)
    seen: dict[tuple[str, str], str] = {}
    dropped: set[str] = set()
    for where, row in for_each_row(
        lambda record: (record.where, _row(record, columns, skip_blank, drop_labels)),
        ((record.where, record) for record in records),
    ):
        if row is None:
            counts["blank"] += 1
        elif isinstance(row, str):
            counts["dropped"] += 1
            dropped.add(row)
        elif row in seen:
            counts["repeated"] += 1
        else:
            seen[row] = where
    texts, labels = [row[0] for row in seen], [row[1] for row in seen]
    _check_labels(str(path), labels, columns.label)
    unknown = _unknown([name for name in drop_labels if name not in dropped], labels)
    said = [*columns.said, *_describe(counts), *unknown, *_similar(labels), *_no_labels(labels)]
    return LabelledTable(texts, labels, list(seen.values()), columns, tuple(said))


def _advise_skip(what: str, error: InputError) -> None:
    """Raise the error of a row; a row without a column can be left out."""
    if isinstance(error, MissingColumnError):
        raise MissingColumnError(f"{error.message}; --skip-blank leaves such rows out") from error
    raise error


def _drop_advice(label: Any) -> str:
    return f"--drop-label {quote(label_key(label))} leaves such rows out"


def _row(
    record: Record, columns: Columns, skip_blank: bool, drop: Collection[str]
) -> tuple[str, str] | str | None:
    """Return the text and label of a row; its label if that is dropped, None for a blank."""
    find = look_up_or_none if skip_blank else look_up
    text, label = find(record.fields, columns.text), find(record.fields, columns.label)
    if isinstance(label, list | dict):
        raise InputError(
            f"column {columns.label!r} is {label!r:.60}; expected one label (for several, use "
            "Classifier(multi_label=True) in Python)"
        )
    if is_dropped(label, label, drop):
        return label_key(label)
    name = "" if is_missing(label) else as_written(label).strip()
    text = "" if is_missing(text) else text
    check_text(text, f"column {columns.text!r}")
    check_text(name, f"column {columns.label!r}")
    for value, column in ((text, columns.text), (name, columns.label)):
        if not value.strip():
            if skip_blank:
                return None
            raise InputError(
                f"column {column!r} is blank; fill it in, or leave such rows out with --skip-blank"
            )
    return text, name


def _check_labels(where: str, labels: Sequence[str], column: str) -> None:
    distinct = dict.fromkeys(labels)
    if len(distinct) < 2:
        raise InputError(
            f"{where}: column {column!r} has {counted(len(distinct), 'distinct label')} "
            f"({', '.join(distinct) or 'no rows are left'}); expected at least two"
        )
    if len(distinct) > max(2, MOST_DISTINCT * len(labels)):
        raise InputError(
            f"{where}: column {column!r} has {len(distinct)} distinct labels in "
            f"{counted(len(labels), 'row')}, so most occur once; expected labels that repeat: "
            "give the right column with --label, or more rows"
        )


def _describe(counts: dict[str, int]) -> Iterator[str]:
    words = {
        "blank": "without a text or a label",
        "dropped": "with a label of --drop-label",
        "repeated": "with an earlier text and label again",
    }
    for name, what in words.items():
        if counts[name]:
            yield f"left out {counted(counts[name], 'row')} {what}"


def _unknown(names: Sequence[str], labels: Sequence[str]) -> Iterator[str]:
    """Yield a warning for each label to drop that no row has."""
    for name in names:
        hint = suggest_name(name, list(dict.fromkeys(labels))).strip() or "nothing is left out"
        yield f"warning: --drop-label {name!r}: no row has this label; {hint}"


def _similar(labels: Sequence[str]) -> Iterator[str]:
    """Yield a warning for labels that may be one, written in two ways."""
    names: dict[str, list[Any]] = {}
    for label in sorted(set(labels)):
        names.setdefault(_folded(label), []).append(label)
    for group in names.values():
        if len(group) > 1:
            shown = ", ".join(
                map(ascii if len({*map(_shown, group)}) < len(group) else repr, group)
            )
            yield f"warning: the labels {shown} are kept apart; correct the table if they are one"


def _folded(label: str) -> str:
    """Return a label without capitals, spare spaces and characters nobody sees; a number by value.

    >>> [_folded(label) for label in ("Yes  sir", "yes\u200b", "01", "1.0")]
    ['yes sir', 'yes', '1', '1']
    """
    text = " ".join(_shown(label).casefold().split())
    return f"{float(text):g}" if _NUMBER.fullmatch(text) else text


def _shown(label: str) -> str:
    """Return a label as it is seen: letters composed, and no characters without a width."""
    text = unicodedata.normalize("NFKC", label)
    return "".join(one for one in text if unicodedata.category(one) != "Cf")


def _no_labels(labels: Sequence[str]) -> Iterator[str]:
    """Yield a warning for labels that often mean that a row has none."""
    distinct = dict.fromkeys(labels)
    numbers = all(_NUMBER.fullmatch(label) for label in distinct)
    for label in distinct:
        if label.casefold() in _MISSING or (numbers and len(distinct) > 2 and label == "-1"):
            rows = counted(labels.count(label), "row")
            yield (
                f"warning: the label {label!r} of {rows} may mean that there is none; "
                f"--drop-label {label} leaves such rows out"
            )
