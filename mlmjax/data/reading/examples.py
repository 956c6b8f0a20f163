"""Turn records into examples: prompts with answers, labelled rows, or plain text."""

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mlmjax.config.columns import alternatives_of, is_missing
from mlmjax.config.data import ExcludeConfig, SourceConfig
from mlmjax.config.run import Head
from mlmjax.data.reading.answers import Answered, AnswerReader, require_text
from mlmjax.data.reading.exclusion import Exclusion
from mlmjax.data.reading.files import BROKEN_FILE, BROKEN_RECORD, Broken, Record, stop
from mlmjax.data.reading.sources import read_source
from mlmjax.data.reading.windows import sentence_cuts, windows
from mlmjax.errors import InputError, MissingColumnError, named_place
from mlmjax.text.checks import check_text, check_weight, split_by_size
from mlmjax.text.prompts import MASK, Template
from mlmjax.text.tokenizer import NO_ANCHOR, Tokenizer

TASK_COLUMNS = ("task", "_task_name", "task_name")
"""Columns that hold the task of a record if a source does not say which one does, in any case."""

_SPELLINGS = tuple(
    dict.fromkeys(
        spell(name)
        for name in TASK_COLUMNS
        for spell in (str, str.capitalize, str.title, str.upper)
    )
)
_NUMBER = re.compile(r"\s*[-+]?\d+([.,]\d+)?\s*")

CHUNK_RECORDS, CHUNK_CHARACTERS = 1024, 2**22
"""At most so much is tokenised together: enough for all threads, little memory."""

TOO_LONG = "prompt too long"
"""Why an example is dropped whose prompt does not fit, however short its text is made."""

_ANY_LENGTH = 2**31

MOST_NAMED = 20
"""Records that the report names: broken ones, broken files, and overlaps with each set."""


class Encoded(NamedTuple):
    """Hold a tokenised record, or a window of one.

    `ids` are uint32 `[tokens]`, and `answer_position` is -1 without an answer token. `key` is a
    64-bit hash of what the model is shown: of the prompt with its slot open, or of the whole
    document that a window is from. Equal prompts have equal keys, whatever their answers.
    `label` is the number of the class, or the value of a regression (NaN: none). `shares` are the
    probabilities of the labels of the source; none for a hard label.
    """

    ids: np.ndarray
    answer_position: int
    task: str
    key: int
    label: float = math.nan
    weight: float = 1.0
    shares: tuple[float, ...] = ()


@dataclass
class Counts:
    """Count what becomes of the records of a source.

    `normalized` counts the answers that each rule changed, `blanked` the records in which a field
    of `SourceConfig.blank` is blank, null or absent. `task_columns` counts the records whose task
    is in each column, `unnamed` those that name no task, and `numbered` those of them that have a
    number where its name is expected, by column. `hits` has, for each evaluation set, the first
    `MOST_NAMED` records that share text with it, and the words. `broken` has the messages of as
    many broken records, `broken_files` those of files that could not be read to their end. All of
    these are also counted in `dropped`.
    """

    records: int = 0
    examples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)
    normalized: Counter[str] = field(default_factory=Counter)
    blanked: Counter[str] = field(default_factory=Counter)
    task_columns: Counter[str] = field(default_factory=Counter)
    unnamed: int = 0
    numbered: Counter[str] = field(default_factory=Counter)
    hits: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    broken_files: list[str] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        """Add what became of other records of the source."""
        self.records += other.records
        self.examples += other.examples
        self.unnamed += other.unnamed
        for name in ("dropped", "shortened", "normalized", "blanked", "task_columns", "numbered"):
            getattr(self, name).update(getattr(other, name))
        for name, hits in other.hits.items():
            self.hits[name] = [*self.hits.get(name, ()), *hits][:MOST_NAMED]
        self.broken = [*self.broken, *other.broken][:MOST_NAMED]
        self.broken_files = [*self.broken_files, *other.broken_files][:MOST_NAMED]

    def count_broken(self, what: str, error: InputError) -> None:
        """Count a broken record or file that is skipped."""
        self.dropped[what] += 1
        named = self.broken_files if what == BROKEN_FILE else self.broken
        if len(named) < MOST_NAMED:
            named.append(error.message)


