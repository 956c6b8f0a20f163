"""Measure where the time of a run goes, and trace chosen updates."""

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

PHASES = {
    "step": "training steps",
    "compile": "compiling",
    "data": "waiting for data",
    "checkpoint": "checkpoints",
    "evaluation": "validation",
    "other": "other",
}
"""What the phases are called. `other` is loading, preparing, restoring, waiting for processes."""

Item = TypeVar("Item")


class Clock:
    """Attribute wall time to the innermost active phase."""

    def __init__(self) -> None:
        self._phase, self._since = "other", time.perf_counter()
        self._recent: dict[str, float] = defaultdict(float)
        self._all: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Attribute the time within to this phase."""
        before = self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, phase: str) -> str:
        now, before = time.perf_counter(), self._phase
        for sums in (self._recent, self._all):
            sums[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    def waiting(self, phase: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and attribute the time they take to arrive to this phase."""
        iterator = iter(items)
        while True:
            with self(phase):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, as `seconds_PHASE`."""
        self._switch(self._phase)
        seconds = {f"seconds_{phase}": self._recent[phase] for phase in PHASES}
        self._recent.clear()
        return seconds

    def describe(self) -> str:
        """Return a line about all the time of this process."""
        self._switch(self._phase)
        total = sum(self._all.values())
        shares = ", ".join(f"{name} {self._all[key] / total:.0%}" for key, name in PHASES.items())
        return f"time: {total:,.0f} s in all ({shares})"


def productive_share(totals: Mapping[str, float]) -> float | None:
    """Return the share of `seconds_step` in all `seconds_PHASE`, or None without any.

    >>> productive_share({"seconds_step": 3.0, "seconds_compile": 1.0})
    0.75
    """
    total = sum(totals.get(f"seconds_{phase}", 0.0) for phase in PHASES)
    return totals.get("seconds_step", 0.0) / total if total else None


class Profile:
    """Trace the updates `first` to `last` (counted from 1) into a folder, once."""

    def __init__(self, folder: Path, first: int, last: int):
        self.folder, self.first, self.last = folder, first, last
        self.running = False

    def before(self, step: int) -> None:
        """Begin the trace if this is the first of the updates."""
        if self.first <= step <= self.last and not self.running:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def after(self, step: int, results: Any) -> None:
        """End the trace after the last of the updates, when the devices have finished it."""
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
    """Yield the `Profile` of `"FIRST:LAST"`; the trace is written however the run ends.

    Raises `InputError` unless these are two numbers of updates that the run still has to do.
    """
    first = last = steps + 1
    if updates is not None:
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", updates)
        first, last = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= first <= last:
            raise InputError(
                f"--profile {updates!r}: expected FIRST:LAST, two numbers of updates such as 10:15"
            )
        if not done < first <= last <= steps:
            left = f"updates {done + 1} to {steps} left" if done < steps else "no updates left"
            raise InputError(f"--profile {updates}: the run has {left}; name some of those")
    # Of several processes only the first records: its devices are like all the others.
    profile = Profile(folder, first, last) if is_first() else Profile(folder, steps + 1, steps + 1)
    try:
        yield profile
    finally:
        profile.stop()
