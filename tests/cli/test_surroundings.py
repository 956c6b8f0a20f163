"""What surrounds a command: pipes, terminals of few characters, devices that are not there."""

import io
import json
import os
import subprocess
import sys
import threading

import pytest

from mlmjax.cli.main import run
from mlmjax.errors import InputError
from mlmjax.reporting import terminal

LABELS = ["größe", "日本"]
TASK = """
name = "täsk 日本"
data = "rows.jsonl"
prompt = "{text} {options}[unused0] [MASK]"
answer = "label"
labels = ["größe", "日本"]
"""
RUN = """
out = "rün"
epochs = 1
init_from = "model"
[data]
rows = "röws"
seq_length = 64
batch_size = 8
[[data.sources]]
path = "rows.jsonl"
prompt = "{text} {options}[unused0] [MASK]"
answer = "label"
labels = ["größe", "日本"]
"""


@pytest.fixture
def folder(word_folder, tmp_path, monkeypatch):
    """A working directory with a model, a table, a task and a run file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(word_folder)
    rows = [{"text": f"the goal {n}", "label": LABELS[n % 2]} for n in range(24)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "texts.txt").write_text("the goal é\nthe bank\n", encoding="utf-8")
    (tmp_path / "täsk.toml").write_text(TASK, encoding="utf-8")
    (tmp_path / "run.toml").write_text(RUN, encoding="utf-8")
    return tmp_path


COMMANDS = {
    "fit": ["fit", "rows.jsonl", "--model", "model", "--epochs", "1", "--out", "klässe"],
    "classify": ["classify", "--model", "model", "--labels", "größe,日本", "--echo", "texts.txt"],
    "evaluate": ["evaluate", "--model", "model", "--task", "täsk.toml", "--order-rows", "0"],
    "train": ["train", "run.toml"],
}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("name", ["classify", "evaluate"])
def test_names_in_any_script_reach_any_terminal(folder, monkeypatch, name, encoding):
    shown = {}
    for stream in ("stdout", "stderr"):
        shown[stream] = io.BytesIO()
        wrapped = io.TextIOWrapper(shown[stream], encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, stream, wrapped)
    arguments = [*COMMANDS[name], *(["--json"] if name == "evaluate" else [])]
    code = run(arguments)
    out, err = (
        shown[stream].getvalue().decode("latin-1" if encoding == "latin-1" else "utf-8")
        for stream in ("stdout", "stderr")
    )
    assert code == 0, err
    assert ("größe" if name == "classify" else "täsk") in out
    lines = out.splitlines() if name == "classify" else [out]
    for line in map(json.loads, lines):  # escaped as JSON does it
        assert line.get("probabilities", {}).keys() in ({*LABELS}, set())
        assert line.get("task", "täsk 日本") == "täsk 日本"


def test_an_ascii_locale_is_replaced_by_utf8(tmp_path):
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    (tmp_path / "größe").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "mlmjax", "compare", "größe", "日本"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    first = done.stderr.decode().splitlines()[0]
    assert first.startswith("mlmjax: größe: has no file"), first


@pytest.mark.parametrize(
    ("arguments", "pipe"),
    [
        (["fit", "pipe.csv", "--model", "model"], "pipe.csv"),
        (["classify", "--model", "model", "--text", "text", "pipe.jsonl"], "pipe.jsonl"),
        ([*COMMANDS["evaluate"], "--data", "pipe.jsonl"], "pipe.jsonl"),
        (["prepare", "run.toml", "data.sources.0.path=pipe.jsonl"], "pipe.jsonl"),
        (["train", "run.toml", "data.sources.0.path=*.jsonl"], "pipe.jsonl"),
    ],
)
def test_a_pipe_that_would_be_read_twice_is_refused(folder, capsys, arguments, pipe):
    os.mkfifo(folder / pipe)
    if "*.jsonl" in arguments[-1]:
        (folder / "rows.jsonl").unlink()
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    message = f"{pipe}: is a pipe or a device; expected a file, because it is read more than once"
    assert message in err
    assert not (folder / "röws").exists()


@pytest.mark.parametrize(
    ("content", "arguments"),
    [
        ("the goal\nthe bank\n", ["classify", "--model", "model", "--labels", "a,b", "pipe"]),
        ("größe\n日本\n", ["classify", "--model", "model", "--labels", "pipe", "texts.txt"]),
        (TASK, ["evaluate", "--model", "model", "--task", "pipe"]),
        (RUN, ["prepare", "pipe"]),
    ],
)
def test_a_pipe_is_read_once(folder, capsys, monkeypatch, content, arguments):
    monkeypatch.setattr(terminal, "PATIENCE_SECONDS", 0.01)
    os.mkfifo(folder / "pipe")

    def write():
        with open(folder / "pipe", "w", encoding="utf-8") as file:
            file.write(content)

    writer = threading.Timer(0.2, write)
    writer.start()
    assert run(arguments) == 0, capsys.readouterr().err
    writer.join()
    out, err = capsys.readouterr()
    assert out
    assert arguments[0] != "classify" or "waiting for pipe" in err


HOMES = {
    "fit": "mlmjax.cli.tables.fit",
    "classify": "mlmjax.cli.tables.classify",
    "evaluate": "mlmjax.parallel.environment",
    "train": "mlmjax.training.run.train",
}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_devices_are_checked_before_long_work(folder, monkeypatch, capsys, name):
    def check():
        raise InputError("JAX_PLATFORMS: found 'nonsense'")

    __import__(HOMES[name])
    monkeypatch.setattr(f"{HOMES[name]}.check_devices", check)
    (folder / "rows.jsonl").unlink()  # would be the error of the work
    before = sorted(folder.iterdir())
    assert run(COMMANDS[name]) == 2
    assert "mlmjax: JAX_PLATFORMS: found 'nonsense'" in capsys.readouterr().err.splitlines()
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("closed", [pytest.param(2, marks=pytest.mark.long), 1])
def test_a_closed_stream_mixes_no_output_and_loses_no_answers(folder, closed):
    command = [sys.executable, "-m", "mlmjax", *COMMANDS["classify"]]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command],
        capture_output=True,
        encoding="utf-8",
    )
    if closed == 2:
        assert done.returncode == 0
        assert [json.loads(line)["line"] for line in done.stdout.splitlines()] == [1, 2]
    else:
        assert done.returncode == 2
        assert "standard output: is closed; give --out FILE" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a full device")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        pytest.param(["init", "fit"], marks=pytest.mark.long),
        pytest.param(COMMANDS["classify"], marks=pytest.mark.long),
    ],
)
def test_output_that_cannot_be_written_fails_in_one_line(folder, arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mlmjax", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    last = "mlmjax: [Errno 28] No space left on device; free some space and run the same command"
    assert done.stderr.splitlines()[-1].startswith(last)
    assert done.stderr.count("mlmjax:") == 1


def test_a_model_without_a_name_is_not_the_packaged_one(folder, capsys):
    assert run(["classify", "--model", "", "--labels", "a,b", "texts.txt"]) == 2
    assert "the model's name is empty" in capsys.readouterr().err
