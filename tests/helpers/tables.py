"""Tables of labelled texts, in every format that is read."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
from labelled_texts import examples


def labelled_rows(count=40, names=None):
    """Return rows with an id, a text that one word decides, and its label."""
    texts, labels = examples(count, seed=3)
    return [
        {"id": f"T{i}", "text": f"{text} #{i}", "label": (names or {}).get(label, label)}
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]


def write_table(path, rows):
    """Write rows in the format that the path's name says; return the path."""
    name = path.name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    open_file = gzip.open if name.endswith(".gz") else open
    with open_file(path, "wt", encoding="utf-8", newline="") as file:
        if ".jsonl" in name:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            delimiter = "\t" if ".tsv" in name else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return path
