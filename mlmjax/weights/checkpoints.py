"""Checkpoints of runs and of models, whole and verified. Nothing else knows Orbax."""

import json
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mlmjax.config.run import CheckpointConfig
from mlmjax.errors import InputError, RunError, full_disk, write_advice
from mlmjax.model.architecture import ModelConfig
from mlmjax.parallel import processes
from mlmjax.parallel.sharding import leaf_path
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.run.resume import check_name, reached
from mlmjax.weights import hub, integrity, pretrained
from mlmjax.weights.layout import to_hf_layout

# What a step's folder holds; what a model's folder holds beside config.json and the tokenizer.
STATE, RECORD = "state", "record"
PARAMS, MODEL_RECORD = "params", "checkpoint.json"
MODEL_FORMAT = "mlmjax-model-1"
MODEL_FILES = frozenset(
    {hub.CONFIG, MODEL_RECORD, PARAMS} | set(hub.TOKENIZER_FILES + hub.OTHER_TOKENIZER_FILES)
)

# Orbax tells of every step it takes, and prints tracebacks of errors that it raises as well.
logging.getLogger("absl").addFilter(lambda line: f"{os.sep}orbax{os.sep}" not in line.pathname)
# When one array cannot be read, those still being read report to an event loop that is gone.
_unraisable = sys.unraisablehook
sys.unraisablehook = lambda found: (
    None if str(found.exc_value) == "Event loop is closed" else _unraisable(found)
)


