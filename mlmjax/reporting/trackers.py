"""Send the figures of a run to experiment trackers, none of which can end the run."""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mlmjax.errors import InputError, first_line, install_advice
from mlmjax.reporting.terminal import say
from mlmjax.storage import without_folder, write_json

KEPT = "trackers.json"
"""The file of a run folder with the id that each tracker gave to the run."""


class Run(NamedTuple):
    """Describe a run to its trackers: its folder, names, flat settings and first step.

    `id` is what `start` of the same tracker returned before the run was stopped; None if it is new.
    """

    folder: Path
    project: str
    name: str
    settings: Mapping[str, Any]
    step: int
    id: str | None


class Tracker(Protocol):
    """Record a run somewhere; any method may raise anything."""

    def start(self, run: Run) -> str | None:
        """Begin or continue a run; return its id there."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record figures of an update, such as `train/loss`."""

    def finish(self) -> None:
        """Send what is left, and end."""


class _TensorBoard:
    """An event file in the run folder; it withdraws what older files say after the first step.

    The writer of tensorboardX itself works in a thread, whose errors nobody sees.
    """

    def start(self, run: Run) -> None:
        # The import loads torch if that is installed, so it is only here.
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        name = f"events.out.tfevents.{int(time.time()):010d}.mlmjax"
        self._file = RecordWriter(str(run.folder / name))
        self._add(0, file_version="brain.Event:2")
        self._add(run.step + 1, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def _add(self, step: int, **what: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **what)
        self._file.write(event.SerializeToString())

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._add(step, summary=self._scalar(name, value))
        self._file.flush()

    def finish(self) -> None:
        self._file.close()


class _Trackio:
    """A run of trackio, which finds it again by its name."""

    def start(self, run: Run) -> str:
        import trackio

        name = run.id or f"{run.name}-{int(time.time())}"
        self._run = trackio.init(
            run.project,
            name=name,
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return name

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def finish(self) -> None:
        self._run.finish()


class _Wandb:
    """A run of Weights & Biases; nothing about the machine or its files is recorded."""

    def start(self, run: Run) -> str:
        import wandb

        quiet: Any = {"console": "off", "silent": True, "disable_code": True, "disable_git": True}
        quiet |= {"x_disable_meta": True, "x_disable_stats": True, "x_save_requirements": False}
        quiet |= {"host": ""}
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow" if run.id else None,
            config=dict(run.settings),
            dir=run.folder,
            settings=wandb.Settings(**quiet),
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run repeats steps
        return str(self._run.id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def finish(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of MLflow, in the store that `MLFLOW_TRACKING_URI` names."""

    def start(self, run: Run) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        if run.id:
            self._client.update_run(run.id, status="RUNNING")
            self._id = run.id
            return run.id
        found = self._client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(run.project)
        self._id = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
        params = [Param(name, str(value)) for name, value in run.settings.items()]
        for first in range(0, len(params), 100):  # the most that one request may have
            self._client.log_batch(self._id, params=params[first : first + 100])
        return self._id

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: Mapping[str, tuple[str, Callable[[], Tracker]]] = {
    "tensorboard": ("tensorboardX", _TensorBoard),
    "trackio": ("trackio", _Trackio),
    "wandb": ("wandb", _Wandb),
    "mlflow": ("mlflow", _MLflow),
}
"""The package and the adapter of each tracker."""


def check_installed(names: Sequence[str]) -> None:
    """Raise `InputError` for the first of these trackers that is not installed."""
    for name in names:
        package, _ = TRACKERS[name]
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"log.to: {name} needs the package {package}, which is not installed; leave it "
                f"out of the list, or {install_advice('track')}"
            )


class Trackers:
    """The trackers of a run; one that fails says so once and gets no more figures.

    `settings` is the table of the run, and `step` where it starts or resumes. The ids are kept in
    the run folder, so that a resumed run continues them.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        project: str = "mlmjax",
        settings: Mapping[str, Any] | None = None,
        step: int = 0,
    ):
        self._open: dict[str, Tracker] = {}
        ids = _read_ids(folder / KEPT) if step else {}
        flat = dict(flat_settings(settings or {}))
        for name in dict.fromkeys(names):
            tracker = self._open[name] = TRACKERS[name][1]()
            run = Run(folder, project, folder.name, flat, step, ids.get(name))
            if given := self._try(name, partial(tracker.start, run)):
                ids[name] = given
        if ids:
            write_json(folder / KEPT, ids)

    def log(self, step: int, split: str, figures: Mapping[str, float | None]) -> None:
        """Send the figures of an update that have a value."""
        known = {f"{split}/{name}": value for name, value in figures.items() if value is not None}
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, step, known))

    def finish(self) -> None:
        """Let each tracker send what is left, and end."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.finish)
        self._open.clear()

    def _try(self, name: str, call: Callable[[], Any]) -> Any:
        """Call a tracker; if it fails, say so and leave it out from now on."""
        try:
            with redirect_stdout(sys.stderr):  # results are on stdout, and some packages print
                return call()
        except Exception as error:  # packages of others may raise anything
            self._open.pop(name, None)
            reason = f"{type(error).__name__}: {first_line(error)}"
            say(f"warning: {name} failed ({reason}); the run goes on without it")
            return None


def _read_ids(path: Path) -> dict[str, str]:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return {name: value for name, value in found.items() if isinstance(value, str)}
    return {}


def flat_settings(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested tables by dotted keys, and absolute paths without their folders.

    >>> dict(flat_settings({"out": "/runs/a", "data": {"sources": [{"weight": 2}]}}))
    {'out': 'a', 'data.sources.0.weight': 2}
    """
    for key, value in table.items():
        if isinstance(value, list | tuple):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, Mapping):
            yield from flat_settings(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", without_folder(value) if isinstance(value, str) else value
