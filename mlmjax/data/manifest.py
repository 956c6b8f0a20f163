"""Read and check the manifest of a rows folder."""

import json
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from mlmjax.config.tables import StrictTable
from mlmjax.errors import InputError

FORMAT = 3
"""Version of row files and manifest; it grows whenever the same input gives other bytes."""

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")


class SourceFile(StrictTable):
    """Describe a file that was read: its name as configured, size and hash."""

    path: str
    bytes: NonNegativeInt
    sha256: str


class RowFile(StrictTable):
    """Describe a file of rows of one source in one split, and what it holds."""

    name: str
    file: str
    bytes: PositiveInt
    sha256: str
    text: bool
    weight: float | None
    level: NonNegativeInt
    rows: NonNegativeInt
    examples: NonNegativeInt
    tokens: NonNegativeInt
    padding_share: float
    max_examples_per_row: NonNegativeInt
    examples_per_task: dict[str, int]


class SourceReport(StrictTable):
    """Count what became of the records of one source; see `reading.examples.Counts`."""

    name: str
    files: list[SourceFile]
    records: NonNegativeInt
    examples: NonNegativeInt
    dropped: dict[str, int]
    shortened: dict[str, int]
    normalized: dict[str, int]
    broken: list[str]
    broken_files: list[str] = Field(default_factory=list)
    hits: dict[str, list[list[str]]]


class NestedSet(StrictTable):
    """Describe a selected set: its size asked (None: all) and found, its cap by task."""

    asked: PositiveInt | None
    examples: NonNegativeInt
    per_task: NonNegativeInt


class SelectionReport(StrictTable):
    """Count what was selected of the examples with an answer, before some are held out.

    `one_answer` counts the tasks without a second answer, which `answer_share` does not change.
    `unbalanced` and `capped` count the examples that `answer_share` and the caps left out.
    """

    sets: list[NestedSet]
    one_answer: NonNegativeInt
    unbalanced: NonNegativeInt
    capped: NonNegativeInt


class Manifest(StrictTable):
    """Describe what a rows folder holds and was made from, without times or machine names."""

    format: int
    version: str
    config: dict[str, Any]
    tokenizer_sha256: str
    vocab_size: PositiveInt
    seq_length: PositiveInt
    tasks: list[str]
    sources: list[SourceReport]
    validation_sources: list[SourceReport]
    selection: SelectionReport | None
    splits: dict[str, list[RowFile]]


def read_manifest(path: str | Path) -> Manifest:
    """Read `manifest.json` of a rows folder.

    Raises `InputError` if it is missing, broken, or of another format version.
    """
    file = Path(path) / MANIFEST
    try:
        table = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror or error}); expected a rows folder made by "
            "`mlmjax prepare`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: is not valid JSON ({error}); delete {path} and prepare again"
        ) from error
    found = table.get("format") if isinstance(table, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{file}: rows of format {found!r}, expected {FORMAT}; delete {path} and prepare again"
        )
    try:
        return Manifest.model_validate(table)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        ]
        raise InputError(
            f"{file}: is not a manifest of rows: {problems[0]}; delete {path} and prepare again",
            problems[1:],
        ) from error
