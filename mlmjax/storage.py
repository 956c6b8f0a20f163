"""Read strangers' files safely; write files and folders whole or not at all."""

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import sys
import uuid
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mlmjax.errors import InputError, read_failed, write_failed

CONFIG = "config.json"
CARD = "README.md"
CLASSIFIER = "mlmjax_classifier.json"
ADAPTER_BASE = "mlmjax_adapter.json"
DECIDER = "mlmjax_decider.json"
TRAINING = "training_manifest.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PROVENANCE = (
    *(CARD, TRAINING, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt"),
    *("ATTRIBUTION.md", "CITATION.cff"),
)
"""Files of a model folder that say where its weights come from."""
EMBEDDING_MODULES = "modules.json"
EMBEDDING_POOLING = "1_Pooling/config.json"
EMBEDDING_LENGTH = "sentence_bert_config.json"
EMBEDDING_PROMPTS = "config_sentence_transformers.json"
EMBEDDING_FILES = (EMBEDDING_MODULES, EMBEDDING_POOLING, EMBEDDING_LENGTH, EMBEDDING_PROMPTS)
"""Files of sentence_transformers beside a model."""
LOCK = ".lock"
PARTIAL = ".partial"
"""Ending of the name of an unfinished file or folder."""
MAX_JSON_BYTES = 16 * 2**20

_BUILDING = ".building"
"""Marks a folder as one that `build_folder` made."""

# The names that `_hidden` and `write_whole` give.
_UNFINISHED_FOLDER = re.compile(r"\.export\.(new|old)-([0-9a-f]{8}-\d+-)?[0-9a-f]{8}")
_UNFINISHED_FILE = re.compile(rf".+\.\d+{re.escape(PARTIAL)}")


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Replace a leading `~` by the home directory, unless a file or folder is called so.

    Raises `InputError` if the home directory is not known.
    """
    plain = Path(path)
    if not os.fspath(path).startswith("~") or os.path.lexists(plain.parts[0]):
        return plain
    try:
        return plain.expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{plain}: the home directory that {plain.parts[0]!r} means is not known; give the "
            f"whole path, set HOME, or give ./{plain} for a folder of this name"
        ) from error


def without_folder(name: str) -> str:
    """Return the last parts of absolute paths, which say nothing elsewhere; other names stay.

    >>> without_folder("/models/model"), without_folder("/data/a.csv, org/name")
    ('model', 'a.csv, org/name')
    """
    parts = name.split(", ")
    return ", ".join(Path(part).name if Path(part).is_absolute() else part for part in parts)


def check_regular(path: Path) -> None:
    """Raise `InputError` for a pipe or a device, which cannot be read twice."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return  # Whoever reads the file says so.
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(
            f"{path}: is a pipe or a device; expected a file, because it is read more than once; "
            "write its content into a file first"
        )


def plain_file(folder: Path, name: str) -> Path:
    """Return the path of a regular file in `folder`; raise `InputError` for anything else.

    A link may lead elsewhere in the folder, and, in a snapshot of the hub's cache (or a folder in
    it), to the blobs next to it, which is how that cache is made.
    """
    if name in {"", ".", ".."} or set(name) & set("/\\:\0"):
        raise InputError(f"{folder}: {name!r} is not a plain file name; nothing outside is read")
    home = folder.resolve()
    snapshots = [up.parent for up in (home, home.parent) if up.parent.name == "snapshots"]
    roots = [home, *(one.parent / "blobs" for one in snapshots)]
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
    raise InputError(
        f"{folder / name}: is missing or not a file; a model folder needs this file; fetch or "
        "export the model again, or give another folder"
    )


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of bounded size; raise `InputError` for anything else."""
    content = read_bounded(plain_file(folder, name), MAX_JSON_BYTES)
    return parse_object(content, str(folder / name))


def read_bounded(path: Path, most: int) -> bytes:
    """Read a file of at most `most` bytes; raise `InputError` for anything else."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise read_failed(path, error, "give a readable file") from error
    if len(content) > most:
        raise InputError(f"{path}: is larger than {most >> 20} MiB; expected a smaller file")
    return content


