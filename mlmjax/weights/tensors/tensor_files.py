"""Read safetensors files: first all headers, then each tensor as a view of its file."""

import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from mlmjax.errors import InputError
from mlmjax.storage import plain_file, read_json, unique_keys

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
"""The files of an adapter, as PEFT names them."""
PICKLES = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".npz", ".npy"}
)
NUMPY_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
MAX_HEADER_BYTES = 16 * 2**20
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel or DeepSpeed",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""Parts of names that a wrapper around a torch module adds, and which one."""
_EMBEDDING = "embeddings.tok_embeddings.weight"
_ENCODER = ("embeddings.", "layers.", "final_norm.")


def weight_map(folder: Path) -> dict[str, str] | None:
    """Return the file of each tensor from the shard index; None if no index is used.

    Like transformers, it prefers `model.safetensors` if both are there.
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
    """What a safetensors header says of one tensor; `start` is its first byte in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int


def plain_names(names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Return the name in a model of each tensor, and what was left out or added, in words.

    Wrappers of torch add parts to names, and a larger model puts its own prefix before them. The
    encoder is found by its embedding, whatever its own prefix is, and is `model.` here.

    >>> plain_names(["_orig_mod.embeddings.tok_embeddings.weight"])[0].popitem()[1]
    'model.embeddings.tok_embeddings.weight'
    """
    plain = {name: name for name in names}
    said = []
    for part, wrapper in WRAPPERS.items():
        stripped = {
            name: ".".join(piece for piece in now.split(".") if piece != part)
            for name, now in plain.items()
        }
        if stripped != plain:
            plain = stripped
            said.append(f"{part}. left out of names, which {wrapper} adds")
    found = [now.removesuffix(_EMBEDDING) for now in plain.values() if now.endswith(_EMBEDDING)]
    if len(found) == 1:
        plain, more = _without_prefixes(plain, found[0])
        said += more
    if len(set(plain.values())) < len(plain):  # then no rule can tell which is which
        return {name: name for name in names}, []
    return plain, said


def _without_prefixes(plain: Mapping[str, str], prefix: str) -> tuple[dict[str, str], list[str]]:
    """Let the names of the encoder, which has a prefix of its own, begin with `model.`.

    Of the other names the longest part of that prefix is left out that all of them begin with.
    """
    of_encoder = tuple(prefix + part for part in _ENCODER)
    others = [now for now in plain.values() if not now.startswith(of_encoder)]
    parts = prefix.split(".")[:-1]
    outers = [".".join([*parts[:count], ""]) for count in range(len(parts), 0, -1)]
    # A prefix that only the encoder has, such as model., is no part of the names of a head.
    outer = next((o for o in outers if others and all(n.startswith(o) for n in others)), "")
    changed = {
        name: "model." + now.removeprefix(prefix)
        if now.startswith(of_encoder)
        else now.removeprefix(outer)
        for name, now in plain.items()
    }
    said = []
    if outer:
        said.append(f"the prefix {outer} left out of names")
    if not outer and prefix not in ("", "model."):
        said.append(f"model. in place of {prefix} in the names of the encoder")
    if not prefix and others:  # an encoder alone has no such prefix in transformers
        said.append("model. added to the names of the encoder")
    return changed, said


class Weights:
    """The tensors of a model folder: `headers` of all, then `read` for one at a time.

    Use it as a context. `file` is the only one to read (by default all of the model). `problems`
    lists tensors that are in two files, or not in the file that
    the index names. Names are those of the model (`plain_names`). Raises `InputError` for pickles
    and for files that are truncated or invalid.
    """

    def __init__(self, folder: Path, file: str | None = None):
        self.folder, self._only = folder, file
        self.headers: dict[str, Header] = {}
        self.problems: list[str] = []
        self._files: dict[str, tuple[Path, tuple[int, ...] | None]] = {}

    def __enter__(self) -> "Weights":
        files = None if self._only else weight_map(self.folder)
        for file in sorted(set(files.values())) if files else [self._only or WEIGHTS]:
            self._add(file)
        for name, file in (files or {}).items():
            found = self.headers[name].file if name in self.headers else None
            if found != file:
                what = f"in {found}" if found else "missing"
                self.problems.append(f"{name}: is {what}, though {INDEX} places it in {file}")
        plain, said = plain_names(self.headers)
        if said:
            log.warning("%s: read with %s", self.folder, "; ".join(said))
        self.headers = {plain[name]: header for name, header in self.headers.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for file in self._files if kind is None else ():
            self._check_unchanged(file)  # the caller has copied what it read
        self._files.clear()

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in its dtype on disk, as a view of the file."""
        header = self.headers[name]
        (path, _), where = self._files[header.file], self.folder / header.file
        if header.dtype not in NUMPY_NAMES:
            raise InputError(
                f"{where}: {name} has dtype {header.dtype}; expected one of "
                f"{', '.join(NUMPY_NAMES)}"
            )
        dtype = np.dtype(NUMPY_NAMES[header.dtype])
        if 0 in header.shape:
            return np.empty(header.shape, dtype)
        try:
            # One mapping per tensor, because memory that stays mapped counts as used.
            value = np.asarray(np.memmap(path, dtype, "r", header.start, header.shape))
        except (ValueError, OSError) as error:
            raise InputError(f"{where}: {name} cannot be read ({error})") from error
        self._check_unchanged(header.file)
        return value

    def _check_unchanged(self, file: str) -> None:
        path, stamp = self._files[file]
        if _stamp(path) != stamp:
            raise InputError(f"{self.folder / file}: was changed while it was read; read it again")

    def _add(self, file: str) -> None:
        if file == WEIGHTS and not os.path.lexists(self.folder / file):
            raise _no_weights(self.folder)
        path, where = plain_file(self.folder, file), self.folder / file
        self._files[file] = path, _stamp(path)
        try:
            found = _read_header(path, where, file)
            with safe_open(path, framework="numpy"):
                pass  # checks that dtypes, shapes, offsets and the size of the file agree
        except (SafetensorError, OSError) as error:
            raise _not_whole(where, error) from error
        for name, header in found.items():
            if name in self.headers:
                self.problems.append(f"{name}: is in both {self.headers[name].file} and {file}")
            self.headers[name] = header


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_header(path: Path, where: Path, file: str) -> dict[str, Header]:
    """Read the header of a safetensors file.

    A header longer than the file or than that of any real model is an error before it is parsed.
    So is one that names a tensor twice, because readers differ in which of the two they take.
    """
    size = path.stat().st_size
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(min(length, MAX_HEADER_BYTES))
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
        entries = json.loads(text, object_pairs_hook=unique_keys)
        entries.pop("__metadata__", None)
        return {
            name: Header(
                file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            )
            for name, entry in entries.items()
        }
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise _not_whole(where, error) from error


def _not_whole(where: Path, error: Exception) -> InputError:
    return InputError(
        f"{where}: is not a whole safetensors file ({error}); fetch or export it again"
    )


def _no_weights(folder: Path) -> InputError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        export = folder / "export"
        advice = export if export.is_dir() else "the folder of an exported model"
        return InputError(f"{folder}: holds no weights ({WEIGHTS} or {INDEX}); give {advice}")
    return InputError(
        f"{folder}: holds weights only in a format that can run code or is not supported "
        f"({', '.join(pickles[:3])}); expected {WEIGHTS}. If you trust the file, convert it: "
        "model = transformers.AutoModelForMaskedLM.from_pretrained(FOLDER); "
        "model.save_pretrained(NEW_FOLDER)"
    )
