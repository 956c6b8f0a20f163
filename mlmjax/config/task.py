"""Read tasks strictly from TOML: a labelled table and how it is prompted."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mlmjax.config.columns import Column, is_missing, look_up, look_up_or_none
from mlmjax.config.data import AnswerRule, CsvDialect, Encoding, Location, Name, ShortenSide
from mlmjax.config.tables import StrictTable, decode, find_file, read_toml
from mlmjax.errors import InputError, MissingColumnError
from mlmjax.text.checks import check_text, describe_twins, find_twins
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import NO_ANCHOR, Tokenizer
from mlmjax.text.verbalizer import Verbalizer, option_names

Cleaning = Literal["newsgroup"]
OPTION = "option"
"""The field of a text to rank that stands for each option in turn."""
_HEADER_LINE = re.compile(r"[!-9;-~]+:|[ \t]")  # RFC 1036: a name and a colon, or a continuation
_QUOTED = re.compile(r"^[>|]|^In article|^Quoted from|writes in|writes:|wrote:|says:|said:")


def newsgroup(post: str) -> str:
    """Remove header, signature and quoted lines of a newsgroup post.

    A post loses its header (up to the first blank line), then its last paragraph (from the last
    line that is blank or made of hyphens), then every line that quotes or introduces a quotation,
    as `fetch_20newsgroups(remove=("headers", "footers", "quotes"))` of scikit-learn does. A text
    without a header counts as cleaned and is not changed: cleaning it again would remove another
    paragraph.

    >>> newsgroup("From: a@b\\nSubject: cars\\n\\nc@d writes:\\n> Why?\\nThe red one.\\n\\n--\\nA")
    'The red one.\\n'
    >>> newsgroup("The red one.\\n")
    'The red one.\\n'
    """
    header, _, body = post.partition("\n\n")
    lines = header.split("\n")
    names = {line.partition(":")[0] for line in lines}
    if not (all(map(_HEADER_LINE.match, lines)) and {"From", "Subject"} <= names):
        return post
    lines = body.strip().split("\n")
    gaps = [number for number, line in enumerate(lines) if not line.strip().strip("-")]
    if gaps and gaps[-1] > 0:
        body = "\n".join(lines[: gaps[-1]])
    return "\n".join(line for line in body.split("\n") if not _QUOTED.search(line))


Probabilities = Literal["labels", "vocabulary"]
CLEANINGS: dict[Cleaning, Callable[[str], str]] = {"newsgroup": newsgroup}


class Protocol(StrictTable):
    """Hold the changes of a named protocol; omitted keys are those of the task."""

    prompt: str | None = None
    shorten: Mapping[str, ShortenSide] | None = None
    verbalizer: Literal["letters", "words"] | Mapping[str, tuple[str, ...]] | None = None
    bare: bool | None = None
    normalize: Probabilities | tuple[AnswerRule, ...] | None = None
    probabilities: Probabilities | None = None


class TaskTable(StrictTable):
    """Say what a task is called, and where its rows are."""

    name: str
    description: str = ""
    licence: str = ""
    data: Name | None = None
    hub: Name | None = None
    subset: str | None = None
    folder: str | None = None
    split: str = "test"
    revision: str | None = None
    csv: CsvDialect | None = None
    encoding: Encoding | None = None

    def location(self, data: str | Path | None = None) -> Location:
        """Return where the rows are: `data`, or the task's place; raise `InputError` if nowhere."""
        path = str(data) if data is not None else self.data
        if path is None and self.hub is None:
            raise InputError(
                f"task {self.name}: has neither data nor hub; give the file of its rows (--data)"
            )
        hub = {name: getattr(self, name) for name in ("hub", "subset", "folder", "revision")}
        place = hub if path is None else {"path": path}
        csv = None if self.csv is None else self.csv.to_dict()
        values = {**place, "split": self.split, "csv": csv, "encoding": self.encoding}
        return decode(Location, values, where=f"task {self.name}")


