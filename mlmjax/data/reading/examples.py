"""How a record becomes an example: prompt and one-token answer, labelled row, or plain text."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mlmjax.config.data import SourceConfig
from mlmjax.data.reading.answers import Answers, Head, answer_reader, require_text
from mlmjax.data.reading.exclusion import Exclusion
from mlmjax.data.reading.files import BROKEN_FILE, BROKEN_RECORD, Broken, Record, stop
from mlmjax.data.reading.sources import read_source, source_files
from mlmjax.data.reading.windows import sentence_cuts, windows
from mlmjax.errors import InputError
from mlmjax.text.checks import check_text
from mlmjax.text.prompts import MASK, Template
from mlmjax.text.tokenizer import Tokenizer

CHUNK_RECORDS = 1000
CHUNK_CHARACTERS = 2**22
"""Records are tokenised together up to these bounds: enough for all threads, little memory."""

_ANY_LENGTH = 2**31

BLANK_PROMPT = "blank prompt"
BLANK_TEXT = "blank text"
TOO_LONG = "prompt too long"
HOLDS_MASK = f"holds {MASK}"

HITS_SHOWN = 20
"""Records named in the report for each evaluation set, of those that share text with it."""

BROKEN_SHOWN = 20
"""Broken records named in the report of a source, and as many files."""


class Encoded(NamedTuple):
    """A tokenised record: ids uint32 `[tokens]`, the answer's position (-1: none), its task.

    `key` is a 64-bit hash of what the model is shown: of the prompt with its slot open, or of the
    whole document a window is from. Equal prompts have equal keys, whatever their answers. `label`
    is the number of the class, or the value of a regression (NaN: none).
    """

    ids: np.ndarray
    answer_position: int
    task: str
    key: int
    label: float = math.nan


class SharedText(NamedTuple):
    """A record that shares words with an evaluation set: where it stands, and the words."""

    where: str
    words: str


@dataclass
class Counts:
    """What became of the records of one source: read, made examples, dropped and why, shortened.

    `normalized` counts the answers that each rule changed; `hits` has, for each evaluation set, the
    first `HITS_SHOWN` records that were dropped because they share text with it; `broken` says what
    was wrong with the first `BROKEN_SHOWN` that were dropped as broken, `broken_files` with the
    first files that could not be read to their end, which are counted among `dropped` too.
    """

    records: int = 0
    examples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)
    normalized: Counter[str] = field(default_factory=Counter)
    hits: dict[str, list[SharedText]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    broken_files: list[str] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        """Add what became of other records of the source."""
        self.records += other.records
        self.examples += other.examples
        self.dropped.update(other.dropped)
        self.shortened.update(other.shortened)
        self.normalized.update(other.normalized)
        for name, hits in other.hits.items():
            shown = self.hits.setdefault(name, [])
            shown += hits[: HITS_SHOWN - len(shown)]
        self.broken += other.broken[: BROKEN_SHOWN - len(self.broken)]
        self.broken_files += other.broken_files[: BROKEN_SHOWN - len(self.broken_files)]

    def count_broken(self, what: str, error: InputError) -> None:
        """Count something broken that is left out."""
        self.dropped[what] += 1
        named = self.broken_files if what == BROKEN_FILE else self.broken
        if len(named) < BROKEN_SHOWN:
            named.append(error.message)


def source_name(source: SourceConfig) -> str:
    """Name a source: its `name`, else its paths or its hub id and subset."""
    return source.title


def read_examples(
    source: SourceConfig,
    tokenizer: Tokenizer,
    seq_length: int,
    counts: Counts,
    head: Head = "mlm",
    exclusion: Exclusion | None = None,
) -> Iterator[Encoded]:
    """Stream the examples of a source, each at most `seq_length` tokens; counts go into `counts`.

    Dropped and counted is what `exclusion` keeps out: records of its tasks before their answers are
    looked at, records that share text with an evaluation set after that. So are prompts and answers
    that hold the text `[MASK]`. An overlapping document is dropped whole.

    Instruction source (`prompt`, `answer`): kept when `" " + answer` (stripped) is one token, the
    trained form. With `labels`: the answer names or numbers a label, and the answer token is the
    label's letter when the prompt has `{options}`, otherwise `" " + label`. The ids are exactly
    the prompt that scoring sees, the answer's token in place of `[MASK]`. Plain text (`text`): the
    document is cut into windows of at most `seq_length - 2` tokens between `[CLS]` and `[SEP]`,
    with `cut = "sentence"` where a sentence ends; no token is lost. For the classification head a
    prompt has no slot, the answer is the number of the label, and without `labels` any finite
    number, to be predicted itself.

    With `broken = "skip"` records and files that cannot be used are left out and counted, each
    record alone.

    Raises `InputError` for labels or templates that cannot work, before anything is read, and for
    a value that is no text, an unknown label or a blank labelled text, naming file and row.
    """
    source_files(source)
    if source.text is not None:
        if seq_length < 3:
            raise InputError(f"seq_length {seq_length}: leaves no room between [CLS] and [SEP]")
        return _read_windows(source, source.text, tokenizer, seq_length - 2, counts, exclusion)
    assert source.prompt is not None
    where = f"source {source_name(source)}"
    with _opened_by(f"{where}: prompt"):
        template = Template(source.prompt, shorten=dict(source.shorten), slot=head == "mlm")
        if not set(template.fields) - {"options"}:
            raise InputError("names no column of the records; write {text} for the column text")
    with _opened_by(f"{where}: labels"):
        read_answers = answer_reader(source, template, tokenizer, head)
    return _read_prompts(source, template, read_answers, tokenizer, seq_length, counts, exclusion)


@contextmanager
def _opened_by(where: str) -> Iterator[None]:
    """Open the message of an error with what it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error.message}", error.details) from error


