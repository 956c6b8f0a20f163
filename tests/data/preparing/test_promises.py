"""What prepare promises: tasks are found and said, exclusion is honest, and most examples train."""

import json

import pytest
from row_files import change_source, two_sources, write_table

from mlmjax import InputError
from mlmjax.config.data import DataConfig, SourceConfig
from mlmjax.data.contamination import training_manifest
from mlmjax.data.manifest import read_manifest
from mlmjax.data.preparing.prepare import prepare, summary
from mlmjax.data.preparing.report import write_rows_report


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """Prepare a table of records; return its manifest."""

    def make(rows, *, validation_rows=0, exclude=None, **source):
        path = write_table(tmp_path / "my.jsonl", rows)
        settings = {"path": path, "prompt": "{input}", "answer": "answer", "name": "mine"} | source
        config = DataConfig(
            rows=str(tmp_path / f"rows{len(list(tmp_path.iterdir()))}"),
            seq_length=64,
            pack=False,
            validation_rows=validation_rows,
            sources=(SourceConfig(**settings),),
            exclude=exclude or {},
        )
        return read_manifest(prepare(config, tokenizer))

    return make


def records(count, **more):
    return [
        {"input": f"Is {i} even?", "answer": ("yes", "no")[i % 2]}
        | {key: values[i % len(values)] for key, values in more.items()}
        for i in range(count)
    ]


@pytest.mark.parametrize("column", ["task", "_task_name", "task_name", "Task", "TASK_NAME"])
def test_the_column_of_tasks_is_found_and_said(prepared, column):
    rows = records(12, **{column: ["glue/sst2", "math", "cola"]})
    found = prepared(rows, exclude={"tasks": ("*sst2*", "cola")})
    (source,) = found.sources
    assert source.dropped == {"task excluded by '*sst2*'": 4, "task excluded by 'cola'": 4}
    assert (source.task_columns, source.unnamed) == ({column: 12}, 0)
    assert found.tasks == ["math"]
    assert f"mine: tasks are named by the column {column!r}" in summary(found)


def test_a_column_that_the_prompt_uses_is_no_task(prepared):
    rows = records(6, task=["Say whether it is even."], task_name=["math"])
    assert prepared(rows, prompt="{task} {input}").tasks == ["math"]
    other = prepared(rows, prompt="{what} {input}", columns={"what": "task"}, answer="answer")
    assert other.tasks == ["math"]
    assert prepared(rows, task="answer").tasks == ["yes", "no"]


def test_exclusion_by_name_says_where_nothing_names_a_task(prepared, tokenizer, tmp_path):
    found = prepared(records(10), exclude={"tasks": ("*sst2*",)})
    said = "mine: data.exclude.tasks: no record names its task, so nothing could be excluded by"
    (line,) = [line for line in summary(found) if line.startswith(said)]
    assert "to the column of the task (columns: input, answer), or" in line
    assert found.sources[0].unnamed == 10
    page = write_rows_report(next(tmp_path.glob("rows*")), tokenizer)
    assert "no record names its task" in page.read_text()
    (run,) = training_manifest(None, found, None).runs
    assert (run.sources[0].unnamed, run.sources[0].records) == (10, 10)
    some = prepared([*records(4, task=["math"]), *records(6)], exclude={"tasks": ("*sst2*",)})
    assert any("6 of 10 records name no task" in line for line in summary(some))
    assert not any("data.exclude" in line for line in summary(prepared(records(10))))


@pytest.mark.parametrize(("column", "source"), [("task", {}), ("Task", {}), ("n", {"task": "n"})])
@pytest.mark.parametrize("numbers", [[1, 2], ["1", "2.0"]])
def test_numbers_are_no_names_of_tasks(prepared, column, source, numbers):
    found = prepared(records(10, **{column: numbers}), exclude={"tasks": ("*sst2*",)}, **source)
    assert found.sources[0].unnamed == 10
    assert found.tasks == ([str(number) for number in numbers] if source else ["mine"])
    lines = summary(found)
    assert f"mine: the column {column!r} holds numbers, which are no names of tasks" in lines
    assert any("so nothing could be excluded by name from it" in line for line in lines)
    if source:  # an explicit pattern of numbers still works
        some = prepared(records(10, n=numbers), exclude={"tasks": (str(numbers[0]),)}, **source)
        assert (some.tasks, some.sources[0].unnamed) == ([str(numbers[1])], 5)


def test_a_share_of_the_examples_is_held_out(prepared, caplog):
    found = prepared(records(200), validation_rows=0.1)
    (file,) = found.splits["validation"]
    assert 20 <= file.examples <= 22
    assert not caplog.records
    assert json.loads(found.model_dump_json())["config"]["data"]["validation_rows"] == 0.1


@pytest.mark.parametrize("held_out", [80, 0.4])
def test_more_than_a_third_held_out_is_a_warning(prepared, caplog, held_out):
    prepared(records(200), validation_rows=held_out)
    (line,) = [one.getMessage() for one in caplog.records]
    assert line.startswith(f"data.validation_rows = {held_out}: holds out 8")
    assert "more than a third does not train; lower it, for example to a share" in line


@pytest.mark.parametrize("held_out", [110, 0.6])
def test_more_than_half_held_out_is_an_error(prepared, held_out):
    with pytest.raises(InputError, match=r"of 200 examples; expected at most half.* = 0\.1"):
        prepared(records(200), validation_rows=held_out)


@pytest.mark.parametrize("share", [1.0, -0.1, 1.5])
def test_a_share_is_below_one(share):
    with pytest.raises(ValueError, match="validation_rows"):
        DataConfig(rows="rows", validation_rows=share)


def test_blank_fields_are_counted_in_the_manifest(tmp_path, tokenizer):
    config = two_sources(tmp_path)
    rows = [{"q": f"Is {i} even?", "answer": "yes"} for i in range(20)]
    rows += [{"q": f"Is {i} odd?", "answer": "yes", "input": None} for i in range(9)]
    rows += [{"q": f"Is {i} big?", "answer": "yes", "input": "It is."} for i in range(90)]
    path = write_table(tmp_path / "optional.jsonl", rows)
    keys = {"path": path, "prompt": "{q} {input}", "task": None, "blank": ("input",)}
    manifest = read_manifest(prepare(change_source(config, **keys), tokenizer))
    assert manifest.sources[0].blanked == {"input": 29}
    assert any("29 blank in 'input'" in line for line in summary(manifest))
