"""A folder that appears whole or not at all, built by one process at a time."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mlmjax.errors import InputError

_LOCK = ".building"


@contextmanager
def built_whole(folder: Path) -> Iterator[Path | None]:
    """Give an empty sibling folder to build in; it takes the name `folder` when the block ends.

    Gives None when `folder` is there already, also when another process finished it while this one
    waited. What a process left behind that was killed, or failed, is there to go on from.
    Raises `InputError` when the place cannot be written, or the sibling is not of our making.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); expected a folder name in a "
            "place with write permission"
        ) from error
    with lock:
        if is_there(folder):
            # One who still waits may put its own lock here meanwhile; the last to come clears up.
            shutil.rmtree(partial, ignore_errors=True)
            yield None
            return
        try:
            yield partial
            # The lock goes along and is removed last, so that nobody can think it abandoned.
            partial.rename(folder)
            clear_lock(folder)
        except BaseException:
            if not any(partial.glob("*/*.json")):
                shutil.rmtree(partial, ignore_errors=True)  # Nothing in it is worth keeping.
            raise


def clear_lock(folder: Path) -> None:
    """Remove the lock from a folder that is whole, where one who was killed has left it."""
    with suppress(OSError):
        if folder.is_dir() and any(path.name != _LOCK for path in folder.iterdir()):
            (folder / _LOCK).unlink()


def is_there(folder: Path) -> bool:
    """Tell whether a name is taken, if only by a link to nowhere; an empty folder is not."""
    return os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))


def _lock(partial: Path) -> IO[bytes]:
    """Take the lock file of the folder being built, which a kill releases; wait if it is held."""
    import fcntl  # Not on Windows, where everything else of this package can be imported.

    path = partial / _LOCK
    while True:
        try:
            # One listing, because a lock may come or go between two looks.
            names = {entry.name for entry in partial.iterdir()} if partial.exists() else set()
            if partial.is_symlink() or (names and _LOCK not in names):
                raise InputError(
                    f"{partial}: is in the way and not ours to delete; move it elsewhere"
                )
            partial.mkdir(exist_ok=True)
            file = path.open("ab")
            fcntl.flock(file, fcntl.LOCK_EX)
            os.set_inheritable(file.fileno(), True)  # Held until the last of our processes ends.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()
        except (FileNotFoundError, FileExistsError):
            # Another process finished or gave up meanwhile: what we saw or locked is gone.
            continue