def parse_object(
    content: bytes | str, where: str, advice: str = "expected an object", **options: Any
) -> dict[str, Any]:
    """Parse a JSON object; raise `InputError` with `where` and `advice` for anything else.

    `options` are those of `json.loads`.
    """
    try:
        value = json.loads(content, **options)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not valid JSON ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds a JSON {type(value).__name__}; {advice}")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise `ValueError` for a repeated key (an `object_pairs_hook`)."""
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return table


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raise `RunError` when writing fails."""
    with write_to(path) as partial, partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def write_to(path: Path) -> Iterator[Path]:
    """Yield a path to write, which replaces `path` at the end; raises what `write_whole` raises."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # others may write this file
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise write_failed(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON whole or not at all; raise `RunError` when writing fails."""
    write_whole(path, f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode())


def check_replaceable(path: Path, replaceable: Collection[str]) -> None:
    """Raise `InputError` unless `replace_folder` may write to this place."""
    path = expand_home(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; give a folder to write to")
    endings = tuple(name[1:] for name in replaceable if name.startswith("*"))
    names = [entry.name for entry in path.iterdir()] if path.exists() else []
    if others := [n for n in names if n not in replaceable and not n.endswith(endings)]:
        raise InputError(
            f"{path}: holds files that are not part of a model ({min(others)}); give a new or "
            "empty folder"
        )


def check_writable(path: Path) -> None:
    """Raise `InputError` unless a folder can be made at this place, before the work for it."""
    path = expand_home(path).absolute()
    place = next(parent for parent in path.parents if parent.exists())
    try:
        with TemporaryDirectory(prefix=f".{path.name}.", dir=place):
            pass
    except OSError as error:
        raise _not_writable(path, error) from error


@contextmanager
def replace_folder(path: Path, replaceable: Collection[str]) -> Iterator[Path]:
    """Yield a new folder to write into; move it to `path` at the end.

    An older folder is replaced only if it holds nothing but `replaceable` names (`*` and an ending
    match any name with that ending). Raises `InputError` for any other folder or file there, and
    `RunError` when writing fails. Then the old folder stays, and nothing else is left.
    """
    path = expand_home(path)
    check_replaceable(path, replaceable)
    _remove_abandoned(path)
    new = _hidden(path, "new")
    try:
        with _move_when_done(new, path):
            new.mkdir(parents=True)
            yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def build_folder(folder: Path) -> Iterator[Path | None]:
    """Yield a locked folder to build in; move it to `folder` at the end.

    It holds the work of a process that was killed or failed. Yields None if `folder` exists, also
    if another process finished it while this one waited. Raises `InputError` if the place cannot
    be written or holds somebody else's folder, and `RunError` when writing fails.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    lock = FileLock(folder.with_name(f".{folder.name}{LOCK}"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = lock.acquire()
    except OSError as error:
        raise _not_writable(folder, error) from error
    with held:
        try:
            if is_there(folder):
                yield None
                return
            _open_partial(folder, partial)
            try:
                with _move_when_done(partial, folder):
                    yield partial
            finally:
                if not any(partial.glob("*/*.json")):
                    shutil.rmtree(partial, ignore_errors=True)  # Nothing in it is worth keeping.
            unmark(folder)
        finally:
            with suppress(OSError):
                Path(lock.lock_file).unlink()


def _open_partial(folder: Path, partial: Path) -> None:
    try:
        names = {entry.name for entry in partial.iterdir()} if partial.exists() else set()
        if partial.is_symlink() or (names and _BUILDING not in names):
            raise InputError(
                f"{partial}: is not an unfinished folder of mlmjax, so it is not deleted; move it "
                "elsewhere"
            )
        partial.mkdir(exist_ok=True)
        (partial / _BUILDING).touch()
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"{folder}: cannot be written ({error.strerror or error}); give a folder in a place with "
        "write permission"
    )


def unmark(folder: Path) -> None:
    """Remove the mark of an unfinished folder that a killed process left."""
    with suppress(OSError):
        if folder.is_dir() and any(path.name != _BUILDING for path in folder.iterdir()):
            (folder / _BUILDING).unlink()


