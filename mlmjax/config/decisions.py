"""Read tasks of several questions per row strictly from TOML."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlmjax.config.columns import Column
from mlmjax.config.data import Name
from mlmjax.config.tables import StrictTable, decode, find_file, read_toml, shipped_names
from mlmjax.config.task import TaskTable

Value = str | int | bool


class TaskQuestion(StrictTable):
    """Ask one question about each row, and say where its right answer is.

    `criteria` is a table of options for a choice, a list of levels for a score, and a table of
    `true`, `false` or both for yes or no (`noul`); an empty text says nothing of an option.
    `answer` is the column of the right answer, `values` maps what stands there to the answer: the
    name of an option, the number of a level, or true and false. A row without a value has no answer
    to this question.
    """

    id: Name
    type: Literal["choice", "noul", "score"]
    instructions: str = ""
    criteria: Mapping[str, str] | tuple[str, ...] | None = None
    answer: Column
    values: Mapping[str, Value] | None = None


class DecisionTask(TaskTable):
    """Describe a table with several questions about each row.

    `data` (a file, relative to the task file) or `hub` says where the rows are. `state` is the
    column of the text that is asked about, or a table from keys to columns.
    """

    state: Column | Mapping[str, Column]
    questions: Annotated[tuple[TaskQuestion, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> "DecisionTask":
        names = [question.id for question in self.questions]
        if len(set(names)) < len(names):
            raise ValueError("questions: two have the same id; give each its own")
        return self


def find_decision_task(name_or_path: str | Path) -> DecisionTask | None:
    """Read a task of several questions; None for the name or file of any other task.

    Raises `InputError` for every wrong key and value of the file.
    """
    name = str(name_or_path)
    if name in shipped_names("decision"):
        path = find_file("decision", name)
    elif Path(name).suffix == ".toml" and Path(name).is_file():
        path = Path(name)
    else:
        return None
    values = read_toml(path)
    if "questions" not in values:
        return None
    task = decode(DecisionTask, values, where=str(path))
    if task.data is not None:
        task = task.model_copy(update={"data": str(path.parent / task.data)})
    return task
