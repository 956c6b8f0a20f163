"""Check whether a run may start, and whether it may resume from what its folder holds."""

import json
import os
import secrets
import socket
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mlmjax.config.data import DataConfig
from mlmjax.config.run import DrawnRate, MeshConfig, ObjectiveConfig, RunConfig, ScheduleConfig
from mlmjax.config.tables import list_differences
from mlmjax.data.manifest import MANIFEST
from mlmjax.data.schedule import mask_rate, micro_batches, row_schedule
from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.attention import check_platform
from mlmjax.parallel import processes
from mlmjax.parallel.sharding import check_rows, make_mesh
from mlmjax.reporting.trackers import check_installed
from mlmjax.storage import CONFIG, LOCK, check_name, is_remote
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.objectives import hash_files
from mlmjax.training.optimizer import make_schedule, rates_at
from mlmjax.training.run.inputs import Loaders
from mlmjax.training.run.timing import profiled_updates
from mlmjax.weights.checkpoints import fingerprints

OWN_FOLDERS = (LOCK, "checkpoints", "export", "adapter")

SHARED_SECONDS = 30.0
"""How long a shared file system may take to show a file to other processes."""

_SHARED = ".shared"
_MAY_DIFFER: Any = {"out": True, "data": {"rows", "workers"}, "checkpoint": {"path"}}
"""Keys that processes may set differently: where shared folders are mounted, and local work."""

_SAME = {"init_from", "revision", "dtype", "seed", "head"}
_OBJECTIVE = {"dummy_mlm_share", "mlm_share", "masking"}
_LATER = {
    *("normalize", "ordered", "label_smoothing"),
    *("random_tokens", "kept_tokens", "target_weight", "loss"),
}
_BATCH = {"batch_size", "batch_start", "batch_warmup"}
_CHOSEN_BY = {
    "learning rate": "learning_rate, schedule and steps",
    "mask rate": "mlm_rate, mlm_rate_end and steps",
    "number of rows": "batch_size, batch_start, batch_warmup and steps",
}
"""What changes from update to update, and the keys that decide it."""


def check_before_start(config: RunConfig, profile: str | None = None) -> Mesh:
    """Check everything that needs neither weights nor rows; return the mesh of the run.

    Several processes also check together that they have the same settings, share their folders and
    use all devices. Raises `InputError`, on all processes together.
    """
    count = processes.process_count()
    if config.parallel == "pmap" and config.mesh != MeshConfig():
        raise InputError(
            "mesh: parallel = 'pmap' keeps the whole state on every device; leave [mesh] out, or "
            "set parallel = 'pjit'"
        )
    if config.parallel == "pmap" and count > 1:
        raise InputError(
            f"parallel = 'pmap' uses the devices of one process, and there are {count}; set "
            "parallel = 'pjit'"
        )
    check_folders(config)
    check_name(Path(config.out))
    check_same_settings(config)
    if "to" in config.log.model_fields_set:  # the first process has the trackers
        processes.broadcast_from_first(lambda: check_installed(config.log.to))
    profiled_updates(profile, 0, config.steps)
    mesh = make_mesh(config.mesh)
    check_platform(config.attention, mesh.devices.flat[0].platform)
    check_batches(config, mesh.shape)
    make_schedule(config.schedule, config.optimizer.learning_rate, config.steps)
    if count > 1:
        if mesh.size < jax.device_count():
            raise InputError(
                f"mesh: uses {mesh.size} of {jax.device_count()} devices; a run of {count} "
                "processes uses all of them; set data = -1"
            )
        _check_shared("out", Path(config.out))
        if not is_remote(checkpoint_folder(config)):
            _check_shared("checkpoint.path", Path(checkpoint_folder(config)))
    return mesh


def checkpoint_folder(config: RunConfig) -> str:
    """Return the folder or address of the checkpoints of a run."""
    return config.checkpoint.path or str(Path(config.out) / "checkpoints")


def check_run_folder(out: Path) -> None:
    """Raise `InputError` for a folder whose `config.json` is not a run's: it would be replaced."""
    path = out / CONFIG
    if not path.exists():
        return
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        if {"out", "steps", "data"} <= json.loads(path.read_bytes()).keys():
            return
    raise InputError(
        f"{path}: is not the configuration of a run, so the folder holds something else, such as a "
        "model; name another folder for out"
    )