def is_there(folder: Path) -> bool:
    """Tell whether a name is taken by anything but an empty folder."""
    return os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def _move_when_done(new: Path, path: Path) -> Iterator[None]:
    """Move `new` to `path` when the block ends; keep a folder there until that succeeds."""
    old = _hidden(path, "old")
    try:
        yield
        if path.is_dir():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    except (OSError, SafetensorError) as error:
        raise write_failed(path, error) from error
    finally:
        if path.exists() and old.exists():
            # Under a name of unfinished folders, so that one that is half deleted never comes back.
            gone = _hidden(path, "new")
            old.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _hidden(path: Path, kind: str) -> Path:
    """Return a hidden name next to `path`, which says what process it belongs to."""
    owner = f"{_this_machine()}-{os.getpid()}"
    return path.with_name(f".{path.name}.{kind}-{owner}-{uuid.uuid4().hex[:8]}")


def _this_machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def find_moved_away(path: Path) -> Path | None:
    """Return the folder that a killed process moved away from `path`, which is not there now."""
    if os.path.lexists(path):
        return None
    moved = _abandoned(path, "old")
    return max(moved, key=lambda entry: entry.stat().st_ctime_ns, default=None)


def _remove_abandoned(path: Path) -> None:
    """Remove what ended processes left for `path`, after moving back what one moved away."""
    with suppress(OSError):
        if (moved := find_moved_away(path)) is not None:
            moved.rename(path)
        for entry in (*_abandoned(path, "new"), *_abandoned(path, "old")):
            shutil.rmtree(entry, ignore_errors=True)


def _abandoned(path: Path, kind: str) -> list[Path]:
    """Return the hidden folders for `path` of processes of this machine that have ended."""
    name = re.compile(rf"\.{re.escape(path.name)}\.{kind}-{_this_machine()}-(\d+)-[0-9a-f]{{8}}")
    try:
        entries = list(path.parent.iterdir())
    except OSError:
        return []
    return [
        entry
        for entry in entries
        if (found := name.fullmatch(entry.name)) and not _is_alive(int(found[1]))
    ]


def _is_alive(process: int) -> bool:
    if sys.platform == "win32":
        return True  # not known: there os.kill sends Ctrl-C, or ends the process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # another user's
    return True


def _remove_unfinished(out: Path) -> None:
    """Remove what killed processes left in a locked run folder."""
    for entry in out.iterdir():
        is_folder = entry.is_dir() and not entry.is_symlink()
        if is_folder and _UNFINISHED_FOLDER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.is_file() and _UNFINISHED_FILE.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


@contextmanager
def alone_in(out: Path, check: Callable[[Path], None] = lambda out: None) -> Iterator[None]:
    """Make a run folder, lock it for this process, and `check` that it is ours.

    Raises `InputError` if it cannot be made or is locked by another process.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = FileLock(out / LOCK).acquire(blocking=False)
    except Timeout as error:
        raise InputError(
            f"{out}: another process uses it; choose another folder for out"
        ) from error
    except OSError as error:
        raise _not_writable(out, error) from error
    with held:
        check(out)
        with suppress(OSError):
            _remove_unfinished(out)
        yield


def hash_value(value: Any) -> str:
    """Return the SHA-256 of a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content; raise `InputError` if it cannot be read."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise read_failed(path, error, "give a readable file") from error


def describe_file(path: Path) -> dict[str, Any]:
    """Return the path, size and hash of a file."""
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": hash_file(path)}


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is an address such as `gs://bucket/run`."""
    return "://" in os.fspath(path)


def check_name(folder: Path) -> None:
    """Raise `InputError` for a folder where Orbax can save but not restore.

    Orbax finds its folders by patterns, in which some characters have a meaning.
    """
    if odd := set("*?[") & set(str(expand_home(folder).absolute())):
        raise InputError(
            f"{folder}: checkpoints cannot lie under a name with {min(odd)!r}; choose a folder "
            "without it"
        )
