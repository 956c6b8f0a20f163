"""Measure where the time of a run goes, and trace chosen updates."""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax

from mlmjax.errors import InputError
from mlmjax.parallel.processes import is_first

PHASES = {
    "step": "compute",
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


def profiled_updates(updates: str | None, done: int, steps: int) -> tuple[int, int]:
    """Return the first and the last update to trace, 0 for none; raises as `profiling`."""
    if updates is None:
        return 0, 0
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", updates)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise InputError(
            f"--profile {updates!r}: expected FIRST:LAST, two numbers of updates such as 10:15"
        )
    if not done < first <= last <= steps:
        left = f"updates {done + 1} to {steps} left" if done < steps else "no updates left"
        raise InputError(f"--profile {updates}: the run has {left}; name some of those")
    return first, last


@contextmanager
def profiling(
    updates: str | None, folder: Path, done: int, steps: int
) -> Iterator[Callable[[int, Any], None]]:
    """Trace the updates `"FIRST:LAST"` into a folder; the trace is written however the run ends.

    Yields a function to call before the first update and after each, with the number of updates
    done and the results of the last. Raises `InputError` unless these are two numbers of updates
    that the run still has to do.
    """
    first, last = profiled_updates(updates, done, steps)
    is_tracing = False

    def after(step: int, results: Any) -> None:
        nonlocal is_tracing
        if is_tracing and step == last:
            jax.block_until_ready(results)
            is_tracing = False
            jax.profiler.stop_trace()
        # Of several processes only the first records: its devices are like all the others.
        if step + 1 == first and is_first():
            jax.profiler.start_trace(folder)
            is_tracing = True

    try:
        yield after
    finally:
        if is_tracing:
            jax.profiler.stop_trace()
