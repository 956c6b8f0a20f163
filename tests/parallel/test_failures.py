"""Processes that end together: whatever becomes of one, the others stop soon and say why."""

import time

import processes
import pytest
from training import make_config, make_table

WORK = """
import os, signal, time
import jax
import mlmjax.training.run.train
from mlmjax.parallel import processes
from mlmjax.errors import InputError, RunError
def work(config, profile=None):
    print("devices", jax.device_count(), flush=True)
    assert processes.broadcast_from_first(lambda: {"a": [1, None]}) == {"a": [1, None]}
    big = 2.0**52 + processes.process_index()
    assert processes.sum_over_processes({"x": 0.25, "y": big}) == {"x": 0.5, "y": 2.0**53 + 1}
    for turn in range(10**6):
        if processes.any_process(turn == 20 and processes.process_index() == 1):
            break
        time.sleep(0.02)
    assert turn == 20
    for turn in range(10**6):
        if turn == 3:
            DOES
        processes.any_process(False)
mlmjax.training.run.train.run_training = work
"""


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


def run(tmp_path, *does):
    """Let two processes agree on a few things, then each do what is said."""
    (tmp_path / "records.jsonl").write_text("")
    config = processes.write_config(make_table(tmp_path))
    code = {number: WORK.replace("DOES", what) for number, what in enumerate(does)}
    return processes.train(tmp_path, config, 2, 1, code, timeout=100)


@pytest.mark.parametrize(
    ("victim", "does", "codes", "told"),
    [
        (1, "os.kill(os.getpid(), signal.SIGKILL)", (-9, 1), "has given no sign of life for 8 s"),
        (0, "os.kill(os.getpid(), signal.SIGKILL)", (-9, 1), "has ended without a word"),
        (1, "raise InputError('bad rows; make others')", (2, 2), "failed: bad rows; make others"),
        (0, "1 / 0", (1, 1), "failed: division by zero"),
        long(0, "raise RunError('a full disk')", (1, 1), "failed: a full disk"),
        long(1, "raise SystemExit(143)", (143, 143), "was asked to stop"),
    ],
    ids=["second killed", "first killed", "input", "bug", "run", "signal"],
)
def test_when_one_ends_the_other_does(tmp_path, victim, does, codes, told):
    does = [does if number == victim else "pass" for number in (0, 1)]
    begun = time.monotonic()
    found, outputs, errors = run(tmp_path, *does)
    assert time.monotonic() - begun < 60
    other = 1 - victim
    assert (found[victim], found[other]) == codes, errors
    assert "devices 2" in outputs[other]
    (line,) = [line for line in errors[other].splitlines() if line.startswith("mlmjax: ")]
    assert line.startswith(f"mlmjax: process {victim} of 2 (on ")
    assert f") {told}; process {other} stops as well" in line
    assert ("The same command on all hosts goes on" in line) == (codes[1] == 1)
    for error in errors:
        assert "Traceback" not in error
        assert "Check failure" not in error


def test_when_both_end_nothing_is_said(tmp_path):
    codes, _, errors = run(tmp_path, "return", "return")
    assert codes == [0, 0], errors
    assert "mlmjax" not in "".join(errors)


@pytest.mark.parametrize("number", [0, 1])
def test_others_that_do_not_come(tmp_path, number):
    config = processes.write_config(make_table(tmp_path))
    place = f"127.0.0.1:{processes.free_port()}"

    def flags(_):
        return ["--coordinator", place, "--processes", 2, "--process", number]

    children = processes.start(tmp_path, config, 1, 1, {0: "launch.JOIN_SECONDS = 3"}, flags)
    codes, _, errors = processes.finish(children, timeout=60)
    assert codes == [1], errors
    assert errors[0].startswith(
        f"mlmjax: process {number} of 2: not all of the others came to {place} within 3 s; "
    )
    assert len(errors[0].splitlines()) == 1


def test_pmap_is_for_one_process(tmp_path):
    make_config(tmp_path)
    config = processes.write_config(make_table(tmp_path, parallel="pmap", mesh={}))
    codes, _, errors = processes.train(tmp_path, config, 2, 1)
    assert codes == [2, 2]
    assert all("'pmap' drives the devices of one process, and there are 2" in e for e in errors)
