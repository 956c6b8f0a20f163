"""Right answers, as people give them, turned into numbers of labels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlmjax.errors import InputError
from mlmjax.text.checks import check_list, check_text, for_each_row, is_listing, name_rows


def seen_labels(labels: Sequence[Any], several: bool) -> list[str]:
    """Return the distinct names among right answers, sorted.

    >>> seen_labels(["b", "a", "b"], several=False), seen_labels([["b"], ["a", "b"]], several=True)
    (['a', 'b'], ['a', 'b'])
    """
    if not several:
        return sorted(set(for_each_row(_name, name_rows(check_list(labels, "labels")))))
    if any(not isinstance(one, list | tuple | set | frozenset) for one in labels):
        raise InputError("labels: numbers tell no names; give labels to the classifier as well")
    names = for_each_row(lambda row: list(map(_name, row)), name_rows(labels))
    return sorted(set().union(*names))


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

    def number(label: Any) -> int:
        name = _name(label)
        if name not in index and known:
            raise _unknown(name, index)
        return index.get(name, -1)

    if several:
        return for_each_row(lambda row: _indicator(row, index), name_rows(labels))
    return for_each_row(number, name_rows(check_list(labels, "labels")))


def _name(label: Any) -> str:
    if isinstance(label, int | float | np.number):
        raise InputError(
            f"label: is {type(label).__name__} ({label!r:.40}); expected text: give names that say "
            "what the labels mean, or at least str(label)"
        )
    check_text(label, "label")
    return str(label)


def _indicator(row: Any, index: Mapping[str, int]) -> tuple[bool, ...]:
    if not is_listing(row):
        raise InputError(
            f"its labels are {row!r:.60} ({type(row).__name__}); expected a list of names"
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
                f"its labels are {entries!r:.60}; expected names, or 0 or 1 for each of the "
                f"{len(index)} labels"
            )
        return tuple(bool(entry) for entry in entries)
    names = set(map(_name, entries))
    for name in sorted(names):
        if name not in index:
            raise _unknown(name, index)
    return tuple(name in names for name in index)


def _unknown(name: str, index: Mapping[str, int]) -> InputError:
    return InputError(f"label {name!r:.60} is none of {', '.join(index):.200}")


def described(labels: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Return `{name: description}`; raises `InputError` for blank, repeated or too few names.

    >>> described(["sports", "world"])
    {'sports': '', 'world': ''}
    """
    if isinstance(labels, Mapping):
        table: dict[Any, Any] = dict(labels)
    else:
        names = list(check_list(labels, "labels"))
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
