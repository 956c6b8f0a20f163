"""Print lines and progress bars on stderr."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from rich import progress as bars
from rich.console import Console

from mlmjax.parallel.processes import is_first

Progress = Callable[[int, int], None]
"""Called with the number of items done and their total."""

PATIENCE_SECONDS = 2.0
"""How long work runs before a progress bar appears."""

_FIGURES = {
    "loss": "loss {:.3f}",
    "loss_atp": "atp {:.3f}",
    "loss_dummy": "dummy {:.3f}",
    "loss_mlm": "mlm {:.3f}",
    "answer_accuracy": "accuracy {:.3f}",
    "grad_norm": "grad {:.2f}",
    "learning_rate": "lr {:.1e}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "mfu {:.1%}",
    "productive_share": "compute {:.0%}",
}


def describe(values: Mapping[str, float | None]) -> str:
    """Return the figures of one line of metrics.jsonl as text, the only part of a loss once.

    >>> describe({"loss": 2.5, "loss_atp": 2.5, "mfu": None, "tokens_per_second": 1234.5})
    'loss 2.500 | 1,234 tok/s'
    """
    found = [
        (form, values.get(key))
        for key, form in _FIGURES.items()
        if not (key.startswith("loss_") and values.get(key) == values.get("loss"))
    ]
    return " | ".join(
        form.format(value) for form, value in found if value is not None and math.isfinite(value)
    )


class RunDisplay(ExitStack):
    """Show a training: a progress bar on a terminal, plain lines in a pipe.

    Only the first process of a run prints.
    """

    def __init__(self, total: int, done: int = 0):
        super().__init__()
        self._console = _console(quiet=not is_first())
        self._bars: bars.Progress | None = None
        self._total = total
        if self._console.is_terminal and is_first():
            figures = bars.TextColumn("{task.fields[figures]}")
            self._bars = self.enter_context(_bar("training", self._console, figures))
            self._bar = self._bars.add_task("", total=total, completed=done, figures="")

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bars:
            self._bars.update(self._bar, completed=step)

    def show(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Show a line of metrics, next to the bar or as a line."""
        if self._bars and split == "train":
            self._bars.update(self._bar, figures=describe(values))
        else:
            name = "" if split == "train" else f"{split} | "
            self.say(f"step {step}/{self._total} | {name}{describe(values)}")


def _console(**options: Any) -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, **options)


def _bar(what: str, console: Console, *more: bars.ProgressColumn) -> bars.Progress:
    counts = bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn()
    return bars.Progress(bars.TextColumn(what), *counts, *more, console=console)


@contextmanager
def count_progress(what: str) -> Iterator[Progress]:
    """Yield a function that shows `(done, total)`: a bar on a terminal, else ten lines."""
    console = _console()
    if console.is_terminal:
        with _bar(what, console) as bar:
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