def read_examples(
    source: SourceConfig,
    tokenizer: Tokenizer,
    seq_length: int,
    counts: Counts,
    head: Head = "mlm",
    exclusion: Exclusion | None = None,
) -> Iterator[Encoded]:
    """Stream the examples of a source, each at most `seq_length` tokens; count in `counts`.

    `exclusion` drops records of its tasks, whatever their answers, and then records (or whole
    documents) that share text with an evaluation set. Prompts and answers that hold the text
    `[MASK]` are dropped too.

    Instruction source (`prompt`, `answer`): the ids are exactly the prompt that scoring sees, with
    the token that `AnswerReader` gives in place of `[MASK]`. Other records are dropped. For the
    classification head, a prompt has no slot.

    Plain text (`text`): the document is cut into windows that fill `seq_length` with the tokens
    around them, with `cut = "sentence"` where a sentence ends; no token is lost.

    With `broken = "skip"`, records and files that cannot be used are skipped and counted.

    Raises `InputError` for labels or templates that cannot work, before anything is read, and for a
    value that is not text, an unknown label or a blank labelled text, with file and row.
    """
    make = _Windows if source.text is not None else _Prompts
    reader: _Reader = make(source, tokenizer, seq_length, head, exclusion)
    skips = source.broken == "skip"

    def skip(what: str, error: InputError) -> None:
        counts.records += what == BROKEN_RECORD
        counts.count_broken(what, error)

    records = read_source(
        source,
        reader.columns,
        optional=reader.optional,
        named=reader.named,
        unnamed=source.drop_labels,
        broken=reader.with_advice(skip if skips else stop),
    )
    return reader.examples(records, counts, skips)


def label_options(source: SourceConfig, tokenizer: Tokenizer, head: Head) -> list[int]:
    """Return the answers of the labels of a source, in their order; none without labels."""
    if source.labels is None:
        return []
    return _Prompts(source, tokenizer, 2**20, head, None).answers.options


class _Reader(ABC):
    """Turn the records of one source into examples: records, kept records, examples."""

    columns: Sequence[str]
    optional: Sequence[str] = ()
    named: Sequence[str] = ()
    blankable: Sequence[str] = ()

    def __init__(
        self,
        source: SourceConfig,
        tokenizer: Tokenizer,
        seq_length: int,
        head: Head,
        exclusion: Exclusion | None,
    ):
        self.source, self.tokenizer, self.seq_length = source, tokenizer, seq_length
        self.exclusion = exclusion or Exclusion(ExcludeConfig())

    def examples(self, records: Iterable[Record], counts: Counts, skips: bool) -> Iterator[Encoded]:
        """Yield the examples of all records, many tokenised together."""
        for chunk in split_by_size(records, _size, CHUNK_CHARACTERS):
            counts.records += len(chunk)
            yield from self._sound(chunk, counts) if skips else self.convert(chunk, counts)

    @abstractmethod
    def convert(self, records: Sequence[Record], counts: Counts) -> Iterator[Encoded]:
        """Yield the examples of some records; raise `InputError` for one that is broken."""

    def _sound(self, records: Sequence[Record], counts: Counts) -> Iterator[Encoded]:
        """Convert the records that are not broken, and find the others by bisection."""
        attempt = Counts()
        try:
            examples = list(self.convert(records, attempt))
        except InputError as error:
            if len(records) == 1:
                counts.count_broken(BROKEN_RECORD, error)
                return
            middle = len(records) // 2
            yield from self._sound(records[:middle], counts)
            yield from self._sound(records[middle:], counts)
            return
        counts.add(attempt)
        yield from examples

    def with_advice(self, broken: Broken) -> Broken:
        """Return a function that adds what can be done about a broken record or file.

        A field without a column may be blank; other records and files may be skipped.
        """
        fields = set(self.columns) & set(self.blankable)
        places = {alternatives_of(self.source.columns.get(name, name)): name for name in fields}

        def tell(what: str, error: InputError) -> None:
            if isinstance(error, MissingColumnError) and error.columns in places:
                advice = f"; {_blank_advice(places[error.columns])}"
                error = MissingColumnError(f"{error.message}{advice}", error.details)
            elif what == BROKEN_RECORD and not isinstance(error, MissingColumnError):
                hint = "" if self.source.broken == "skip" else " (broken = 'skip' leaves it out)"
                error = InputError(f"{error.message}{hint}", error.details)
            broken(what, error)

        return tell

    def find_tasks(self, used: Sequence[str]) -> tuple[str, ...]:
        """Return the columns in which a record's task may be, unless the source names one."""
        if self.source.task is not None:
            return ()
        mapped = [alternatives_of(column) for column in self.source.columns.values()]
        taken = {*used, *(name for names in mapped for name in names)}
        return tuple(name for name in _SPELLINGS if name not in taken)

    def task_column(self, record: Record) -> str | None:
        """Return the column that names the task of a record; None if no column does."""
        column = self.source.task
        if column is None:
            names = (name for name in _SPELLINGS if name in self.optional)
            return next((name for name in names if _is_name(record.fields[name])), None)
        value = record.fields[column]
        if value is None or not str(value).strip():
            raise InputError(f"{record.where}: column {column!r} names no task; found {value!r}")
        return column

    def task_of(self, record: Record) -> str:
        """Return the task of a record, by default the name of its source."""
        column = self.task_column(record)
        if column is None:
            return self.source.title
        value = str(record.fields[column])
        check_text(value, f"{record.where}: column {column!r}")
        return value

    def is_excluded(self, record: Record, counts: Counts) -> bool:
        """Tell, and count, whether `data.exclude` names the task of a record.

        A number is a task if the source says so, but it is no name.
        """
        column = self.task_column(record)
        pattern = self.exclusion.pattern(self.task_of(record)) if self.exclusion.patterns else None
        if pattern is not None:
            counts.dropped[f"task excluded by {pattern!r}"] += 1
        if column is not None and (pattern is not None or _is_name(record.fields[column])):
            counts.task_columns[column] += 1
        else:
            counts.unnamed += 1
            may_name = (name for name in _SPELLINGS if name in self.optional)
            counts.numbered.update(
                name
                for name in (may_name if column is None else [column])
                if _NUMBER.fullmatch(str(record.fields[name]))
            )
        return pattern is not None

    def overlaps(self, record: Record, text: str, counts: Counts) -> bool:
        """Tell, and count, whether a record shares text with an evaluation set."""
        hit = self.exclusion.overlap(text)
        if hit is None:
            return False
        counts.dropped[f"overlaps {hit.name}"] += 1
        shown = counts.hits.setdefault(hit.name, [])
        if len(shown) < MOST_NAMED:
            shown.append((record.where, hit.words))
        return True


