"""Save and restore the checkpoints of a run with Orbax, whole and verified."""

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from mlmjax.config.run import CheckpointConfig
from mlmjax.errors import InputError, RunError, first_line, full_disk, write_advice
from mlmjax.parallel import processes
from mlmjax.parallel.jax_internals import gather
from mlmjax.parallel.sharding import named_leaves
from mlmjax.storage import check_name, expand_home, is_remote

STATE, RECORD = "state", "record"
"""The two items of a step's folder: its arrays, and their description."""

# Where the message of an error of Orbax or TensorStore continues with their internals.
_INTERNALS = re.compile(
    r" in OCDBT database|\.?\s*(?:See full )?TensorStore details:| \[tensorstore_spec"
)

# Orbax logs every step it takes, and the tracebacks of errors that it raises too.
logging.getLogger("absl").addFilter(lambda line: f"{os.sep}orbax{os.sep}" not in line.pathname)
# When one array cannot be read, the readers of others end with errors that nobody waits for, or
# report to an event loop that no longer exists.
_unraisable = sys.unraisablehook


def _report(found: Any) -> None:
    """Report an exception that Python cannot raise, unless it is of a reader of Orbax."""
    code = getattr(found.object, "cr_code", None)
    is_reader = code is not None and f"{os.sep}orbax{os.sep}" in code.co_filename
    if not is_reader and str(found.exc_value) != "Event loop is closed":
        _unraisable(found)


sys.unraisablehook = _report


class Checkpoints:
    """The checkpoints of one run, in `folder/STEP`, each whole or not there.

    `folder` may be an address that Orbax and fsspec reach, such as `gs://bucket/run`. The newest
    `keep_last` are kept, and the `keep_best` with the smallest validation loss. Every array is
    saved with a fingerprint, which restoring verifies. Writing continues in the background: use
    this as a context, or call `close`. A save that failed raises `RunError` at the next call.
    """

    def __init__(self, folder: str | os.PathLike[str], config: CheckpointConfig):
        self.folder = open_place(folder)
        self._saving: int | None = None
        self._cleared = False
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(config.keep_last)]
        if config.keep_best:
            best = ocp.checkpoint_managers.BestN(
                get_metric_fn=itemgetter("loss"),
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
                    # Orbax writes metrics only with these two; the next process needs them.
                    best_fn=itemgetter("loss"),
                    best_mode="min",
                    # Orbax would do it in the background, even when it is opened only to read.
                    cleanup_tmp_directories=False,
                ),
                item_handlers={
                    STATE: ocp.StandardCheckpointHandler(),
                    RECORD: ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be used for checkpoints ({error.strerror or error}); give "
                "another folder"
            ) from error
        except ValueError as error:
            raise InputError(
                f"{self.folder}: the loss of a checkpoint cannot be read ({error}); delete the "
                f"folder of that step, {_without_loss(self.folder)}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            self.close()
        except RunError:
            if kind is None:  # an earlier error says more
                raise

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Save any tree of arrays under `step`; writing continues in the background.

        `metrics` with a finite "loss" makes the step a candidate for the best. `metadata` is a JSON
        object that says whose state this is (see `metadata()`). A step that exists is not written
        again. Raises `RunError` if this save or the one before it fails.
        """
        step = int(step)
        self.wait()
        if processes.broadcast_from_first(lambda: step in self.steps()):
            return
        self._saving = step
        if not self._cleared and processes.is_first():  # what interrupted saves left
            for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
                with suppress(OSError):
                    path.rmtree()
            self._cleared = True
        loss = float((metrics or {}).get("loss", np.nan))
        record = {
            "metadata": dict(metadata or {}),
            "arrays": describe(state),
            "fingerprints": fingerprints(state),
        }
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{STATE: ocp.args.StandardSave(state), RECORD: ocp.args.JsonSave(record)}
                ),
                metrics={"loss": loss} if np.isfinite(loss) else None,
                force=True,
            )

    def latest(self) -> int | None:
        """Return the newest whole step, or None."""
        return max(self.steps(), default=None)

    def resumable(self) -> int | None:
        """Return the newest whole step, or None, if the run can save after it.

        Raises `InputError` for a later step that is not whole: its folder would make saving fail
        when the run reaches it.
        """
        latest = self.latest() or 0
        if later := [step for step in self._numbered() if step > latest]:
            then = f"resumes from step {latest}" if latest else "starts again"
            raise InputError(
                f"{self.folder / str(min(later))}: is not a whole checkpoint; delete this folder, "
                f"and the run {then}"
            )
        return latest or None

    def steps(self) -> list[int]:
        """Return all whole steps in order."""
        self.wait()
        parts = (STATE, RECORD, "_CHECKPOINT_METADATA")
        return [
            step
            for step in self._numbered()
            if all((self.folder / str(step) / part).exists() for part in parts)
        ]

    def _numbered(self) -> list[int]:
        # Orbax moves a finished folder into place, but lists any folder named by a number.
        return sorted(self._manager.all_steps())

    def metadata(self, step: int) -> dict[str, Any]:
        """Return the `metadata` given to `save`; raises `InputError`."""
        return self._record(step)["metadata"]

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Return the state saved under `step`, bit by bit, on the shardings of `abstract_state`.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct` (or arrays). Raises `InputError` that
        names the leaves that differ if the checkpoint is of another model, and one that says what
        to do if it is damaged.
        """
        record = self._record(step)
        abstract = jax.tree.map(_abstract, abstract_state)
        check_same(self.folder / str(step), record["arrays"], describe(abstract))
        with self._reading(step):
            args = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract)})
            state = self._manager.restore(step, args=args)[STATE]
            verify(state, record["fingerprints"])
        return state

    def wait(self) -> None:
        """Wait for the last save; raises `RunError` if it failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last save and close threads and files; raises `RunError` as `wait`."""
        with self._writing():
            self._manager.close()

    def _record(self, step: int) -> dict[str, Any]:
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"{self.folder}: has no checkpoint of step {step}; it has {have}")
        with self._reading(step):
            args = ocp.args.Composite(**{RECORD: ocp.args.JsonRestore()})
            record = self._manager.restore(step, args=args)[RECORD]
            return {key: dict(record[key]) for key in ("metadata", "arrays", "fingerprints")}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = full_disk(error) or reason_of(error)
            raise RunError(
                f"{self.folder}: the checkpoint of step {self._saving} could not be saved "
                f"({reason}); those saved before it are whole; {write_advice(error)}"
            ) from error

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            others = [other for other in self.steps() if other != step]
            then = f"the run resumes from step {max(others)}" if others else "the run starts again"
            raise InputError(
                f"{self.folder / str(step)}: the checkpoint of step {step} is damaged "
                f"({reason_of(error)}); delete this folder, and {then}"
            ) from error


