"""Runs of several processes over gloo: the same run as of one, and none left behind.

Those that train are long, because each process imports and compiles everything. By default, the
tests of failures and of launching start real processes.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import processes
import pytest
from training import assert_same, lines_of, make_config, make_table

from mlmjax import InputError
from mlmjax.parallel import processes as distributed
from mlmjax.parallel.sharding import make_mesh
from mlmjax.training.optimizer import make_optimizer
from mlmjax.training.run.initial_model import load_start
from mlmjax.training.run.resume import check_same_settings
from mlmjax.training.run.train import run_training
from mlmjax.training.step import abstract_train_state, split_parameters
from mlmjax.weights import pretrained
from mlmjax.weights.checkpoints import Checkpoints
from mlmjax.weights.tensors import layout

pytestmark = pytest.mark.usefixtures("orbax_leftovers")

TWO = {"data": 1, "fsdp": 2}
SMALL = {
    "steps": 6,
    "model__hidden_size": 16,
    "model__intermediate_size": 16,
    "log__every": 2,
    "evaluation__every": 3,
    "checkpoint__every": 3,
    "mesh": {"fsdp": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the inputs of all runs here."""
    folder = tmp_path_factory.mktemp("runs")
    make_config(folder)
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """The run of one process, on two of its devices, to compare with."""
    run_training(make_config(folder, out=str(folder / "one"), **{**SMALL, "mesh": TWO}))
    return folder / "one"


def assert_close_lines(lines, expected):
    """Same steps and counts, and the same losses and norms to rounding."""

    def close(key, value):
        is_exact = value is None or not key.startswith(("loss", "grad_norm", "update_norm"))
        return value if is_exact else pytest.approx(value, rel=2e-5)

    assert lines == [{key: close(key, value) for key, value in line.items()} for line in expected]


def assert_close_runs(out, expected):
    """Same lines, and the same exported weights and validation to rounding."""
    assert_close_lines(lines_of(out), lines_of(expected))
    found, wanted = (
        dict(layout.to_hf_tensors(pretrained.load_pretrained(folder / "export")[0]))
        for folder in (out, expected)
    )
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
    found, wanted = (json.loads((o / "validation.json").read_text()) for o in (out, expected))
    assert found["per_task"] == wanted["per_task"]
    losses = ([one["loss_mlm"] for one in o["per_source"].values()] for o in (found, wanted))
    np.testing.assert_allclose(*losses, rtol=2e-5)


AT_STEP = """
import os, signal, time
from mlmjax.training.run import loop
settle = loop.Loop._settle
def settle_and_signal(self, step, *rest):
    while step == {step} and not os.path.isdir({after!r}):
        time.sleep(0.1)
    if step == {step}:
        os.kill(os.getpid(), signal.{name})
    return settle(self, step, *rest)
loop.Loop._settle = settle_and_signal
"""


def saved(out):
    return sorted(int(path.name) for path in (out / "checkpoints").glob("[0-9]*"))


@pytest.fixture(scope="module")
def stopped(folder):
    """The run of two processes, which both stop and save when one gets a signal."""
    out = folder / "two"
    config = processes.write_config(make_table(folder, out=str(out), **SMALL))
    stop = {1: AT_STEP.format(step=4, name="SIGTERM", after=str(out / "checkpoints" / "3"))}
    codes, outputs, errors = processes.train(config, 2, 1, stop)
    assert codes == [143, 143], errors
    assert f"stopped by a signal; step {saved(out)[-1]} is saved" in errors[0]
    assert "loss" not in outputs[1] + errors[1]
    assert "Traceback" not in "".join(errors)
    assert 4 <= saved(out)[-1] < 6
    assert not (out / "export").exists()
    return out


@pytest.mark.long
def test_two_processes_train_like_one_and_stop_together(folder, stopped, one):
    lines = lines_of(stopped)
    assert {(line["step"], line["split"]) for line in lines} >= {(2, "train"), (3, "validation")}
    assert_close_lines(lines, lines_of(one)[: len(lines)])


@pytest.mark.long
def test_what_two_processes_began_one_ends_on_another_mesh(folder, stopped, one):
    """The state is restored bit by bit, and the run ends like one that never stopped."""
    out, other = folder / "moved", {"data": 4, "fsdp": 2}
    shutil.copytree(stopped, out)
    config = make_config(folder, out=str(out), **{**SMALL, "mesh": other})
    params = split_parameters(load_start(config)[0])[1]
    optimizer = make_optimizer(config.optimizer, config.schedule, config.steps)
    with Checkpoints(out / "checkpoints", config.checkpoint) as checkpoints:
        step = checkpoints.latest()
        states = [
            checkpoints.restore(step, abstract_train_state(params, optimizer, make_mesh(sizes)))
            for sizes in (TWO, other)
        ]
    assert states[0].step == step >= 4
    assert_same(*states)
    run_training(config)
    assert_close_runs(out, one)