class Checkpoints:
    """The checkpoints of one run, in `folder/STEP`: written in the background, whole or not at all.

    `folder` may be an address that Orbax and fsspec reach, such as `gs://bucket/run`.

    The newest `keep_last` are kept, and the `keep_best` with the smallest validation loss as well.
    Every array is saved with a fingerprint, and restoring verifies it. Use as a context, or call
    `close`; a save that failed in the background raises `RunError` at the next call.
    """

    def __init__(self, folder: str | os.PathLike[str], config: CheckpointConfig):
        self.folder = reached(folder)
        self._saving: int | None = None
        self._cleared = False
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(config.keep_last)]
        if config.keep_best:
            best = ocp.checkpoint_managers.BestN(
                get_metric_fn=_loss,
                n=config.keep_best,
                reverse=True,  # the last ones in order are kept
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                    # Only with these does Orbax write the metrics, which the next process needs.
                    best_fn=_loss,
                    best_mode="min",
                    # Orbax does it in the background of every opening, also of one that only reads.
                    cleanup_tmp_directories=False,
                ),
                item_handlers={
                    STATE: ocp.StandardCheckpointHandler(),
                    RECORD: ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be used for checkpoints ({error})") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            self.close()
        except RunError:
            if kind is None:  # what went wrong first says more
                raise

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Save any tree of arrays under `step`; writing goes on in the background.

        `metrics` with a finite "loss" makes the step a candidate for the best; `metadata` is a
        JSON object that says whose state this is (see `metadata()`). A step that is there already
        is left alone. Raises `RunError` if this or the save before it fails.
        """
        step = int(step)
        self.wait()
        if processes.told_by_first(lambda: step in self.steps()):
            return
        self._saving = step
        self._clear()
        ranked = metrics is not None and np.isfinite(float(metrics.get("loss", np.nan)))
        record = {
            "metadata": dict(metadata or {}),
            "arrays": integrity.describe(state),
            "fingerprints": integrity.fingerprints(state),
        }
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{STATE: ocp.args.StandardSave(state), RECORD: ocp.args.JsonSave(record)}
                ),
                metrics={"loss": float(metrics["loss"])} if metrics and ranked else None,
                force=True,
            )
        except Exception as error:
            raise self._failed(error) from error

    def _clear(self) -> None:
        """Remove what saves that were cut off have left, before the first save of this process."""
        if not self._cleared and processes.is_first():
            for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
                with suppress(OSError):
                    path.rmtree()
            self._cleared = True

    def latest(self) -> int | None:
        """Return the newest step that is saved whole, or None."""
        return max(self.steps(), default=None)

    def resumable(self) -> int | None:
        """Return the newest step, as `latest` does, if saving can go on after it.

        Raises `InputError` for the rest of a later one: its place is taken, and saving would fail
        when the run comes to it.
        """
        latest = self.latest() or 0
        if later := [step for step in self._numbered() if step > latest]:
            then = f"goes on from step {latest}" if latest else "starts again"
            raise InputError(
                f"{self.folder / str(min(later))}: is not a whole checkpoint; delete this folder, "
                f"and the run {then}"
            )
        return latest or None

    def steps(self) -> list[int]:
        """Return all steps that are saved whole, in order."""
        self.wait()
        parts = (STATE, RECORD, "_CHECKPOINT_METADATA")
        return [
            step
            for step in self._numbered()
            if all((self.folder / str(step) / part).exists() for part in parts)
        ]

    def _numbered(self) -> list[int]:
        # Orbax renames a finished folder into place, but lists any with a number for a name.
        return sorted(self._manager.all_steps())

    def metadata(self, step: int) -> dict[str, Any]:
        """Return the `metadata` that was given to `save`; raises `InputError`."""
        return self._record(step)["metadata"]

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Return the state saved under `step`, bit by bit, on the shardings of `abstract_state`.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct` (or arrays). Raises `InputError` that
        names the first leaf that differs if the checkpoint is of another model, and one that says
        what to do if it is damaged.
        """
        record = self._record(step)
        abstract = jax.tree.map(_abstract, abstract_state)
        integrity.check_same(
            self.folder / str(step), record["arrays"], integrity.describe(abstract)
        )
        try:
            args = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract)})
            state = self._manager.restore(step, args=args)[STATE]
            integrity.verify(state, record["fingerprints"])
        except Exception as error:
            raise self._damaged(step, error) from error
        return state

    def wait(self) -> None:
        """Return when no save is under way; raises `RunError` if one failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Wait for the last save, and let go of threads and files; raises `RunError` as `wait`."""
        try:
            self._manager.close()
        except Exception as error:
            raise self._failed(error) from error

    def _record(self, step: int) -> dict[str, Any]:
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"{self.folder}: has no checkpoint of step {step}; it has {have}")
        try:
            args = ocp.args.Composite(**{RECORD: ocp.args.JsonRestore()})
            record = self._manager.restore(step, args=args)[RECORD]
            if not all(
                isinstance(record[key], dict) for key in ("metadata", "arrays", "fingerprints")
            ):
                raise ValueError(f"{RECORD} is not what was saved")
        except Exception as error:
            raise self._damaged(step, error) from error
        return record

    def _failed(self, error: Exception) -> RunError:
        reason = full_disk(error) or _first_line(error)
        return RunError(
            f"{self.folder}: the checkpoint of step {self._saving} could not be saved ({reason}); "
            f"those saved before it are whole; {write_advice(error)}"
        )

    def _damaged(self, step: int, error: Exception) -> InputError:
        others = [other for other in self.steps() if other != step]
        then = f"the run goes on from step {max(others)}" if others else "the run starts again"
        return InputError(
            f"{self.folder / str(step)}: the checkpoint of step {step} is damaged "
            f"({_first_line(error)}); delete this folder, and {then}"
        )


def _loss(metrics: Any) -> float:
    return metrics["loss"]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def save_model(
    path: str | os.PathLike[str], model: pretrained.Model, tokenizer: Tokenizer | None
) -> None:
    """Write a model alone: config.json, tokenizer files, `params/` (Orbax), checkpoint.json.

    The dtypes of the files it was loaded from are kept, so that it can go back bit by bit. The
    folder appears whole or not at all. Raises `InputError` and `RunError` as `hf.save_pretrained`.
    """
    check_name(Path(path))
    params = nnx.state(model, nnx.Param)
    values = model.config.to_hf() | {"architectures": [type(model).__name__]}
    record = {
        "format": MODEL_FORMAT,
        "source_dtypes": dict(getattr(model, "source_dtypes", ())),
        "arrays": integrity.describe(params),
        "fingerprints": integrity.fingerprints(params),
    }
    with hub.written_whole(Path(path), MODEL_FILES) as folder:
        for name, table in ((hub.CONFIG, values), (MODEL_RECORD, record)):
            (folder / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / PARAMS).absolute(), params)


