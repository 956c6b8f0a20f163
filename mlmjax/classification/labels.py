"""Right answers, as people give them, turned into numbers of labels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlmjax.errors import InputError
from mlmjax.text.checks import check_text, one_dimensional


def seen_labels(labels: Sequence[Any], several: bool) -> list[str]:
    """Return the distinct names among right answers, sorted.

    >>> seen_labels(["b", "a", "b"], several=False), seen_labels([["b"], ["a", "b"]], several=True)
    (['a', 'b'], ['a', 'b'])
    """
    if not several:
        return sorted({_name(label, i) for i, label in enumerate(_one_each(labels))})
    if any(not isinstance(one, list | tuple | set | frozenset) for one in labels):
        raise InputError("labels: numbers tell no names; give labels to the classifier as well")
    return sorted({_name(label, i) for i, one in enumerate(labels) for label in one})


def label_numbers(
    labels: Iterable[Any], names: Sequence[str], several: bool, *, known: bool = True
) -> list[Any]:
    """Return the number of each row's label; with `several`, a tuple of bool, one per label.

    With several labels a row is a list of names, or a row of 0 and 1 for each label. Raises
    `InputError` that names each row whose label is no text or none of `names`; with `known` False
    a label that is none of them is -1 (of several labels all have to be known).

    >>> label_numbers(["b", "a"], ["a", "b"], several=False)
    [1, 0]
    >>> label_numbers([["b"], [], [1, 0]], ["a", "b"], several=True)
    [(False, True), (False, False), (True, False)]
    """
    index = {str(name): i for i, name in enumerate(names)}
    found: list[Any] = []
    problems = []
    rows = list(labels) if several else _one_each(labels)
    for i, row in enumerate(rows):
        try:
            if several:
                found.append(_indicator(row, index, i))
            else:
                name = _name(row, i)
                if name not in index and known:
                    raise _unknown(name, index, i)
                found.append(index.get(name, -1))
        except InputError as error:
            problems.append(error.message)
    if problems:
        raise InputError(problems[0], problems[1:])
    return found


def _one_each(labels: Iterable[Any]) -> list[Any]:
    if isinstance(labels, str | bytes | Mapping) or not isinstance(labels, Iterable):
        raise InputError(f"labels: is one {type(labels).__name__}; expected a list of texts")
    if getattr(labels, "ndim", 1) != 1:
        raise InputError("labels: is a table; expected one column of texts")
    return list(labels)


def _name(label: Any, row: int) -> str:
    if isinstance(label, int | float | np.number):
        raise InputError(
            f"row {row + 1} (index {row}): label: is {type(label).__name__} ({label!r:.40}); "
            "expected text: give names that say what the labels mean, or at least str(label)"
        )
    check_text(label, f"row {row + 1} (index {row}): label")
    return str(label)


def _indicator(row: Any, index: Mapping[str, int], number: int) -> tuple[bool, ...]:
    where = f"row {number + 1} (index {number})"
    if isinstance(row, str | bytes | Mapping) or not isinstance(row, Iterable):
        raise InputError(
            f"{where}: its labels are {row!r:.60} ({type(row).__name__}); expected a list of names"
        )
    entries = list(row)
    if entries and not any(isinstance(entry, str) for entry in entries):
        flags = [
            entry in (0, 1)
            for entry in entries
            if isinstance(entry, int | float | np.number | np.bool_)
        ]
        if len(entries) != len(index) or len(flags) != len(entries) or not all(flags):
            raise InputError(
                f"{where}: its labels are {entries!r:.60}; expected names, or 0 or 1 for each of "
                f"the {len(index)} labels"
            )
        return tuple(bool(entry) for entry in entries)
    names = {_name(entry, number) for entry in entries}
    for name in sorted(names):
        if name not in index:
            raise _unknown(name, index, number)
    return tuple(name in names for name in index)


def _unknown(name: str, index: Mapping[str, int], row: int) -> InputError:
    listed = ", ".join(index)
    return InputError(f"row {row + 1} (index {row}): label {name!r:.60} is none of {listed:.200}")


def described(labels: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Return `{name: description}`; raises `InputError` for blank, repeated or too few names.

    >>> described(["sports", "world"])
    {'sports': '', 'world': ''}
    """
    if isinstance(labels, Mapping):
        table: dict[Any, Any] = dict(labels)
    else:
        names = list(one_dimensional(labels, "labels"))
        for number, name in enumerate(names, 1):
            check_text(name, f"labels: label {number}")
        table = dict.fromkeys(names, "")
        if len(table) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise InputError(f"labels: {twice!r} stands there twice; expected distinct names")
    for name, description in table.items():
        check_text(name, f"labels: name {name!r}")
        check_text(description, f"labels: the description of {name!r}")
        if not name.strip():
            raise InputError(f"labels: {name!r} is blank; expected a name")
        if name.endswith("\0"):  # numpy's arrays of text end there
            raise InputError(f"labels: {name!r} ends in a NUL character; take it off")
    if len(table) < 2:
        raise InputError(
            f"labels: found {', '.join(table) or 'none'}; expected at least two distinct names"
        )
    return {str(name): description.strip() for name, description in table.items()}