class _Windows(_Reader):
    """Read plain text in windows."""

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        assert self.source.text is not None
        if self.seq_length <= self.tokenizer.outer:
            raise InputError(
                f"seq_length {self.seq_length}: leaves no room between the {self.tokenizer.outer} "
                "tokens that the tokenizer puts around a text; raise it"
            )
        self.text = self.source.text
        self.columns = [self.text, *filter(None, [self.source.task])]
        self.optional = self.find_tasks([self.text])

    def convert(self, records: Sequence[Record], counts: Counts) -> Iterator[Encoded]:
        kept = list(self._kept(records, counts))
        texts = [record.fields[self.text] for record in kept]
        width = self.seq_length - self.tokenizer.outer
        encoded = self.tokenizer.encode_plain_batch(texts)
        for record, text, ids in zip(kept, texts, encoded, strict=True):
            task, key = self.task_of(record), _hash(text.encode())
            cuts = np.empty(0, np.int64)
            if self.source.cut == "sentence" and len(ids) > width:
                cuts = sentence_cuts(text, self.tokenizer.plain_offsets(text))
            for part in windows(ids, width, cuts):
                yield Encoded(np.array(self.tokenizer.wrap(part), np.uint32), -1, task, key)

    def _kept(self, records: Sequence[Record], counts: Counts) -> Iterator[Record]:
        for record in records:
            require_text(record, self.text)
            if not record.fields[self.text].strip():
                counts.dropped["blank text"] += 1
            elif not self.is_excluded(record, counts) and not self.overlaps(
                record, record.fields[self.text], counts
            ):
                yield record


