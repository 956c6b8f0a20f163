"""Files and folders: strangers' files read safely, our own written whole or not at all."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from etils import epath
from safetensors import SafetensorError

from mlmjax.errors import InputError, RunError, full_disk, write_advice, write_failed

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


CONFIG = "config.json"
CARD = "README.md"
CLASSIFIER = "mlmjax_classifier.json"
TRAINING = "training_manifest.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MAX_JSON_BYTES = 16 * 2**20


def plain_file(folder: Path, name: str) -> Path:
    """Return the path of a regular file that lies in `folder`; raise `InputError` otherwise.

    A link may lead elsewhere in the folder, and, in a snapshot of the hub's cache, to the blobs
    beside it, which is how that cache is made.
    """
    if name in {"", ".", ".."} or set(name) & set("/\\:\0"):
        raise InputError(f"{folder}: {name!r} is not a plain file name; nothing outside is read")
    home = folder.resolve()
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        target = (folder / name).resolve()
        if not any(target.is_relative_to(root) for root in roots):
            raise InputError(
                f"{folder / name}: is a link to {target}, outside its folder; copy the file itself"
            )
        if target.is_file():
            return target
    except (OSError, RuntimeError) as error:
        raise InputError(f"{folder / name}: cannot be read ({error})") from error
    raise InputError(f"{folder / name}: is missing; a model folder needs this file")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of bounded size; raise `InputError` for anything else."""
    path = plain_file(folder, name)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InputError(
                f"{folder / name}: is {size} bytes long; expected at most {MAX_JSON_BYTES}"
            )
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{folder / name}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / name}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(
            f"{folder / name}: holds a JSON {type(value).__name__}; expected an object"
        )
    return value


@contextmanager
def written_whole(path: Path, replaceable: frozenset[str] | set[str]) -> Iterator[Path]:
    """Give a new folder to write into, and put it in the place of `path` once all is written.

    An older folder there is replaced only if it holds nothing but `replaceable` names (a name
    that starts with `*` stands for its ending). Raises `InputError` for any other folder or file
    there, `RunError` when writing fails; nothing is left behind then, and the old folder stays.
    """
    path = path.expanduser()
    check_replaceable(path, replaceable)
    token = uuid.uuid4().hex[:8]
    new, old = (path.with_name(f".{path.name}.{kind}-{token}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if path.is_dir():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    except (OSError, SafetensorError) as error:
        reason = full_disk(error) or error
        raise RunError(f"{path}: could not be written ({reason}); {write_advice(error)}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path: Path, replaceable: frozenset[str] | set[str]) -> None:
    """Refuse (`InputError`) to write where something other than an older model folder is."""
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path}: is a file; give a folder to write to")
    endings = tuple(name[1:] for name in replaceable if name.startswith("*"))
    others = [
        entry.name
        for entry in path.iterdir()
        if entry.name not in replaceable and not (endings and entry.name.endswith(endings))
    ]
    if others:
        raise InputError(
            f"{path}: holds other things than a model written before ({sorted(others)[0]}); "
            "give a new or empty folder"
        )


LOCK = ".lock"


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


PARTIAL = ".partial"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all; raises `RunError` if it cannot be."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise write_failed(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one piece, whole or not at all; raises `RunError` when that fails."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(f"{json.dumps(value, indent=2, ensure_ascii=False)}\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise write_failed(path, error) from error


def hash_of(value: Any) -> str:
    """Return a name for JSON values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def describe_file(path: Path) -> dict[str, Any]:
    """Return name, size and hash of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest}


def file_sha256(path: Path) -> str:
    """Return the hash of a file's content; raises `InputError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
