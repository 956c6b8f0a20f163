"""Read a suite strictly from TOML: the tasks to evaluate, and how."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from mlmjax.config.data import Name, NonNegativeFloat, OpenShare, PositiveFloat, PositiveInt
from mlmjax.config.run import Head
from mlmjax.config.tables import StrictTable, decode, find_file, override, read_toml
from mlmjax.config.task import Task, load_task
from mlmjax.errors import InputError, suggest_name

ORDER_ROWS, SHIFTS = 200, 4
HEADS: tuple[Head, ...] = ("mlm", "classification")
Few = Annotated[int, Field(gt=0, le=1000)]


class Part(StrictTable):
    """Locate one split of a task: patterns of local files, and the hub.

    Omitted keys of the hub are those of the task; without `split` the hub does not have this part.
    """

    files: tuple[Name, ...] = ()
    hub: Name | None = None
    subset: str | None = None
    folder: Name | None = None
    split: Name | None = None
    revision: Name | None = None

    @model_validator(mode="after")
    def _inside(self) -> "Part":
        for pattern in self.files:
            if ".." in pattern or pattern.startswith(("/", "~")) or "\\" in pattern:
                raise ValueError(
                    f"files: {pattern!r} leads out of the data folder; write a pattern of names "
                    "in it, such as 'reviews*test*'"
                )
        if self.split is None and (self.hub or self.subset or self.folder or self.revision):
            raise ValueError("names a place on the hub without its split; give split as well")
        return self


class Entry(StrictTable):
    """Describe one task of a suite: prompted zero-shot, or fine-tuned on its training rows.

    `tables` are the tables of the paper that have it, and `published` its figures there in per
    cent by method: `zero-shot`, or `mlm` and `classification`.
    """

    task: Name
    kind: Literal["zero-shot", "fine-tune"]
    protocol: Name = "default"
    tables: tuple[PositiveInt, ...] = ()
    train: Part | None = None
    validation: Part | None = None
    test: Part = Part()
    published: Mapping[Literal["zero-shot", "mlm", "classification"], PositiveFloat] = {}

    @model_validator(mode="after")
    def _parts(self) -> "Entry":
        if self.kind == "fine-tune" and self.train is None:
            raise ValueError("a task that is fine-tuned needs train, the part it is trained on")
        if self.kind == "zero-shot" and (self.train or self.validation):
            raise ValueError("a zero-shot task reads no train and no validation; leave them out")
        return self


class Missing(StrictTable):
    """Name a task that belongs to a suite but cannot be run, and why."""

    task: Name
    reason: Name
    tables: tuple[PositiveInt, ...] = ()


class Sweep(StrictTable):
    """List the settings to try, and what all of them share.

    The defaults are those of arXiv 2502.03793, section 4. `held_out` is the share of the training
    rows used to choose a setting if a task has no validation rows.
    """

    epochs: Annotated[tuple[Few, ...], Field(min_length=1)] = (1, 2, 3)
    learning_rate: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (2e-5, 3e-5, 5e-5)
    weight_decay: NonNegativeFloat = 0.01
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    batch_size: Annotated[int, Field(gt=0, le=65536)] = 32
    max_length: Annotated[int, Field(gt=0, le=2**20)] = 512
    held_out: OpenShare = 0.1

    @model_validator(mode="after")
    def _distinct(self) -> "Sweep":
        for key in ("epochs", "learning_rate"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} repeats a value; list every setting once")
        return self


class Suite(StrictTable):
    """Hold what to evaluate: entries, the sweep, and the number of seeds.

    `limit` draws that many rows of every part; `tasks` keeps only the entries of these tasks.
    `anchor` names the token before `[MASK]` in the prompts of all tasks, in place of their own.
    `order_rows` of the test rows answered by letters are prompted again in other orders (0: none).
    """

    name: Name
    description: str = ""
    seeds: Few = 3
    limit: PositiveInt | None = None
    tasks: tuple[Name, ...] = ()
    heads: Annotated[tuple[Head, ...], Field(min_length=1)] = HEADS
    order_rows: Annotated[int, Field(ge=0)] = ORDER_ROWS
    anchor: Name | None = None
    sweep: Sweep = Sweep()
    entries: Annotated[tuple[Entry, ...], Field(min_length=1)]
    missing: tuple[Missing, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> "Suite":
        if len(set(self.heads)) < len(self.heads):
            raise ValueError("heads repeats a head; list each once")
        seen = [(entry.task, entry.kind, entry.protocol) for entry in self.entries]
        if twice := next((one for one in seen if seen.count(one) > 1), None):
            raise ValueError(f"entries: {' '.join(twice)} is listed twice")
        known = [entry.task for entry in self.entries] + [one.task for one in self.missing]
        for name in self.tasks:
            if name not in known:
                raise ValueError(
                    f"tasks: {name!r} is not an entry of the suite; {suggest_name(name, known)}"
                    f"it has {', '.join(dict.fromkeys(known))}"
                )
        return self

    def is_wanted(self, task: str) -> bool:
        """Tell whether to run the entries of a task."""
        return not self.tasks or task in self.tasks


class Planned(NamedTuple):
    """Hold an entry to run and its task."""

    entry: Entry
    task: Task


def load_suite(
    name_or_path: str | Path, overrides: Sequence[str] = ()
) -> tuple[Suite, list[Planned]]:
    """Read a shipped suite by its name, or a suite file, and apply `key=value` overrides.

    Task files are relative to the suite file. Raises `InputError` that lists everything wrong with
    the file and the overrides, or with a task.

    >>> suite, planned = load_suite("paper", ["sweep.epochs=[1]", 'tasks=["mmlu"]'])
    >>> suite.sweep.epochs, [task.name for _, task in planned]
    ((1,), ['mmlu'])
    """
    path = find_file("suite", name_or_path)
    table: dict[str, Any] = read_toml(path)
    for change in overrides:
        override(table, change)
    suite = decode(Suite, table, where=str(path))
    wanted = [entry for entry in suite.entries if suite.is_wanted(entry.task)]
    anchor = {} if suite.anchor is None else {"anchor": suite.anchor}
    tasks = [_task_of(entry, path).model_copy(update=anchor) for entry in wanted]
    return suite, [Planned(*pair) for pair in zip(wanted, tasks, strict=True)]


def _task_of(entry: Entry, suite: Path) -> Task:
    """Load the task of an entry; raise `InputError` if it cannot be fine-tuned."""
    is_file = entry.task.endswith(".toml")
    task = load_task(suite.parent / entry.task if is_file else entry.task).under(entry.protocol)
    if task.scorer == "pll":
        raise InputError(
            f"{suite}: {entry.task} ranks texts by their likelihood, and a suite prompts; use "
            "mlmjax evaluate --task for it"
        )
    if entry.kind == "fine-tune" and not task.label_names:
        raise InputError(
            f"{suite}: {entry.task} has other options in each row, which a classification head "
            'cannot learn; give kind = "zero-shot", or a task with labels'
        )
    return task
