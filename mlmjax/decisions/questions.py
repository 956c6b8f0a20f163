"""Ask three kinds of question: a choice, yes or no, and a level of a scale."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlmjax.config.labels import is_distribution, read_distribution
from mlmjax.errors import InputError, named_place, suggest_keywords
from mlmjax.text.checks import check_text

Text = str | Mapping[str, Any] | Sequence[Any]
"""A text, or JSON that is shown as one line of it."""

MOST_OPTIONS, MOST_LEVELS = 255, 10
CHOICE, YES_NO, SCORE = "choice", "noul", "score"
"""The types of question by their names in the protocol."""


@suggest_keywords
@dataclass(frozen=True)
class Choice:
    """Ask which one of 2 to 255 options is right.

    `criteria` maps the name of each option to its description or None; a list of names will do.
    `instructions` and descriptions are texts, or JSON that is shown as one line. Raises
    `InputError` for other criteria, and for names that are empty or repeated.

    >>> Choice("Which team?", {"billing": "invoices", "support": None}).shown
    ('billing: invoices', 'support')
    """

    instructions: Text
    criteria: Mapping[str, Text | None] | Sequence[str]
    type: ClassVar[str] = CHOICE

    def __post_init__(self) -> None:
        _show(self.instructions, "instructions")
        names = _list(self.criteria, "a table from the name of each option to its description")
        for name in names:
            check_text(name, "criteria: the name of an option")
            if not name:
                raise InputError("criteria: the name of an option is empty; give every name")
        if len(set(names)) < len(names):
            name = next(name for at, name in enumerate(names) if name in names[:at])
            raise InputError(f"criteria: option {name!r:.60} appears twice; give distinct names")
        _check_count(names, "options", MOST_OPTIONS)
        table = self.criteria if isinstance(self.criteria, Mapping) else dict.fromkeys(names)
        for name, text in table.items():
            _show(text or "", f"criteria: the description of {name!r:.60}")
        object.__setattr__(self, "criteria", dict(table))

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the answers."""
        return tuple(self.criteria)

    @property
    def shown(self) -> tuple[str, ...]:
        """Return the text of each answer in the prompt."""
        assert isinstance(self.criteria, Mapping)
        return tuple(_described(name, text) for name, text in self.criteria.items())

    @property
    def words(self) -> tuple[str, ...]:
        """Return what stands for each answer at the slot if it is answered by words."""
        return self.names

    def number(self, answer: Any) -> int:
        """Return the number of an answer, given by its name."""
        if isinstance(answer, str) and answer in self.names:
            return self.names.index(answer)
        raise InputError(
            f"the answer is {answer!r:.60}; expected one of {', '.join(map(repr, self.names)):.300}"
        )


@suggest_keywords
@dataclass(frozen=True)
class YesNo:
    """Ask a question of yes or no.

    `criteria` may say what counts as `"true"`, as `"false"`, or both. Instructions may be left out
    if the criteria say enough.

    >>> YesNo("Is it urgent?", {"true": "within a day"}).shown
    ('yes: within a day', 'no')
    """

    instructions: Text | None = None
    criteria: Mapping[str, Text | None] | None = None
    type: ClassVar[str] = YES_NO
    names: ClassVar[tuple[str, ...]] = ("true", "false")
    words: ClassVar[tuple[str, ...]] = ("yes", "no")

    def __post_init__(self) -> None:
        _show(self.instructions or "", "instructions")
        if self.criteria is None:
            return
        if not isinstance(self.criteria, Mapping):
            raise InputError(
                f"criteria: is {self.criteria!r:.60}; expected a table of 'true', 'false' or both"
            )
        table = {_side(key): text for key, text in self.criteria.items()}
        for side, text in table.items():
            if side not in self.names:
                raise InputError(f"criteria: has {side!r:.60}; expected 'true', 'false' or both")
            _show(text or "", f"criteria: {side}")
        object.__setattr__(self, "criteria", table)

    @property
    def shown(self) -> tuple[str, ...]:
        """Return the text of each answer in the prompt."""
        table = self.criteria or {}
        pairs = zip(self.words, self.names, strict=True)
        return tuple(_described(word, table.get(side)) for word, side in pairs)

    def number(self, answer: Any) -> int:
        """Return the number of an answer: 0 for true, 1 for false."""
        if type(answer).__name__ in ("bool", "bool_"):
            return 0 if answer else 1
        raise InputError(f"the answer is {answer!r:.60}; expected true or false")