def check_folders(config: RunConfig) -> None:
    """Raise `InputError` for addresses as folders, and for folders inside one another.

    Rows may be in the run folder, but not in what it holds itself. Only checkpoints can be remote.
    """
    for key, place in (("out", config.out), ("data.rows", config.data.rows)):
        if is_remote(place):
            raise InputError(
                f"{key} = {place}: has to be a folder of this machine or of a mounted file system; "
                "only checkpoint.path can be remote"
            )
    for name in ("export", "adapter"):
        own = Path(config.out, name)
        if config.init_from and os.path.realpath(config.init_from) == os.path.realpath(own):
            raise InputError(
                f"init_from: {config.init_from} is in out = {config.out}, where the run would "
                "replace it; name another out"
            )
    rows, path, out = config.data.rows, config.checkpoint.path, f"out = {config.out}"
    apart = [("data.rows", rows, out, Path(config.out, name)) for name in OWN_FOLDERS]
    if path is not None and not is_remote(path):
        apart.append(("checkpoint.path", path, f"data.rows = {rows}", Path(rows)))
        apart.append(("checkpoint.path", path, out, Path(config.out, "export")))
    for key, folder, what, other in apart:
        here, there = (Path(os.path.realpath(place)) for place in (folder, other))
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise InputError(
                f"{key}: {folder} and {what} would be written into one another; choose another "
                "folder"
            )


