"""Read and check the manifest of a rows folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from mlmjax.config.tables import StrictTable, check_values
from mlmjax.errors import InputError, read_failed
from mlmjax.storage import parse_object

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
    """Describe a file of rows of one source in one split, and what it holds.

    `options` are the answers of the labels of the source, in their order: tokens, or numbers of
    classes. In a `soft` file examples have weights, and distributions over the options.
    """

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
    options: list[int] = Field(default_factory=list)
    soft: bool = False


def totals(files: Sequence[RowFile], seq_length: int) -> dict[str, Any]:
    """Add up what row files hold."""
    rows, tokens = sum(file.rows for file in files), sum(file.tokens for file in files)
    return {
        "files": len(files),
        "rows": rows,
        "examples": sum(file.examples for file in files),
        "tokens": tokens,
        "padding_share": 1 - tokens / (rows * seq_length) if rows else 0.0,
    }


class SourceReport(StrictTable):
    """Count what became of the records of one source; see `reading.examples.Counts`.

    `unnamed` is None in rows of earlier versions, which did not count records without a task.
    `columns` are those of the first record, if `data.exclude.tasks` was in vain.
    """

    name: str
    files: list[SourceFile]
    records: NonNegativeInt
    examples: NonNegativeInt
    dropped: dict[str, int]
    shortened: dict[str, int]
    normalized: dict[str, int]
    blanked: dict[str, int] = Field(default_factory=dict)
    task_columns: dict[str, int] = Field(default_factory=dict)
    unnamed: NonNegativeInt | None = None
    numbered: dict[str, int] = Field(default_factory=dict)
    columns: list[str] = Field(default_factory=list)
    broken: list[str]
    broken_files: list[str] = Field(default_factory=list)
    hits: dict[str, list[list[str]]]


class NestedSet(StrictTable):
    """Describe a selected set: its size wanted (None: all) and found, its cap by task."""

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
    again = f"delete {path} and prepare again"
    try:
        content = file.read_bytes()
    except OSError as error:
        advice = "expected a rows folder made by `mlmjax prepare`"
        raise read_failed(file, error, advice) from error
    table = parse_object(content, str(file), again)
    if table.get("format") != FORMAT:
        raise InputError(
            f"{file}: rows of format {table.get('format')!r}, expected {FORMAT}; {again}"
        )
    return check_values(Manifest, table, f"{file}: is not a manifest of rows", f"; {again}")
