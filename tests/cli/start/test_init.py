"""Run files to begin from, and epochs in place of steps."""

import json
import shlex
import tomllib
from importlib.resources import files
from pathlib import Path

import jax
import pytest
from processes import write_config

from mlmjax.cli.main import run
from mlmjax.cli.start import machine as machines
from mlmjax.cli.start.init import make_run_file
from mlmjax.cli.start.machine import Machine, find_machine, machine_by_name
from mlmjax.config.run import load_config, parse_config
from mlmjax.errors import InputError
from mlmjax.training.planning import plan
from mlmjax.training.run.train import count_steps

ROOT = Path(__file__).parents[3]
LAPTOP = Machine("cpu", "cpu", 1, 8 * 2**30)
H200S = Machine("gpu", "NVIDIA H200", 8, 100 * 2**30)
RTX = Machine("gpu", "NVIDIA GeForce RTX 4090", 1, 18 * 2**30)


@pytest.mark.parametrize("kind", ["atp", "fit", "mlm"])
def test_a_written_run_file_has_comments_and_is_read_again(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machines, "find_machine", lambda: LAPTOP)
    assert run(["init", kind, "mine"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("mine.toml: mlmjax-small, float32, ")
    assert " tokens in 1 part, remat " in out
    assert out.endswith("mlmjax train mine.toml\n")
    assert "8 GiB of memory for a run" in err
    text = (tmp_path / "mine.toml").read_text()
    config = load_config("mine.toml")
    assert (config.out, config.data.rows) == ("runs/mine", "rows/mine")
    assert config.epochs == (3 if kind == "fit" else 1)
    assert "# yours" in text.replace("yours:", "yours")
    assert "8 GiB of memory" in text
    assert max(map(len, text.splitlines())) <= 100
    (source,) = config.data.sources
    assert (source.text is not None) == (kind == "mlm")
    assert run(["init", kind, "mine.toml"]) == 2
    assert "mine.toml: exists already" in capsys.readouterr().err
    assert (tmp_path / "mine.toml").read_text() == text


def test_sizes_are_those_of_the_machine():
    def found(kind, machine):
        config = make_run_file(kind, "x", machine)[1]
        return config.dtype, config.init_from, config.remat, config.data.accumulate

    assert found("fit", LAPTOP) == ("float32", "mlmjax-small", "none", 1)
    large = "answerdotai/ModernBERT-large"
    assert found("fit", H200S)[:3] == ("bfloat16", large, "none")
    many, few = found("atp", H200S), found("atp", RTX)
    assert few[1] == large
    assert few[3] > many[3]
    text, config = make_run_file("atp", "x", Machine("gpu", "g", 6, 1e11))
    assert config.data.batch_size % 6 == 0
    assert "*mmlu*" in config.data.exclude.tasks
    assert tomllib.loads(text)["epochs"] == 1


@pytest.mark.parametrize("name", ["v5e-16", "h200:8", "rtx4090", "l4"])
def test_a_run_file_for_a_machine_by_its_name_fits_there(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machines, "find_machine", None)  # JAX is not asked for devices
    monkeypatch.setattr(plan, "may_have_gpus", lambda: False)
    monkeypatch.setattr(plan, "has_tpu_compiler", lambda: False)
    assert run(["init", "mlm", "mine", "--machine", name]) == 0
    out, err = capsys.readouterr()
    machine = machine_by_name(name)
    assert err.startswith(f"writing for {machine.described}\n")
    written = f"init mlm --machine {machine.name}` for this machine:\n# {machine.described}.\n"
    assert written in Path("mine.toml").read_text()
    assert ", bfloat16, " in out
    (line,) = [line for line in err.splitlines() if line.startswith("to check it: mlmjax plan ")]
    file, _, topology = shlex.split(line)[5:]
    found = plan.make_plan(load_config(file), topology)
    assert found["training"]["fits"]
    assert found["training"]["rows"] % machine.devices == 0


def test_a_machine_that_cannot_be_written_for_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, says in (("h2000:8", "did you mean 'h200:8'?"), ("cpu:8", "is only simulated")):
        assert run(["init", "mlm", "--machine", name]) == 2
        err = capsys.readouterr().err
        assert f"machine {name!r}: " in err
        assert says in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no/such/name", "no/such: there is no such folder"),
        ("a\nb", "is not a name for a run"),
        ("", None),
    ],
)
def test_a_name_that_cannot_be_used(tmp_path, monkeypatch, capsys, name, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machines, "find_machine", lambda: LAPTOP)
    assert run(["init", "mlm", name]) == (2 if says else 0)
    assert (says or "") in capsys.readouterr().err
    assert run(["init", "other"]) == 2
    assert "'atp', 'fit', 'mlm'" in capsys.readouterr().err


def test_a_name_with_quotes_stays_a_name():
    _, config = make_run_file("mlm", 'my "best" run', LAPTOP)
    assert config.out == 'runs/my "best" run'


def test_this_machine_is_found(monkeypatch):
    here = find_machine()
    assert here.platform == "cpu"
    assert 2**28 < here.memory < 2**50

    class Device:
        platform, device_kind = "gpu", "NVIDIA H200"

        def memory_stats(self):
            return {"bytes_limit": 105 * 2**30}

    monkeypatch.setattr(jax, "devices", lambda: [Device()] * 8)
    assert find_machine().described == "8 x NVIDIA H200, 105 GiB of memory for a run on each"


