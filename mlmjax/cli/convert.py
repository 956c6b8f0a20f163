"""Define `mlmjax convert`, which is also `tools/convert_weights.py`."""

import os
from pathlib import Path

import click

from mlmjax.cli.options import Group
from mlmjax.errors import EXIT_FAILED, first_details

_folder = click.Path(path_type=Path)


@click.group(
    cls=Group,
    examples=[
        "mlmjax convert to-jax mlmjax-small small-jax",
        "mlmjax convert to-hf small-jax small-hf",
        "mlmjax convert check small-jax small-hf",
    ],
)
def convert() -> None:
    """Convert models to or from Orbax; compare."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is needed, or searched for


@convert.command("to-jax", examples=["mlmjax convert to-jax mlmjax-small small-jax"])
@click.argument("source", metavar="HF_FOLDER")
@click.argument("target", metavar="CHECKPOINT", type=_folder)
def to_jax(source: str, target: Path) -> None:
    """Write a Hugging Face folder (or Hub id) as an Orbax checkpoint."""
    from mlmjax.weights import convert as weights

    click.echo(f"{target}: written, {weights.to_jax(source, target)} parameters")


@convert.command("to-hf", examples=["mlmjax convert to-hf small-jax small-hf"])
@click.argument("source", metavar="CHECKPOINT", type=_folder)
@click.argument("target", metavar="HF_FOLDER", type=_folder)
def to_hf(source: Path, target: Path) -> None:
    """Write an Orbax checkpoint of a model as a Hugging Face folder."""
    from mlmjax.weights import convert as weights

    click.echo(f"{target}: written, {weights.to_hf(source, target)} parameters")


@convert.command(
    "check",
    examples=[
        "mlmjax convert check small-jax small-hf",
        "mlmjax convert check small-jax --against-torch",
    ],
)
@click.argument("first", metavar="A")
@click.argument("second", metavar="[B]", required=False)
@click.option(
    "--against-torch",
    is_flag=True,
    help="Compare the logits of A here with those of B (default: A) in transformers; needs the "
    "extra mlmjax[oracle].",
)
def check(first: str, second: str | None, against_torch: bool) -> int:
    """Compare two models of either kind, tensor by tensor.

    A and B are folders, Hub ids or mlmjax-small. The exit code is 1 if they differ.
    """
    from mlmjax.weights import convert as weights

    if against_torch:
        found = weights.check_torch(first, second)
        done = "equal to transformers"
    elif second is None:
        raise click.UsageError("Missing argument 'B'; only --against-torch takes one model.")
    else:
        found = weights.check(first, second)
        done = f"identical: {found.tensors} tensors"
    for line in (*first_details(found.lines), found.largest):
        click.echo(line)
    click.echo("different" if found.lines else done)
    return EXIT_FAILED if found.lines else 0