def load_model(
    path: str | os.PathLike[str], *, dtype: str = "float32", attention: str = "auto"
) -> tuple[pretrained.Model, Tokenizer | None]:
    """Read what `save_model` wrote; the tokenizer is None where none was saved.

    Raises `InputError` for a damaged folder, and for one whose arrays are not those of its
    config.json.
    """
    folder = Path(path).expanduser().absolute()
    record = _model_record(folder)
    config = ModelConfig.from_hf(hub.read_json(folder, hub.CONFIG))
    names = config.architectures or ()
    if len(names) != 1 or names[0] not in pretrained.CLASSES:
        raise InputError(f"{folder / hub.CONFIG}: architectures is {names}; expected a class")
    model: Any = pretrained.abstract_model(names[0], config, dtype=dtype, attention=attention)
    graphdef, params = nnx.split(model)
    integrity.check_same(folder, record["arrays"], integrity.describe(params))
    model = nnx.merge(graphdef, _restored(folder / PARAMS, params, record["fingerprints"]))
    if record["source_dtypes"]:
        model.source_dtypes = tuple(sorted(record["source_dtypes"].items()))
    has_tokenizer = (folder / hub.TOKENIZER_FILES[0]).exists()
    return model, pretrained.load_tokenizer(folder) if has_tokenizer else None


def is_model(folder: Path) -> bool:
    """Tell whether a folder is one that `save_model` wrote."""
    return (folder / MODEL_RECORD).is_file()


def saved_tensors(folder: Path) -> dict[str, np.ndarray] | None:
    """Return the parameters of a model's or a run's checkpoint as tensors of a Hugging Face folder.

    `folder` is what `save_model` wrote, one step of `Checkpoints`, or a folder of such steps or a
    run with one (the newest step then); None for anything else. The dtypes are those of the files
    the model was loaded from, where they are known. Raises `InputError` for damaged files.
    """
    folder = folder.expanduser().absolute()
    if is_model(folder):
        record = _model_record(folder)
        tensors = _named(_restored(folder / PARAMS, None, record["fingerprints"]))
        dtypes = record["source_dtypes"]
        if pretrained.DECODER in dtypes:
            tensors[pretrained.DECODER] = tensors[pretrained.EMBEDDING]
        return {name: x.astype(dtypes.get(name, x.dtype)) for name, x in tensors.items()}
    for place in (folder, folder / "checkpoints"):
        steps = [int(entry.name) for entry in place.glob("*") if entry.name.isdecimal()]
        if steps and not (place / STATE).is_dir():
            folder = place / str(max(steps))
            break
    if not (folder / STATE).is_dir():
        return None
    record = hub.read_json(folder / RECORD, "metadata")
    state = _restored(folder / STATE, None, record.get("fingerprints"))
    if not isinstance(state, Mapping) or "params" not in state:
        raise InputError(f"{folder}: holds a state without params; give a training run's folder")
    return _named(state["params"])


def _named(params: Any) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = ((leaf_path(path), np.asarray(leaf)) for path, leaf in leaves)
    return {name: to_hf_layout(name, value) for name, value in named}


def _model_record(folder: Path) -> dict[str, Any]:
    record = hub.read_json(folder, MODEL_RECORD)
    tables = [record.get(key) for key in ("source_dtypes", "arrays", "fingerprints")]
    known = set(pretrained.DTYPES.values())
    if record.get("format") != MODEL_FORMAT or not all(isinstance(t, dict) for t in tables):
        raise InputError(f"{folder / MODEL_RECORD}: is not a record of format {MODEL_FORMAT}")
    if not known.issuperset(map(str, record["source_dtypes"].values())):
        raise InputError(f"{folder / MODEL_RECORD}: expected dtypes {', '.join(sorted(known))}")
    return record


def _saved_tree(folder: Path) -> Any:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata
            return getattr(tree, "tree", tree)
    except Exception as error:
        raise InputError(f"{folder}: is damaged or no checkpoint ({_first_line(error)})") from error


def _restored(folder: Path, abstract: Any, expected: Mapping[str, int] | None) -> Any:
    check_name(folder)
    device = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        _saved_tree(folder) if abstract is None else abstract,
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder, abstract)
        if expected is not None:
            integrity.verify(tree, expected)
        return tree
    except Exception as error:
        raise InputError(
            f"{folder}: is damaged ({_first_line(error)}); write the checkpoint again"
        ) from error
