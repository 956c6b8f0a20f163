"""Check and split texts, rows and lists; name every bad row in one error."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

import numpy as np

from mlmjax.errors import InputError, MissingColumnError

MOST_WEIGHT = 1e6
"""The largest weight, so that sums of weighted losses stay exact enough in float32."""

_Result = TypeVar("_Result")


def is_listing(values: Any) -> bool:
    """Tell whether a value is a collection or stream, not one text or table."""
    return isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)


def check_list(values: Any, what: str, of: str = "texts", *, columns: int = 1) -> Iterable[Any]:
    """Return an ordered list, column or stream; raise `InputError` for anything else.

    With `columns` 2 each of its rows may be a list too.
    """
    if not is_listing(values):
        found = "None" if values is None else f"one {type(values).__name__}"
        raise InputError(f"{what}: found {found}; expected a list of {of}")
    if isinstance(values, Set):
        raise InputError(f"{what}: is a set, which has no order; expected a list of {of}")
    if not 1 <= getattr(values, "ndim", 1) <= columns:
        raise InputError(f"{what}: is a table; expected one column of {of}")
    return values


def find_twins(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two names that are equal but for white space at their ends; None if none.

    >>> find_twins(["a", "b", "a "]), find_twins(["a", "A"])
    (('a', 'a '), None)
    """
    seen: dict[str, str] = {}
    for name in names:
        if name.strip() in seen:
            return seen[name.strip()], name
        seen[name.strip()] = name
    return None


def describe_twins(one: str, other: str) -> str:
    """Say what is wrong with two names of `find_twins`."""
    if one == other:
        return f"{one!r} appears twice"
    return f"{one!r} and {other!r} differ only in white space at their ends"


def name_rows(rows: Iterable[_Result], first: int = 0) -> Iterator[tuple[str, _Result]]:
    """Yield each row with its name in messages, the first being number `first`.

    >>> list(name_rows("ab", 7))
    [('row 8 (index 7)', 'a'), ('row 9 (index 8)', 'b')]
    """
    for index, row in enumerate(rows, first):
        yield f"row {index + 1} (index {index})", row


def for_each_row(
    act: Callable[[Any], _Result], named_rows: Iterable[tuple[str, Any]]
) -> list[_Result]:
    """Apply `act` to each row; raise one `InputError` that names every bad row.

    It stops at a row without a column, because the others hardly have it.
    """
    results, problems = [], []
    for name, row in named_rows:
        try:
            results.append(act(row))
        except InputError as error:
            problems.append(f"{name}: {error.message}")
            if isinstance(error, MissingColumnError):
                break
    if problems := list(dict.fromkeys(problems)):
        raise InputError(problems[0], problems[1:])
    return results


def split_by_size(
    items: Iterable[Any], size: Callable[[Any], int], limit: int
) -> Iterator[list[Any]]:
    """Yield runs of items; the item with which a run reaches the limit ends it.

    >>> list(split_by_size(["ab", "c", "defg", "h"], len, 3))
    [['ab', 'c'], ['defg'], ['h']]
    """
    chunk: list[Any] = []
    total = 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if total >= limit:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def check_share(value: Any, what: str) -> float:
    """Return a number from 0 to 1; raise `InputError` for anything else."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise InputError(f"{what} is {value!r:.60}; expected a number from 0 to 1")
    return float(value)


def check_weight(value: Any, what: str = "weight") -> float:
    """Return a finite number of 0 or more; raise `InputError` for anything else."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MOST_WEIGHT:
        raise InputError(f"{what} is {value!r:.60}; expected a number from 0 to {MOST_WEIGHT:g}")
    return float(value)


def check_fields(row: Any, fields: Sequence[str]) -> None:
    """Raise `InputError` for a row without a text for each field; `options` are a list of texts."""
    if not isinstance(row, Mapping):
        raise InputError(f"is {row!r:.60} ({type(row).__name__}); expected {{field: text}}")
    for field in fields:
        if field not in row:
            known = ", ".join(map(repr, row)) or "none"
            raise InputError(
                f"has no field {field!r}, which the prompt needs; its fields: {known:.200}"
            )
        if field == "options":
            check_options(row[field])
        else:
            check_text(row[field], f"field {field!r}")


def check_options(options: Any) -> None:
    """Raise `InputError` for options that are not a list of at least one text."""
    check_list(options, "field 'options'")
    if not isinstance(options, Collection) or not len(options):
        raise InputError("field 'options' has no option; expected a list of texts")
    for number, option in enumerate(options, 1):
        check_text(option, f"option {number}")


def check_row(
    row: Any, fields: Sequence[str], label_count: int, optional: Sequence[str] = ()
) -> None:
    """Raise `InputError` for a row that cannot be scored.

    Its fields, except those in `optional`, and its options are not blank, and there are labels for
    all options.

    >>> check_row({"text": " "}, ["text"], 2)
    Traceback (most recent call last):
    mlmjax.errors.InputError: field 'text' is blank; give it some text or leave the row out
    """
    check_fields(row, fields)
    for field in fields:
        if field not in ("options", *optional):
            check_filled(row[field], f"field {field!r}")
    if row.get("options") is None:
        return
    check_options(row["options"])
    if len(row["options"]) > label_count:
        raise InputError(
            f"has {len(row['options'])} options; the verbalizer has {label_count} labels; remove "
            "options, or give a verbalizer with more labels"
        )
    for number, option in enumerate(row["options"], 1):
        check_filled(option, f"option {number}")


def check_filled(text: Any, what: str) -> None:
    """Raise `InputError` that begins with `what` for a blank text or no text."""
    check_text(text, what)
    if not text.strip():
        raise InputError(f"{what} is blank; give it some text or leave the row out")


def check_texts(texts: Sequence[Any], first: int = 0) -> list[str]:
    """Return the name of each text in messages, the first being number `first`.

    Raises `InputError` that names each one that is blank or not text.
    """
    for_each_row(lambda text: check_filled(text, "field 'text'"), name_rows(texts, first))
    return [name for name, _ in name_rows(texts, first)]


def check_text(text: Any, what: str) -> None:
    """Raise `InputError` that begins with `what` unless `text` is a valid string."""
    if not isinstance(text, str):
        raise InputError(f"{what} is {type(text).__name__} ({text!r:.60}); expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what}: holds half a character (a lone surrogate, U+{ord(text[error.start]):04X}) at "
            f"position {error.start}; expected Unicode text"
        ) from error
