"""Where a run may write: folders of this machine, and for checkpoints addresses as well."""

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mlmjax.config.data import DataConfig
from mlmjax.config.run import ObjectiveConfig, RunConfig, ScheduleConfig
from mlmjax.data.manifest import MANIFEST
from mlmjax.data.schedule import mask_rate, row_schedule
from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.parallel import processes
from mlmjax.storage import CONFIG, LOCK, is_remote
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.optimizer import make_schedule
from mlmjax.training.run.inputs import Loaders

OWN_FOLDERS = (LOCK, "checkpoints", "export")


def check_run_folder(out: Path) -> None:
    """Raise `InputError` for a folder whose `config.json` is not a run's: it would be replaced."""
    path = out / CONFIG
    if not path.exists():
        return
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not {"out", "steps", "data"} <= table.keys():
        raise InputError(f"{path}: is not the configuration of a run; name another folder for out")


def check_places(config: RunConfig) -> None:
    """Raise `InputError` for remote places, and when places would be written into one another.

    Rows may lie in the run folder, but not where it keeps something itself. Only checkpoints can
    be remote.
    """
    for key, place in (("out", config.out), ("data.rows", config.data.rows)):
        if "://" in place:
            raise InputError(
                f"{key} = {place}: has to be a folder of this machine or of a mounted file system; "
                "checkpoints can be remote: set checkpoint.path"
            )
    out, rows = (Path(os.path.realpath(name)) for name in (config.out, config.data.rows))
    if out.is_relative_to(rows) or any(rows.is_relative_to(out / name) for name in OWN_FOLDERS):
        raise InputError(
            f"data.rows: {config.data.rows} and out = {config.out} would be written into one "
            "another; give the rows a folder of their own"
        )
    path = config.checkpoint.path
    if path is None or is_remote(path):
        return
    own = Path(os.path.realpath(path))
    for what, other in (("data.rows", rows), ("the export", out / "export")):
        if own.is_relative_to(other) or other.is_relative_to(own):
            raise InputError(
                f"checkpoint.path: {path} and {what}, {other}, would be written into one another; "
                "give the checkpoints a folder of their own"
            )


def checkpoint_folder(config: RunConfig) -> str:
    """Return where the checkpoints of a run lie."""
    return config.checkpoint.path or str(Path(config.out) / "checkpoints")


SHARED_SECONDS = 30.0
"""How long a file may take from one process to the others."""


_SIGN = ".shared"
_OWN_KEYS = ("out", "data.rows", "data.workers", "checkpoint.path")
OBJECTIVE = ("dummy_mlm_share", "mlm_share", "masking")
BATCH = ("batch_size", "batch_start", "batch_warmup")
CHOSEN_BY = {
    "learning rate": "learning_rate, schedule and steps",
    "mask rate": "mlm_rate, mlm_rate_end and steps",
    "number of rows": "batch_size, batch_start, batch_warmup and steps",
}
"""What changes from update to update, and the keys of the configuration that say how."""


def identity_of(
    config: RunConfig, model: ModelConfig, tokenizer: Tokenizer, loaders: Loaders
) -> dict[str, Any]:
    """Return what decides every number of a run, as JSON values.

    What may differ when a run goes on is left out: where and how often it writes, the mesh,
    `accumulate` and `remat` (the same sums in another order), and `steps`, as long as the updates
    already done have the same learning rates, rows and mask rates.
    """
    data = config.data
    table = {
        "model": model.to_hf(),
        "init_from": config.init_from,
        "revision": config.revision,
        "dtype": config.dtype,
        "seed": config.seed,
        "tokenizer": tokenizer.sha256,
        "data": {
            "manifest": loaders.sha256,
            "seq_length": data.seq_length,
            "batch_size": data.batch_size,
            "subset": data.subset,
            "weights": {source.title: source.weight for source in data.sources},
        },
        "head": config.head,
        "objective": config.objective.model_dump(mode="json", include=set(OBJECTIVE)),
        "optimizer": config.optimizer.model_dump(mode="json", exclude={"learning_rate"}),
        "rates": {
            "learning_rate": config.optimizer.learning_rate,
            "schedule": config.schedule.model_dump(mode="json"),
            "objective": config.objective.model_dump(mode="json"),
            "batch": data.model_dump(mode="json", include=set(BATCH)),
            "steps": config.steps,
        },
    }
    return json.loads(json.dumps(table))


