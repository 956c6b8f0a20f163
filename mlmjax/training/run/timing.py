"""Where the time of a run goes."""

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax

from mlmjax.errors import InputError
from mlmjax.parallel.processes import is_first

PHASES = ("step", "compile", "data", "checkpoint", "evaluation", "other")
"""`other` is all the rest: loading, preparing, restoring, waiting for other processes."""


Item = TypeVar("Item")


class Clock:
    """Adds every second of a process to one phase: the one that was entered last."""

    def __init__(self) -> None:
        self._phase, self._since = "other", time.perf_counter()
        self._fresh: dict[str, float] = defaultdict(float)
        self._all: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time within as of this phase."""
        before = self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, phase: str) -> str:
        now, before = time.perf_counter(), self._phase
        for sums in (self._fresh, self._all):
            sums[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    def waiting(self, phase: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; waiting for the next one is of this phase."""
        iterator = iter(items)
        while True:
            with self(phase):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def taken(self) -> dict[str, float]:
        """Return the seconds of each phase since this was last asked, as `seconds_PHASE`."""
        self._switch(self._phase)
        seconds = {f"seconds_{phase}": self._fresh[phase] for phase in PHASES}
        self._fresh.clear()
        return seconds

    def told(self) -> str:
        """Put all the time of this process into a line for people."""
        self._switch(self._phase)
        total = sum(self._all.values())
        shares = ", ".join(f"{phase} {self._all[phase] / total:.1%}" for phase in PHASES)
        return f"time {total:.0f} s: {shares}"


def productive_share(totals: Mapping[str, float]) -> float | None:
    """Return the share of `seconds_step` in all `seconds_PHASE`, None where none were counted.

    >>> productive_share({"seconds_step": 3.0, "seconds_compile": 1.0})
    0.75
    """
    total = sum(totals.get(f"seconds_{phase}", 0.0) for phase in PHASES)
    return totals.get("seconds_step", 0.0) / total if total else None


class Profile:
    """Records the updates `first` to `last` (counted from 1) into a folder, once."""

    def __init__(self, folder: Path, first: int, last: int):
        self.folder, self.first, self.last = folder, first, last
        self.running = False

    def before(self, step: int) -> None:
        """Begin the trace if this is the first of the updates."""
        if self.first <= step <= self.last and not self.running:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def after(self, step: int, results: Any) -> None:
        """End the trace if this was the last of the updates, when the devices are done with it."""
        if self.running and step >= self.last:
            jax.block_until_ready(results)
            self.stop()

    def stop(self) -> None:
        """Write what was recorded."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()


@contextmanager
def profiling(updates: str | None, folder: Path, done: int, steps: int) -> Iterator[Profile]:
    """Give the `Profile` of `"FIRST:LAST"`, and write the trace whatever ends the run.

    Raises `InputError` unless these are two numbers of updates that the run still has to do.
    """
    first, last = (steps + 1, steps + 1) if updates is None else _parse(updates)
    if updates is not None and not done < first <= last <= steps:
        left = f"the updates {done + 1} to {steps} to do" if done < steps else "no updates left"
        raise InputError(f"--profile {updates}: the run has {left}; name some that are to be done")
    # Of several processes the first one records: its devices stand for all.
    profile = Profile(folder, first, last) if is_first() else Profile(folder, steps + 1, steps + 1)
    try:
        yield profile
    finally:
        profile.stop()


def _parse(updates: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", updates)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(
            f"--profile {updates!r}: expected FIRST:LAST, two numbers of updates such as 10:15"
        )
    return int(found[1]), int(found[2])