def _read_windows(
    source: SourceConfig,
    column: str,
    tokenizer: Tokenizer,
    width: int,
    counts: Counts,
    exclusion: Exclusion | None,
) -> Iterator[Encoded]:
    columns = [column, *([source.task] if source.task else [])]

    def convert(records: Sequence[Record], counts: Counts) -> Iterator[Encoded]:
        kept = []
        for record in records:
            require_text(record, column)
            if not record.fields[column].strip():
                counts.dropped[BLANK_TEXT] += 1
            elif not (
                _excluded_by_task(exclusion, source, record, counts)
                or _overlaps(exclusion, record, record.fields[column], counts)
            ):
                kept.append(record)
        texts = [record.fields[column] for record in kept]
        encoded = tokenizer.encode_plain_batch(texts)
        for record, text, ids in zip(kept, texts, encoded, strict=True):
            task = _task(source, record)
            key = _key(text.encode())
            cuts = np.empty(0, np.int64)
            if source.cut == "sentence" and len(ids) > width:
                cuts = sentence_cuts(text, tokenizer.plain_offsets(text))
            for part in windows(ids, width, cuts):
                window = [tokenizer.cls_id, *part, tokenizer.sep_id]
                yield Encoded(np.array(window, np.uint32), -1, task, key)

    return _converted(source, columns, (), convert, counts)


def _read_prompts(
    source: SourceConfig,
    template: Template,
    read_answers: Callable[[Sequence[Record], Counter[str], Counter[str]], Answers],
    tokenizer: Tokenizer,
    seq_length: int,
    counts: Counts,
    exclusion: Exclusion | None,
) -> Iterator[Encoded]:
    answer_column = source.answer
    assert answer_column is not None
    labels = None if source.labels is None else list(source.label_names)
    fields = [name for name in template.fields if labels is None or name != "options"]
    columns = [*fields, answer_column, *([source.task] if source.task else [])]
    texts = [name for name in fields if name != "options"]

    def convert(records: Sequence[Record], counts: Counts) -> Iterator[Encoded]:
        rows, answers, kept = [], [], []
        for record in records:
            for name in texts:
                require_text(record, name)
        usable = [
            record
            for record in records
            if not _excluded_by_task(exclusion, source, record, counts)
            and not _holds_mask(record, [*fields, answer_column], counts)
        ]
        for record, answer in read_answers(usable, counts.dropped, counts.normalized):
            row = {name: record.fields[name] for name in fields}
            if labels is not None and "options" in template.fields:
                row["options"] = labels
            if any(row[name].strip() for name in texts) or not texts:
                if _overlaps(exclusion, record, _shown(record, fields), counts):
                    continue
                rows.append(row)
                answers.append(answer)
                kept.append(record)
            elif labels is not None:
                raise InputError(f"{record.where}: {', '.join(texts)} is blank; expected some text")
            else:
                counts.dropped[BLANK_PROMPT] += 1
        # Everything is encoded at once and whole; only what is too long is looked at again.
        try:
            prompts = template.render_batch(tokenizer, rows, _ANY_LENGTH)
        except InputError:
            for row, record in zip(rows, kept, strict=True):
                with _opened_by(record.where):
                    template.render(tokenizer, row, _ANY_LENGTH)
            raise
        for row, answer, record, prompt in zip(rows, answers, kept, prompts, strict=True):
            ids, slot = prompt.ids, prompt.slot
            if len(ids) > seq_length:
                try:
                    ids, slot, shortened = template.render(tokenizer, row, seq_length)
                except InputError:
                    counts.dropped[TOO_LONG] += 1
                    continue
                counts.shortened.update(shortened.keys())
            example = np.array(ids, np.uint32)
            key = _key(example)
            task = _task(source, record)
            if template.slot:
                example[slot] = answer
                yield Encoded(example, slot, task, key)
            else:
                yield Encoded(example, slot, task, key, answer)

    return _converted(source, columns, () if labels else (answer_column,), convert, counts)


