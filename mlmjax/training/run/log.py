"""Write metrics.jsonl and log lines, and send figures on, from sums over a stretch of updates."""

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich import progress as bars

from mlmjax.data.batch import OBJECTIVES, PADDING_SEGMENT, Batch, LabelBatch
from mlmjax.errors import InputError, counted, write_failed
from mlmjax.parallel.processes import is_first
from mlmjax.reporting.terminal import (
    LINE_SECONDS,
    PATIENCE_SECONDS,
    Ticker,
    about,
    describe_compiling,
    new_bar,
    new_console,
    say,
)
from mlmjax.reporting.trackers import Trackers
from mlmjax.storage import write_whole
from mlmjax.training.run.timing import PHASES

METRICS = "metrics.jsonl"

Figures = Mapping[str, float | None]
"""The figures of one line of metrics.jsonl; None where there is nothing to measure."""

Totals = defaultdict[str, float]
"""Sums over a stretch of updates."""


class MetricsLog:
    """The `metrics.jsonl` of a run folder, one JSON object per (step, split).

    When a run resumes from `step`, the lines after that step are removed, and so is a last line
    that a killed process left unfinished. New lines also go to `trackers`. Raises `InputError` for
    a file of other content, `RunError` if writing fails.
    """

    def __init__(self, folder: Path, step: int = 0):
        self.path = folder / METRICS
        self.trackers: Trackers | None = None
        with self._writing():
            lines = _kept_lines(self.path, step)
            write_whole(self.path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
            self._file = self.path.open("a", encoding="utf-8", newline="\n")
        self._written = {(line["step"], line["split"]) for line in lines}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_failed(self.path, error) from error

    def close(self) -> None:
        """Close the file and end the trackers."""
        # After a failed write, closing fails in the same way; the first error is the one to show.
        with suppress(OSError):
            self._file.close()
        if self.trackers:
            self.trackers.finish()

    def has(self, step: int, split: str) -> bool:
        """Tell whether there is a line of this step and split."""
        return (step, split) in self._written

    def write(self, step: int, split: str, values: Figures) -> None:
        """Append one line and flush it."""
        line = {"step": step, "split": split, **values}
        with self._writing():
            self._file.write(f"{json.dumps(line, allow_nan=False)}\n")
            self._file.flush()
        if self.trackers:
            self.trackers.log(step, split, values)
        self._written.add((step, split))

    def sync(self) -> None:
        """Force all lines to disk, so that no checkpoint is ahead of them."""
        with self._writing():
            self._file.flush()
            os.fsync(self._file.fileno())


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
            # A power failure leaves zeros only at the end of a file.
            if number == len(whole):
                break
            raise InputError(
                f"{path}, line {number}: is not a line of metrics; move the file away to resume"
            ) from error
        if key[0] <= step:
            lines.setdefault(key, line)
    return list(lines.values())


def count_tokens(batch: Batch | LabelBatch) -> dict[str, float]:
    """Count positions and real tokens of a batch on the host.

    Rows that are all padding, as in the last batch of validation, do not count.

    >>> segments = np.array([[1, 1, 2, 0]])
    >>> count_tokens(Batch(segments, segments, segments, *[segments] * 3))
    {'positions': 4.0, 'tokens': 3.0}
    """
    segments = np.asarray(batch.segment_ids)
    is_row = (segments != PADDING_SEGMENT).any(axis=1)
    return {
        "positions": float(np.count_nonzero(is_row) * segments.shape[1]),
        "tokens": float(np.count_nonzero(segments != PADDING_SEGMENT)),
    }


def add(totals: Totals, *parts: Mapping[str, Any]) -> None:
    """Add scalars to the sums of a stretch of updates, in float64 on the host."""
    for part in parts:
        for name, value in part.items():
            totals[name] += float(value)


def summarize(
    totals: Mapping[str, float], peak: float | None = None, chips: int = 1
) -> dict[str, float | None]:
    """Turn sums into the figures of one line of `metrics.jsonl`.

    `answer_accuracy` is over ATP targets or labelled texts, `target_share` targets per real token,
    `padding_share` padding per position. `grad_norm` and `update_norm` are means over the updates
    made; of a skipped update only the tokens count. `flops_per_second` are model FLOPs, and `mfu`
    is their share of `peak`, that of all devices. `seconds_PHASE` are those of `timing.PHASES`, and
    `productive_share` is the share of `seconds_step`.
    """
    seconds = {key: totals.get(key) for key in (f"seconds_{phase}" for phase in PHASES)}
    working = (seconds["seconds_step"] or 0.0) + (seconds["seconds_data"] or 0.0)
    total = sum(value or 0.0 for value in seconds.values())

    def share(part: str, whole: str) -> float | None:
        return totals.get(part, 0.0) / totals[whole] if totals.get(whole) else None

    padding, change = share("tokens", "positions"), share("update_norm", "steps")
    speed = totals.get("timed_flops", 0.0) / working if working else None
    tokens = totals.get("timed_tokens", 0.0) / working if working else None
    answers = "atp" if totals.get("atp_count") else "label"
    return {
        "loss": share("loss_sum", "loss_count"),
        **{f"loss_{name}": share(f"{name}_loss_sum", f"{name}_count") for name in OBJECTIVES},
        "answer_accuracy": share(f"{answers}_correct", f"{answers}_count"),
        "grad_norm": share("grad_norm", "steps"),
        # The sum of squares may overflow although all parameters are finite.
        "update_norm": change if change is not None and math.isfinite(change) else None,
        "skipped_updates": totals.get("skipped", 0.0) if seconds["seconds_step"] else None,
        "learning_rate": None,
        "tokens_per_second": tokens or None,
        "chip_tokens_per_second": tokens / chips if tokens else None,
        "flops_per_second": speed or None,
        "mfu": speed / peak if speed and peak else None,
        "target_share": share("loss_count", "tokens"),
        "padding_share": None if padding is None else 1.0 - padding,
        **seconds,
        "productive_share": (seconds["seconds_step"] or 0.0) / total if total else None,
    }


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
    """Return the figures of one line of metrics.jsonl as text, without the only part of a loss.

    >>> describe({"loss": 2.5, "loss_atp": 2.5, "mfu": None, "tokens_per_second": 1234.5})
    'loss 2.500 | 1,234 tok/s'
    """
    parts = [key for key in _FIGURES if key.startswith("loss_") and values.get(key) is not None]
    hidden = parts if len(parts) == 1 else []
    found = [(form, values.get(key)) for key, form in _FIGURES.items() if key not in hidden]
    return " | ".join(
        form.format(value) for form, value in found if value is not None and math.isfinite(value)
    )


class RunDisplay(ExitStack):
    """Show a training: a progress bar on a terminal, plain lines in a pipe.

    In a pipe, ten seconds without a line are followed by one with the step and the time left.
    Only the first process of a run prints.
    """

    def __init__(self, total: int, done: int = 0):
        super().__init__()
        self._console = new_console()
        self._bars: bars.Progress | None = None
        self._total, self._step, self._doing = total, done, ""
        self._timed: tuple[int, float] | None = None
        self._since = self._printed = time.monotonic()
        if not is_first():
            return
        if self._console.is_terminal:
            self._bars = self.enter_context(new_bar("training", self._console))
            self._bar = self._bars.add_task("", total=total, completed=done, figures="")
        else:
            self.enter_context(Ticker(self._tick, PATIENCE_SECONDS, LINE_SECONDS / 10))

    def say(self, text: str) -> None:
        """Print one line; with `--quiet` only a warning."""
        self._printed = time.monotonic()
        if self._console.quiet:
            say(text)
        else:
            self._console.print(text, markup=False)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show what happens instead of updates, such as compiling."""
        before, self._doing, self._since = self._doing, what, time.monotonic()
        figures = ""
        if self._bars:
            figures = self._bars.tasks[0].fields["figures"]
            self._bars.update(self._bar, figures=what)
        try:
            yield
        finally:
            self._doing = before
            if self._bars:
                self._bars.update(self._bar, figures=figures)

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._timed is None:
            # The first update compiles; the time left follows from the others.
            self._timed = step, time.monotonic()
        self._step = step
        if self._bars:
            self._bars.update(self._bar, completed=step)

    def show(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Show a line of metrics, next to the bar or as a line."""
        if self._bars and split == "train":
            self._bars.update(self._bar, figures=describe(values))
        else:
            name = "" if split == "train" else f"{split} | "
            self.say(f"step {step}/{self._total} | {name}{describe(values)}")

    def _tick(self) -> None:
        """Print a line if none was printed for long, or if something else than updates began."""
        now, doing = time.monotonic(), self._doing
        is_new = doing and self._printed < self._since <= now - PATIENCE_SECONDS
        if is_new or now - self._printed >= LINE_SECONDS:
            if doing and self._printed > self._since:  # Its first line says how long it takes.
                doing = f"{doing.split(',')[0]} | {now - self._since:.0f} s so far"
            self.say(f"step {self._step}/{self._total} | {doing or self._time_left()}")

    def _time_left(self) -> str:
        if self._timed is None or self._step == self._timed[0]:
            return "training"
        step, began = self._timed
        each = (time.monotonic() - began) / (self._step - step)
        return f"{about(each * (self._total - self._step))} left"


# Seconds that XLA took per layer of mlmjax-small on two cores of an AMD EPYC: a step with its
# backward pass, and a forward pass. Programs of wider layers have as many operations.
TRAINING_COMPILE_SECONDS = 2.0


def describe_step_compiling(layers: int, number: int, rows: int) -> str:
    """Say how long it takes to compile the training step for batches of `rows` rows.

    `number` counts the programs of a run, from 1.
    """
    what = f"program {number} for batches of {counted(rows, 'row')}"
    return describe_compiling(TRAINING_COMPILE_SECONDS * layers, what)
