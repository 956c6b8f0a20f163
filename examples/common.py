"""Shared by the examples: load the starting model, and print errors in one line."""

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installing

from mlmjax import InputError, ModernBertForMaskedLM, Tokenizer, load_pretrained

HERE = Path(__file__).resolve().parent


def load(source: str | None) -> tuple[ModernBertForMaskedLM, Tokenizer]:
    """Load a folder or a Hub id; without one, load the small packaged model."""
    model, tokenizer = load_pretrained(source or "mlmjax-small")
    if not isinstance(model, ModernBertForMaskedLM):
        raise InputError(f"{source}: is a {type(model).__name__}; expected a masked language model")
    return model, tokenizer


def read_text(path: Path) -> str:
    """Read a whole text file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a UTF-8 text file") from error


def read_labelled(path: Path) -> list[dict[str, str]]:
    """Read a CSV file of texts with labels."""
    rows = list(csv.DictReader(io.StringIO(read_text(path))))
    if not rows or not all(row.get("text") and row.get("label") for row in rows):
        raise InputError(f"{path}: expected a CSV with text and label in every row")
    return rows


def run(main: Callable[[], None]) -> None:
    """Run a script; on bad input print one line and exit with code 2."""
    try:
        main()
    except InputError as error:
        print(error.message, *error.details, sep="\n", file=sys.stderr)
        sys.exit(2)
