"""Count texts to write a table of weights or phrases for masking."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlmjax.config.data import Location
from mlmjax.config.tables import decode
from mlmjax.data.preparing.mask_tables import make_mask_table, read_documents, write_mask_table
from mlmjax.reporting.terminal import count_progress, say
from mlmjax.weights.hub import PACKAGED, fetch
from mlmjax.weights.pretrained import read_tokenizer


def write_counted(sources: Sequence[str], by: str, out: Path, **given: Any) -> None:
    """Count the texts of files, write the table, and say what is in it.

    `given` are the other options of `mlmjax mask-table`. Raises `InputError` as `read_documents`
    and `make_mask_table`.
    """
    place = {"path": list(sources), "encoding": given["encoding"], "csv": given["csv"]}
    source = decode(Location, place, "mask-table")
    folder = fetch(given["model"] or PACKAGED, revision=given["revision"], weights=False)
    columns = {name: given[name] for name in ("text", "label", "unit")}
    with count_progress("texts counted") as show:

        def counted(documents: Iterable[Any]) -> Iterator[Any]:
            for number, document in enumerate(documents, 1):
                yield document
                show(number, 0)

        documents = counted(read_documents(source, read_tokenizer(folder), **columns))
        table = make_mask_table(documents, by, **columns, least=given["least"])
    write_mask_table(out, table)
    masking = "phrases" if table.unit == "phrase" else "weights"
    say(f'{out}: {len(table.weights):,} {table.unit}s, for masking = "{masking}"')