class OddOs:
    """An operating system that says nothing of its memory, with a number of cores."""

    def __init__(self, cores):
        self.process_cpu_count = self.cpu_count = lambda: cores


@pytest.mark.parametrize(
    ("system", "limits", "says"),
    [
        (OddOs(None), [], "1 processor core, no accelerator, 2 GiB"),
        (OddOs(1), ["max\n"], "1 processor core, no accelerator, 2 GiB"),
        (OddOs(2), ["3221225472\n"], "2 processor cores, no accelerator, 1.5 GiB"),
        (OddOs(2), ["", str(2**33), str(2**62)], "2 processor cores, no accelerator, 4 GiB"),
    ],
)
def test_odd_machines_are_found(tmp_path, monkeypatch, system, limits, says):
    paths = [tmp_path / str(number) for number in range(len(limits))]
    for path, text in zip(paths, limits, strict=True):
        path.write_text(text)
    monkeypatch.setattr(machines, "os", system)
    monkeypatch.setattr(machines, "CONTAINER_LIMITS", [tmp_path / "absent", *paths])
    assert find_machine().described == f"{says} of memory for a run"


def test_a_machine_with_little_memory_gets_a_run_file():
    text, config = make_run_file("atp", "x", Machine("cpu", "cpu", 1, 0.3 * 2**30))
    assert config.remat == "layer"
    assert config.data.accumulate == 8
    assert "0.3 GiB of memory" in text


def test_configurations_tasks_and_examples_are_part_of_the_package():
    assets = files("mlmjax") / "assets"
    for folder in ("configs", "examples"):
        here = sorted(p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*.toml"))
        assert here
        for path in here:
            packaged = assets / folder / str(path)
            assert packaged.read_bytes() == (ROOT / folder / path).read_bytes()
    for path in (ROOT / "configs").glob("*.toml"):
        load_config(str(assets / "configs" / path.name))


START = {"out": "x", "init_from": "mlmjax-small", "data": {"rows": "r"}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "steps: is missing, and so is epochs; give either steps"),
        ({"steps": 5, "epochs": 2}, "both steps and epochs; give either"),
        ({"epochs": 0}, "epochs: found 0"),
        ({"epochs": "3"}, "epochs: found '3'"),
        ({"epochs": 2, "data": {"rows": "r", "batch_start": 4}}, "epochs cannot be counted while"),
    ],
)
def test_a_run_has_steps_or_epochs(changes, says):
    with pytest.raises(InputError, match=says):
        parse_config({**START, **changes})


@pytest.mark.parametrize(
    ("length", "changes", "line", "expected"),
    [
        ("epochs = 1", ["steps=6"], "steps of the command replaces epochs = 1", (6, None)),
        ("steps = 9", ["epochs=0.5"], "epochs of the command replaces steps = 9", (1, 0.5)),
        ("steps = 9", ["steps=6"], None, (6, None)),
    ],
)
def test_a_length_of_the_command_replaces_that_of_the_file(
    tmp_path, length, changes, line, expected
):
    file, said = tmp_path / "run.toml", []
    text = '\nout = "x"\ninit_from = "mlmjax-small"\n[data]\nrows = "r"\n'
    file.write_text(length + text)
    config = load_config(file, changes, say=said.append)
    assert said == ([f"{file}: {line}"] if line else [])
    assert (config.steps, config.epochs) == expected
    with pytest.raises(InputError, match="both steps and epochs"):
        load_config(file, ["steps=6", "epochs=1"])


def test_epochs_survive_being_written_and_become_steps():
    config = parse_config({**START, "epochs": 3})
    table = config.model_dump(mode="json")
    assert table["epochs"] == 3
    assert "steps" not in table
    assert parse_config(table) == config
    settled = config.with_steps(12)
    assert parse_config(settled.model_dump(mode="json")).steps == 12


def epochs_run(tmp_path, monkeypatch):
    """A run of 1.5 epochs over 20 rows, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Is {i} even?", "answer": "yes" if i % 2 else "no"} for i in range(20)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return {
        "out": "run", "epochs": 1.5, "model": {**sizes, "num_attention_heads": 2},
        "data": {
            "rows": "rows", "seq_length": 32, "batch_size": 8, "pack": False,
            "sources": [{"path": "a.jsonl", "prompt": "{prompt}", "answer": "answer"}],
        },
    }  # fmt: skip


def test_epochs_are_counted_on_the_prepared_rows(tmp_path, monkeypatch, capsys):
    config = parse_config(epochs_run(tmp_path, monkeypatch))
    for _ in range(2):  # the second time the rows are there
        settled = count_steps(config)
        assert (settled.steps, settled.epochs) == (5, None)  # 20 rows are 3 batches
        assert capsys.readouterr().err == "epochs = 1.5: 5 updates of 8 rows\n"
    assert count_steps(settled) is settled


@pytest.mark.long
def test_a_run_of_epochs_is_complete_after_its_updates(tmp_path, monkeypatch, capsys):
    file = write_config(epochs_run(tmp_path, monkeypatch))
    assert run(["train", str(file)]) == 0
    assert json.loads(Path("run/config.json").read_text())["steps"] == 5
    assert run(["train", str(file)]) == 0
    assert "is complete at step 5" in capsys.readouterr().err
