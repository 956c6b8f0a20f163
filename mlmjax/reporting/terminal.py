"""Print lines and progress bars on stderr."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column
from rich.text import Text

from mlmjax.parallel.processes import is_first
from mlmjax.reporting.verbosity import is_quiet, is_shown

Progress = Callable[[int, int], None]
"""Called with the number of items done and their total; a total of 0 is unknown."""

PATIENCE_SECONDS = 2.0
"""How long work runs before anything shows its progress."""
LINE_SECONDS = 10.0
"""How often a line shows progress where there is no terminal."""
NARROW = 60
"""Columns of a terminal below which the name of a bar makes room for the bar."""


def new_console() -> Console:
    """Return a console for stderr that prints texts as they are.

    It prints nothing with `--quiet`, and nothing in other processes than the first.
    """
    quiet = is_quiet() or not is_first()
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)


class Figures:
    """Show as many figures as the width holds, from the left; cut none in half."""

    def __init__(self, text: str):
        self.parts = [part for part in text.split(" | ") if part]

    def fitting(self, width: int) -> str:
        """Return the leading figures that `width` columns hold.

        >>> Figures("loss 0.71 | accuracy 0.80 | lr 4.9e-04").fitting(25)
        'loss 0.71 | accuracy 0.80'
        """
        for count in range(len(self.parts), 0, -1):
            if len(text := " | ".join(self.parts[:count])) <= width:
                return text
        return ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.fitting(options.max_width), no_wrap=True, overflow="crop")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, min(len(" | ".join(self.parts)), options.max_width))


class _FiguresColumn(bars.ProgressColumn):
    """The figures of a task, in the room that the other columns leave."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(ratio=1, no_wrap=True, overflow="crop"))

    def render(self, task: bars.Task) -> Figures:
        return Figures(task.fields.get("figures", ""))


