"""Checkpoints of runs and of models, whole and verified. Nothing else knows Orbax."""

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from mlmjax.config.run import CheckpointConfig
from mlmjax.errors import InputError, RunError, first_line, full_disk, write_advice
from mlmjax.parallel import processes
from mlmjax.parallel.sharding import leaf_path
from mlmjax.storage import check_name, open_place


def fingerprints(state: Any) -> dict[str, int]:
    """Return the sum of every array's bits as 32-bit words, modulo 2**32, by the array's path.

    Any change of one word changes it, and it is the same for every sharding. All processes of a
    run have to call this together.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    # Piece by piece, each on its own device: no device has to wait for another one.
    pieces = [
        [
            _fingerprint(piece.data)
            for piece in jnp.asarray(leaf).addressable_shards
            if not piece.replica_id
        ]
        for _, leaf in leaves
    ]
    sums = np.array([sum(map(int, some)) for some in jax.device_get(pieces)], np.uint64)
    if jax.process_count() > 1:
        low = (sums % 2**32).astype(np.uint32)
        sums = multihost_utils.process_allgather(low).astype(np.uint64).sum(axis=0)
    return {leaf_path(path): int(n % 2**32) for (path, _), n in zip(leaves, sums, strict=True)}


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)


def verify(state: Any, expected: Mapping[str, int]) -> None:
    """Raise `ValueError` that names the first array whose bits are not those of `expected`."""
    found = fingerprints(state)
    changed = [name for name in found if found[name] != expected.get(name)]
    if changed:
        raise ValueError(f"{changed[0]} is not what was saved")


def describe(tree: Any) -> dict[str, str]:
    """Return dtype and shape of every array (or abstract one) by its path.

    >>> describe({"a": np.zeros((2, 3), np.float32)})
    {'a': 'float32 [2, 3]'}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        leaf_path(path): f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}" for path, leaf in leaves
    }


def check_same(where: Path, saved: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise `InputError` that lists how a saved tree and the expected one (`describe`) differ."""
    problems = [
        f"{name}: the checkpoint has {saved.get(name, 'nothing')}, the model "
        f"{expected.get(name, 'nothing')}"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if problems:
        raise InputError(
            f"{where}: is the checkpoint of another model: {problems[0]} (differences: "
            f"{len(problems)}); give the configuration it was saved with, or another folder",
            problems[1:],
        )


# What a step's folder holds; what a model's folder holds beside config.json and the tokenizer.
STATE, RECORD = "state", "record"


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
        self.folder = open_place(folder)
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
        if processes.broadcast_from_first(lambda: step in self.steps()):
            return
        self._saving = step
        self._clear()
        ranked = metrics is not None and np.isfinite(float(metrics.get("loss", np.nan)))
        record = {
            "metadata": dict(metadata or {}),
            "arrays": describe(state),
            "fingerprints": fingerprints(state),
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
        check_same(self.folder / str(step), record["arrays"], describe(abstract))
        try:
            args = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract)})
            state = self._manager.restore(step, args=args)[STATE]
            verify(state, record["fingerprints"])
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
        reason = full_disk(error) or f"{first_line(error):.200}"
        return RunError(
            f"{self.folder}: the checkpoint of step {self._saving} could not be saved ({reason}); "
            f"those saved before it are whole; {write_advice(error)}"
        )

    def _damaged(self, step: int, error: Exception) -> InputError:
        others = [other for other in self.steps() if other != step]
        then = f"the run goes on from step {max(others)}" if others else "the run starts again"
        return InputError(
            f"{self.folder / str(step)}: the checkpoint of step {step} is damaged "
            f"({first_line(error):.200}); delete this folder, and {then}"
        )


def _loss(metrics: Any) -> float:
    return metrics["loss"]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _saved_tree(folder: Path) -> Any:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata
            return getattr(tree, "tree", tree)
    except Exception as error:
        raise InputError(
            f"{folder}: is damaged or no checkpoint ({first_line(error):.200})"
        ) from error


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
            verify(tree, expected)
        return tree
    except Exception as error:
        raise InputError(
            f"{folder}: is damaged ({first_line(error):.200}); write the checkpoint again"
        ) from error
