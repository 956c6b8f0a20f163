"""Convert a model between a Hugging Face folder and an Orbax checkpoint, and compare two of them.

    python tools/convert_weights.py to-jax HF_FOLDER CHECKPOINT
    python tools/convert_weights.py to-hf CHECKPOINT HF_FOLDER
    python tools/convert_weights.py check A B

Both directions keep every tensor bit by bit in its dtype on disk. `check` takes either kind on each
side, and the checkpoints of a training run. It prints the largest difference and where it is.
Exit codes: 0 done or identical, 1 different or writing failed, 2 bad input.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed

import click
import numpy as np

from mlmjax.cli import main as main_module
from mlmjax.errors import InputError
from mlmjax.model.modernbert import Model, parameters
from mlmjax.storage import CONFIG, TOKENIZER_FILES, read_json
from mlmjax.weights import hub, pretrained
from mlmjax.weights.model_checkpoint import (
    MODEL_RECORD,
    is_model,
    load_model,
    save_model,
    saved_tensors,
)
from mlmjax.weights.tensor_files import Weights

MOST_LINES = 20


Tensors = dict[str, Callable[[], np.ndarray]]
"""How to read each tensor of a folder, by its Hugging Face name."""


def open_tensors(folder: Path, stack: ExitStack) -> Tensors:
    """Return the tensors of a folder of either kind."""
    if (saved := saved_tensors(folder)) is not None:
        return {name: partial(saved.__getitem__, name) for name in saved}
    weights = stack.enter_context(Weights(folder))
    if weights.problems:
        raise InputError(f"{folder}: {weights.problems[0]}", weights.problems[1:])
    names = (name for name in weights.headers if not pretrained.DERIVED.fullmatch(name))
    return {name: partial(weights.read, name) for name in names}


@click.group(help=__doc__.partition("\n")[0])
def main() -> None:
    """Convert and compare weights."""


@main.command("to-jax")
@click.argument("source", metavar="HF_FOLDER")
@click.argument("target", metavar="CHECKPOINT", type=click.Path(path_type=Path))
def to_jax(source: str, target: Path) -> None:
    """Write a Hugging Face folder (or hub id) as an Orbax checkpoint."""
    folder = hub.fetch(source)
    if is_model(folder):
        raise InputError(f"{folder}: is an Orbax checkpoint already; give a Hugging Face folder")
    model = pretrained.read_model(folder)
    save_model(target, model, _tokenizer(folder, model))
    click.echo(f"{target}: written, {len(parameters(model))} parameters")


@main.command("to-hf")
@click.argument("source", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@click.argument("target", metavar="HF_FOLDER", type=click.Path(path_type=Path))
def to_hf(source: Path, target: Path) -> None:
    """Write an Orbax checkpoint of a model as a Hugging Face folder."""
    if not is_model(source):
        raise InputError(
            f"{source}: is no checkpoint that to-jax wrote (it has no {MODEL_RECORD}); "
            "a training run exports its model itself, to export/"
        )
    model, _ = load_model(source)
    tokenizer = _tokenizer(source, model)
    pretrained.save_pretrained(model, tokenizer, target, dtype="source")
    click.echo(f"{target}: written, {len(parameters(model))} parameters")


@main.command("check")
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
def check(first: Path, second: Path) -> int:
    """Compare two models of either kind, tensor by tensor."""
    with ExitStack() as stack:
        for folder in (first, second):
            if not folder.is_dir():
                raise InputError(f"{folder}: there is no such folder")
        a, b = open_tensors(first, stack), open_tensors(second, stack)
        tensors = len(a)
        for mine, other in ((a, b), (b, a)):
            # A tied decoder may be stored or left out; either way it is the embedding.
            if pretrained.DECODER in other and pretrained.EMBEDDING in mine:
                mine.setdefault(pretrained.DECODER, mine[pretrained.EMBEDDING])
        lines, largest = compare(a, b)
    for line in lines[:MOST_LINES]:
        click.echo(line)
    if len(lines) > MOST_LINES:
        click.echo(f"... and {len(lines) - MOST_LINES} more")
    click.echo(largest)
    click.echo("different" if lines else f"identical: {tensors} tensors")
    return 1 if lines else 0


def compare(first: Tensors, second: Tensors) -> tuple[list[str], str]:
    """Return one line per tensor that differs, and a line on the largest difference."""
    lines, largest, where = [], 0.0, ""
    for name in sorted({*first, *second}):
        if name not in first or name not in second:
            lines.append(f"{name}: only in {'A' if name in first else 'B'}")
            continue
        a, b = first[name](), second[name]()
        if a.shape != b.shape:
            lines.append(f"{name}: shape {list(a.shape)} in A, {list(b.shape)} in B")
            continue
        if a.dtype == b.dtype and a.tobytes() == b.tobytes():
            continue
        difference, index = _largest_difference(a, b)
        dtypes = "" if a.dtype == b.dtype else f" ({a.dtype} in A, {b.dtype} in B)"
        lines.append(f"{name}: differs by up to {difference:g}{dtypes}")
        if difference > largest:
            place = ", ".join(map(str, index))
            largest, where = difference, f" at {name}[{place}]: {a[index]} in A, {b[index]} in B"
    return lines, f"largest difference {largest:g}{where}"


def _largest_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """Return the largest |a - b| and its index; a NaN on one side only counts as infinite."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    gap = np.where(np.isnan(gap), np.inf, gap)
    if not gap.size:
        return 0.0, ()
    index = np.unravel_index(int(gap.argmax()), gap.shape)
    return float(gap[index]), tuple(int(i) for i in index)


def _tokenizer(folder: Path, model: Model) -> Any:
    if not os.path.lexists(folder / TOKENIZER_FILES[0]):
        return None
    tokenizer = pretrained.read_tokenizer(folder)
    pretrained.check_tokenizer(folder, model.config, read_json(folder, CONFIG), tokenizer)
    return tokenizer


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; errors are printed as `mlmjax` prints them."""
    return main_module.run(arguments, main, "convert_weights.py")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
