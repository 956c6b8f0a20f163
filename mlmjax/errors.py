"""Define the errors shown to users, their exit codes and their wording."""

import difflib
import errno
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter, isfunction, signature
from pathlib import Path
from typing import Any, TypeVar

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
MAX_DETAIL_LINES = 20

Callee = TypeVar("Callee", bound=Callable[..., Any])
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """Reject user input: where, what was found, what was expected, what to do.

    `message` is one complete line; `details` are further lines, each one problem of many. The
    text of the error has at most 20 details; the command line prints it and exits with code 2.
    """

    def __init__(self, message: str, details: Sequence[str] = ()):
        self.message = printable(message)
        self.details = tuple(map(printable, details))
        super().__init__("\n".join([self.message, *first_details(self.details)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.details)  # Workers send errors to their parent.


class MissingColumnError(InputError):
    """Reject a row without a column, which most likely no other row has either.

    `columns` are the patterns of the column, of which one is needed.
    """

    columns: Sequence[str] = ()


class UnknownKeywordError(InputError, TypeError):
    """Reject a keyword argument that a function does not have."""


def first_details(details: Sequence[str]) -> list[str]:
    """Return at most 20 lines, and one with the number of the others."""
    more = len(details) - MAX_DETAIL_LINES
    return [*details[:MAX_DETAIL_LINES], *([f"... and {more} more"] if more > 0 else [])]


@contextmanager
def named_place(where: str, hint: str = "") -> Iterator[None]:
    """Put the place of an `InputError` before its message, and a hint after it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error.message}{hint}", error.details) from error


def counted(count: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "row"), counted(2, "batch")
    ('1 row', '2 batches')
    """
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith('ch') else 's'}"


def install_advice(extra: str) -> str:
    """Say how to install an extra, where mlmjax is installed and in a clone that is not.

    >>> install_advice("serve")
    "run pip install 'mlmjax[serve]', or pip install '.[serve]' in a clone of mlmjax"
    """
    return f"run pip install 'mlmjax[{extra}]', or pip install '.[{extra}]' in a clone of mlmjax"


def suggest_name(name: str, known: Sequence[str]) -> str:
    """Ask whether the nearest known name was meant; empty if none is near.

    >>> suggest_name("mmlu_prp", ["agnews", "mmlu_pro"])
    "did you mean 'mmlu_pro'? "
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def suggest_keywords(callee: Callee) -> Callee:
    """Let a function, or the public methods of a class, name the nearest of a mistyped keyword.

    They raise `UnknownKeywordError`; signatures and documentation stay as they are.

    >>> suggest_keywords(counted)(2, nuon="row")
    Traceback (most recent call last):
    mlmjax.errors.UnknownKeywordError: counted: has no argument 'nuon'; did you mean 'noun'? \
arguments: count, noun
    """
    if not isinstance(callee, type):
        return _checked(callee)
    for name, method in list(vars(callee).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isfunction(method):
            setattr(callee, name, _checked(method))
        elif isinstance(method, classmethod):
            setattr(callee, name, classmethod(_checked(method.__func__)))
    return callee


def _checked(function: Any) -> Any:
    parameters = signature(function).parameters.values()
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    known = [
        one.name for one in parameters if one.kind in named and one.name not in ("self", "cls")
    ]
    if any(one.kind is Parameter.VAR_KEYWORD for one in parameters):
        return function

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        for name in keywords:
            if name not in known:
                is_class = function.__name__ == "__init__"
                what = type(args[0]).__name__ if is_class and args else function.__name__
                raise UnknownKeywordError(
                    f"{what}: has no argument {name!r:.60}; {suggest_name(name, known)}"
                    f"arguments: {', '.join(known) or 'none'}"
                )
        return function(*args, **keywords)

    return checked


def printable(text: str) -> str:
    r"""Escape characters that do not print or that control a terminal.

    >>> print(printable("naïve\n\x1b[2J"))
    naïve\n\x1b[2J
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


class RunError(RuntimeError):
    """Stop a run for a reason outside its input: a non-finite loss, a full disk.

    The command line prints it and exits with code 1.
    """


def full_disk(error: BaseException) -> str | None:
    """Return the system's words for a full disk, quota or size limit, or None.

    The text is searched, because errors of libraries in other languages have no number.
    """
    words = map(os.strerror, _FULL)
    return next((found for found in words if found in str(error)), None)


def read_failed(path: Path, error: OSError, advice: str) -> InputError:
    """Return the error for a file that cannot be read, with what to do."""
    return InputError(f"{path}: cannot be read ({error.strerror or error}); {advice}")


def write_failed(path: Path, error: Exception) -> RunError:
    """Return the error for a failed write, with what to do."""
    reason = full_disk(error) or getattr(error, "strerror", None) or error
    return RunError(f"{path}: cannot be written ({reason}); {write_advice(error)}")


def write_advice(error: BaseException) -> str:
    """Say what to do after a failed write."""
    return (
        "free some space and run the same command again" if full_disk(error) else "check the path"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type without text."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