def _without_loss(folder: epath.Path) -> str:
    """Return the number of the first step whose loss is not JSON."""
    for path in sorted(folder.glob("*/metrics/metrics")):
        try:
            json.loads(path.read_bytes())
        except (OSError, ValueError):
            return path.parent.parent.name
    return "which is not known"


def fingerprints(state: Any) -> dict[str, int]:
    """Return the sum of each array's bits as 32-bit words, modulo 2**32, by the array's path.

    Any change of one word changes the sum, and no sharding does. All processes of a run have to
    call this together.
    """
    leaves = named_leaves(state)
    # Each piece is summed on its own device, so that no device waits for another.
    pieces = [
        [
            _fingerprint(piece.data)
            for piece in jnp.asarray(leaf).addressable_shards
            if not piece.replica_id
        ]
        for leaf in leaves.values()
    ]
    sums = np.array([sum(map(int, some)) for some in jax.device_get(pieces)], np.uint64)
    if jax.process_count() > 1:
        low = (sums % 2**32).astype(np.uint32)
        sums = gather(low).astype(np.uint64).sum(axis=0)
    return {name: int(n % 2**32) for name, n in zip(leaves, sums, strict=True)}


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


def reason_of(error: Exception) -> str:
    """Return the first line of an error of Orbax, without the internals of its storage.

    >>> reason_of(ValueError('Error reading "step" in OCDBT database at local file "a/": ...'))
    'Error reading "step"'
    """
    return f"{_INTERNALS.split(first_line(error))[0]:.200}"


def describe(tree: Any) -> dict[str, str]:
    """Return dtype and shape of every array (or abstract one) by its path.

    >>> describe({"a": np.zeros((2, 3), np.float32)})
    {'a': 'float32 [2, 3]'}
    """
    return {
        name: f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}"
        for name, leaf in named_leaves(tree).items()
    }


def check_same(where: Path, saved: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise `InputError` that lists how a saved tree and the expected one (`describe`) differ."""
    both = saved.keys() | expected.keys()
    names = sorted(name for name in both if saved.get(name) != expected.get(name))
    # Some names of either side come first, before one side fills the lines that an error has.
    sides = [[name for name in names if name not in side][:3] for side in (expected, saved)]
    problems = [
        f"{name}: the checkpoint has {saved.get(name, 'nothing')}, the model "
        f"{expected.get(name, 'nothing')}"
        for name in dict.fromkeys([*sides[0], *sides[1], *names])
    ]
    if problems:
        raise InputError(
            f"{where}: is the checkpoint of another model: {problems[0]} (differences: "
            f"{len(problems)}); give the configuration it was saved with, or another folder",
            problems[1:],
        )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def open_place(path: str | os.PathLike[str]) -> epath.Path:
    """Return a folder or an address as a path; raise `InputError` if unreachable."""
    if not is_remote(path):
        check_name(Path(path))
        return epath.Path(expand_home(path).absolute())
    try:
        place = epath.Path(path)
        place.exists()
        return place
    except Exception as error:
        raise InputError(
            f"{path}: cannot be reached ({first_line(error)}); expected gs://, s3:// or az://, "
            "the package that fsspec needs (gcsfs, s3fs, adlfs), and permission for this machine"
        ) from error
