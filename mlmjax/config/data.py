"""Read the part of a run file that says what to read, keep and pack."""

import codecs
import re
from collections.abc import Mapping, Sequence
from encodings.aliases import aliases
from itertools import pairwise
from shlex import quote
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from mlmjax.config.columns import Column, Pattern, pattern_parts
from mlmjax.config.tables import StrictTable, decode
from mlmjax.errors import InputError, suggest_name
from mlmjax.storage import expand_home
from mlmjax.text.checks import describe_twins, find_twins

Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
Rows = Annotated[int, Field(gt=0, le=2**20)]
# The limit is that of float32, in which these numbers are used.
PositiveFloat = Annotated[float, Field(gt=0.0, le=3e38, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=3e38, allow_inf_nan=False)]
ShortenSide = Literal["head", "tail", "middle"]
AnswerRule = Literal["strip", "letter", "period", "lower"]


def _filled(text: str) -> str:
    if not text.strip():  # As a path it would mean the working directory.
        raise ValueError("is blank; give it a value, or leave the key out if it is optional")
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path or name can have")
    return text


def _from_home(path: str) -> str:
    return str(expand_home(path)) if path.startswith("~") else path


# They rewrite escapes or names of hosts, and no file is written in them.
_NO_ENCODINGS = ("idna", "punycode", "unicode_escape", "raw_unicode_escape")


def check_encoding(name: str) -> str:
    """Return the name of an encoding; raise `ValueError` with the nearest one for any other."""
    try:
        "a".encode(name)  # raises LookupError for codecs that are not for text
        if codecs.lookup(name).name not in _NO_ENCODINGS:
            return name
    except (LookupError, ValueError):
        pass
    hint = suggest_name(name, sorted({*aliases, *aliases.values()}))
    raise ValueError(f'is {name!r:.60}; {hint}expected an encoding of text, such as "latin-1"')


Name = Annotated[str, AfterValidator(_filled)]
Encoding = Annotated[str, AfterValidator(check_encoding)]
"""A name that Python knows for an encoding of text files, such as `latin-1`."""
Place = Annotated[Name, AfterValidator(_from_home)]
"""A path, whose leading `~` is the home directory."""


class CsvDialect(StrictTable):
    """Say how a CSV or TSV file is written; what is left out is detected.

    `separator` is the character between fields. `quote` is the character around fields, "" for
    none. `escape` is the character before a quote inside a field, which is doubled otherwise.
    `merged_lines` says whether a quoted field may hold line ends: `allow`, `refuse`, or
    `check`, which refuses lines that look like records of their own.
    """

    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    quote: Annotated[str, Field(max_length=1)] = '"'
    escape: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    merged_lines: Literal["check", "allow", "refuse"] = "check"

    KEY: ClassVar[str] = "csv"
    """Where a person sets this, in messages."""

    def setting(self, name: str, value: str | None = None) -> str:
        """Return how messages write a key, or the key with a value.

        >>> CsvDialect().setting("separator"), CsvDialect().setting("separator", ";")
        ('csv.separator', 'csv.separator = ";"')
        """
        return f"{self.KEY}.{name}" + ("" if value is None else f' = "{value}"')

    @model_validator(mode="after")
    def _distinct(self) -> "CsvDialect":
        for name in ("separator", "quote", "escape"):
            value = getattr(self, name)
            if value and (value in "\r\n\0 " or not value.isascii()):
                raise ValueError(f"{name} is {value!r}; expected one ASCII character, not a space")
        given = [value for value in (self.separator, self.quote, self.escape) if value]
        if len(set(given)) < len(given):
            raise ValueError(
                f"separator, quote and escape are {', '.join(map(repr, given))}; expected "
                "different characters"
            )
        return self


class CsvOptions(CsvDialect):
    """A dialect that is set on the command line, by `--csv KEY=VALUE`."""

    KEY: ClassVar[str] = "--csv"

    @classmethod
    def parse(cls, given: Sequence[str]) -> "CsvOptions":
        r"""Read `KEY=VALUE` texts, where `\t` is a tab; raise `InputError` for bad ones.

        >>> CsvOptions.parse([r"separator=\t", "quote="])
        CsvOptions(separator='\t', quote='', escape=None, merged_lines='check')
        """
        values = {}
        for text in given:
            name, equals, value = text.partition("=")
            if not equals:
                raise InputError(
                    f"--csv {text!r:.60}: expected KEY=VALUE, as in "
                    f"{cls().setting('separator', ';')}"
                )
            values[name] = "\t" if value == r"\t" else value
        return decode(cls, values, cls.KEY)

    def setting(self, name: str, value: str | None = None) -> str:
        """Return how messages write an option.

        >>> CsvOptions().setting("quote"), CsvOptions().setting("separator", ";")
        ('--csv quote=...', "--csv 'separator=;'")
        """
        return f"{self.KEY} " + (f"{name}=..." if value is None else quote(f"{name}={value}"))


