"""Model folders: found on disk or the hub, opened as a stranger's, written whole or not at all."""

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import ml_dtypes  # noqa: F401 - numpy knows the name "bfloat16" only after this import
import numpy as np
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open

from mlmjax.errors import InputError, RunError, full_disk, write_advice

PACKAGED = "mlmjax-small"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
CLASSIFIER = "mlmjax_classifier.json"
TRAINING = "training_manifest.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
OTHER_TOKENIZER_FILES = ("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")
PICKLES = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".npz", ".npy"}
)
NUMPY_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
MAX_JSON_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 16 * 2**20

# What to do about each way the hub can refuse; the first match counts.
_HUB_REFUSALS: tuple[tuple[type[Exception], str], ...] = (
    (hub_errors.HFValidationError, "and is not a valid hub id (organisation/name)"),
    (hub_errors.GatedRepoError, "and the hub asks for permission: accept its terms, log in"),
    (hub_errors.RepositoryNotFoundError, "and the hub has no such model (or hides it: log in)"),
    (hub_errors.RevisionNotFoundError, "and the hub has no such revision of it"),
    (hub_errors.LocalEntryNotFoundError, "and neither the hub nor a copy in the cache is at hand"),
    (hub_errors.OfflineModeIsEnabled, "and the hub is switched off (HF_HUB_OFFLINE)"),
)