class _CountColumn(bars.ProgressColumn):
    """The items done, of their total where it is known."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: bars.Task) -> Text:
        total = f"/{task.total:.0f}" if task.total else ""
        return Text(f"{task.completed:.0f}{total}", style="progress.download", no_wrap=True)


def new_bar(what: str, console: Console) -> bars.Progress:
    """Return a progress bar with counts, the time left, and `figures` where there is room.

    Bar, counts and time left keep their room at any width of the terminal.
    """
    width = console.width
    columns: list[bars.ProgressColumn] = []
    if width >= NARROW:
        columns.append(bars.TextColumn(what, table_column=Column(no_wrap=True)))
    columns += [
        bars.BarColumn(bar_width=max(5, min(20, width // 5)), table_column=Column(no_wrap=True)),
        _CountColumn(),
        bars.TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _FiguresColumn(),
    ]
    # Results on stdout stay there: rich would otherwise print them to the console of the bar.
    redirect = sys.stdout.isatty()
    return bars.Progress(*columns, console=console, expand=True, redirect_stdout=redirect)


class Ticker:
    """Call a function after `first` seconds and then every `every` seconds, until the block ends.

    It is called from a thread, so that it also reports on work that counts nothing for long.
    """

    def __init__(self, tick: Callable[[], None], first: float, every: float):
        self._tick, self._waits = tick, (first, every)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="progress")

    def _run(self) -> None:
        first, every = self._waits
        over = self._over.wait(first)
        while not over:
            self._tick()
            over = self._over.wait(every)

    def __enter__(self) -> "Ticker":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


class _Work:
    """Work whose progress is shown if it takes long; see `count_progress`."""

    def __init__(self, what: str, first: str, last: str):
        self.what, self.first, self.last = what, first, last
        self.started = time.monotonic()
        self.done, self.total = 0, 0
        self.shown_done, self.is_over = -1, False
        self.bar: bars.Progress | None = None
        self.task: bars.TaskID | None = None
        self.console = new_console()
        self.lock = threading.Lock()

    def update(self, done: int, total: int) -> None:
        with self.lock:
            if not self.done and done:
                # What came before the first items, such as compiling, says nothing about the rest.
                self.first_done, self.first_at = done, time.monotonic()
            self.done, self.total = done, total
            self._draw()

    def show(self) -> None:
        """Show the present state: by the bar on a terminal, by a line elsewhere."""
        with self.lock:
            if not self.console.is_terminal:
                self.shown_done = self.done
                say(self.line())
            elif self.bar is None:
                self.bar = new_bar(self.what, self.console)
                self.task = self.bar.add_task("", total=None, figures=self.first)
                self.bar.start()
                self._draw()

    def _draw(self) -> None:
        if self.bar is not None and self.task is not None and self.done:
            figures = self.last if self.done == self.total else ""
            total = self.total or None
            self.bar.update(self.task, completed=self.done, total=total, figures=figures)

    def line(self) -> str:
        """Return the present state as a line."""
        seconds = time.monotonic() - self.started
        if not self.done:
            return f"{self.what}: {self.first or 'working'} | {seconds:.0f} s so far"
        if not self.total:
            return f"{self.what} {self.done:,} | {seconds:.0f} s so far"
        text = f"{self.what} {self.done}/{self.total}"
        if self.done >= self.total:
            doing = f"{self.last} | " if self.last and not self.is_over else ""
            return f"{text} | {doing}{seconds:.0f} s{' so far' if doing else ''}"
        if self.done > self.first_done:
            each = (time.monotonic() - self.first_at) / (self.done - self.first_done)
            text += f" | {about(each * (self.total - self.done))} left"
        return text

    def finish(self) -> None:
        """Show the last state, if any other one was shown."""
        with self.lock:
            self.is_over = True
            if self.bar is not None:
                self.bar.stop()
            elif self.shown_done >= 0 and self.done > self.shown_done:
                say(self.line())


@contextmanager
def count_progress(
    what: str, first: str = "", last: str = "", *, at_once: bool = False
) -> Iterator[Progress]:
    """Yield a function that shows `(done, total)` of work that takes over two seconds.

    A terminal shows a bar. Elsewhere a line appears every ten seconds. `first` says what happens
    before anything is done, such as compiling, and `last` what happens after everything is. With
    `at_once` nothing waits for two seconds.
    """
    work = _Work(what, first, last)
    if at_once and work.console.is_terminal:
        work.show()

    def show(done: int, total: int) -> None:
        work.update(done, total)
        if at_once and work.shown_done < 0 and not work.console.is_terminal:
            work.show()

    try:
        with Ticker(work.show, PATIENCE_SECONDS, LINE_SECONDS):
            yield show
    finally:
        work.finish()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that work without a count goes on, if it takes over two seconds."""
    console, started = new_console(), time.monotonic()
    status = console.status(what)

    def show() -> None:
        if console.is_terminal:
            status.start()
        else:
            seconds = time.monotonic() - started
            say(f"{what} | {seconds:.0f} s so far")

    try:
        with Ticker(show, PATIENCE_SECONDS, LINE_SECONDS):
            yield
    finally:
        status.stop()


@contextmanager
def progress_bar(
    what: str, shown: bool | None, last: str = "", first: str = ""
) -> Iterator[Progress | None]:
    """Yield a function of `(done, total)` for work that may take long, or None.

    If `shown` is True, progress is shown at once. If `shown` is None and stderr is a terminal,
    a bar appears after two seconds. `first` and `last` are those of `count_progress`.
    """
    if not (shown or (shown is None and sys.stderr.isatty())):
        yield None
        return
    with count_progress(what, first, last, at_once=bool(shown)) as show:
        yield show


def about(seconds: float) -> str:
    """Return an estimated time in words, rounded as an estimate deserves.

    >>> about(3.2), about(47), about(400), about(9000)
    ('about 3 s', 'about 50 s', 'about 7 min', 'about 2.5 h')
    """
    if seconds < 10:
        return f"about {max(1, round(seconds))} s"
    if seconds < 95:
        return f"about {round(seconds / 5) * 5 if seconds < 30 else round(seconds / 10) * 10} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"


def describe_compiling(seconds: float, what: str = "") -> str:
    """Say what is compiled, and how long that takes if no earlier run kept its result.

    >>> describe_compiling(38, "program 2")
    'compiling program 2, about 40 s | first time on this machine'
    """
    return f"compiling{what and ' '}{what}, {about(seconds)} | first time on this machine"


def say(text: str) -> None:
    """Print one line to stderr, from the first process only; with `--quiet` only a warning."""
    if is_first() and is_shown(text):
        print(text, file=sys.stderr, flush=True)