ALL_SUBSETS = "*"
"""What stands for all subsets of a dataset of the hub, in the order of their names."""


class Location(StrictTable):
    """Say where records are: local files, or a dataset of the hub.

    Exactly one of `path` (a file or glob, or several: parquet, JSONL, CSV, each also `.zst`) and
    `hub` (a dataset id). `columns` maps names to columns. `limit` keeps the first records.
    `csv` says how CSV files are written, and `encoding` how text files are, if not in UTF-8.
    """

    name: Name | None = None
    path: Place | Annotated[tuple[Place, ...], Field(min_length=1)] | None = None
    hub: Name | None = None
    subset: str | None = None
    folder: Name | None = None
    split: str = "train"
    revision: Name | None = None
    columns: Mapping[str, Column] = {}
    limit: PositiveInt | None = None
    csv: CsvDialect | None = None
    encoding: Encoding | None = None

    @model_validator(mode="after")
    def _one_place(self) -> "Location":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path (local files) and hub (a dataset id)")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the files and globs of `path`, one or many."""
        return (self.path,) if isinstance(self.path, str) else self.path or ()

    @property
    def title(self) -> str:
        """Return its title in reports: name, or paths, or hub id and subset."""
        place = ", ".join(self.paths) or "/".join(filter(None, [self.hub, self.subset]))
        return self.name or place

    @property
    def is_pinned(self) -> bool:
        """Tell whether the records are fixed: local files, or a dataset at a commit."""
        return self.hub is None or bool(re.fullmatch(r"[0-9a-f]{40}", self.revision or ""))


class SourceConfig(Location):
    """Describe a source of training text, and how a record becomes an example.

    Exactly one of `prompt` (an instruction or labelled example, with `answer`) and `text` (the
    column of plain text, trained by MLM only; `cut` says where a long one is cut). A field of the
    prompt is the column of its name, or the column that `columns` maps it to. `normalize` names
    rules that rewrite answers, in their order (`config.labels.RULES`). `drop_labels` names answers
    whose records are left out, `blank` the fields that may be null or absent. `weight` is a number,
    the share of drawn rows that come from this source, or the column of a weight of each example.
    Without numbers, every row of all sources comes once per epoch. `broken` says whether a bad
    record stops the run, or is skipped and counted.
    """

    prompt: str | None = None
    answer: Pattern | None = None
    labels: tuple[str, ...] | Mapping[str, str] | None = None
    text: Pattern | None = None
    cut: Literal["window", "sentence"] = "window"
    task: Pattern | None = None
    normalize: tuple[AnswerRule, ...] = ()
    drop_labels: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()
    shorten: Mapping[str, ShortenSide] = {}
    broken: Literal["stop", "skip"] = "stop"
    weight: PositiveFloat | Name | None = None

    @property
    def share(self) -> float | None:
        """Return the share of drawn rows that come from this source, if it is given."""
        return None if isinstance(self.weight, str) else self.weight

    @property
    def weight_column(self) -> str | None:
        """Return the column that weighs the examples, if there is one."""
        return self.weight if isinstance(self.weight, str) else None

    @model_validator(mode="after")
    def _consistent(self) -> "SourceConfig":
        if (self.prompt is None) == (self.text is None):
            raise ValueError(
                "give exactly one of prompt (with answer) and text (a column of plain text)"
            )
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("prompt and answer go together: answer names the column of the answer")
        if self.labels is not None and self.prompt is None:
            raise ValueError("labels needs prompt and answer")
        if (pair := find_twins(self.label_names)) is not None:
            raise ValueError(f"labels: {describe_twins(*pair)}; expected distinct names")
        if self.cut != "window" and self.text is None:
            raise ValueError("cut is for plain text (text); for a prompt, use shorten")
        if self.weight_column is not None and self.prompt is None:
            raise ValueError("weight names a column, which is for answers; give a number for text")
        for key in ("normalize", "drop_labels", "blank"):
            if getattr(self, key) and self.prompt is None:
                what = "fields of a prompt" if key == "blank" else "answers"
                raise ValueError(f"{key} is for {what}; it needs prompt and answer")
        if not self.is_pinned:
            found = "no revision" if self.revision is None else f"revision {self.revision!r}"
            raise ValueError(
                f"hub dataset {self.hub} has {found}; give a commit of 40 hexadecimal digits, as "
                'in revision = "0123...cdef" (from the History of its files on the hub, or from '
                f"huggingface_hub.dataset_info({self.hub!r}).sha)"
            )
        return self

    @model_validator(mode="after")
    def _columns_of_fields(self) -> "SourceConfig":
        if not self.columns and not self.blank:
            return self
        if self.prompt is None:
            raise ValueError('columns are for a prompt; text itself may be "{title} {body}"')
        fields = {name for _, name in pattern_parts(self.prompt) if name}
        fields -= {"options"} if self.labels is not None else set()
        named = [("columns", name) for name in self.columns]
        for key, name in (*named, *(("blank", name) for name in self.blank)):
            if name not in fields or (key == "blank" and name == "options"):
                known = ", ".join(sorted(fields)) or "none"
                raise ValueError(
                    f"{key}: {name!r} is not a field of the prompt; its fields: {known}"
                )
        for name in self.columns:
            if name in (self.answer, self.task):
                raise ValueError(
                    f"columns: {name!r} is also the column of answer or task; give the field of "
                    "the prompt another name"
                )
        return self

    @property
    def label_names(self) -> tuple[str, ...]:
        """Return the names of the labels in order; empty for a source without labels."""
        if isinstance(self.labels, Mapping):
            return tuple(dict.fromkeys(self.labels.values()))
        return self.labels or ()


