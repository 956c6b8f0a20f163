"""What a run tells: metrics.jsonl, TensorBoard events, and lines or a bar for people."""

import json
import math
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mlmjax.data.batch import OBJECTIVES, PADDING_SEGMENT, UNUSED, Batch, LabelBatch
from mlmjax.errors import InputError, write_failed
from mlmjax.parallel.processes import is_first
from mlmjax.storage import write_whole
from mlmjax.training.run.timing import PHASES, productive_share

METRICS = "metrics.jsonl"
EVENTS_SECONDS = 10.0
"""How long figures for TensorBoard may wait before they are on disk."""


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
            write_whole(self.path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
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


Totals = defaultdict[str, float]


def count_tokens(batch: Batch | LabelBatch) -> dict[str, float]:
    """Count positions and real tokens of a batch on the host.

    Rows of padding alone, which fill up the last batch of validation, do not count.

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
    """Add scalars to the sums of a stretch of steps, in float64 on the host."""
    for part in parts:
        for name, value in part.items():
            if np.ndim(value) == 0:
                totals[name] += float(value)


def summarize(
    totals: Mapping[str, float], peak: float | None = None, chips: int = 1
) -> dict[str, float | None]:
    """Turn sums into the figures of one line of `metrics.jsonl`; None where nothing was counted.

    `answer_accuracy` is over ATP targets or labelled texts, `target_share` targets per real token,
    `padding_share` padding per position, `grad_norm` and `update_norm` the means over the updates
    made; those of `skipped_updates` count in nothing but the tokens read.
    `flops_per_second` are model FLOPs, `mfu` their share of the `peak` of all devices;
    `seconds_PHASE` is where the time went (`goodput.PHASES`), and `productive_share` that of steps.
    """
    seconds = {key: totals.get(key) for key in (f"seconds_{phase}" for phase in PHASES)}
    working = (seconds["seconds_step"] or 0.0) + (seconds["seconds_data"] or 0.0)

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
        # Its square may overflow where the parameters do not.
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
        "productive_share": productive_share(totals),
    }


def _widened(batch: Batch, width: int) -> Batch:
    unused = ((0, 0), (0, width - batch.target_ids.shape[1]))
    targets = ("target_positions", "target_ids", "target_objective")
    return batch._replace(
        **{name: np.pad(getattr(batch, name), unused, constant_values=UNUSED) for name in targets}
    )
