"""Hostile and clumsy input through the command line: exit codes, first lines, nothing half done."""

import io
import json
import shutil
import sys

import pytest
from flax import nnx
from training import make_config, make_table

from mlmjax import ModelConfig, ModernBertForMaskedLM, Tokenizer, cli, save_pretrained

TASK = {
    "name": '"t"',
    "prompt": '"Q: {text}\\n{options}ANSWER: [unused0] [MASK]"',
    "labels": '["bad", "good"]',
    "answer": '"label"',
}
RECORD = {
    "text": "one",
    "label": "good",
    "number": 5,
    "nothing": None,
    "two": ["a", "b"],
    "one": ["a"],
    "index": 1,
}
CLEAN = {"labels": None, "options": '"two"', "answer": '"index"'}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with the inputs of a run, and `model`: a tiny network with random weights."""
    folder = tmp_path_factory.mktemp("inputs")
    make_config(folder)
    config = ModelConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=512,
    )
    model = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
    save_pretrained(model, Tokenizer.from_pretrained(), folder / "model")
    return folder


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command; return its exit code, what it wrote to stdout, and the lines it said."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = cli.run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert "internal error" not in err
        assert len(err.splitlines()) <= 22
        return code, out, err.splitlines()

    return run


@pytest.fixture
def evaluate(command, inputs, tmp_path):
    """Evaluate the tiny model on one record under a task with some keys changed."""

    def run(changes, *more):
        task, data = tmp_path / "task.toml", tmp_path / "data.jsonl"
        keys = {key: value for key, value in (TASK | changes).items() if value is not None}
        task.write_text("".join(f"{key} = {value}\n" for key, value in keys.items()))
        data.write_text(json.dumps(RECORD))
        model = inputs / "model"
        return command("evaluate", "--model", model, "--task", task, "--data", data, *more)

    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": '""'}, "prompt names no field of the row"),
        ({"prompt": '"{options}"'}, "prompt names no field of the row"),
        ({"prompt": '"{text"'}, "task.toml: top level: template: single '{'"),
        ({"labels": '["bad", "bad", "good"]'}, "labels holds a label twice"),
        ({"answer": "[]"}, "answer"),
        ({"answer": '"{label"'}, "unpaired braces"),
        ({"answer": '"{number}"'}, "data.jsonl line 1: column 'number': is int (5)"),
        ({"answer": '"{nothing}"'}, "data.jsonl line 1: column 'nothing': is NoneType"),
        ({"columns": '{text = "{}"}'}, "without a plain column name"),
        ({"columns": '{text = "{label!r}"}'}, "without a plain column name"),
        ({"columns": '{txet = "label"}'}, "'txet' is no field of the prompt; its fields: text"),
        ({"strip": '["txet"]'}, "'txet' is no field of the prompt"),
        ({"group": '"nothing"'}, "the row's group, is null"),
        ({**CLEAN, "options": '["text"]'}, "options"),
        ({**CLEAN, "option_names": '"number"'}, "column 'number' is 5; expected a list"),
        ({**CLEAN, "option_names": '"text"'}, "column 'text' is 'one'; expected a list"),
        ({**CLEAN, "option_names": '"one"'}, "expected a list of two or more"),
        ({"drop_labels": '["good"]'}, "data.jsonl: task t: no row is left to answer; 1 were"),
    ],
)
def test_mistakes_in_a_task_file(evaluate, changes, message):
    code, out, lines = evaluate(changes)
    assert (code, out) == (2, "")
    assert message in lines[0]


@pytest.mark.parametrize("out", ["file", "file/below", ""])
def test_no_folder_for_results_is_found_before_the_work(evaluate, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    code, printed, lines = evaluate({}, "--out", out)
    assert (code, printed) == (2, "")
    assert "folder for the results" in lines[0]
    assert (tmp_path / "file").read_text() == "precious"


def test_a_huge_limit_is_every_row(evaluate):
    code, out, _ = evaluate({}, "--limit", "9" * 30)
    assert code == 0
    assert json.loads(out)["n"] == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", "neither a file nor a comma-separated list"),
        (",", "label 1 is blank"),
        ("red,", "label 2 is blank"),
        ("red,,blue", "label 2 is blank"),
        ("red, red", "stands there twice"),
        ("absent.txt", "neither a file"),
        (",".join(map(str, range(5000))), "give at most"),
    ],
)
def test_label_lists(command, inputs, labels, message):
    code, out, lines = command("classify", "--model", inputs / "model", "--labels", labels)
    assert (code, out) == (2, "")
    assert message in lines[0]


def test_byte_order_marks_are_no_text(command, inputs, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_bytes(b"\xef\xbb\xbfred\r\nblue\r\n")
    arguments = ("classify", "--model", inputs / "model", "--labels", labels)
    marked, plain = (
        command(*arguments, stdin=mark + b"the sun\n") for mark in (b"\xef\xbb\xbf", b"")
    )
    assert marked == plain
    assert marked[0] == 0
    assert list(json.loads(marked[1])["probabilities"]) == ["red", "blue"]


def test_nothing_to_classify(command, inputs, tmp_path):
    arguments = ("classify", "--model", inputs / "model", "--labels", "red,blue")
    empty = tmp_path / "empty.txt"
    empty.touch()
    for file, name in (("-", "standard input"), (empty, str(empty))):
        code, out, lines = command(*arguments, file)
        assert (code, out) == (2, "")
        assert f"{name}: is empty" in lines[0]


def test_odd_texts_are_answered_one_line_each_and_cuts_are_told(command, inputs):
    texts = [
        "[MASK] [unused0] [SEP][CLS] [PAD]",
        "\x01\x02\x0b\x0c\x1c\x85\u2028 control",
        "a\x00b",
        "\U0001f600\u200d\U0001f469 \u202e",
        "\u200b",
        "sun " * 250_000,
    ]
    code, out, lines = command(
        *("classify", "--model", inputs / "model", "--labels", "[MASK],[unused0],\U0001f600"),
        stdin="\n".join(texts).encode(),
    )
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == len(texts)
    assert all(sum(a["probabilities"].values()) == pytest.approx(1.0) for a in answers)
    assert lines == ["1 of the texts did not fit the model; their ends were cut off"]


def _toml(table, prefix=""):
    plain, nested = "", ""
    for key, value in table.items():
        if isinstance(value, dict):
            nested += f"[{prefix}{key}]\n" + _toml(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            nested += "".join(f"[[{prefix}{key}]]\n{_toml(item)}" for item in value)
        else:
            plain += f"{key} = {json.dumps(value)}\n"
    return plain + nested


@pytest.fixture
def train(command, inputs, tmp_path):
    """Train by a configuration file with overrides; rows and run folder lie in `tmp_path`."""
    table = make_table(
        inputs,
        out=str(tmp_path / "out"),
        data__rows=str(tmp_path / "rows"),
        data__seq_length=32,
        data__validation_rows=0,
        model__num_hidden_layers=1,
        steps=1,
        schedule={"warmup": 0, "decay": 0},
    )
    path = tmp_path / "run.toml"
    path.write_text(_toml(table))
    return lambda *overrides: command("train", path, *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("out=", "out: is blank"),
        ("data.rows= ", "data.rows: is blank"),
        ("tokenizer=", "tokenizer: is blank"),
        ("data.sources.0.path=", "path: is blank"),
        (f"data.sources.0.limit={'9' * 30}", "data.sources.0.limit: found 9999"),
        (f"steps={'9' * 30}", "steps: found 9999"),
        ("data.sources.0.prompt=fixed", "prompt: names no column of the records"),
        ("schedule.warmup=100", "schedule: warmup 100"),
    ],
)
def test_mistakes_in_a_run_file(train, tmp_path, override, message):
    code, out, lines = train(override)
    assert (code, out) == (2, "")
    assert message in lines[0]
    assert not (tmp_path / "rows").exists()


def test_an_older_run_without_checkpoints_does_not_pass_for_this_one(train, tmp_path):
    assert train()[0] == 0
    weights = tmp_path / "out" / "export" / "model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    assert train("seed=1")[0] == 0
    assert weights.read_bytes() != before
