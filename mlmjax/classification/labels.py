"""Labels and right answers, as people give them."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from mlmjax.config.labels import is_distribution, read_distribution
from mlmjax.errors import InputError, suggest_name
from mlmjax.text.checks import (
    check_list,
    check_text,
    check_texts,
    check_weight,
    describe_twins,
    find_twins,
    for_each_row,
    is_listing,
    name_rows,
)


def label_table(labels: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Return `{name: description}`; raises `InputError` for blank, repeated or too few names.

    >>> label_table(["sports", "world"])
    {'sports': '', 'world': ''}
    """
    names = list(labels if isinstance(labels, Mapping) else check_list(labels, "labels"))
    for number, name in enumerate(names, 1):
        check_text(name, f"labels: label {number}")
        if not name.strip():
            raise InputError(f"labels: {name!r} is blank; expected a name")
        if name.endswith("\0"):  # NumPy's arrays of text end there.
            raise InputError(f"labels: {name!r} ends in a NUL character; remove it")
    if (pair := find_twins(names)) is not None:
        raise InputError(f"labels: {describe_twins(*pair)}; expected distinct names")
    if len(names) < 2:
        raise InputError(
            f"labels: found {', '.join(names) or 'none'}; expected at least two distinct names"
        )
    table = labels if isinstance(labels, Mapping) else dict.fromkeys(names, "")
    for name, description in table.items():
        check_text(description, f"labels: the description of {name!r}")
    return {str(name): description.strip() for name, description in table.items()}


def list_answers(answers: Any, what: str = "labels") -> list[Any]:
    """Return right answers as a list; raise `InputError` for anything but a list of rows."""
    return list(check_list(answers, what, "one per text", columns=2))


def seen_labels(answers: Sequence[Any], multi_label: bool) -> list[str]:
    """Return the distinct names among right answers, sorted.

    >>> seen_labels(["b", "a", "b"], False), seen_labels([["b"], ["a", "b"]], True)
    (['a', 'b'], ['a', 'b'])
    """
    if not multi_label:
        found = for_each_row(_names_of, name_rows(check_list(answers, "labels", columns=2)))
        return sorted(set().union(*found))
    if any(not isinstance(row, list | tuple | Set) for row in answers):
        raise InputError("labels: rows of numbers have no names; give the classifier its labels")
    names = for_each_row(lambda row: list(map(_name, row)), name_rows(answers))
    return sorted(set().union(*names))


def label_numbers(
    answers: Iterable[Any], names: Sequence[str], multi_label: bool, *, known: bool = True
) -> list[Any]:
    """Return the number of each row's label.

    With `multi_label` a row is a list of names, or 0 or 1 for each label, and the result a tuple of
    bool, one per label. Raises `InputError` that lists each row whose label is not text or not
    among `names`. With `known` False an unknown label is -1 (an error with `multi_label`).

    >>> label_numbers(["b", "a"], ["a", "b"], False)
    [1, 0]
    >>> label_numbers([["b"], [], [1, 0]], ["a", "b"], True)
    [(False, True), (False, False), (True, False)]
    """
    index = {str(name): i for i, name in enumerate(names)}

    def number(label: Any) -> int:
        name = _name(label)
        if known:
            check_known(name, index)
        return index.get(name, -1)

    if multi_label:
        return for_each_row(lambda row: _flags(row, index), name_rows(list_answers(answers)))
    return for_each_row(number, name_rows(check_list(answers, "labels")))


def read_targets(answers: Iterable[Any], names: Sequence[str], multi_label: bool) -> list[Any]:
    """Return `label_numbers` of right answers that may also be distributions over the names.

    A distribution is a table `{name: probability}` or a list of probabilities, and becomes a list
    of floats. One that gives all to one label is the number of that label.

    >>> read_targets(["b", {"a": 0.5, "b": 0.5}, [1, 0]], ["a", "b"], False)
    [1, [0.5, 0.5], 0]
    """
    listed = list_answers(answers)
    if multi_label or not any(map(is_distribution, listed)):
        return label_numbers(listed, names, multi_label)
    index = {str(name): i for i, name in enumerate(names)}

    def read(row: Any) -> Any:
        if not is_distribution(row):
            check_known(_name(row), index)
            return index[str(row)]
        shares = read_distribution(row, list(index))
        return shares.index(1.0) if 1.0 in shares else shares

    return for_each_row(read, name_rows(listed))


def pair_labels(
    texts: Sequence[str], answers: Iterable[Any], names: Sequence[str], multi_label: bool
) -> list[Any]:
    """Return `label_numbers` of texts; raise `InputError` unless each text has one row of it."""
    truth = label_numbers(answers, names, multi_label)
    check_lengths(texts, truth)
    return truth


