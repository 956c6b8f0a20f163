"""Read the answers of records: one token, one of the labels, or a number."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlmjax.config.data import SourceConfig
from mlmjax.config.labels import (
    drop_advice,
    find_label,
    is_distribution,
    is_dropped,
    normalize,
    read_distribution,
)
from mlmjax.config.run import Head
from mlmjax.data.reading.files import Record
from mlmjax.errors import InputError, suggest_name
from mlmjax.text.checks import check_text
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import Verbalizer, surface

MOST = 1e6
"""The largest value to predict, so that squared errors and their gradients fit in float32."""

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


class Answered(NamedTuple):
    """A record with its answer: a token, a class or a value.

    `shares` are the probabilities of the labels, whose most probable one is the answer, or None.
    """

    record: Record
    answer: float
    shares: tuple[float, ...] | None = None


class AnswerReader:
    """Read the answers of a source: tokens, numbers of labels, or values.

    The MLM head takes a token: that of the answer where it is one, or with `labels` that of the
    label's letter (or of its name, if the prompt lists no options). The classification head takes
    the number of the label, or without `labels` any finite number. Raises `InputError` for labels
    that cannot work.
    """

    def __init__(self, source: SourceConfig, template: Template, tokenizer: Tokenizer, head: Head):
        assert source.answer is not None
        self._column, self._rules = source.answer, source.normalize
        self._drop = source.drop_labels
        self._tokenizer, self._head = tokenizer, head
        self._names = None if source.labels is None else list(source.label_names)
        self._name_of = source.labels if isinstance(source.labels, Mapping) else None
        answers: Sequence[int] = range(len(source.label_names))
        if self._names is not None and head == "mlm":
            has_letters = "options" in template.fields
            make = Verbalizer.letters if has_letters else Verbalizer.words
            answers = [f[0] for f in make(self._names, tokenizer=tokenizer).ids(tokenizer)]
        self._answers = dict(zip(self._names or (), answers, strict=True))

    def read(
        self, records: Sequence[Record], dropped: Counter[str], normalized: Counter[str]
    ) -> list["Answered"]:
        """Return the records that have an answer, each with it.

        Count dropped ones by their reason, and answers that each rule of `source.normalize`
        changed. Raises `InputError` for a value that is no answer, with file and row.
        """
        values = []
        for record in records:
            value = self._normalized(record, normalized)
            if is_dropped(record.fields[self._column], value, self._drop):
                dropped["left out by drop_labels"] += 1
            else:
                values.append((record, value))
        if self._names is None and self._head == "mlm":
            return self._one_token(values, dropped)
        return [
            self._answered(record, value, f"{record.where}: column {self._column!r}")
            for record, value in values
        ]

    @property
    def options(self) -> list[int]:
        """Return the answers of all labels, in their order; none without labels."""
        return [int(answer) for answer in self._answers.values()]

    def _answered(self, record: Record, value: Any, where: str) -> "Answered":
        """Return the answer of a label, of a distribution over labels, or of a number."""
        if isinstance(value, list) and value and all(map(_is_pair, value)):
            value = dict(value)  # as pyarrow reads a map
        if not is_distribution(value):
            read = _number if self._names is None else self._label
            return Answered(record, read(value, where))
        if self._names is None:
            raise InputError(
                f"{where} is a distribution ({value!r:.60}); give labels to name what it is over"
            )
        try:
            shares = read_distribution(value, self._names)
        except InputError as error:
            raise InputError(f"{where} {error.message}") from error
        best = self._names[shares.index(max(shares))]
        # One that gives all to one label is that label.
        return Answered(record, self._answers[best], None if 1.0 in shares else tuple(shares))

    def _normalized(self, record: Record, normalized: Counter[str]) -> Any:
        value = record.fields[self._column]
        if not self._rules or not isinstance(value, str):
            return value
        return normalize(value, self._rules, normalized)

    def _one_token(
        self, values: Sequence[tuple[Record, Any]], dropped: Counter[str]
    ) -> list["Answered"]:
        """Keep the records whose answer is one token after a space, with that token."""
        answers = []
        for record, value in values:
            if is_distribution(value):
                self._answered(record, value, f"{record.where}: column {self._column!r}")
            advice = f"; {drop_advice(record.fields[self._column])}"
            hint = f"; give labels to name the classes of a number{advice}"
            require_text(record, self._column, hint, advice)
            answers.append(value.strip())
        forms = [surface(answer, self._tokenizer) for answer in answers]
        encoded = self._tokenizer.encode_plain_batch(forms)
        kept: list[Answered] = []
        for (record, _), answer, ids in zip(values, answers, encoded, strict=True):
            if not answer:
                dropped["blank answer"] += 1
            elif len(ids) != 1 or ids[0] in self._tokenizer.special_ids:
                dropped["answer is not one token"] += 1
            else:
                kept.append(Answered(record, ids[0]))
        return kept

    def _label(self, value: Any, where: str) -> float:
        """Return the answer of the label that a value names, by itself or as its position."""
        assert self._names is not None
        try:
            number = find_label(value, self._names, self._name_of)
        except InputError as error:
            raise InputError(f"{where} {error.message}") from error
        if number is not None:
            return self._answers[self._names[number]]
        found = "null" if value is None else f"{value!r:.60}"
        known: Sequence[str] = self._names if self._name_of is None else list(self._name_of)
        unlisted = "" if self._name_of is None or value is None else ", which labels does not list"
        place = "" if self._name_of else f", or a number from 0 to {len(self._names) - 1}"
        hint = suggest_name(value, known) if isinstance(value, str) else ""
        raise InputError(
            f"{where} is {found}{unlisted}; {hint}expected one of "
            f"{', '.join(map(repr, known))}{place}; {drop_advice(value)}"
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def require_text(record: Record, column: str, hint: str = "", absent: str = "") -> None:
    """Raise `InputError` with file, row and column for a value that is not text."""
    value = record.fields[column]
    where = f"{record.where}: column {column!r}"
    if value is None:
        raise InputError(f"{where} is null; expected text{absent}")
    if not isinstance(value, str):
        raise InputError(f"{where} is {type(value).__name__} ({value!r:.60}); expected text{hint}")
    check_text(value, where)


def _number(value: Any, where: str) -> float:
    """Read a value to predict; CSV files hold it as text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, str) and len(value) < 100 and _NUMBER.fullmatch(value):
        value, is_number = float(value), True
    if not is_number or not abs(value) <= MOST:
        # Python refuses to write the digits of a huge integer.
        found = "larger" if isinstance(value, int) and is_number else f"{value!r:.60}"
        raise InputError(
            f"{where} is {found}; expected a number of at most {MOST:g} (larger ones: give them in "
            "another unit), or give labels to name the classes"
        )
    return float(value)
