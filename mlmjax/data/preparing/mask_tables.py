"""Read tables of weights and phrases for masking, and count texts to write them."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from mlmjax.config.data import Location
from mlmjax.data.masking.maskers import MaskTable, Unit, WordReader
from mlmjax.data.reading.files import read_file
from mlmjax.data.reading.sources import read_source
from mlmjax.errors import InputError, named_place
from mlmjax.storage import write_whole
from mlmjax.text.checks import check_text
from mlmjax.text.tokenizer import Tokenizer

MOST_ROWS = 2**21
MOST_WEIGHT = 1e30
"""The largest weight; sums and logarithms of float64 are far from their limits."""

CHUNK = 1024


def read_mask_table(path: str | Path, tokenizer: Tokenizer) -> MaskTable:
    """Read a table with a column `token`, `word` or `phrase`, and `weight` (1 for phrases).

    It is JSON lines, CSV, TSV or parquet. Tokens have their names in the vocabulary. The row whose
    token or word is empty has the weight of all others, which is 0 without it. Raises `InputError`
    with the line of a weight that is negative or not finite, of a token that is unknown or special,
    of a repeated row, and for a table without rows.
    """
    unit: Unit | None = None
    weights: dict[str, float] = {}
    others = None
    for number, record in enumerate(read_file(path, None)):
        with named_place(record.where):
            unit = unit or _unit_of(record.fields)
            if number == MOST_ROWS:
                raise InputError(f"is past the {MOST_ROWS:,} rows a table may have; shorten it")
            name = record.fields.get(unit)
            weight = _weight(record.fields.get("weight", 1.0 if unit == "phrase" else None))
            if not name and others is None:
                others = weight
                continue
            name = _checked_name(name, unit, tokenizer)
            if name in weights:
                raise InputError(f"repeats the {unit} {name!r:.60}; list each once")
            weights[name] = weight
    if unit is None or not (weights or others):
        raise InputError(f"{path}: has no rows; expected tokens, words or phrases")
    if not any(weights.values()) and not others:
        raise InputError(f"{path}: has no weight above 0; give at least one, or masking = 'token'")
    return MaskTable(unit, weights, others or 0.0)


def _unit_of(fields: Mapping[str, Any]) -> Unit:
    """Return the unit that the columns of a table name."""
    found = [unit for unit in get_args(Unit) if unit in fields]
    if len(found) != 1 or (found != ["phrase"] and "weight" not in fields):
        raise InputError(
            f"has the columns {', '.join(map(repr, fields)):.200}; expected token and weight, word "
            "and weight, or phrase"
        )
    unit: Unit = found[0]
    return unit


def _weight(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0.0 <= number <= MOST_WEIGHT:
        raise InputError(f"weight is {value!r:.60}; expected a number from 0 to {MOST_WEIGHT:g}")
    return number


def _checked_name(name: Any, unit: Unit, tokenizer: Tokenizer) -> str:
    """Return the token, word or phrase of a row."""
    check_text(name, unit)
    found: str = name
    if not name.strip() and unit != "token":
        raise InputError(f"{unit} is {name!r:.60}, which is blank; expected a {unit}")
    if unit != "token":
        return found
    number = tokenizer.backend.token_to_id(name)
    if number is None:
        ids = tokenizer.encode_plain(name)
        spelled = [repr(tokenizer.backend.id_to_token(i)) for i in ids[:5]]
        raise InputError(
            f"token {name!r:.60} is not in the vocabulary; as text it is {', '.join(spelled)}"
        )
    if number in tokenizer.special_ids:
        raise InputError(f"token {name!r:.60} is special and never masked; leave it out")
    return found


class Document(NamedTuple):
    """The words (or tokens) of a text in order, and its label if labels are read."""

    names: list[str]
    label: str | None = None


def read_documents(
    source: Location, tokenizer: Tokenizer, *, text: str, label: str | None, unit: Unit
) -> Iterator[Document]:
    """Stream the texts of a source, divided as masking divides them.

    Raises `InputError` as `read_source`, and for a text or label that is not text.
    """
    columns, reader = [text] if label is None else [text, label], WordReader(tokenizer)
    records = iter(read_source(source, columns, named=columns[1:]))
    while chunk := list(islice(records, CHUNK)):
        for record in chunk:
            with named_place(record.where):
                check_text(record.fields[text], text)
                if label is not None:
                    record.fields[label] = _label_of(record.fields[label], label)
        encoded = tokenizer.encode_plain_batch([record.fields[text] for record in chunk])
        for record, ids in zip(chunk, encoded, strict=True):
            if unit == "token":
                names = [tokenizer.backend.id_to_token(number) or "" for number in ids]
            else:
                _, names = reader(np.array(ids, int), np.arange(len(ids)))
            yield Document(
                [name for name in names if name], record.fields[label] if label else None
            )


def _label_of(value: Any, column: str) -> str:
    """Return a label as text; numbers of classes are labels, too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    check_text(value, column)
    return str(value)