@suggest_keywords
@dataclass(frozen=True)
class Score:
    """Ask for one of 2 to 10 levels, listed from low to high.

    >>> Score("How urgent is it?", ["can wait", "this week", "today"]).names
    ('0', '1', '2')
    """

    instructions: Text
    criteria: Sequence[Text]
    type: ClassVar[str] = SCORE

    def __post_init__(self) -> None:
        _show(self.instructions, "instructions")
        if isinstance(self.criteria, Mapping):
            raise InputError("criteria: is a table; expected a list of levels from low to high")
        levels = _list(self.criteria, "a list of levels from low to high")
        _check_count(levels, "levels", MOST_LEVELS)
        for number, level in enumerate(levels):
            _show(level, f"criteria: level {number}")
        object.__setattr__(self, "criteria", tuple(levels))

    @property
    def names(self) -> tuple[str, ...]:
        """Return the numbers of the levels as text, from 0."""
        return tuple(map(str, range(len(self.criteria))))

    @property
    def shown(self) -> tuple[str, ...]:
        """Return the text of each level in the prompt."""
        return tuple(_show(level, "criteria") for level in self.criteria)

    @property
    def words(self) -> tuple[str, ...]:
        """Return what stands for each level at the slot if it is answered by words."""
        return self.shown

    def number(self, answer: Any) -> int:
        """Return the number of a level, given by its number or its text."""
        is_number = hasattr(answer, "__index__") and type(answer).__name__ not in ("bool", "bool_")
        if is_number and 0 <= int(answer) < len(self.criteria):
            return int(answer)
        if isinstance(answer, str) and self.shown.count(answer) == 1:
            return self.shown.index(answer)
        raise InputError(
            f"the answer is {answer!r:.60}; expected a level from 0 to {len(self.criteria) - 1}, "
            "or the text of one"
        )


Question = Choice | YesNo | Score


def read_target(question: Question, answer: Any) -> list[float]:
    """Return a right answer as a distribution over the options.

    It is the name of an option, a bool, the number of a level or its text, or a distribution: a
    table `{name: p}` or a list of probabilities. Raises `InputError` for anything else.

    >>> read_target(YesNo("Is it urgent?"), True), read_target(YesNo("Is it urgent?"), [0.3, 0.7])
    ([1.0, 0.0], [0.3, 0.7])
    """
    if not is_distribution(answer):
        number = question.number(answer)
        return [float(at == number) for at in range(len(question.names))]
    if isinstance(answer, Mapping) and not isinstance(question, Choice):
        answer = {_name_of(key): share for key, share in answer.items()}
    with named_place("the answer"):
        return read_distribution(answer, question.names)


def _name_of(key: Any) -> Any:
    """Return the name of an answer that is given as a bool or a number."""
    return str(key).lower() if isinstance(key, int) else key


TYPES: dict[str, type[Choice] | type[YesNo] | type[Score]] = {
    kind.type: kind for kind in (Choice, YesNo, Score)
}


def read_question(value: Any) -> Question:
    """Return a question as it is, or made from its JSON object in the protocol.

    >>> read_question({"type": "noul", "instructions": "Is it urgent?"})
    YesNo(instructions='Is it urgent?', criteria=None)
    """
    if isinstance(value, Choice | YesNo | Score):
        return value
    if not isinstance(value, Mapping):
        raise InputError(f"is {value!r:.60}; expected a Choice, a YesNo or a Score")
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in TYPES:
        raise InputError(f"type: is {kind!r:.60}; expected {', '.join(TYPES)}")
    needed = () if kind == YES_NO else ("instructions", "criteria")
    for key in needed:
        if value.get(key) is None:
            raise InputError(f"{key}: is missing; a question of type {kind!r} needs it")
    return TYPES[kind](value.get("instructions"), value.get("criteria"))  # type: ignore[arg-type]


def read_questions(values: Any) -> dict[str, Question]:
    """Return the questions of a call by their ids; raise `InputError` that names a wrong one."""
    if not isinstance(values, Mapping):
        raise InputError(
            f"questions: found {type(values).__name__}; expected a table from ids to questions"
        )
    if not values:
        raise InputError("questions: there are none; ask at least one")
    found = {}
    for key, value in values.items():
        check_text(key, "questions: an id")
        if not key:
            raise InputError("questions: an id is empty; expected some text")
        with named_place(f"questions: {key!r:.60}"):
            found[key] = read_question(value)
    return found


def show_text(value: Text | None) -> str:
    """Return a text as it is, and JSON as one line of it.

    >>> show_text({"is": ["a", 1]})
    '{"is": ["a", 1]}'
    """
    return _show(value or "", "text")


def _show(value: Any, what: str) -> str:
    if isinstance(value, str):
        check_text(value, what)
        return value
    if isinstance(value, Mapping | list | tuple):
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{what}: cannot be written as JSON ({error})") from error
        check_text(text, what)
        return text
    raise InputError(f"{what}: is {value!r:.60}; expected text, a table or a list")


def _described(name: str, text: Text | None) -> str:
    said = show_text(text).strip()
    return f"{name}: {said}" if said else name


def _list(values: Any, expected: str) -> list[Any]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InputError(f"criteria: is {values!r:.60}; expected {expected}")
    return list(values)


def _check_count(values: Sequence[Any], what: str, most: int) -> None:
    if not 2 <= len(values) <= most:
        raise InputError(f"criteria: has {len(values)} {what}; expected 2 to {most}")


def _side(key: Any) -> Any:
    return {True: "true", False: "false"}.get(key, key) if isinstance(key, bool) else key
