"""Define the errors shown to users, their exit codes and their wording."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
MAX_DETAIL_LINES = 20
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
    """Reject a row without a column, which most likely no other row has either."""


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