class Task(TaskTable):
    """Describe a labelled table and its prompt, with options per row or labels for all.

    `data` (a file, relative to the task file) or `hub` says where the rows are. `clean` names a
    cleaning of a field (`CLEANINGS`); rows left blank are dropped and counted. `metric` is the
    figure that the task is usually compared by. A classification head reads `head_prompt` instead
    of the prompt.

    A task has either `options` (the column of each row's list, or one column per option) or
    `labels`: a list, with names or indices in `answer`, or a table from the column's value to the
    label's name. For `options` the answer is an index, a letter, or a name in `option_names`.

    `normalize`, `drop_labels`, `blank`, `csv` and `encoding` mean what they mean in a source of
    training data. With `ordered` the labels are levels from low to high. `probabilities` says over
    what they sum to 1; `normalize` may hold its value instead of rules.
    `anchor` names the token before `[MASK]` ("none": no token; default: that of the tokenizer).

    With `scorer = "pll"` nothing is prompted: the options of a row are texts, put in the place of
    `{option}` in `prompt`, and ranked by their pseudo-log-likelihood. `method` and `average` say
    how. Without `answer` the first option is the right one; row i then has its options rotated by i
    places, so that none is always right.
    """

    prompt: str
    scorer: Literal["slot", "pll"] = "slot"
    method: Literal["word_l2r", "original", "unmasked"] = "word_l2r"
    average: Literal["total", "token", "word"] = "total"
    anchor: Name | None = None
    shorten: Mapping[str, ShortenSide] = {}
    head_prompt: str | None = None
    columns: Mapping[str, Column] = {}
    clean: Mapping[str, Cleaning] = {}
    strip: tuple[str, ...] = ()
    options: str | Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    option_names: str | None = None
    answer: Column | None = None
    labels: tuple[str, ...] | Mapping[str, str] | None = None
    drop_labels: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()
    group: Column | None = None
    verbalizer: Literal["letters", "words"] | Mapping[str, tuple[str, ...]] = "letters"
    bare: bool = False
    normalize: Probabilities | tuple[AnswerRule, ...] = "labels"
    probabilities: Probabilities | None = None
    metric: Literal["accuracy", "macro_f1", "mcc"] = "accuracy"
    ordered: bool = False
    protocols: Mapping[str, Protocol] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "Task":
        if self.answer is None and (self.scorer == "slot" or self.options is None):
            raise ValueError("answer is missing; give the column of the right answer")
        if (self.options is None) == (self.labels is None):
            raise ValueError(
                "give exactly one of options (the column of the row's own) and labels (for all)"
            )
        if self.labels is not None and len(self.label_names) < 2:
            raise ValueError("labels needs at least two distinct labels")
        if isinstance(self.labels, tuple) and len(self.label_names) < len(self.labels):
            raise ValueError("labels repeats a label, so an index would be ambiguous")
        if self.ordered and self.labels is None:
            raise ValueError("ordered is for labels; options of each row have no order")
        if any(not name.strip() for name in self.label_names):
            raise ValueError("labels holds a blank label")
        if (pair := find_twins(self.label_names)) is not None:
            raise ValueError(f"labels: {describe_twins(*pair)}; expected distinct names")
        for verbalizer in (self.verbalizer, *(p.verbalizer for p in self.protocols.values())):
            if self.options is not None and verbalizer not in ("letters", None):
                raise ValueError("a task with options is answered by letters")
            if isinstance(verbalizer, Mapping) and set(verbalizer) != set(self.label_names):
                raise ValueError(
                    f"verbalizer names {', '.join(verbalizer)}; "
                    f"expected the labels {', '.join(self.label_names)}"
                )
        tables: tuple[Task | Protocol, ...] = (self, *self.protocols.values())
        for table in tables:
            _check_normalize(table.normalize, table.probabilities)
        self._check_prompts()
        return self

    def _check_prompts(self) -> None:
        """Check that every prompt reads the row, and every column has a field."""
        if self.scorer == "pll":
            self._check_text()
            return
        fields: set[str] = set()
        for protocol in (Protocol(), *self.protocols.values()):
            prompt = self.prompt if protocol.prompt is None else protocol.prompt
            shorten = self.shorten if protocol.shorten is None else protocol.shorten
            named = set(Template(prompt, shorten=dict(shorten), anchor=self.anchor).fields)
            own = named - {"options"}
            if not own and self.options is None:
                raise ValueError("prompt names no field of the row, such as {text}")
            verbalizer = protocol.verbalizer or self.verbalizer
            if verbalizer == "letters" and "options" not in named:
                self._check_spelled_out(prompt, own)
            fields |= own
        read = set(Template(self.head_prompt, slot=False).fields) if self.head_prompt else fields
        if not read - {"options"} and self.options is None:
            raise ValueError("head_prompt names no field of the row, such as {text}")
        fields |= read
        for name in (*self.columns, *self.clean, *self.strip, *self.blank):
            if name not in fields or (name == "options" and name in self.blank):
                known = ", ".join(sorted(fields)) or "none"
                raise ValueError(f"{name!r} is not a field of the prompt; its fields: {known}")

    def _check_text(self) -> None:
        """Check that the texts to rank hold the option, and nothing is set that prompts need."""
        fields = set(self.template().fields)
        if OPTION not in fields or "options" in fields:
            raise ValueError('with scorer = "pll" the prompt has {option}, and no {options}')
        for name in ("head_prompt", "anchor", "shorten", "protocols", "ordered"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'{name} is for prompts; leave it out with scorer = "pll"')
        for name in (*self.columns, *self.clean, *self.strip, *self.blank):
            if name not in fields - {OPTION}:
                known = ", ".join(sorted(fields - {OPTION})) or "none"
                raise ValueError(f"{name!r} is not a field of the prompt; its fields: {known}")

    def _check_spelled_out(self, prompt: str, fields: set[str]) -> None:
        """Check that a prompt without {options} that is answered by letters shows every option."""
        if self.labels is not None:
            literal = re.sub(r"\{[^{}]*\}", "", prompt)
            shown = all(name in literal for name in self.label_names)
        else:
            columns = {self.columns.get(field, field) for field in fields}
            shown = isinstance(self.options, tuple) and columns.issuperset(self.options)
        if not shown:
            raise ValueError(
                "the prompt has no {options}, so it does not say what each letter means; write "
                '{options}, spell every option out, or set verbalizer = "words"'
            )

    @property
    def label_names(self) -> tuple[str, ...]:
        """Return the distinct labels in order; empty for a task with options per row."""
        names = self.labels.values() if isinstance(self.labels, Mapping) else self.labels or ()
        return tuple(dict.fromkeys(names))

    @property
    def rules(self) -> tuple[AnswerRule, ...]:
        """Return the rules that rewrite answers before they are looked up."""
        return () if isinstance(self.normalize, str) else self.normalize

    @property
    def scored_over(self) -> Probabilities:
        """Return over what the probabilities of the labels sum to 1."""
        if self.probabilities is not None:
            return self.probabilities
        return self.normalize if isinstance(self.normalize, str) else "labels"

    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the fields of the prompt except options; None if cleaning leaves one blank."""
        row: dict[str, Any] = {}
        for field in self._row_fields():
            column = self.columns.get(field, field)
            if field in self.blank and is_missing(look_up_or_none(record, column)):
                row[field] = ""
                continue
            try:
                value = look_up(record, column, f"columns.{field}")
            except MissingColumnError as error:
                advice = f'or set blank = ["{field}"] if it may be absent'
                raise MissingColumnError(f"{error.message}, {advice}") from error
            if field in self.clean:
                check_text(value, f"field {field!r}")
                value = CLEANINGS[self.clean[field]](value)
                if not value.strip():
                    return None
            row[field] = value.strip() if field in self.strip and isinstance(value, str) else value
        return row

    def options_of(self, record: Mapping[str, Any]) -> list[Any]:
        """Return the options of a row, or the labels."""
        return list(self.label_names) if self.options is None else option_list(self.options, record)

    def under(self, protocol: str) -> "Task":
        """Return the task under a named protocol; raise `InputError` for an unknown name."""
        if protocol == "default":
            return self
        if protocol not in self.protocols:
            known = ", ".join(["default", *self.protocols])
            raise InputError(f"task {self.name}: has no protocol {protocol!r}; it has {known}")
        update = self.protocols[protocol].model_dump(exclude_none=True)
        if isinstance(update.get("normalize"), str):  # It says nothing about rules for answers.
            update["probabilities"] = update.pop("normalize")
        return self.model_copy(update=update)

    def for_head(self) -> "Task":
        """Return the task with the prompt that a classification head reads.

        It is `head_prompt`, or each field of the prompt except options on a line. `shorten` keeps
        the fields of that prompt.
        """
        if self.scorer == "pll":
            raise InputError(
                f"task {self.name}: ranks texts by their likelihood, which a classification head "
                "does not give; use a masked language model"
            )
        prompt = self.head_prompt
        if prompt is None:
            prompt = "\n".join(f"{{{name}}}" for name in self._row_fields())
        fields = Template(prompt, slot=False).fields
        shorten = {name: side for name, side in self.shorten.items() if name in fields}
        return self.model_copy(update={"prompt": prompt, "shorten": shorten})

    def head_template(self) -> Template:
        """Return the template of a task made by `for_head`."""
        return Template(self.prompt, shorten=dict(self.shorten), slot=False)

    def _row_fields(self) -> list[str]:
        own = OPTION if self.scorer == "pll" else "options"
        return [name for name in _fields(self.prompt, self.scorer == "slot") if name != own]

    def template(self) -> Template:
        """Return the template of the prompt, or of the texts to rank."""
        if self.scorer == "pll":
            return Template(self.prompt, slot=False)
        return Template(self.prompt, shorten=dict(self.shorten), anchor=self.anchor)

    def verbalizer_for(self, label_count: int, tokenizer: Tokenizer | None = None) -> Verbalizer:
        """Return the verbalizer of the first `label_count` labels (or options) in a tokenizer."""
        labels = (self.label_names or option_names(label_count))[:label_count]
        if self.verbalizer == "letters":
            return Verbalizer.letters(labels, bare=self.bare, tokenizer=tokenizer)
        if self.verbalizer == "words":
            return Verbalizer.words(labels, bare=self.bare, tokenizer=tokenizer)
        assert isinstance(self.verbalizer, Mapping)
        return Verbalizer({name: list(self.verbalizer[name]) for name in labels})


def _check_normalize(normalize: Any, probabilities: str | None) -> None:
    if isinstance(normalize, str) and probabilities not in (None, normalize):
        raise ValueError(
            f"normalize is {normalize!r} and probabilities {probabilities!r}; give one of them, or "
            "a list of rules as normalize"
        )


@lru_cache(maxsize=32)
def _fields(prompt: str, slot: bool) -> tuple[str, ...]:
    # Whether there is an anchor changes no field.
    return Template(prompt, slot=slot, anchor=NO_ANCHOR).fields


def option_list(options: str | tuple[str, ...], record: Mapping[str, Any]) -> list[Any]:
    """Return the values of a row in a column of lists, or in several columns."""
    if isinstance(options, tuple):
        return [look_up(record, column, "options") for column in options]
    values = look_up(record, options, "options")
    is_list = isinstance(values, list | tuple) or getattr(values, "ndim", 0) == 1  # numpy's, too
    if not is_list or len(values) < 2:
        raise InputError(f"column {options!r} is {values!r:.60}; expected a list of two or more")
    return list(values)


def load_task(name_or_path: str | Path, others: Sequence[str] = ()) -> Task:
    """Read a shipped task by its name, or a task file.

    A `data` file is relative to the task file. Raises `InputError` for an unknown name (with the
    nearest one, also of the `others` that would do), and for every wrong key and value of the file.
    """
    path = find_file("task", name_or_path, others)
    values = read_toml(path)
    if isinstance(values.get("data"), Mapping):
        raise InputError(
            f"{path}: is a run file, as `mlmjax train` reads it; give a task file, or the name of "
            "a shipped task"
        )
    task = decode(Task, values, where=str(path))
    if task.data is not None:
        task = task.model_copy(update={"data": str(path.parent / task.data)})
    return task
