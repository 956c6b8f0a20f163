"""Embed the lines of a text file, or the rows of a table."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlmjax.cli.tables.answers import check_options, check_out, open_items
from mlmjax.cli.tables.inputs import check_csv
from mlmjax.config.columns import as_written
from mlmjax.config.data import CsvOptions
from mlmjax.errors import InputError
from mlmjax.parallel.environment import check_devices
from mlmjax.reporting.terminal import count_progress, say, working
from mlmjax.scoring.engine import describe_forward_compiling
from mlmjax.scoring.vectors.embedding import Embedder
from mlmjax.storage import write_to
from mlmjax.weights.hub import PACKAGED, report_packaged

CHUNK = 4096
"""Texts that are read and embedded together."""
ENDINGS = (".npy", ".parquet")


def embed_file(
    file: str,
    *,
    out: str,
    model: str | None = None,
    text: str | None = None,
    id_: str | None = None,
    prompt: str | None = None,
    encoding: str | None = None,
    csv: CsvOptions | None = None,
    **options: Any,
) -> None:
    """Write a vector for each line of a file (`-`: standard input), or each row of a table.

    `text` and `id_` are columns of a table, `csv` says how it is written, `options` are those of
    `Embedder.from_pretrained`; those that are None are left to the model's folder. Raises
    `InputError` for a bad line or row before it loads the model, unless the texts can be read only
    once.
    """
    check_options(file, text, id_, None)
    check_out(out, file, ENDINGS)
    if id_ is not None and Path(out).suffix.lower() == ".npy":
        raise InputError(f"--out {out}: has no place for ids; give a .parquet file, or no --id")
    check_csv(file, csv)
    check_devices()
    read, total = open_items(file, text, id_, encoding, csv)
    source = PACKAGED if model is None else model
    given = {name: value for name, value in options.items() if value is not None}
    with working(f"loading {source}"):
        embedder = Embedder.from_pretrained(source, **given)
    report_packaged(model is None)
    keys: list[Any] = []
    parts: list[np.ndarray] = []
    compiling = describe_forward_compiling(embedder.model.config.num_hidden_layers)
    with count_progress("texts embedded", compiling) as progress:
        items = read()
        while chunk := list(itertools.islice(items, CHUNK)):
            parts.append(embedder.embed([item.text for item in chunk], prompt=prompt))
            keys += [item.key for item in chunk]
            progress(len(keys), total)
    _write(Path(out), "line" if id_ is None else "id", keys, np.concatenate(parts))
    settings = embedder.settings
    unit = ", of length 1" if settings.normalize else ""
    size = embedder.model.config.hidden_size
    say(f"{out}: {len(keys):,} vectors of {size} numbers (pooling {settings.pooling}{unit})")
    if embedder.truncated:
        say(
            f"warning: {embedder.truncated:,} of the texts did not fit and were truncated: a text "
            f"has at most {embedder.limit}"
        )


def _write(out: Path, key: str, keys: Sequence[Any], vectors: np.ndarray) -> None:
    """Write vectors `[texts, hidden]` as an array, or as a table with their lines or ids."""
    with write_to(out) as path:
        if out.suffix.lower() == ".npy":
            with path.open("wb") as file:
                np.save(file, vectors, allow_pickle=False)
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = keys if key == "line" else [None if k is None else as_written(k) for k in keys]
        kind = pa.int64() if key == "line" else pa.string()
        flat = pa.array(vectors.ravel(), pa.float32())
        lists = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        pq.write_table(pa.table({key: pa.array(names, kind), "embedding": lists}), path)