def pair_targets(
    texts: Sequence[str], answers: Iterable[Any], names: Sequence[str], multi_label: bool
) -> list[Any]:
    """Return `read_targets` of texts; raise `InputError` unless each text has one row of it."""
    truth = read_targets(answers, names, multi_label)
    check_lengths(texts, truth)
    return truth


def check_lengths(texts: Sequence[str], answers: Sequence[Any]) -> None:
    """Raise `InputError` unless each text has one answer."""
    if len(texts) != len(answers):
        raise InputError(
            f"there are {len(texts)} texts and {len(answers)} labels; give one per text"
        )


def _name(label: Any) -> str:
    if isinstance(label, int | float | np.number):
        raise InputError(
            f"label is {type(label).__name__} ({label!r:.40}); expected text: give names that say "
            "what the labels mean, or at least str(label)"
        )
    check_text(label, "label")
    return str(label)


def _names_of(answer: Any) -> set[str]:
    """Return the names in a right answer: a label, or a table of probabilities."""
    if isinstance(answer, Mapping):
        return {_name(name) for name in answer}
    if is_distribution(answer):
        raise InputError(
            "is a list of probabilities, which have no names; give the classifier its labels"
        )
    return {_name(answer)}


def _flags(row: Any, index: Mapping[str, int]) -> tuple[bool, ...]:
    """Tell which labels are among a row's labels, given as names or as 0 and 1."""
    if not is_listing(row):
        raise InputError(
            f"its labels are {row!r:.60} ({type(row).__name__}); expected a list of names"
        )
    entries = list(row)
    if not entries or any(isinstance(entry, str) for entry in entries):
        names = set(map(_name, entries))
        for name in sorted(names):
            check_known(name, index)
        return tuple(name in names for name in index)
    numeric = int | float | np.number | np.bool_
    are_flags = all(isinstance(entry, numeric) and entry in (0, 1) for entry in entries)
    if len(entries) != len(index) or not are_flags:
        raise InputError(
            f"its labels are {entries!r:.60}; expected names, or 0 or 1 for each of the "
            f"{len(index)} labels"
        )
    return tuple(map(bool, entries))


def check_known(name: str, index: Mapping[str, Any]) -> None:
    """Raise `InputError` for a label that is not among the keys of `index`."""
    if name not in index:
        raise InputError(
            f"label {name!r:.60} is not one of {', '.join(index):.200}; "
            f"{suggest_name(name, list(index))}correct it, or add it to the classifier's labels"
        )


def target_rows(truth: Sequence[Any], columns: int, multi_label: bool) -> np.ndarray:
    """Return the right answers as distributions, float32 `[rows of scores, columns]`.

    `truth` has label numbers, distributions over the labels, or with `multi_label` tuples of bool.

    >>> target_rows([1, [0.25, 0.75]], 2, False).tolist()
    [[0.0, 1.0], [0.25, 0.75]]
    >>> target_rows([(False, True)], 2, True).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    one_hot = np.eye(columns, dtype=np.float32)
    if multi_label:
        return one_hot[right_columns(truth, multi_label)]
    rows = [one_hot[one] if isinstance(one, int) else np.float32(one) for one in truth]
    return np.array(rows, np.float32).reshape(len(rows), columns)


def right_columns(truth: Sequence[Any], multi_label: bool) -> np.ndarray:
    """Return the right column of each row of scores: a label, or yes or no.

    >>> right_columns([(False, True), (True, True)], True).tolist()
    [1, 0, 0, 0]
    """
    return 1 - np.array(truth, int).reshape(-1) if multi_label else np.array(truth)


def read_weights(given: Iterable[float], texts: Sequence[str]) -> np.ndarray:
    """Return the weights of texts; raise `InputError` that names each that is none."""
    listed = list(check_list(given, "sample_weight", "numbers"))
    if len(listed) != len(texts):
        raise InputError(
            f"sample_weight: there are {len(texts)} texts and {len(listed)} weights; give one each"
        )
    weights = np.array(for_each_row(check_weight, name_rows(listed)), np.float32)
    if not weights.any():
        raise InputError("sample_weight: all weights are 0; give the texts to learn from more")
    return weights


def read_validation(
    validation: Any, names: Iterable[str], multi_label: bool
) -> tuple[Sequence[str], Sequence[Any]]:
    """Return the held-out texts that are given, with their right answers."""
    if not isinstance(validation, Sequence) or len(validation) != 2:
        raise InputError("validation: expected a pair of texts and their labels")
    texts = list(check_list(validation[0], "validation texts"))
    answers = list_answers(validation[1], "validation labels")
    truth = pair_targets(texts, answers, list(names), multi_label)
    check_texts(texts)
    return texts, truth
