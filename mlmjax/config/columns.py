"""Look up columns of a record: by name, inside a struct, or joined from several."""

import string
from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, Field

from mlmjax.errors import InputError, MissingColumnError


def pattern_parts(pattern: str) -> list[tuple[str, str | None]]:
    """Cut a text with `{column}`s into `(text before, column or None)`; raise `InputError`.

    >>> pattern_parts("{title}: {body}")
    [('', 'title'), (': ', 'body')]
    """
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise InputError(f"{pattern!r} has unpaired braces; write {{column}} for one") from error
    if any(name == "" or kind or form for _, name, form, kind in parts):
        raise InputError(f"{pattern!r} has braces without a plain column name; write {{column}}")
    return [(text, name) for text, name, *_ in parts]


def _checked(pattern: str) -> str:
    if "{" in pattern:
        pattern_parts(pattern)
    return pattern


# A column (`a.b` steps into a struct), or text with {column}s in braces.
Pattern: TypeAlias = Annotated[str, AfterValidator(_checked)]
# Of several, the first whose columns are all present.
Column: TypeAlias = Pattern | Annotated[tuple[Pattern, ...], Field(min_length=1)]


def look_up(fields: Mapping[str, Any], column: Column, key: str = "") -> Any:
    """Return the value of a column in a record; raise `MissingColumnError` if it has none.

    `key` is the key of a task file that names the column.

    >>> record = {"title": "On ice", "body": "Skates.", "meta": {"year": 1999}}
    >>> look_up(record, "meta.year"), look_up(record, ("text", "{title}: {body}"))
    (1999, 'On ice: Skates.')
    """
    try:
        return _find(fields, column)
    except KeyError:
        alternatives = alternatives_of(column)
    found = ", ".join(map(repr, fields))
    expected = " or ".join(map(repr, alternatives))
    advice = f"; give other rows (--data), or set {key} of the task to one of these" if key else ""
    error = MissingColumnError(f"has no column {expected}; its columns are {found}{advice}")
    error.columns = alternatives
    raise error


def look_up_or_none(fields: Mapping[str, Any], column: Column) -> Any:
    """Return the value of a column in a record; None if it has none.

    >>> look_up_or_none({"text": "On ice"}, "input") is None
    True
    """
    try:
        return _find(fields, column)
    except KeyError:
        return None


def _find(fields: Mapping[str, Any], column: Column) -> Any:
    """Return the value of the first alternative of a column; raise `KeyError` if there is none."""
    for alternative in alternatives_of(column):
        try:
            if "{" not in alternative:
                return _step(fields, alternative)
            parts = pattern_parts(alternative)
            return "".join(text + (_text(fields, name) if name else "") for text, name in parts)
        except KeyError:
            continue
    raise KeyError(column)


def is_missing(value: Any) -> bool:
    """Tell whether a cell holds no value: null, or a number that is none (NaN).

    >>> [is_missing(value) for value in (None, float("nan"), "", 0)]
    [True, True, False, False]
    """
    return value is None or (isinstance(value, float) and value != value)


def as_written(value: Any) -> str:
    """Return a cell as a TOML file writes it as a key.

    >>> as_written(2.0), as_written(True), as_written("yes")
    ('2', 'true', 'yes')
    """
    # By its text, because importing numpy for its booleans would double the time to read a file.
    if not isinstance(value, str) and str(value) in ("True", "False"):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def columns_read(column: Column, present: Collection[str]) -> list[str] | None:
    """Return the columns of a table that `look_up` will read; None if it lacks them.

    >>> columns_read(("text", "{title}: {meta.year}"), ["title", "meta"])
    ['title', 'meta']
    """
    for alternative in alternatives_of(column):
        found = [_outermost(name, present) for name in names_in(alternative)]
        if None not in found:
            return [name for name in found if name is not None]
    return None


def alternatives_of(column: Column) -> tuple[str, ...]:
    """Return the patterns of a column, in the order they are tried."""
    return (column,) if isinstance(column, str) else tuple(column)


def names_in(pattern: str) -> list[str]:
    """Return the names of the columns in a pattern; without braces it is one name."""
    return [name for _, name in pattern_parts(pattern) if name] if "{" in pattern else [pattern]


def _outermost(name: str, present: Collection[str]) -> str | None:
    first = name.partition(".")[0]
    return next((found for found in (name, first) if found in present), None)


def _text(fields: Mapping[str, Any], column: str) -> str:
    value = _step(fields, column)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InputError(f"column {column!r}: is {kind} ({value!r:.60}); expected text")
    return value


def _step(fields: Mapping[str, Any], column: str) -> Any:
    if column in fields:
        return fields[column]
    first, dot, rest = column.partition(".")
    if dot and isinstance(fields.get(first), Mapping):
        return _step(fields[first], rest)
    raise KeyError(column)
