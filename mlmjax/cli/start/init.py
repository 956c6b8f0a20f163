"""Write a run file to begin from, with comments and sizes that suit a machine."""

import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlmjax.cli.start.machine import Machine
from mlmjax.config.run import RunConfig, parse_config
from mlmjax.config.tables import read_toml
from mlmjax.errors import InputError, write_failed
from mlmjax.parallel import sharding
from mlmjax.reporting.pages import render
from mlmjax.storage import write_whole
from mlmjax.training.planning.arithmetic import estimate
from mlmjax.training.planning.changes import apply_change
from mlmjax.training.run.initial_model import describe_start
from mlmjax.weights.hub import PACKAGED

KINDS = {
    "atp": "instruction data: prompts with answers of one token",
    "fit": "a table of texts with labels",
    "mlm": "plain text, to continue pretraining",
}
"""The kinds of run files, and what data each reads."""

_LARGE = {"atp": "answerdotai/ModernBERT-large", "fit": "answerdotai/ModernBERT-large"}
_SIZES = {  # rows of an update, tokens of a row: on a processor, and on accelerators
    "atp": ((8, 512), (256, 2048)),
    "fit": ((32, 256), (32, 512)),
    "mlm": ((8, 512), (128, 1024)),
}


def write_run_file(kind: str, name: str | None, machine: Machine) -> tuple[Path, RunConfig]:
    """Write `NAME.toml`, which trains on `KINDS[kind]`; return its path and what it decodes to.

    Raises `InputError` if the file exists already or cannot be written.
    """
    path = Path(name or kind)
    path = path if path.suffix == ".toml" else path.with_name(f"{path.name}.toml")
    if not path.stem.strip() or not path.stem.isprintable():
        raise InputError(f"{name!r}: is not a name for a run; give one such as my-run")
    text, config = make_run_file(kind, path.stem, machine)
    if path.exists():
        raise InputError(f"{path}: exists already; give another name, or remove the file")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: there is no such folder; make it, or give another name")
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise write_failed(path, error) from error
    return path, config


def make_run_file(kind: str, name: str, machine: Machine) -> tuple[str, RunConfig]:
    """Return the text of a run file for a machine, and what it decodes to."""
    on_cpu = machine.platform == "cpu"
    batch, length = _SIZES[kind][not on_cpu]
    values: dict[str, Any] = {
        "kind": kind,
        "what": KINDS[kind],
        "name": name,
        "machine": machine.described,
        "option": "" if machine.name is None else f" --machine {machine.name}",
        "model": PACKAGED if on_cpu else _LARGE.get(kind, "answerdotai/ModernBERT-base"),
        "dtype": "float32" if on_cpu else "bfloat16",
        "batch_size": _multiple(batch, machine.devices),
        "seq_length": length,
        "accumulate": 1,
        "remat": "none",
        "rate": 1e-3 if on_cpu else 3e-5,
        "epochs": 3 if kind == "fit" else 1,
        "excluded": _excluded_tasks(),
    }
    config = _decode(values)
    model = describe_start(_with_a_length(config))  # none of the changes changes its parameters
    for change in _changes(config, machine):
        values |= change
        config = _decode(values)
        if _fits(config, model, machine):
            break
    return _text(values), config


def _multiple(rows: int, devices: int) -> int:
    """Return the rows of an update that all devices share equally, at least as many."""
    return -(-rows // devices) * devices


def _changes(config: RunConfig, machine: Machine) -> list[dict[str, Any]]:
    """Return settings that need less and less memory, the fastest first."""
    found: list[dict[str, Any]] = [{"remat": "none"}, {"remat": "dots"}, {"remat": "layer"}]
    accumulate = 1
    while config.data.batch_size % (machine.devices * accumulate * 2) == 0:
        accumulate *= 2
        found += [{"remat": remat, "accumulate": accumulate} for remat in ("dots", "layer")]
    return found


def _with_a_length(config: RunConfig) -> RunConfig:
    """Return the configuration with steps, on which neither model nor memory depends."""
    return apply_change(config.with_steps(1), {})


def _fits(config: RunConfig, model: Any, machine: Machine) -> bool:
    """Tell by arithmetic whether the training step fits the devices."""
    sizes = sharding.mesh_shape(config.mesh, machine.devices)
    memory = estimate(_with_a_length(config), model, sizes)["training"]["memory"]
    return bool(memory["total"] <= machine.memory)


def _excluded_tasks() -> list[str]:
    """Return the evaluation sets that shipped configurations keep out of training."""
    shipped = Path(str(files("mlmjax"))) / "assets" / "configs" / "atp_tiny.toml"
    tasks: list[str] = read_toml(shipped)["data"]["exclude"]["tasks"]
    return tasks


def _text(values: dict[str, Any]) -> str:
    return render("cli/start/run.toml.j2", **values, quote=json.dumps)


def _decode(values: dict[str, Any]) -> RunConfig:
    return parse_config(tomllib.loads(_text(values)), f"{values['name']}.toml")
