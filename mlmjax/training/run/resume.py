"""Where a run may write: folders of this machine, and for checkpoints addresses as well."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from mlmjax.config.run import RunConfig
from mlmjax.errors import InputError

LOCK = ".lock"
OWN_FOLDERS = (LOCK, "checkpoints", "export")


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


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Make a run folder and hold it alone; raises `InputError` if it cannot be, or is in use."""
    import fcntl  # Not on Windows, where everything else of this package can be imported.

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("ab")
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror}); give a folder for out"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{out}: another process is training there; name another out"
            ) from error
        _check_ours(out / "config.json")
        yield


def _check_ours(path: Path) -> None:
    """Refuse a folder whose `config.json` is somebody else's: it would be overwritten."""
    if not path.exists():
        return
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not {"out", "steps", "data"} <= table.keys():
        raise InputError(f"{path}: is not the configuration of a run; name another folder for out")


def checkpoint_folder(config: RunConfig) -> str:
    """Return where the checkpoints of a run lie."""
    return config.checkpoint.path or str(Path(config.out) / "checkpoints")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is an address such as `gs://bucket/run`."""
    return "://" in os.fspath(path)


def check_name(folder: Path) -> None:
    """Raise `InputError` for a place where Orbax could save and not read back.

    It searches its own folders by patterns, in which some characters have a meaning.
    """
    if odd := set("*?[") & set(str(folder.expanduser().absolute())):
        raise InputError(
            f"{folder}: checkpoints cannot lie under a name with {min(odd)!r}; choose a folder "
            "without it"
        )


def reached(path: str | os.PathLike[str]) -> epath.Path:
    """Return a folder or an address as a path; raises `InputError` if it cannot be reached."""
    if not is_remote(path):
        check_name(Path(path))
        return epath.Path(Path(path).expanduser().absolute())
    try:
        place = epath.Path(path)
        place.exists()
        return place
    except Exception as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"{path}: cannot be reached ({why}); expected gs://, s3:// or az://, what fsspec needs "
            "for it (gcsfs, s3fs, adlfs), and the rights of this machine"
        ) from error
