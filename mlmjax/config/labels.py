"""Read the label of a row by one rule, for training and for evaluation."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from mlmjax.config.columns import as_written, is_missing
from mlmjax.config.data import AnswerRule
from mlmjax.errors import InputError

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


def label_key(value: Any) -> str:
    """Return a cell as `labels` and `drop_labels` write it; a missing value is `null`.

    >>> label_key(" yes"), label_key(-1), label_key(2.0), label_key(None)
    ('yes', '-1', '2', 'null')
    """
    return "null" if is_missing(value) else as_written(value).strip()


def is_dropped(value: Any, normalized: Any, drop: Collection[str]) -> bool:
    """Tell whether `drop_labels` names a value, as it is written or as it is normalised.

    >>> is_dropped(-1, -1, ["-1"]), is_dropped("Skip.", "skip", ["skip"]), is_dropped("", "", [""])
    (True, True, True)
    """
    return bool(drop) and not {label_key(value), label_key(normalized)}.isdisjoint(drop)


def find_label(
    value: Any, names: Sequence[str], table: Mapping[str, str] | None = None
) -> int | None:
    """Return the number of the label that a value names; None for no label.

    A value is a key of `table`, if there is one. Otherwise it is a name, or a position from 0. A
    number can be both if names are numbers. That raises `InputError`, unless every name is its own
    position. Text that equals a name is the name.

    >>> [find_label(value, ["no", "yes"]) for value in ("yes ", 1, "0", 2)]
    [1, 1, 0, None]
    >>> [find_label(value, ["1", "2"]) for value in ("1", "2")]
    [0, 1]
    """
    key = label_key(value)
    if is_missing(value):
        return None
    if table is not None:
        return names.index(table[key]) if key in table else None
    stripped = [name.strip() for name in names]
    is_number = key.isdecimal()
    if isinstance(value, str) or not is_number:
        for known, wanted in ((names, value), (stripped, key)):
            if known.count(wanted) == 1:
                return known.index(wanted)
    if not is_number:
        return None
    # Names that are their own positions, "0" and "1", leave no doubt.
    is_clear = all(name == str(place) for place, name in enumerate(stripped))
    if not is_clear and any(name.isdecimal() for name in stripped):
        raise InputError(
            f"is {value!r:.60}, which may be a name or a position in labels; write labels as a "
            'table, as in labels = { 1 = "bad" }'
        )
    return int(key) if len(key) < 10 and int(key) < len(names) else None


MOST_OFF = 1e-3
"""How far the sum of probabilities may be from 1, for they are often rounded."""


def is_distribution(value: Any) -> bool:
    """Tell whether a value gives probabilities of labels: a table, or a list of numbers.

    >>> [is_distribution(value) for value in ({"a": 1.0}, [0.5, 0.5], "yes", ["yes"], 1)]
    [True, True, False, False, False]
    """
    if isinstance(value, Mapping):
        return True
    if isinstance(value, str | bytes) or not hasattr(value, "__len__"):
        return False
    return len(value) > 0 and not any(isinstance(one, str | bytes) for one in value)


def read_distribution(value: Any, names: Sequence[str]) -> list[float]:
    """Return the probability of each label, which sum to 1, from a table or a list.

    A table `{label: probability}` may leave labels out; a list has all in the order of `names`.
    Sums within `MOST_OFF` of 1 are divided by the sum. Raises `InputError` for anything else.

    >>> read_distribution({"yes": 0.25, "no": 0.75}, ["no", "yes"])
    [0.75, 0.25]
    """
    if isinstance(value, Mapping):
        for name in value:
            if name not in names and value[name] is not None:
                known = ", ".join(map(repr, names))
                raise InputError(
                    f"gives a probability to {name!r:.60}, which is not a label; expected some of "
                    f"{known:.200}"
                )
        given = [0.0 if value.get(name) is None else value[name] for name in names]
    else:
        given = list(value)
        if len(given) != len(names):
            raise InputError(
                f"has {len(given)} probabilities; expected {len(names)}, one for each of "
                f"{', '.join(map(repr, names)):.200}"
            )
    for name, share in zip(names, given, strict=True):
        is_number = isinstance(share, Real) and type(share).__name__ not in ("bool", "bool_")
        if not is_number or not 0 <= share < math.inf:
            raise InputError(
                f"gives {name!r:.60} the probability {share!r:.40}; expected a number from 0 to 1"
            )
    total = math.fsum(given)
    if abs(total - 1) > MOST_OFF:
        raise InputError(f"its probabilities sum to {total:.6g}; expected 1")
    return [float(share) / total for share in given]


def drop_advice(value: Any) -> str:
    """Say how rows with a value are left out.

    >>> drop_advice(-1)
    'drop_labels = ["-1"] leaves such rows out'
    """
    key = json.dumps(label_key(value)[:40], ensure_ascii=False)
    return f"drop_labels = [{key}] leaves such rows out"
