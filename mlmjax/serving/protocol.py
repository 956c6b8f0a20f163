"""Read requests of the protocol strictly, and say in its shapes what is wrong with one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from mlmjax.decisions.questions import Question, read_question
from mlmjax.decisions.states import State
from mlmjax.errors import InputError
from mlmjax.storage import unique_keys
from mlmjax.text.checks import check_text

EXPLAIN = "x_explain"
"""A key of our own: what a request wants besides answers."""


@dataclass(frozen=True)
class Limits:
    """Bound what one request may hold, and what may wait.

    `body_bytes` of one body, `open_bytes` of all bodies under way, `questions` and
    `tokens` (of all prompts) of one request, `waiting` questions before a request is turned away,
    `together` questions of a batch, `gather_seconds` to wait for more requests, `body_seconds` to
    read a body, and `answer_seconds` until a request is given up.
    """

    body_bytes: int = 8 * 2**20
    open_bytes: int = 128 * 2**20
    questions: int = 256
    tokens: int = 2**17
    waiting: int = 1024
    together: int = 128
    gather_seconds: float = 0.003
    body_seconds: float = 20.0
    answer_seconds: float = 120.0


class RequestError(Exception):
    """Refuse a request with a status, a type of error and a message."""

    def __init__(
        self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
    ):
        self.status, self.kind, self.message = status, kind, message
        self.headers = dict(headers or {})
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        return {"detail": {"error_type": self.kind, "message": self.message}}


class InvalidRequestError(RequestError):
    """Refuse a request whose body is not valid, with each problem and its place."""

    def __init__(self, problems: list[tuple[list[Any], str, str]]):
        self.problems = problems
        super().__init__(422, "validation_error", problems[0][1])

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        return {
            "detail": [
                {"loc": ["body", *loc], "msg": text, "type": kind}
                for loc, text, kind in self.problems
            ]
        }


@dataclass(frozen=True)
class Asked:
    """What a request asks: a model, a state and questions by their ids.

    `explain` wants the importance of the words of the state for each answer.
    """

    model: str
    state: State
    questions: Mapping[str, Question]
    explain: bool = False


def read_request(body: bytes, limits: Limits) -> Asked:
    """Read the body of a request; raise `InvalidRequestError` that places each problem."""
    values = _parse(body)
    problems: list[tuple[list[Any], str, str]] = [
        ([key], "is missing; this field is required", "missing")
        for key in ("model", "state", "questions")
        if key not in values
    ]

    def attempt(loc: list[Any], read: Any, *given: Any) -> Any:
        try:
            return read(*given)
        except InputError as error:
            # Names may hold half a character, which no response can hold.
            plain = [_printable(one) if isinstance(one, str) else one for one in loc]
            problems.append((plain, _printable(error.message), "value_error"))

    state, questions = None, {}
    if "model" in values:
        attempt(["model"], check_text, values["model"], "model")
    if "state" in values:
        state = attempt(["state"], State, values["state"])
    if "questions" in values:
        given = values["questions"]
        if attempt(["questions"], _check_questions, given, limits.questions):
            for key, value in given.items():
                attempt(["questions", key], _check_id, key)
                questions[key] = attempt(["questions", key], read_question, value)
    explain = values.get(EXPLAIN, False)
    if not isinstance(explain, bool):
        problems.append(([EXPLAIN], "expected true or false", "bool_type"))
    if problems:
        raise InvalidRequestError(problems[:100])
    assert state is not None
    return Asked(values["model"], state, questions, explain)


def _parse(body: bytes) -> dict[str, Any]:
    def reject(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        text = body.decode("utf-8")
        values = json.loads(text, object_pairs_hook=unique_keys, parse_constant=reject)
    except (ValueError, RecursionError) as error:
        found = f"is not valid JSON ({_printable(str(error))}); expected an object in UTF-8"
        raise InvalidRequestError([([], found, "json_invalid")]) from error
    if not isinstance(values, dict):
        found = f"is a JSON {type(values).__name__}; expected an object"
        raise InvalidRequestError([([], found, "dict_type")])
    return values


def _check_questions(given: Any, most: int) -> bool:
    if not isinstance(given, dict):
        raise InputError(f"is a JSON {type(given).__name__}; expected an object of questions")
    if not given:
        raise InputError("holds no question; ask at least one")
    if len(given) > most:
        raise InputError(f"holds {len(given)} questions; expected at most {most} in one request")
    return True


def _check_id(key: str) -> None:
    check_text(key, "the id")
    if not key:
        raise InputError("the id of a question is empty; expected some text")


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
