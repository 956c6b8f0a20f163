"""Read the answers of records: one token, one of the labels, or a number."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlmjax.config.columns import as_written
from mlmjax.config.data import AnswerRule, SourceConfig
from mlmjax.config.run import Head
from mlmjax.data.reading.files import Record
from mlmjax.errors import InputError
from mlmjax.text.checks import check_text
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import Verbalizer

MOST = 1e6
"""The largest value to predict, so that squared errors and their gradients fit in float32."""

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)

_LETTER = re.compile(r"\(([^\W\d_])\)|([^\W\d_])[.):]")
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+")


def letter(answer: str) -> str:
    """Remove brackets and punctuation around a single letter.

    >>> [letter(text) for text in ("(A)", "A)", "A.", "a:", "A. Yes", "(12)")]
    ['A', 'A', 'A', 'a', 'A. Yes', '(12)']
    """
    found = _LETTER.fullmatch(answer)
    return answer if found is None else found[1] or found[2]


def period(answer: str) -> str:
    """Remove a full stop at the end, but not from an ellipsis or initials.

    >>> [period(text) for text in ("Yes.", "1.5.", "...", "U.S.", ".")]
    ['Yes', '1.5', '...', 'U.S.', '.']
    """
    if len(answer) < 2 or not answer.endswith(".") or answer.endswith(".."):
        return answer
    return answer if _INITIALS.fullmatch(answer) else answer[:-1]


RULES: dict[AnswerRule, Callable[[str], str]] = {
    "strip": str.strip,
    "letter": letter,
    "period": period,
    "lower": str.lower,
}


def normalize(answer: str, rules: Sequence[AnswerRule], changed: Counter[str]) -> str:
    """Rewrite an answer by rules in order, and count each rule that changes it.

    Outer white space is removed before the first rule and after each.

    >>> changed = Counter()
    >>> normalize("(B) .", ["period", "letter"], changed), dict(changed)
    ('B', {'period': 1, 'letter': 1})
    """
    if "strip" in rules and answer != answer.strip():
        changed["strip"] += 1
    answer = answer.strip()
    for rule in rules:
        rewritten = RULES[rule](answer).strip()
        if rewritten != answer:
            changed[rule] += 1
        answer = rewritten
    return answer


class AnswerReader:
    """Read the answers of a source: tokens, numbers of labels, or values.

    The MLM head takes a token: that of `" " + answer` where it is one, or with `labels` that of the
    label's letter (or of its name, if the prompt lists no options). The classification head takes
    the number of the label, or without `labels` any finite number. Raises `InputError` for labels
    that cannot work.
    """

    def __init__(self, source: SourceConfig, template: Template, tokenizer: Tokenizer, head: Head):
        assert source.answer is not None
        self._column, self._rules = source.answer, source.normalize
        self._tokenizer, self._head = tokenizer, head
        self._names = None if source.labels is None else list(source.label_names)
        self._name_of = source.labels if isinstance(source.labels, Mapping) else None
        answers: Sequence[int] = range(len(source.label_names))
        if self._names is not None and head == "mlm":
            has_letters = "options" in template.fields
            make = Verbalizer.letters if has_letters else Verbalizer.words
            answers = [forms[0] for forms in make(self._names).ids(tokenizer)]
        self._answers = dict(zip(self._names or (), answers, strict=True))

    def read(
        self, records: Sequence[Record], dropped: Counter[str], normalized: Counter[str]
    ) -> list[tuple[Record, float]]:
        """Return the records that have an answer, each with it.

        Count dropped ones by their reason, and answers that each rule of `source.normalize`
        changed. Raises `InputError` for a value that is no answer, with file and row.
        """
        values = [(record, self._normalized(record, normalized)) for record in records]
        if self._names is None and self._head == "mlm":
            return self._one_token(values, dropped)
        read = _number if self._names is None else self._label
        return [
            (record, read(value, f"{record.where}: column {self._column!r}"))
            for record, value in values
        ]

    def _normalized(self, record: Record, normalized: Counter[str]) -> Any:
        value = record.fields[self._column]
        if not self._rules or not isinstance(value, str):
            return value
        return normalize(value, self._rules, normalized)

    def _one_token(
        self, values: Sequence[tuple[Record, Any]], dropped: Counter[str]
    ) -> list[tuple[Record, float]]:
        """Keep the records whose answer is one token after a space, with that token."""
        answers = []
        for record, value in values:
            require_text(record, self._column, "; give labels to name the classes of a number")
            answers.append(value.strip())
        encoded = self._tokenizer.encode_plain_batch([f" {answer}" for answer in answers])
        kept: list[tuple[Record, float]] = []
        for (record, _), answer, ids in zip(values, answers, encoded, strict=True):
            if not answer:
                dropped["blank answer"] += 1
            elif len(ids) != 1 or ids[0] in self._tokenizer.special_ids:
                dropped["answer is not one token"] += 1
            else:
                kept.append((record, ids[0]))
        return kept

    def _label(self, value: Any, where: str) -> float:
        """Return the answer of the label that a value names, by itself or as its position."""
        assert self._names is not None
        if value is None:
            raise InputError(f"{where} is null; expected a label")
        key = as_written(value).strip()
        if self._name_of is not None and key in self._name_of:
            return self._answers[self._name_of[key]]
        if self._name_of is not None:
            raise InputError(
                f"{where} is {value!r:.60}, which labels does not list; expected one of "
                f"{', '.join(map(repr, self._name_of))}"
            )
        if isinstance(value, str) and key in self._answers:
            return self._answers[key]
        if key.isdecimal():
            if any(name.isdecimal() for name in self._names):
                raise InputError(
                    f"{where} is {value!r:.60}, which may be a name or a position in labels; write "
                    'labels as a table, as in labels = { 1 = "bad" }'
                )
            if len(key) < 10 and int(key) < len(self._names):
                return self._answers[self._names[int(key)]]
        raise InputError(
            f"{where} is {value!r:.60}; expected one of {', '.join(map(repr, self._names))}, or a "
            f"number from 0 to {len(self._names) - 1}"
        )


def require_text(record: Record, column: str, hint: str = "") -> None:
    """Raise `InputError` with file, row and column for a value that is not text."""
    value = record.fields[column]
    where = f"{record.where}: column {column!r}"
    if value is None:
        raise InputError(f"{where} is null; expected text")
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