def check_same_run(
    out: Path,
    config: RunConfig,
    step: int,
    metadata: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> None:
    """Raise `InputError` that lists how a run differs from the one whose checkpoint lies there."""
    try:
        saved, sums = metadata["identity"], metadata["interval"]
        before = _each_update(saved["rates"], step)
        if not all(isinstance(value, int | float) for value in sums.values()):
            raise TypeError("interval holds no sums")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{out}: its checkpoints are no training run's; name another out"
        ) from error
    there, here = (_flat({k: v for k, v in t.items() if k != "rates"}) for t in (saved, identity))
    differences = [
        f"{key} is {here.get(key)!r}, the run there has {there.get(key)!r}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differences:
        raise InputError(
            f"{out}: holds another run, at step {step}: {differences[0]}; give the configuration "
            "it was started with to go on, or another out",
            differences[1:],
        )
    if config.steps < step:
        raise InputError(
            f"{out}: its run is at step {step}, past steps = {config.steps}; give at least {step}"
        )
    now = _each_update(identity["rates"], step)
    for what, keys in CHOSEN_BY.items():
        if not np.array_equal(before[what], now[what]):
            update = int(np.flatnonzero(before[what] != now[what])[0])
            raise InputError(
                f"{out}: update {update + 1} of {step} already done had the {what} "
                f"{before[what][update]:.6g}; this configuration says {now[what][update]:.6g}. "
                f"Give the {keys} it was started with (fractions of the run change with steps; "
                "numbers of updates do not)"
            )


def _each_update(table: Mapping[str, Any], step: int) -> dict[str, np.ndarray]:
    """Return what the configuration says of each of the first `step` updates."""
    steps, updates = table["steps"], np.arange(step)
    schedule = ScheduleConfig.model_validate(table["schedule"])
    rate = mask_rate(ObjectiveConfig.model_validate(table["objective"]), steps)
    rows = row_schedule(DataConfig.model_validate({"rows": "-", **table["batch"]}), steps)
    return {
        "learning rate": np.asarray(
            make_schedule(schedule, table["learning_rate"], steps)(updates)
        ),
        "mask rate": np.array([rate(update) for update in range(step)]),
        "number of rows": np.array([rows.rows(update) for update in range(step)]),
    }


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, Mapping) and value
        found |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def check_alike(config: RunConfig) -> None:
    """Raise `InputError`, on all processes together, where one has not the settings of the first.

    Where the shared folders are mounted may differ, and how many processes read data.
    """
    if processes.process_count() == 1:
        return
    mine = _flat(config.model_dump(mode="json"))
    mine = {"--processes": processes.process_count(), **mine}
    first = processes.broadcast_from_first(lambda: mine)
    differences = [
        f"{key} is {mine.get(key)!r} on process {processes.process_index()} "
        f"(on {socket.gethostname()}), and {first.get(key)!r} on process 0"
        for key in [key for key in {**first, **mine} if key not in _OWN_KEYS]
        if mine.get(key) != first.get(key)
    ]
    if differences:
        raise InputError(
            f"{differences[0]}; give all processes the same configuration", differences[1:]
        )


def check_processes(out: Path, checkpoints: str, mesh: Mesh) -> None:
    """Check, on all processes together, that they share folders and that all devices are used.

    Raises `InputError`.
    """
    if processes.process_count() == 1:
        return
    if mesh.size < jax.device_count():
        raise InputError(
            f"mesh: uses {mesh.size} of {jax.device_count()} devices; a run of "
            f"{processes.process_count()} processes uses all: let data be -1"
        )
    _check_shared("out", out)
    if not is_remote(checkpoints):
        _check_shared("checkpoint.path", Path(checkpoints))


def _check_shared(key: str, folder: Path) -> None:
    place = folder / _SIGN

    def sign() -> str:
        text = secrets.token_hex(8)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        except OSError as error:
            raise InputError(
                f"{key}: {folder} cannot be written ({error.strerror}); give another folder"
            ) from error
        return text

    signed = processes.broadcast_from_first(sign)
    until = time.monotonic() + SHARED_SECONDS
    while (found := _text(place)) != signed and time.monotonic() < until:
        time.sleep(0.5)  # A file system of a network shows it late.
    if found != signed:
        raise InputError(
            f"{key}: {folder} of process {processes.process_index()} (on "
            f"{socket.gethostname()}) is not the folder of process 0; it has to lie on a file "
            "system that all hosts share"
        )
    processes.barrier(f"shared {key}")
    if processes.is_first():
        place.unlink()


def check_rows_shared(folder: Path) -> None:
    """Raise `InputError`, on all processes together, where one has not the rows of the first."""
    first = processes.broadcast_from_first(lambda: _text(folder / MANIFEST))
    if _text(folder / MANIFEST) != first:
        raise InputError(
            f"data.rows: {folder} of process {processes.process_index()} (on "
            f"{socket.gethostname()}) does not hold the rows that process 0 prepared; put it on a "
            "file system that all hosts share"
        )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
