"""One case of the corpus: the files of its folder, a command, and the expected answer."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

Spoil = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A command to run in the folder of the case, its exit code, and a text it must print.

    `needs` names the good inputs that are copied there; `spoil` then changes the folder.
    `says` is in the first line of an error, or in stdout if the exit code is 0.
    `writes` names what the command may change; everything else must stay unchanged.
    """

    name: str
    command: tuple[str, ...]
    exit: int
    says: str
    needs: tuple[str, ...] = ()
    spoil: Spoil = lambda folder: None
    stdin: str = ""
    writes: tuple[str, ...] = ()

    def write(self, good: Path, folder: Path) -> None:
        """Write the inputs of the case into `folder`."""
        folder.mkdir(parents=True)
        for name in self.needs:
            source = good / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, folder / name)
        self.spoil(folder)


def words(command: str, *more: str) -> tuple[str, ...]:
    """Split a command at its spaces; `more` are words that contain spaces."""
    return (*command.split(), *more)


def write(name: str, content: str | bytes) -> Spoil:
    """Write a file into the folder, and overwrite one with its name."""
    data = content.encode() if isinstance(content, str) else content

    def spoil(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return spoil


def change(name: str, function: Callable[[bytes], bytes]) -> Spoil:
    """Change the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(function((folder / name).read_bytes()))


def change_json(name: str, function: Callable[[Any], Any]) -> Spoil:
    """Change the value of a JSON file in place."""

    def apply(data: bytes) -> bytes:
        value = json.loads(data)
        function(value)
        return json.dumps(value).encode()

    return change(name, apply)


def update_json(name: str, *keys: str | int, **values: Any) -> Spoil:
    """Set values in a JSON file, in the table to which the keys lead."""
    return change_json(name, lambda table: reduce(getitem, keys, table).update(values))


def remove(*names: str) -> Spoil:
    """Delete files and folders."""

    def spoil(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def all_of(*spoils: Spoil) -> Spoil:
    """Apply several changes in order."""

    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil


def link(name: str, target: str) -> Spoil:
    """Replace a file or folder by a symbolic link."""

    def spoil(folder: Path) -> None:
        if (folder / name).exists():
            remove(name)(folder)
        (folder / name).symlink_to(target)

    return spoil


def cut(share: float) -> Callable[[bytes], bytes]:
    """Keep the first part of a file."""
    return lambda data: data[: int(len(data) * share)]


def jsonl(rows: Iterable[Any]) -> str:
    """Write one JSON value per line."""
    return "".join(json.dumps(row) + "\n" for row in rows)
