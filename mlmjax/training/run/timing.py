"""Where the time of a run goes."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

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
