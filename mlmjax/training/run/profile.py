"""Traces of some updates of a run, for the profilers of TensorBoard and XProf."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from mlmjax.errors import InputError
from mlmjax.parallel.processes import is_first


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