Convert = Callable[[Sequence[Record], Counts], Iterator[Encoded]]
"""Makes examples of records, and counts what becomes of them."""


def _converted(
    source: SourceConfig,
    columns: Sequence[str],
    named: Sequence[str],
    convert: Convert,
    counts: Counts,
) -> Iterator[Encoded]:
    """Read the columns of a source and convert its records, many at a time."""
    skipping = source.broken == "skip"

    def skip(what: str, error: InputError) -> None:
        counts.records += what == BROKEN_RECORD
        counts.count_broken(what, error)

    broken: Broken = skip if skipping else stop
    for records in _chunks(read_source(source, columns, named=named, broken=broken)):
        counts.records += len(records)
        yield from _sound(records, convert, counts) if skipping else convert(records, counts)


def _sound(records: Sequence[Record], convert: Convert, counts: Counts) -> Iterator[Encoded]:
    """Convert the records that can be, looking for the others by halves."""
    attempt = Counts()
    try:
        converted = list(convert(records, attempt))
    except InputError as error:
        if len(records) == 1:
            counts.count_broken(BROKEN_RECORD, error)
            return
        middle = len(records) // 2
        yield from _sound(records[:middle], convert, counts)
        yield from _sound(records[middle:], convert, counts)
        return
    counts.add(attempt)
    yield from converted


def _excluded_by_task(
    exclusion: Exclusion | None, source: SourceConfig, record: Record, counts: Counts
) -> bool:
    if exclusion is None or not exclusion.patterns:
        return False
    pattern = exclusion.pattern(_task(source, record))
    if pattern is not None:
        counts.dropped[f"task excluded by {pattern!r}"] += 1
    return pattern is not None


def _overlaps(exclusion: Exclusion | None, record: Record, text: str, counts: Counts) -> bool:
    hit = None if exclusion is None else exclusion.overlap(text)
    if hit is None:
        return False
    counts.dropped[f"overlaps {hit.name}"] += 1
    shown = counts.hits.setdefault(hit.name, [])
    if len(shown) < HITS_SHOWN:
        shown.append(SharedText(record.where, hit.words))
    return True


def _holds_mask(record: Record, columns: Sequence[str], counts: Counts) -> bool:
    """Tell whether a record speaks of the mask itself, which is no text to learn answers from."""
    holds = any(MASK in text for name in columns for text in _strings(record.fields[name]))
    if holds:
        counts.dropped[HOLDS_MASK] += 1
    return holds


def _shown(record: Record, fields: Sequence[str]) -> str:
    """Return what the fields of a record show, options included, a line each."""
    return "\n".join(text for name in fields for text in _strings(record.fields[name]))


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [item for item in values if isinstance(item, str)]


def _key(content: bytes | np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _task(source: SourceConfig, record: Record) -> str:
    if source.task is None:
        return source_name(source)
    value = record.fields[source.task]
    if value is None or not str(value).strip():
        raise InputError(f"{record.where}: column {source.task!r} names no task; found {value!r}")
    task = str(value)
    check_text(task, f"{record.where}: column {source.task!r}")
    return task


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group records for tokenising."""
    chunk: list[Record] = []
    size = 0
    for record in records:
        size += sum(len(value) for value in record.fields.values() if isinstance(value, str))
        chunk.append(record)
        if len(chunk) >= CHUNK_RECORDS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
