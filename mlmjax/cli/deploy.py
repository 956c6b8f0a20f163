"""Define the commands whose results other programs and people read."""

import gc
from pathlib import Path
from typing import Any

import click

from mlmjax.cli import options
from mlmjax.cli.options import Command


@click.command(
    cls=Command,
    examples=[
        "mlmjax embed --model MODEL --out vectors.npy texts.txt",
        "mlmjax embed --model MODEL --text body --out vectors.parquet tickets.csv",
    ],
)
@click.option("--model", help="Folder or Hub id of the model (default: the packaged mlmjax-small).")
@click.option("--out", metavar="FILE", required=True, help="Write a .npy or .parquet file.")
@click.option("--text", metavar="COLUMN", help="FILE is a table; the column of its texts.")
@click.option("--id", "id_", metavar="COLUMN", help="Put this column in place of line numbers.")
@click.option(
    "--pooling",
    type=click.Choice(["mean", "cls", "max"]),
    help="How a text's tokens become one vector (default: that of the model's folder, or mean).",
)
@click.option(
    "--normalize/--no-normalize", default=None, help="Give vectors length 1 (default: as pooling)."
)
@click.option("--prompt", metavar="NAME", help="Put this prompt of the model before each text.")
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    help="Most tokens of a text (default: that of the model's folder, or what the model reads).",
)
@click.option("--truncate", is_flag=True, help="Embed the beginning of longer texts.")
@options.revision
@options.dtype
@options.batch_size
@options.encoding
@options.csv
@click.argument("file", default="-")
def embed(file: str, **given: Any) -> None:
    """Embed the lines of FILE, or its rows.

    FILE may be - for standard input, or a table with --text. A .npy file has one row for each text,
    a .parquet file also the number of its line, or its --id.
    """
    gc.set_threshold(50_000, 10, 10)  # imports make many objects, and few of them are garbage
    from mlmjax.cli.vectors.embed import embed_file

    embed_file(file, **given)


@click.command(
    "export-program",
    cls=Command,
    examples=["mlmjax export-program tickets-classifier --out tickets-program --length 512"],
)
@click.argument("model")
@click.option("--out", metavar="DIR", required=True, help="Folder to write.")
@click.option("--labels", help="Labels of a model that is no saved classifier, as for classify.")
@click.option(
    "--length",
    "lengths",
    type=click.IntRange(min=1),
    multiple=True,
    default=[512],
    show_default=True,
    help="Most tokens of a prompt. Repeat it for more programs, each for its length.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Rows of one forward pass.",
)
@options.revision
@options.dtype
@options.anchor
def export_program(
    model: str,
    out: str,
    labels: str | None,
    lengths: tuple[int, ...],
    batch_size: int,
    **given: Any,
) -> None:
    """Write a classifier as a program.

    MODEL is a saved classifier. The folder answers with jax, numpy and tokenizers alone, on the
    kind of device that exported it: python DIR/run.py texts.txt
    """
    from mlmjax.classification.predictor import Predictor
    from mlmjax.classification.programs.program import export_program as write
    from mlmjax.cli.tables.inputs import read_labels
    from mlmjax.parallel.environment import check_devices
    from mlmjax.reporting.terminal import say, working

    names = None if labels is None else read_labels(labels)
    check_devices()
    with working(f"loading {model}"):
        predictor = Predictor.from_pretrained(model, names, progress=False, **given)
    with working("exporting"):
        write(predictor, out, lengths=lengths, batch_size=batch_size)
    say(f"{out}: python {out}/run.py texts.txt answers the lines of a file")


@click.command(
    "mask-table",
    cls=Command,
    examples=[
        "mlmjax mask-table corpus.jsonl --by frequency --out weights.jsonl",
        "mlmjax mask-table reviews.csv --by pmi --label label --out sentiment.jsonl",
        "mlmjax mask-table corpus.jsonl --by pmi --out phrases.jsonl",
    ],
)
@click.argument("sources", nargs=-1, required=True)
@click.option(
    "--by",
    type=click.Choice(["frequency", "tfidf", "pmi"]),
    required=True,
    help="What weighs a word: 1/sqrt(count), tf-idf, or mutual information with --label. Without "
    "--label, pmi finds phrases.",
)
@click.option("--out", metavar="FILE", required=True, help="Table to write, as JSON lines.")
@click.option("--text", metavar="COLUMN", default="text", show_default=True, help="Text column.")
@click.option("--label", metavar="COLUMN", help="Label column, for pmi.")
@click.option(
    "--unit",
    type=click.Choice(["word", "token"]),
    default="word",
    show_default=True,
    help="What gets weights.",
)
@click.option(
    "--least",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="pmi leaves out what occurs less often; frequency weighs it as if it occurred so often.",
)
@click.option("--model", help="Folder or Hub id whose tokenizer is used (default: mlmjax-small's).")
@options.revision
@options.encoding
@options.csv
def mask_table(sources: tuple[str, ...], by: str, out: str, **given: Any) -> None:
    """Count SOURCES to write a table for masking.

    SOURCES are files or globs. The table is for objective.mask_table of a run file, with masking =
    "weights", or "phrases" for phrases.
    """
    if given["label"] is not None and by != "pmi":
        raise click.UsageError("--label belongs to --by pmi; leave it out here.")
    if by == "pmi" and given["label"] is None and given["unit"] == "token":
        raise click.UsageError("phrases are of words; leave --unit out, or give --label.")
    from mlmjax.cli.start.mask_table import write_counted

    write_counted(sources, by, Path(out), **given)


@click.command(
    cls=Command,
    examples=[
        "mlmjax push tickets-classifier my-team/tickets",
        "mlmjax push runs/atp/export my-team/atp --public --results results",
    ],
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name", metavar="ORG/NAME")
@click.option(
    "--private/--public", default=True, show_default=True, help="Who may see a new repository."
)
@click.option("--revision", metavar="BRANCH", help="Branch to write to (default: main).")
@click.option(
    "--results",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder of `mlmjax evaluate --out`, whose figures the card will show. Repeat it.",
)
def push(
    folder: Path, name: str, private: bool, revision: str | None, results: tuple[Path, ...]
) -> None:
    """Upload FOLDER to the Hugging Face Hub.

    FOLDER holds a model, a classifier, a decider or an adapter. Only the files that loading needs,
    the card and the licence files are uploaded, and no data. The login is that of `hf auth login`
    or HF_TOKEN.
    """
    from mlmjax.weights.hub import push as upload

    card = _card_with(folder, results) if results else None
    address = upload(folder, name, private=private, revision=revision, card=card)
    click.echo(f"{folder}: uploaded to {address}")


def _card_with(folder: Path, results: tuple[Path, ...]) -> str:
    """Return the card of a folder with the figures of these result folders."""
    from mlmjax.evaluation.summary import read_measured
    from mlmjax.storage import CARD, MAX_JSON_BYTES, plain_file, read_bounded
    from mlmjax.weights.cards import with_results

    found = [one for place in results for one in read_measured(place)]
    text = ""
    if (folder / CARD).exists():
        text = read_bounded(plain_file(folder, CARD), MAX_JSON_BYTES).decode(errors="replace")
    return with_results(text, found)
