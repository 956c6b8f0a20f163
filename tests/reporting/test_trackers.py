"""Trackers get the figures of a run, continue it, and cannot end it."""

import json
import sqlite3
import struct

import pytest
from fake_trackers import FakeTracker
from tensorboardX.proto.event_pb2 import Event

from mlmjax.errors import InputError
from mlmjax.reporting import trackers
from mlmjax.reporting.trackers import KEPT, Trackers, check_installed

SETTINGS = {"out": "/runs/run", "optimizer": {"learning_rate": 1e-3}}


def record(folder, names, step=0):
    """Record three updates that follow a step."""
    found = Trackers(names, folder, settings=SETTINGS, step=step)
    for number in range(step + 1, step + 4):
        found.log(number, "train", {"loss": 1.0 / number, "mfu": None})
    found.finish()


@pytest.fixture
def fakes(monkeypatch):
    """Put fakes in the places of two trackers."""
    found = {"wandb": FakeTracker(), "mlflow": FakeTracker()}
    for name, fake in found.items():
        monkeypatch.setitem(trackers.TRACKERS, name, ("json", lambda fake=fake: fake))
    return found


def test_a_tracker_gets_settings_and_figures_and_continues_the_same_run(fakes, tmp_path):
    record(tmp_path, ["wandb", "wandb"])
    (_, run), *logged, last = fakes["wandb"].calls
    assert run.settings == {"out": "run", "optimizer.learning_rate": 1e-3}
    assert (run.name, run.step, run.id) == (tmp_path.name, 0, None)
    assert [call[1:] for call in logged] == [(n, {"train/loss": 1.0 / n}) for n in (1, 2, 3)]
    assert last == ("finish",)
    assert json.loads((tmp_path / KEPT).read_text()) == {"wandb": "id-1"}
    record(tmp_path, ["mlflow", "wandb"], step=2)
    assert fakes["wandb"].calls[5][1].id == "id-1"
    assert fakes["mlflow"].calls[0][1].id is None
    record(tmp_path, ["wandb"])  # from the beginning it is another run
    assert fakes["wandb"].calls[-5][1].id is None


@pytest.mark.parametrize("broken", ["[]", "nonsense", '{"wandb": 1}'])
def test_ids_that_cannot_be_read_begin_a_new_run(fakes, tmp_path, broken):
    (tmp_path / KEPT).write_text(broken)
    record(tmp_path, ["wandb"], step=5)
    assert fakes["wandb"].calls[0][1].id is None


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_says_so_once_and_the_others_go_on(fakes, tmp_path, capsys, method):
    fakes["wandb"].fails = (method,)
    record(tmp_path, ["wandb", "mlflow"])
    printed = capsys.readouterr()
    assert printed.out == ""
    line = f"warning: wandb failed (RuntimeError: no {method}); the run goes on without it"
    assert printed.err.count(line) == printed.err.count("warning") == 1
    assert [call[0] for call in fakes["wandb"].calls].count(method) == 1
    assert len(fakes["mlflow"].calls) == 5


def test_a_package_that_is_missing_is_said_before_the_run(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", ("no_such_package", FakeTracker))
    check_installed(["tensorboard"])
    with pytest.raises(InputError, match=r"log\.to: wandb needs .* pip install 'mlmjax\[track\]'"):
        check_installed(["tensorboard", "wandb"])


def test_tensorboard_withdraws_what_a_resumed_run_repeats(tmp_path):
    record(tmp_path, ["tensorboard"])
    record(tmp_path, ["tensorboard"], step=2)
    (file,) = tmp_path.glob("events.out.tfevents.*.mlmjax")  # both are of the same second
    content, events = file.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    assert (events[0].step, events[-1].step) == (0, 5)


@pytest.mark.track
def test_trackio_has_one_run_after_a_resume(tmp_path, monkeypatch, capfd):
    import trackio.sqlite_storage as storage

    database = tmp_path / "trackio"
    monkeypatch.setattr(storage, "TRACKIO_DIR", database)
    record(tmp_path, ["trackio"])
    record(tmp_path, ["trackio"], step=3)
    assert "warning" not in capfd.readouterr().err
    with sqlite3.connect(database / "mlmjax.db") as opened:
        rows = opened.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, *_ in rows}) == 1
    assert [step for _, step, _ in rows] == [1, 2, 3, 4, 5, 6]
    assert json.loads(rows[-1][2]) == {"train/loss": pytest.approx(1 / 6)}


@pytest.mark.track
def test_wandb_has_one_run_after_a_resume_and_nothing_of_the_machine(tmp_path, monkeypatch, capfd):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    record(tmp_path, ["wandb"])
    record(tmp_path, ["wandb"], step=3)
    wandb.teardown()  # its own process writes the last lines
    assert "warning" not in capfd.readouterr().err
    ids, steps = set(), []
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        content = file.read_bytes()[7:]  # a header, then whole records in one block
        while content:
            size, kind = struct.unpack("<HB", content[4:7])
            assert kind == 1
            one, content = Record.FromString(content[7 : 7 + size]), content[7 + size :]
            if one.WhichOneof("record_type") == "run":
                ids.add(one.run.run_id)
                assert one.run.host == ""
            for item in one.history.item:
                if "step" in (item.key, *item.nested_key):
                    steps.append(json.loads(item.value_json))
        assert str(tmp_path).encode() not in file.read_bytes()
    assert ids == {json.loads((tmp_path / KEPT).read_text())["wandb"]}
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.track
def test_mlflow_has_one_run_after_a_resume(tmp_path, monkeypatch, capfd):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    record(tmp_path, ["mlflow"])
    record(tmp_path, ["mlflow"], step=3)
    assert "warning" not in capfd.readouterr().err
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mlmjax").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"out": "run", "optimizer.learning_rate": "0.001"}
    found = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in found] == [(n, 1 / n) for n in range(1, 7)]
