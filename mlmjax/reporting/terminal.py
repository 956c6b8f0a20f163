"""Print lines and progress bars on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich import progress as bars
from rich.console import Console

from mlmjax.parallel.processes import is_first

Progress = Callable[[int, int], None]
"""Called with the number of items done and their total."""

PATIENCE_SECONDS = 2.0
"""How long work runs before a progress bar appears."""


def new_console(**options: Any) -> Console:
    """Return a console for stderr that prints texts as they are."""
    return Console(stderr=True, highlight=False, soft_wrap=True, **options)


def new_bar(what: str, console: Console, *more: bars.ProgressColumn) -> bars.Progress:
    """Return a progress bar with its counts, the remaining time and more columns."""
    counts = bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn()
    return bars.Progress(bars.TextColumn(what), *counts, *more, console=console)


@contextmanager
def count_progress(what: str) -> Iterator[Progress]:
    """Yield a function that shows `(done, total)`: a bar on a terminal, else ten lines."""
    console = new_console()
    if console.is_terminal:
        with new_bar(what, console) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if (tenths := 10 * done // total) > shown:
            shown = tenths
            say(f"{what} {done}/{total}")

    yield show


@contextmanager
def progress_bar(what: str, shown: bool | None) -> Iterator[Progress | None]:
    """Yield a function of `(done, total)` for work that may take long, or None.

    If `shown` is True, it is that of `count_progress`. If `shown` is None and stderr is a terminal,
    a bar appears after two seconds.
    """
    if not (shown or (shown is None and sys.stderr.isatty())):
        yield None
        return
    started, inner = time.monotonic(), list[Progress]()

    def show(done: int, total: int) -> None:
        is_late = done < total and time.monotonic() - started > PATIENCE_SECONDS
        if not inner and (shown or is_late):
            inner.append(stack.enter_context(count_progress(what)))
        for one in inner:
            one(done, total)

    with ExitStack() as stack:
        yield show


def say(text: str) -> None:
    """Print one line to stderr, from the first process only."""
    if is_first():
        print(text, file=sys.stderr, flush=True)