class _Prompts(_Reader):
    """Read prompts with their answers."""

    def __init__(
        self, source: SourceConfig, tokenizer: Tokenizer, length: int, head: Head, *rest: Any
    ):
        super().__init__(source, tokenizer, length, head, *rest)
        assert source.prompt is not None
        assert source.answer is not None
        with named_place(f"source {source.title}: prompt"):
            slot = head == "mlm"
            anchor = NO_ANCHOR if slot and tokenizer.find_anchor() is None else tokenizer.anchor
            self.template = Template(
                source.prompt,
                shorten=dict(source.shorten),
                slot=slot,
                anchor=anchor if slot else None,
            )
            if not set(self.template.fields) - {"options"}:
                raise InputError("names no column of the records; write {text} for the column text")
        with named_place(f"source {source.title}: labels"):
            self.answers = AnswerReader(source, self.template, tokenizer, head)
        # With labels, `options` are their names; without, a column of the record.
        self.options = None if source.labels is None else list(source.label_names)
        self.texts = [name for name in self.template.fields if name != "options"]
        self.fields = list(self.template.fields) if self.options is None else self.texts
        self.shown = [*self.fields, source.answer]
        self.blank = frozenset(source.blank)
        self.blankable = [name for name in self.texts if name != source.answer]
        required = [name for name in self.shown if name not in self.blank]
        self.columns = [*required, *filter(None, [source.task, source.weight_column])]
        self.optional = (*source.blank, *self.find_tasks(self.shown))
        self.named = () if source.labels else (source.answer,)

    def convert(self, records: Sequence[Record], counts: Counts) -> Iterator[Encoded]:
        kept = list(self._kept(list(self._usable(records, counts)), counts))
        places, rows = [one.record.where for one, _ in kept], [row for _, row in kept]
        # Encoded together and whole, because few are too long.
        prompts = self.template.render_batch(self.tokenizer, rows, _ANY_LENGTH, places)
        for (one, row), prompt in zip(kept, prompts, strict=True):
            if len(prompt.ids) > self.seq_length:
                try:
                    prompt = self.template.render(self.tokenizer, row, self.seq_length)
                except InputError:
                    counts.dropped[TOO_LONG] += 1
                    continue
                counts.shortened.update(prompt.shortened.keys())
            ids = np.array(prompt.ids, np.uint32)
            key, label = _hash(ids), one.answer
            if self.template.slot:
                ids[prompt.slot], label = int(one.answer), math.nan
            task, weight = self.task_of(one.record), self._weight_of(one.record)
            yield Encoded(ids, prompt.slot, task, key, label, weight, one.shares or ())

    def _usable(self, records: Sequence[Record], counts: Counts) -> Iterator[Record]:
        """Drop records of excluded tasks, and those that contain `[MASK]`."""
        for record in records:
            for name in self.texts:
                if name in self.blank and is_missing(record.fields[name]):
                    record = Record({**record.fields, name: ""}, record.where)
                require_text(record, name, absent=f"; {_blank_advice(name)}")
                if name in self.blank and not record.fields[name].strip():
                    counts.blanked[name] += 1
            if self.is_excluded(record, counts):
                continue
            if any(MASK in text for text in _strings(record, self.shown)):
                counts.dropped[f"holds {MASK}"] += 1
            else:
                yield record

    def _kept(
        self, records: Sequence[Record], counts: Counts
    ) -> Iterator[tuple[Answered, dict[str, Any]]]:
        """Yield records that have answers with the fields of their prompts; drop the others."""
        for one in self.answers.read(records, counts.dropped, counts.normalized):
            record = one.record
            row = {name: record.fields[name] for name in self.fields}
            if self.options is not None:
                row["options"] = self.options
            if self.texts and not any(row[name].strip() for name in self.texts):
                if self.options is not None:
                    raise InputError(
                        f"{record.where}: {', '.join(self.texts)} is blank; expected some text"
                    )
                counts.dropped["blank prompt"] += 1
            elif not self.overlaps(record, "\n".join(_strings(record, self.fields)), counts):
                yield one, row

    def _weight_of(self, record: Record) -> float:
        """Return the weight of a record's example; CSV files hold it as text."""
        column = self.source.weight_column
        if column is None:
            return 1.0
        value = record.fields[column]
        if isinstance(value, str):
            with suppress(ValueError):
                value = float(value)
        return check_weight(value, f"{record.where}: column {column!r}")


def _blank_advice(field: str) -> str:
    """Say how a field that may be null or absent is read.

    >>> _blank_advice("input")
    'blank = ["input"] reads it as blank'
    """
    return f"blank = [{json.dumps(field, ensure_ascii=False)}] reads it as blank"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not _NUMBER.fullmatch(value)


def _strings(record: Record, columns: Sequence[str]) -> Iterator[str]:
    """Yield the texts in some columns of a record, those in lists included."""
    for name in columns:
        value = record.fields[name]
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, str):
                yield item


def _hash(content: bytes | np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _size(record: Record) -> int:
    """Count the characters of a record, at least so many that `CHUNK_RECORDS` fill a chunk."""
    characters = sum(len(value) for value in record.fields.values() if isinstance(value, str))
    return max(characters, CHUNK_CHARACTERS // CHUNK_RECORDS)
