"""The one error type for everything a user can get wrong."""

from collections.abc import Sequence


class InputError(ValueError):
    """A refusal of user input: where, what was found, what was expected, what to do.

    `message` is one line complete in itself; `details` are further lines (each one problem of
    many). The command line prints the message, at most 20 details, and exits with code 2.
    """

    def __init__(self, message: str, details: Sequence[str] = ()):
        self.message = message
        self.details = tuple(details)
        super().__init__("\n".join([message, *self.details]))


class RunError(RuntimeError):
    """A run that could not go on for a reason outside its input: a non-finite loss, a full disk.

    The command line prints it and exits with code 1.
    """
