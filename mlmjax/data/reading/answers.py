"""What the answer column of a record says: a one-token answer, one of the labels, or a number."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mlmjax.config.data import AnswerRule, SourceConfig
from mlmjax.data.reading.files import Record
from mlmjax.errors import InputError
from mlmjax.text.checks import check_text
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import Verbalizer

Head = Literal["mlm", "classification"]

Answers = list[tuple[Record, float]]
"""Records that are kept, each with its answer: a token id, a label's number, or a value."""

MOST = 1e6
"""The largest value to predict: squared errors and their gradients have to stay well in float32."""

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)

_LETTER = re.compile(r"\(([^\W\d_])\)|([^\W\d_])[.):]")
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+")


def strip(answer: str) -> str:
    """Take off outer white space; every answer is read so.

    >>> strip(" yes\\n")
    'yes'
    """
    return answer.strip()


def letter(answer: str) -> str:
    """Take brackets and punctuation off a lone letter.

    >>> [letter(text) for text in ("(A)", "A)", "A.", "a:", "A. Yes", "(12)")]
    ['A', 'A', 'A', 'a', 'A. Yes', '(12)']
    """
    found = _LETTER.fullmatch(answer)
    return answer if found is None else found[1] or found[2]


def period(answer: str) -> str:
    """Take off a full stop at the end, but not an ellipsis or that of initials.

    >>> [period(text) for text in ("Yes.", "1.5.", "...", "U.S.", ".")]
    ['Yes', '1.5', '...', 'U.S.', '.']
    """
    if len(answer) < 2 or not answer.endswith(".") or answer.endswith(".."):
        return answer
    return answer if _INITIALS.fullmatch(answer) else answer[:-1]


def lower(answer: str) -> str:
    """Write in lower case.

    >>> lower("Yes")
    'yes'
    """
    return answer.lower()


RULES: dict[AnswerRule, Callable[[str], str]] = {
    "strip": strip,
    "letter": letter,
    "period": period,
    "lower": lower,
}


def normalize(answer: str, rules: Sequence[AnswerRule], changed: Counter[str]) -> str:
    """Rewrite an answer by the rules in their order; count for each rule the answers it changed.

    Outer white space is off before the first rule and after each.

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


BLANK_ANSWER = "blank answer"
MANY_TOKENS = "answer is not one token"


def answer_reader(
    source: SourceConfig, template: Template, tokenizer: Tokenizer, head: Head
) -> Callable[[Sequence[Record], Counter[str], Counter[str]], Answers]:
    """Return the function from records to answers; what it drops and rewrites it counts.

    Its counters are by reason and by rule of `source.normalize`, which text answers are rewritten
    by first.

    The MLM head takes a token: that of `" " + answer` where it is one, or with `labels` that of the
    label's letter (or of its name, when the prompt lists no options). The classification head takes
    the number of the label, or without `labels` any finite number.

    Raises `InputError` for labels that cannot work; the function raises it for a value that is no
    answer, naming file and row.
    """
    column = source.answer
    assert column is not None
    rules = source.normalize

    def values(records: Sequence[Record], changed: Counter[str]) -> Iterator[tuple[Record, Any]]:
        for record in records:
            value = record.fields[column]
            is_text = isinstance(value, str)
            yield record, normalize(value, rules, changed) if is_text and rules else value

    if source.labels is None:
        if head == "mlm":
            return lambda records, dropped, changed: _one_token(
                list(values(records, changed)), column, tokenizer, dropped
            )
        return lambda records, _, changed: [
            (record, _number(value, f"{record.where}: column {column!r}"))
            for record, value in values(records, changed)
        ]
    names = list(source.label_names)
    if head == "mlm":
        lettered = "options" in template.fields
        verbalizer = Verbalizer.letters(names) if lettered else Verbalizer.words(names)
        answers = [forms[0] for forms in verbalizer.ids(tokenizer)]
    else:
        answers = list(range(len(names)))
    by_value = source.labels if isinstance(source.labels, Mapping) else None
    labels = _Labels(names, dict(zip(names, answers, strict=True)), by_value)
    return lambda records, _, changed: [
        (record, labels.answer(value, f"{record.where}: column {column!r}"))
        for record, value in values(records, changed)
    ]


def require_text(record: Record, column: str, hint: str = "") -> None:
    """Raise `InputError` that names file, row and column unless a value is text."""
    value = record.fields[column]
    where = f"{record.where}: column {column!r}"
    if value is None:
        raise InputError(f"{where} is null; expected text")
    if not isinstance(value, str):
        raise InputError(f"{where} is {type(value).__name__} ({value!r:.60}); expected text{hint}")
    check_text(value, where)


def _one_token(
    values: Sequence[tuple[Record, Any]],
    column: str,
    tokenizer: Tokenizer,
    dropped: Counter[str],
) -> Answers:
    """Keep the records whose answer is one token after a space, with that token."""
    answers = []
    for record, value in values:
        require_text(record, column, "; give labels to name the classes of a number")
        answers.append(value.strip())
    encoded = tokenizer.encode_plain_batch([f" {answer}" for answer in answers])
    kept: Answers = []
    for (record, _), answer, ids in zip(values, answers, encoded, strict=True):
        if not answer:
            dropped[BLANK_ANSWER] += 1
        elif len(ids) != 1 or ids[0] in tokenizer.special_ids:
            dropped[MANY_TOKENS] += 1
        else:
            kept.append((record, ids[0]))
    return kept


def _number(value: Any, where: str) -> float:
    """Read a value to predict, which CSV files hold as text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, str) and len(value) < 100 and _NUMBER.fullmatch(value):
        value, is_number = float(value), True
    if not is_number or not abs(value) <= MOST:
        # The digits of a huge integer cannot be written.
        found = "beyond that" if isinstance(value, int) and is_number else f"{value!r:.60}"
        raise InputError(
            f"{where} is {found}; expected a number of at most {MOST:g} (larger ones: give them in "
            "another unit), or give labels to name the classes"
        )
    return float(value)


class _Labels(NamedTuple):
    """The classes of a labelled table: names in order, the answer to each, names by value."""

    names: list[str]
    answers: dict[str, int]
    by_value: Mapping[str, str] | None

    def answer(self, value: Any, where: str) -> int:
        """Give the answer for a value, or refuse it by file and row."""
        return self.answers[self._name(value, where)]

    def _name(self, value: Any, where: str) -> str:
        if value is None:
            raise InputError(f"{where} is null; expected a label")
        key = _plain(value)
        if self.by_value is not None:
            if key in self.by_value:
                return self.by_value[key]
            raise InputError(
                f"{where} is {value!r:.60}, which labels does not list; expected one of "
                f"{', '.join(map(repr, self.by_value))}"
            )
        if isinstance(value, str) and value.strip() in self.answers:
            return value.strip()
        if key.isdecimal():
            if any(name.isdecimal() for name in self.names):
                raise InputError(
                    f"{where} is {value!r:.60}, and it is not clear whether that is a name or a "
                    'position in labels; write labels as a table, as in labels = { 1 = "bad" }'
                )
            if len(key) < 10 and int(key) < len(self.names):
                return self.names[int(key)]
        raise InputError(
            f"{where} is {value!r:.60}; expected one of {', '.join(map(repr, self.names))}, or a "
            f"number from 0 to {len(self.names) - 1}"
        )


def _plain(value: Any) -> str:
    """Write a label as a configuration names it.

    >>> _plain(2.0), _plain(True), _plain(" yes ")
    ('2', 'true', 'yes')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()
