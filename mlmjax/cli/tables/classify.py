"""Classify the lines of a text file, or the rows of a table."""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mlmjax.classification.predictor import Predictor
from mlmjax.cli.tables.answers import check_options, open_items, shape_answer, write_answers
from mlmjax.cli.tables.inputs import check_csv, read_labels
from mlmjax.config.data import CsvOptions
from mlmjax.errors import InputError
from mlmjax.parallel.environment import check_devices
from mlmjax.reporting.terminal import count_progress, say, working
from mlmjax.scoring.engine import describe_forward_compiling, describe_limit
from mlmjax.weights.hub import PACKAGED, report_packaged

CHUNK = 256
"""Texts that are answered, and printed, together."""


def classify_file(
    file: str,
    *,
    model: str | None = None,
    labels: str | None = None,
    text: str | None = None,
    id_: str | None = None,
    out: str | None = None,
    encoding: str | None = None,
    csv: CsvOptions | None = None,
    echo: bool = False,
    full: bool = False,
    **options: Any,
) -> None:
    """Print or write an answer for each line of a file (`-`: standard input), or each row.

    `labels` are those of `read_labels`, `text` and `id_` columns of a table, `csv` says how it is
    written, `options` are those of `Predictor`. Raises `InputError` for a bad line or row before it
    prints an answer, unless the texts can be read only once.
    """
    check_options(file, text, id_, out)
    check_csv(file, csv)
    if out is None and sys.stdout is None:
        raise InputError("standard output: is closed; give --out FILE, or leave it open")
    check_devices()
    names = None if labels is None else read_labels(labels)
    read, total = open_items(file, text, id_, encoding, csv)
    source = PACKAGED if model is None else model
    with working(f"loading {source}"):
        predictor = Predictor.from_pretrained(source, names, progress=False, **options)
    report_packaged(model is None)
    key = "line" if id_ is None else "id"

    def answers(progress: Callable[[int, int], None]) -> Iterator[dict[str, Any]]:
        items, done = read(), 0
        while chunk := list(itertools.islice(items, CHUNK)):
            found = predictor.answers([item.text for item in chunk])
            for item, answer in zip(chunk, found, strict=True):
                yield shape_answer(answer, item, key, echo=echo, full=full)
            progress(done := done + len(chunk), total)

    with count_progress(
        "texts classified", describe_forward_compiling(predictor.layers)
    ) as progress:
        count = write_answers(answers(progress), out)
    if out is not None:
        say(f"{out}: {count:,} answers")
    if predictor.shortened:
        scorer = predictor.asking_.scorer
        longest = scorer.model.config.max_position_embeddings
        several = predictor.prompts > count
        noun = f"{predictor.prompts:,} prompts" if several else "texts"
        say(
            f"warning: {predictor.shortened:,} of the {noun} did not fit and were truncated: "
            "prompt and text together have at most "
            f"{describe_limit(scorer.max_length, longest, 'the classifier')}"
        )
