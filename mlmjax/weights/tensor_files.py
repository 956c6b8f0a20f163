"""Safetensors files: headers are checked first, then tensors are views of the file."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from mlmjax.errors import InputError
from mlmjax.storage import plain_file, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".npz", ".npy"}
)
NUMPY_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
MAX_HEADER_BYTES = 16 * 2**20


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