def check_batches(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Raise `InputError` if the first or the largest batch cannot be divided over the mesh."""
    first = row_schedule(config.data, config.steps).start
    for rows in (config.data.batch_size, first):
        check_rows(sizes, rows, micro_batches(config.data, rows))


def check_same_settings(config: RunConfig) -> None:
    """Raise `InputError`, on all processes together, if one has other settings than the first."""
    settings = config.model_dump(mode="json", exclude=_MAY_DIFFER)
    files = hash_files(config.objective)
    mine = {"--processes": processes.process_count(), **settings, "objective_files": files}
    first = processes.broadcast_from_first(lambda: mine)
    if differences := list_differences(mine, first, "process 0 has"):
        raise InputError(
            f"{_this_process()}: {differences[0]}; give all processes the same configuration",
            differences[1:],
        )


def _check_shared(key: str, folder: Path) -> None:
    """Check, on all processes together, that a folder is the same one for all of them."""
    place = folder / _SHARED

    def write() -> str:
        text = secrets.token_hex(8)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        except OSError as error:
            raise InputError(
                f"{key}: {folder} cannot be written ({error.strerror}); give another folder"
            ) from error
        return text

    written = processes.broadcast_from_first(write)
    until = time.monotonic() + SHARED_SECONDS
    while (found := _read(place)) != written and time.monotonic() < until:
        time.sleep(0.5)  # A network file system shows a file late.
    if found != written:
        raise InputError(
            f"{key}: {folder} of {_this_process()} is not the folder of process 0; use a file "
            "system that all hosts share"
        )
    processes.barrier(f"shared {key}")
    if processes.is_first():
        place.unlink()


def check_rows_shared(folder: Path) -> None:
    """Raise `InputError`, on all processes together, if one does not see the rows of the first."""
    first = processes.broadcast_from_first(lambda: _read(folder / MANIFEST))
    if _read(folder / MANIFEST) != first:
        raise InputError(
            f"data.rows: {folder} of {_this_process()} does not hold the rows that process 0 "
            "prepared; put it on a file system that all hosts share"
        )


def _this_process() -> str:
    return f"process {processes.process_index()} (on {socket.gethostname()})"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def identity_of(
    config: RunConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    loaders: Loaders,
    frozen: Any = None,
) -> dict[str, Any]:
    """Return what decides every number of a run, as JSON values.

    Checkpoints do not hold the frozen parameters, so a hash of them is part of it. All processes
    call it together. It leaves out what may differ when a run resumes: where and how often it
    writes, the mesh, `accumulate` and `remat` (the same sums in another order), and `steps`, as
    long as the updates already done keep their learning rates, rows and mask rates.
    """
    data, optimizer = config.data, config.optimizer.model_dump(mode="json")
    # Runs of earlier versions have none of these keys.
    later: dict[str, Any] = {}
    if frozen is not None:
        later["frozen_parameters"] = zlib.crc32(json.dumps(fingerprints(frozen)).encode())
    if config.adapter is not None:
        later["adapter"] = config.adapter.model_dump(mode="json")
    if config.evaluation.patience is not None:
        later["evaluation"] = {"patience": config.evaluation.patience}
    if files := hash_files(config.objective):
        later["objective_files"] = files
    if isinstance(config.objective.mlm_rate, DrawnRate):
        later["mlm_rate"] = config.objective.mlm_rate.model_dump(mode="json")
    left_out = {"learning_rate"} | ({"train"} if config.optimizer.train is None else set())
    table = {
        **later,
        **config.model_dump(mode="json", include=_SAME),
        "model": model.to_hf(),
        "tokenizer": tokenizer.sha256,
        "data": {
            **data.model_dump(mode="json", include={"seq_length", "batch_size", "subset"}),
            "manifest": loaders.sha256,
            "weights": {source.title: source.weight for source in data.sources},
        },
        "objective": config.objective.model_dump(mode="json", include=_OBJECTIVE)
        # Left out if not given, so that runs of earlier versions resume.
        | config.objective.model_dump(mode="json", include=_LATER, exclude_defaults=True),
        "optimizer": {key: value for key, value in optimizer.items() if key not in left_out},
        "rates": {
            "learning_rate": config.optimizer.learning_rate,
            "schedule": config.schedule.model_dump(mode="json"),
            "objective": config.objective.model_dump(mode="json"),
            "batch": data.model_dump(mode="json", include=_BATCH),
            "steps": config.steps,
        },
    }
    return json.loads(json.dumps(table))


def check_same_run(
    config: RunConfig, step: int, metadata: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Raise `InputError` that lists how a run differs from the one that saved this checkpoint."""
    out = config.out
    try:
        saved, sums = metadata["identity"], metadata["interval"]
        before = _rates(saved["rates"], step)
        if not all(isinstance(value, int | float) for value in sums.values()):
            raise TypeError("interval holds no sums")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{out}: its checkpoints are not those of a training run; name another out"
        ) from error
    here, there = ({**table, "rates": None} for table in (identity, saved))
    if differences := list_differences(here, there, "the run there has"):
        raise InputError(
            f"{out}: holds another run, at step {step}: {differences[0]}; give its configuration "
            "to resume it, or name another out",
            differences[1:],
        )
    if config.steps < step:
        raise InputError(
            f"{out}: its run is at step {step}, past steps = {config.steps}; give at least {step}"
        )
    now = _rates(identity["rates"], step)
    for what, keys in _CHOSEN_BY.items():
        if not np.array_equal(before[what], now[what]):
            update = int(np.flatnonzero(before[what] != now[what])[0])
            raise InputError(
                f"{out}: update {update + 1} of {step} already done had the {what} "
                f"{before[what][update]:.6g}; this configuration says {now[what][update]:.6g}. "
                f"Give the {keys} of the first start; fractions of the run change with steps"
            )


def _rates(table: Mapping[str, Any], step: int) -> dict[str, np.ndarray]:
    """Return what the configuration says of each of the first `step` updates."""
    steps, updates = table["steps"], np.arange(step)
    schedule = ScheduleConfig.model_validate(table["schedule"])
    learning_rate = make_schedule(schedule, table["learning_rate"], steps)
    # JSON has lists where a table has tuples.
    objective = ObjectiveConfig.model_validate_json(json.dumps(table["objective"]))
    rates = map(mask_rate(objective, steps), range(step))
    rows = row_schedule(DataConfig.model_validate({"rows": "-", **table["batch"]}), steps)
    return {
        "learning rate": rates_at(learning_rate, updates),
        "mask rate": np.array([one.mean if isinstance(one, DrawnRate) else one for one in rates]),
        "number of rows": np.array([*map(rows.rows, range(step))]),
    }