def make_mask_table(
    documents: Iterable[Document], by: str, *, text: str, label: str | None, unit: Unit, least: int
) -> MaskTable:
    """Return the table of documents by "frequency", "tfidf" or "pmi" (with a label, or of phrases).

    Raises `InputError` if there is nothing to put into it.
    """
    others = 0.0
    if by == "frequency":
        weights, others = weigh_by_frequency(documents, least=least)
    elif by == "tfidf":
        weights, others = weigh_by_tfidf(documents)
    elif label is not None:
        weights, others = weigh_by_label(documents, least=least)
    else:
        unit, weights = "phrase", find_phrases(documents, least=least)
    if not any(weights.values()):
        what = "phrase" if unit == "phrase" else f"{unit} of a weight above 0"
        raise InputError(
            f"{text}: holds no {what} that occurs {least} times; give more texts, or lower --least"
        )
    return MaskTable(unit, weights, others)


def weigh_by_frequency(
    documents: Iterable[Document], *, least: int, power: float = 0.5
) -> tuple[dict[str, float], float]:
    """Weigh names by their counts to the power `-power`; rarer ones as if seen `least` times.

    Returns the weights, and that of all others. This is the frequency weighting of Zhang et al.
    2023 (arXiv 2302.14225).

    >>> weigh_by_frequency([Document(["a", "b", "a", "a", "a"])], least=1)
    ({'a': 0.5, 'b': 1.0}, 1.0)
    """
    counts = Counter(name for document in documents for name in document.names)
    return {name: max(n, least) ** -power for name, n in counts.items()}, least**-power


def weigh_by_tfidf(documents: Iterable[Document]) -> tuple[dict[str, float], float]:
    """Weigh names by their mean count in the texts that hold them, times log((1 + N) / (1 + n)).

    N counts the texts, n those that hold the name. Returns as `weigh_by_frequency`; others have
    the weight of a name that occurs once.
    """
    counts, texts, total = Counter[str](), Counter[str](), 0
    for document in documents:
        counts.update(document.names)
        texts.update(set(document.names))
        total += 1
    weights = {
        name: counts[name] / held * math.log((1 + total) / (1 + held))
        for name, held in texts.items()
    }
    return weights, math.log((1 + total) / 2) if total else 0.0


def weigh_by_label(documents: Iterable[Document], *, least: int) -> tuple[dict[str, float], float]:
    """Weigh names by their largest pointwise mutual information with a label, at least 0.

    It compares the texts with that label that hold the name with those expected by chance. Names in
    fewer than `least` texts weigh 0, like all others. Returns as `weigh_by_frequency`.
    """
    labels, texts, pairs = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
    for names, label in documents:
        label = label or ""
        labels[label] += 1
        texts.update(set(names))
        pairs.update((name, label) for name in set(names))
    total, weights = labels.total(), dict[str, float]()
    for (name, label), count in pairs.items():
        if texts[name] >= least:
            found = math.log(count * total / (texts[name] * labels[label]))
            weights[name] = max(weights.get(name, 0.0), found)
    return weights, 0.0


def find_phrases(
    documents: Iterable[Document], *, least: int, longest: int = 5, most: int = 20_000
) -> dict[str, float]:
    """Return the `most` phrases of 2 to `longest` words whose words belong together most, scored.

    The score is that of PMI masking (Levine et al. 2021, arXiv 2010.01825): the smallest, over all
    ways to divide the phrase, of the logarithm of its probability over that of its parts. Phrases
    seen fewer than `least` times, or with a score of 0 or less, are left out. Words are of letters
    and digits.
    """
    counts: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(longest)]
    for names, _ in documents:
        for _, run in groupby(names, str.isalnum):
            words = tuple(run)
            if words[0].isalnum():
                for length, seen in enumerate(counts, 1):
                    seen.update(words[i : i + length] for i in range(len(words) - length + 1))
    totals = [max(1, seen.total()) for seen in counts]
    best: dict[tuple[str, ...], float] = {}
    scores: dict[str, float] = {}
    for length, (seen, total) in enumerate(zip(counts, totals, strict=True), 1):
        for words, count in seen.items():
            if count < least:
                continue
            whole = math.log(count / total)
            parts = max(
                (best[words[:at]] + best[words[at:]] for at in range(1, length)), default=-math.inf
            )
            best[words] = max(whole, parts)
            if length > 1 and whole > parts:
                scores[" ".join(words)] = whole - parts
    ranked = sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
    return dict(ranked[:most])


def write_mask_table(path: Path, table: MaskTable) -> None:
    """Write a table as JSON lines, the largest weights first; raise `RunError` if it fails."""
    value = "score" if table.unit == "phrase" else "weight"
    rows = [] if table.unit == "phrase" else [("", table.others)]
    rows += sorted(table.weights.items(), key=lambda pair: (-pair[1], pair[0]))
    lines = (
        json.dumps({table.unit: name, value: float(f"{weight:.6g}")}, ensure_ascii=False)
        for name, weight in rows
    )
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