@pytest.mark.long
def test_two_processes_resume_and_end_like_one(folder, stopped, one):
    step = saved(stopped)[-1]
    codes, outputs, errors = processes.train(Path(f"{stopped}.toml"), 2, 1)
    assert codes == [0, 0], errors
    assert f"resumes from step {step}" in errors[0]
    assert f"export: {stopped / 'export'}" in outputs[0]
    assert not outputs[1].strip()
    assert "loss" not in errors[1]
    assert_close_runs(stopped, one)


IN_PHASE = """
import os, signal
from mlmjax.training.run import timing
switch, sent = timing.Clock._switch, []
def switch_and_signal(self, phase):
    if phase == {phase!r} and not sent:
        sent.append(phase)
        os.kill(os.getpid(), signal.SIGTERM)
    return switch(self, phase)
timing.Clock._switch = switch_and_signal
"""


@pytest.mark.long
def test_four_processes_through_signals_at_any_time(folder):
    """Each time another process gets a signal, in another phase; the result is the same."""
    changes = {
        **SMALL,
        "steps": 12,
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "model__num_hidden_layers": 2,
        "optimizer": {"learning_rate": 1e-3, "skip_spikes": 6.0, "ema": 0.5},
        "data__accumulate": 2,
    }
    run_training(make_config(folder, out=str(folder / "one-long"), **changes))
    out = folder / "four"
    config = processes.write_config(make_table(folder, out=str(out), **changes))
    steps = [0]
    phases = ["compile", "data", "evaluation", "checkpoint"]
    for number, phase in enumerate(phases):
        code = {number: IN_PHASE.format(phase=phase)}
        codes, _, errors = processes.train(config, 4, 2, code)
        assert codes == [143] * 4, (phase, errors)
        assert "Traceback" not in "".join(errors)
        steps.append(saved(out)[-1])
        assert steps[-2] <= steps[-1] < 12
    shutil.copytree(out, folder / "four-as-one")
    codes, _, errors = processes.train(config, 4, 2)
    assert codes == [0] * 4, errors
    assert_close_runs(out, folder / "one-long")
    moved = {**changes, "mesh": {"data": 4}, "data__accumulate": 1}
    run_training(make_config(folder, out=str(folder / "four-as-one"), **moved))
    assert_close_runs(folder / "four-as-one", folder / "one-long")
    print(f"stopped at steps {steps[1:]}, of {', '.join(phases)}")


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 2])
def test_of_four_processes_one_dies(folder, victim):
    """One dies; the others end, and the same command resumes from the checkpoint."""
    out = folder / f"of-four-{victim}"
    config = processes.write_config(make_table(folder, out=str(out), **{**SMALL, "mesh": {}}))
    saves = str(out / "checkpoints" / "3")
    kill = {victim: AT_STEP.format(step=5, name="SIGKILL", after=saves)}
    codes, _, errors = processes.train(config, 4, 1, kill)
    ends = {1} if victim else {1, -6}  # JAX aborts the others when it loses the first process.
    assert codes[victim] == -9
    assert {code for number, code in enumerate(codes) if number != victim} <= ends, errors
    # Gloo, which sends the sums between processes, may meet the loss before JAX, and abort.
    named = ("lost the connection", "another task died", "terminate called")
    for number, error in enumerate(errors):
        assert any(text in error for text in named) == (number != victim), error
    codes, _, errors = processes.train(config, 4, 1)
    assert codes == [0] * 4, errors
    assert "resumes from step 3" in errors[0]


def test_processes_of_other_settings_are_refused(tmp_path, monkeypatch):
    first = make_config(tmp_path)
    sent = []
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(
        distributed, "broadcast_from_first", lambda make: sent.append(make()) or sent[0]
    )
    check_same_settings(first)
    monkeypatch.setattr(distributed, "process_index", lambda: 1)
    received = json.loads(json.dumps(sent[0]))
    monkeypatch.setattr(distributed, "broadcast_from_first", lambda make: received)
    check_same_settings(first)
    check_same_settings(make_config(tmp_path, out="/elsewhere", data__workers=3))
    other = make_config(tmp_path, steps=9, optimizer={"learning_rate": 0.5})
    message = r"^process 1 .*learning_rate is 0.5, process 0 has 0.001; give all processes the same"
    with pytest.raises(InputError, match=message) as caught:
        check_same_settings(other)
    assert caught.value.details == ("steps is 9, process 0 has 8",)
    monkeypatch.setattr(distributed, "process_count", lambda: 3)
    with pytest.raises(InputError, match=r"--processes is 3, process 0 has 2"):
        check_same_settings(first)