def fetch(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """Return the folder of a model: `source` itself, the packaged one, or the hub's of that id.

    `mlmjax-small` is the packaged model; a folder of that name is `./mlmjax-small`. From the hub
    only the configuration, tokenizer files, safetensors weights (unless `weights` is false) and
    what mlmjax adds are fetched.
    Raises `InputError` for a path that is no folder, an unknown id and an unreachable hub.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if not name.strip():
        raise InputError("the model's name is empty; give a folder or a hub id")
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"{name[:200]!r}: is no usable path ({error}); give a folder") from error
    own = packaged(name) if isinstance(source, str) else None
    if own and is_folder:
        told = f"is the packaged model and a folder; rename the folder, or give ./{name} for it"
        raise InputError(f"{name}: {told}")
    folder = path if is_folder else own
    if folder is not None and revision is not None:
        what = "is the packaged model" if own else "is a folder"
        raise InputError(
            f"{name}: {what}, but revision {revision!r} names a version on the hub; "
            "leave the revision out, or give a hub id"
        )
    if folder is not None:
        return folder
    if exists:
        raise InputError(f"{name}: is a file; give the folder that holds {CONFIG} and the weights")
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name:
        raise InputError(f"{name}: there is no such folder; give an existing folder or a hub id")
    small = [CONFIG, INDEX, CLASSIFIER, TRAINING, *TOKENIZER_FILES]
    folder = download(name, revision, local_files_only, small)
    if not weights:
        return folder
    files = sorted(set((weight_map(folder) or {}).values())) or [WEIGHTS]
    if not all((folder / file).exists() for file in files):
        # The snapshot's folder is named by its commit: both calls see the same version.
        folder = download(name, folder.name, local_files_only, files)
    return folder


def packaged(name: str) -> Path | None:
    """Return the folder inside this package of a model by its name; None for any other name.

    >>> packaged("mlmjax-small").name
    'small'
    """
    return Path(str(resources.files("mlmjax"))) / "assets" / "small" if name == PACKAGED else None


def download(name: str, revision: str | None, local: bool, files: list[str]) -> Path:
    """Return the snapshot of a hub id with the files of these patterns; `InputError` without it."""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, local_files_only=local, allow_patterns=files
            )
        )
    except Exception as error:  # the transport's own errors differ from version to version
        reasons = (text for kind, text in _HUB_REFUSALS if isinstance(error, kind))
        reason = next(reasons, "and the hub cannot be used now")
        what = name if revision is None else f"{name} (revision {revision})"
        first_line = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"{what}: is no folder here, {reason}; check the name, or give the path of a folder",
            [f"{type(error).__name__}: {first_line}"],
        ) from error


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


def weight_map(folder: Path) -> dict[str, str] | None:
    """Return which file holds each tensor by the shard index, or None without an index in use.

    As in transformers, `model.safetensors` comes before an index when both are there.
    """
    if os.path.lexists(folder / WEIGHTS) or not os.path.lexists(folder / INDEX):
        return None
    files = read_json(folder, INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{folder / INDEX}: has no weight_map; expected tensor names and files")
    problems = [
        f"{name}: file {file!r}"
        for name, file in files.items()
        if not isinstance(file, str)
        or set(file) & set("/\\:\0")
        or not file.endswith(".safetensors")
    ]
    if problems:
        raise InputError(
            f"{folder / INDEX}: names files that are no plain *.safetensors names in this folder",
            problems,
        )
    return files


class Header(NamedTuple):
    """What a safetensors header says of one tensor; `start` counts bytes from the file's begin."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class Weights:
    """The tensors of a model folder: headers first (`headers`), then one at a time (`read`).

    `problems` lists tensors that stand twice, or not where the index says. Used as a context.
    Raises `InputError` for pickles, truncated and lying files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.headers: dict[str, Header] = {}
        self.problems: list[str] = []
        self._paths: dict[str, Path] = {}
        self._stamps: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> "Weights":
        files = weight_map(self.folder)
        for file in sorted(set(files.values())) if files else [WEIGHTS]:
            self._add(file)
        self._check_index(files)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for file, path in self._paths.items() if kind is None else ():
            self._check_unchanged(file, path)  # what was read is copied by now
        self._paths.clear()

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in the dtype it has on disk, a view of the file that is not a copy."""
        header = self.headers[name]
        path, where = self._paths[header.file], self.folder / header.file
        if header.dtype not in NUMPY_NAMES:
            raise InputError(
                f"{where}: {name} has dtype {header.dtype}; expected one of "
                f"{', '.join(NUMPY_NAMES)}"
            )
        dtype = np.dtype(NUMPY_NAMES[header.dtype])
        if 0 in header.shape:
            return np.empty(header.shape, dtype)
        try:
            # Mapped for each: what stays mapped counts as memory in use.
            value = np.asarray(np.memmap(path, dtype, "r", header.start, header.shape))
        except (ValueError, OSError) as error:
            raise InputError(f"{where}: {name} cannot be read ({error})") from error
        self._check_unchanged(header.file, path)
        return value

    def _check_unchanged(self, file: str, path: Path) -> None:
        try:
            same = _stamp(path) == self._stamps[file]
        except OSError:
            same = False
        if not same:
            raise InputError(f"{self.folder / file}: was changed while it was read; read it again")

    def _add(self, file: str) -> None:
        if file == WEIGHTS and not os.path.lexists(self.folder / file):
            raise _no_weights(self.folder)
        path = plain_file(self.folder, file)
        where = self.folder / file
        try:
            self._stamps[file] = _stamp(path)
            starts = _starts(path, where)
            with safe_open(path, framework="numpy") as opened:
                parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                found = {
                    name: Header(file, part.get_dtype(), tuple(part.get_shape()), starts[name])
                    for name, part in parts.items()
                }
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{where}: is not a whole safetensors file ({error}); fetch or export it again"
            ) from error
        self._paths[file] = path
        for name, header in found.items():
            if name in self.headers:
                self.problems.append(f"{name}: stands in {self.headers[name].file} and in {file}")
            self.headers[name] = header

    def _check_index(self, files: Mapping[str, str] | None) -> None:
        for name, file in (files or {}).items():
            if name not in self.headers:
                self.problems.append(f"{name}: is missing, though {INDEX} places it in {file}")
            elif self.headers[name].file != file:
                found = self.headers[name].file
                self.problems.append(f"{name}: is in {found}, though {INDEX} places it in {file}")


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _starts(path: Path, where: Path) -> dict[str, int]:
    """Return the byte at which each tensor of a safetensors file starts.

    Refuses a header longer than the file or than any real model's before it is parsed, and one that
    names a tensor twice: readers differ in which of the two they take.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, MAX_HEADER_BYTES))
    if size < 8 or length > size - 8:
        raise InputError(
            f"{where}: is truncated or no safetensors file: its header says {length} bytes, and "
            f"{max(size - 8, 0)} are there; fetch or export it again"
        )
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"{where}: has a header of {length} bytes; expected at most {MAX_HEADER_BYTES}"
        )
    try:
        entries = json.loads(text, object_pairs_hook=_without_doubles)
        return {
            name: 8 + length + entry["data_offsets"][0]
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{where}: is not a whole safetensors file ({error}); fetch or export it again"
        ) from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    doubled = [name for name, count in names.items() if count > 1]
    if doubled:
        raise ValueError(f"its header names {doubled[0]!r} twice")
    return dict(pairs)


def _no_weights(folder: Path) -> InputError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        return InputError(f"{folder}: holds no weights; expected {WEIGHTS} or {INDEX}")
    return InputError(
        f"{folder}: holds weights only in a format that can run code or is not supported "
        f"({', '.join(pickles[:3])}); expected {WEIGHTS}. Convert it where you trust the file: "
        "model = transformers.AutoModelForMaskedLM.from_pretrained(FOLDER); "
        "model.save_pretrained(NEW_FOLDER)"
    )


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