class EvaluationSet(StrictTable):
    """Name a task, and a file to read instead of its own.

    A string is short for the table with only the task.
    """

    task: Name
    data: Place | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value


class ExcludeConfig(StrictTable):
    """Exclude evaluation data from training.

    `tasks` are globs (`*`, `?`, `[...]`) on the task of a record, whatever its case. `overlap` are
    evaluation sets; a record that shares `ngram` consecutive words with their texts is excluded.
    """

    tasks: tuple[Name, ...] = ()
    overlap: tuple[EvaluationSet, ...] = ()
    ngram: Annotated[int, Field(ge=5, le=1000)] = 13


class SelectConfig(StrictTable):
    """Select examples with an answer, by hash.

    `sizes` are those of nested sets: the largest tasks are cut, down to one common number of
    examples, until the set has that size. `per_task` is the most examples of any task,
    `answer_share` the largest share of a task's examples with the same answer.
    """

    sizes: tuple[PositiveInt, ...] = ()
    per_task: PositiveInt | None = None
    answer_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None

    @model_validator(mode="after")
    def _ascending(self) -> "SelectConfig":
        if any(a >= b for a, b in pairwise(self.sizes)) or len(self.sizes) > 100:
            raise ValueError(
                f"sizes are {list(self.sizes)}; expected at most 100 sizes, in ascending order"
            )
        return self


class DataConfig(StrictTable):
    """Say what to read, how to pack it, and how many rows make one update.

    With `batch_start` the first update has that many rows, and `batch_size` is reached at update
    `batch_warmup`, a fraction of the run (< 1) or a number of updates (>= 1). `validation_rows` is
    a number of rows, or (between 0 and 1) a share of the tokens.
    """

    rows: Place
    seq_length: Annotated[int, Field(gt=0, le=2**20)] = 1024
    batch_size: Rows = 32
    batch_start: Rows | None = None
    batch_warmup: NonNegativeFloat = 0.1
    accumulate: Rows = 1
    pack: bool = True
    validation_rows: Annotated[int, Field(ge=0, lt=2**31)] | OpenShare = 0
    sources: tuple[SourceConfig, ...] = ()
    validation_sources: tuple[SourceConfig, ...] = ()
    select: SelectConfig = SelectConfig()
    subset: PositiveInt | None = None
    workers: Annotated[int, Field(gt=0, le=4096)] | None = None
    exclude: ExcludeConfig = ExcludeConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}; "
                "change one of them, so that batches divide into equal parts"
            )
        if self.validation_sources and self.validation_rows:
            raise ValueError(
                "give validation_rows (split off the sources) or validation_sources, not both"
            )
        if self.subset is not None and self.subset not in self.select.sizes:
            raise ValueError(
                f"subset {self.subset} is not one of select.sizes {list(self.select.sizes)}"
            )
        return self
