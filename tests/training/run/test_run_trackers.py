"""A run sends its figures to trackers, resumes them, and does not end with them."""

import json

import pytest
from fake_trackers import FakeTracker
from training import assert_same, make_config

from mlmjax.errors import InputError
from mlmjax.reporting import trackers
from mlmjax.training.run.train import run_training


def test_a_resumed_run_continues_its_trackers_and_outlives_them(
    folder, straight, stop_after, monkeypatch, tmp_path, capsys
):
    whole, broken = FakeTracker(), FakeTracker("log")
    monkeypatch.setitem(trackers.TRACKERS, "wandb", ("json", lambda: whole))
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", ("json", lambda: broken))
    out = tmp_path / "out"
    config = make_config(folder, out=str(out), log__to=["wandb", "mlflow"], log__project="mine")
    stop_after(5, lambda: run_training(config))
    assert capsys.readouterr().err.count("mlflow failed (RuntimeError: no log)") == 1
    assert_same(run_training(config), straight)
    first, second = (call[1] for call in whole.calls if call[0] == "start")
    assert (first.step, first.id, second.step, second.id) == (0, None, 5, "id-1")
    assert (first.project, first.name, first.settings["out"]) == ("mine", "out", "out")
    sent = {(step, name) for _, step, figures in _logged(whole) for name in figures}
    lines = {
        (line["step"], f"{line['split']}/{name}")
        for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        for name, value in line.items()
        if name not in ("step", "split") and value is not None
    }
    assert sent == lines
    assert [call[0] for call in whole.calls].count("finish") == 2


def _logged(tracker):
    return [call for call in tracker.calls if call[0] == "log"]


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_prepared(
    folder, monkeypatch, tmp_path
):
    monkeypatch.setitem(trackers.TRACKERS, "trackio", ("no_such_package", FakeTracker))
    config = make_config(folder, out=str(tmp_path / "out"), log__to=["trackio"])
    with pytest.raises(InputError, match=r"pip install 'mlmjax\[track\]'"):
        run_training(config)
    assert not (tmp_path / "out").exists()
