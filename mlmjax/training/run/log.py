"""What a run tells: metrics.jsonl, TensorBoard events, and lines or a bar for people."""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlmjax.errors import InputError, write_failed
from mlmjax.parallel.processes import is_first

METRICS = "metrics.jsonl"
EVENTS_SECONDS = 10.0
"""How long figures for TensorBoard may wait before they are on disk."""
PATIENCE_SECONDS = 2.0
"""How long work goes on without a bar."""


class MetricsLog:
    """The file `metrics.jsonl` of a run folder, one JSON object per (step, split), and its events.

    Opening it for a run that goes on from `step` drops the lines past that step, and what a killed
    process left half written. Raises `InputError` for a file that is no metrics file, `RunError`
    when writing fails.
    """

    def __init__(self, folder: Path, step: int = 0):
        self.path = folder / METRICS
        try:
            lines = _kept_lines(self.path, step)
            partial = self.path.with_suffix(".partial")
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
            self._file = self.path.open("a", encoding="utf-8")
            self._events = _open_events(folder, step)
        except OSError as error:
            raise write_failed(self.path, error) from error
        self._written = {(line["step"], line["split"]) for line in lines}

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After a failed write, closing fails in the same way; the first error is the one to show.
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            if self._events:
                self._events.close()

    def has(self, step: int, split: str) -> bool:
        """Tell whether the line of this step and split is there."""
        return (step, split) in self._written

    def write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Append one line, flushed; None stands for a figure there is none of."""
        line = {"step": step, "split": split, **values}
        try:
            self._file.write(f"{json.dumps(line, allow_nan=False)}\n")
            self._file.flush()
            if self._events:
                self._events.write(step, split, values)
        except OSError as error:
            raise write_failed(self.path, error) from error
        self._written.add((step, split))

    def sync(self) -> None:
        """Force what was written to disk, so that it is there when a checkpoint of it is."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            if self._events:
                self._events.flush()
        except OSError as error:
            raise write_failed(self.path, error) from error


class NoLog:
    """What stands for the `MetricsLog` of a process that keeps none."""

    def has(self, step: int, split: str) -> bool:
        """Return False."""
        return False

    def write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""


@contextmanager
def open_log(folder: Path, step: int) -> Iterator["MetricsLog | NoLog"]:
    """Give the log of a run; of several processes the first one keeps it."""
    if not is_first():
        yield NoLog()
        return
    with MetricsLog(folder, step) as log:
        yield log


def _kept_lines(path: Path, step: int) -> list[dict[str, Any]]:
    if not path.exists() or not step:
        return []
    lines: dict[tuple[int, str], dict[str, Any]] = {}
    *whole, _ = path.read_bytes().split(b"\n")
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
            key = (line["step"], line["split"])
            if [type(part) for part in key] != [int, str]:
                raise ValueError("no step, or no split")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            # A power cut can leave the unsynced end of a file as zeros; before it nothing may be.
            if number == len(whole):
                break
            raise InputError(
                f"{path}, line {number}: is not a line of metrics; move the file away to go on"
            ) from error
        if key[0] <= step:
            lines.setdefault(key, line)
    return list(lines.values())


class _Events:
    """The TensorBoard file of a run. What is past `step` in older ones is taken back.

    Written here and now: tensorboardX's own writer does it in a thread, whose errors nobody sees.
    """

    def __init__(self, folder: Path, step: int):
        # The import loads torch where that is installed: only here.
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        self._file = RecordWriter(str(folder / name))
        self._flushed = 0.0
        self._add(0, file_version="brain.Event:2")
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def _add(self, step: int, **what: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **what)
        self._file.write(event.SerializeToString())

    def write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self._add(step, summary=self._scalar(f"{split}/{name}", value))
        if time.monotonic() - self._flushed > EVENTS_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


def _open_events(folder: Path, step: int) -> _Events | None:
    try:
        return _Events(folder, step)
    except ImportError:
        return None


def describe(values: Mapping[str, float | None]) -> str:
    """Put the figures of one line of metrics into words for people.

    >>> describe({"loss": 2.5, "answer_accuracy": None, "tokens_per_second": 1234.5})
    'loss 2.500  tokens/s 1,234'
    """
    shown = {
        "loss": ("loss", "{:.3f}"),
        "loss_atp": ("atp", "{:.3f}"),
        "loss_dummy": ("dummy", "{:.3f}"),
        "loss_mlm": ("mlm", "{:.3f}"),
        "answer_accuracy": ("accuracy", "{:.3f}"),
        "grad_norm": ("grad", "{:.2f}"),
        "learning_rate": ("lr", "{:.2e}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
        "mfu": ("mfu", "{:.1%}"),
        "productive_share": ("in steps", "{:.0%}"),
    }
    found = [
        f"{name} {form.format(values[key])}"
        for key, (name, form) in shown.items()
        if values.get(key) is not None and math.isfinite(values[key] or 0.0)
    ]
    return "  ".join(found)


class Talk:
    """A progress bar on a terminal, plain lines in a pipe; on stderr, of the first process."""

    def __init__(self, total: int, done: int = 0):
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_first())
        self._progress: Progress | None = None
        self._total = total
        if self._console.is_terminal and is_first():
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._bar = self._progress.add_task("", total=total, completed=done, figures="")

    def __enter__(self) -> "Talk":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False)

    def step(self, step: int) -> None:
        """Move the bar."""
        if self._progress:
            self._progress.update(self._bar, completed=step)

    def figures(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Show a line of metrics: beside the bar, or as a line of its own."""
        if self._progress and split == "train":
            self._progress.update(self._bar, figures=describe(values))
        else:
            self.say(f"step {step}/{self._total}  {split}  {describe(values)}")


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that shows `(done, total)`: a bar on a terminal, else a line every tenth."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if console.is_terminal:
        columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=None)
            yield lambda done, total: progress.update(bar, completed=done, total=total)
        return
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if (tenths := 10 * done // total) > shown:
            shown = tenths
            say(f"{what} {done}/{total}")

    yield show


@contextmanager
def bar(what: str, shown: bool | None) -> Iterator[Callable[[int, int], None] | None]:
    """Give a function of `(done, total)` for work that may take long, None where none is shown.

    `shown` True counts as `counting` does; None shows a bar on a terminal from two seconds on.
    """
    if shown:
        with counting(what) as progress:
            yield progress
    elif shown is None and sys.stderr.isatty():
        with ExitStack() as stack:
            started = time.monotonic()
            inner: list[Callable[[int, int], None]] = []

            def patient(done: int, total: int) -> None:
                if not inner and done < total and time.monotonic() - started > PATIENCE_SECONDS:
                    inner.append(stack.enter_context(counting(what)))
                if inner:
                    inner[0](done, total)

            yield patient
    else:
        yield None


def say(text: str) -> None:
    """Print one line to stderr; of several processes the first one does."""
    if is_first():
        print(text, file=sys.stderr, flush=True)
