"""Processes that end together: when one fails, the others stop soon and say why."""

import time

import processes
import pytest
from training import make_table

# In place of training, so that processes start in a second.
WORK = """
import os, signal, sys, time, types
import jax
from mlmjax.errors import InputError, RunError
from mlmjax.parallel import processes
def work(config, profile=None, code=()):
    print("devices", jax.device_count(), flush=True)
    count, index = processes.process_count(), processes.process_index()
    assert processes.broadcast_from_first(lambda: {"a": [1, None]}) == {"a": [1, None]}
    sums = processes.sum_over_processes({"x": 0.25, "y": 2.0**50 + index})
    assert sums == {"x": 0.25 * count, "y": count * 2.0**50 + sum(range(count))}
    for turn in range(10**6):
        if processes.vote(turn == 20 and index == 1)():
            break
        time.sleep(0.02)
    assert turn == 20
    for turn in range(10**6):
        if turn == 3:
            DOES
        WAITS
sys.modules["mlmjax.training.run.train"] = types.SimpleNamespace(run_training=work)
"""
COLLECTIVE, ALONE = "processes.vote(False)()", "time.sleep(0.05)"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


def run(tmp_path, *does, waits=COLLECTIVE):
    """Let processes agree on a few things, then let each do something else."""
    (tmp_path / "records.jsonl").write_text("")
    config = processes.write_config(make_table(tmp_path))
    work = WORK.replace("WAITS", waits)
    code = {number: work.replace("DOES", what) for number, what in enumerate(does)}
    return processes.train(config, len(does), 1, code, timeout=100)


@pytest.mark.parametrize(
    ("victim", "does", "waits", "codes", "message"),
    [
        (1, KILLED, COLLECTIVE, (-9, 1), "lost the connection to another process (UNKNOWN: Gloo"),
        long(1, KILLED, ALONE, (-9, -6), "tasks are unhealthy (stopped sending heartbeats)"),
        long(0, KILLED, ALONE, (-9, -6), "the leader task was preempted/died"),
        long(1, "raise InputError('bad rows')", ALONE, (2, 2), "failed: bad rows; process 0 stops"),
        long(0, "1 / 0", COLLECTIVE, (1, 1), "failed: division by zero; process 1 stops"),
        long(0, "raise RunError('a full disk')", ALONE, (1, 1), "failed: a full disk; process 1"),
        long(1, "raise SystemExit(143)", ALONE, (143, 143), "was asked to stop; process 0 stops"),
    ],
    ids=["killed", "silent", "first killed", "input", "bug", "run", "signal"],
)
def test_when_one_process_ends_the_other_does(tmp_path, victim, does, waits, codes, message):
    actions = [does if number == victim else "pass" for number in (0, 1)]
    begun = time.monotonic()
    found, outputs, errors = run(tmp_path, *actions, waits=waits)
    assert time.monotonic() - begun < 60
    other = 1 - victim
    assert (found[victim], found[other]) == codes, errors
    assert outputs[other] == "devices 2\n"
    assert message in errors[other]
    if codes[1] >= 0:
        (line,) = [line for line in errors[other].splitlines() if line.startswith("mlmjax: ")]
        assert ("the same command on all hosts resumes" in line) == (codes[1] == 1)
        assert message.startswith("lost") or f"process {victim} of 2 (on " in line
        assert "Traceback" not in errors[other]
        assert "Check failure" not in errors[other]


@pytest.mark.long
@pytest.mark.parametrize(
    ("does", "code", "message"),
    [(KILLED, 1, "lost the connection"), ("raise InputError('bad rows')", 2, "bad rows")],
)
def test_when_one_of_four_processes_ends_the_others_do(tmp_path, does, code, message):
    codes, _, errors = run(tmp_path, "pass", "pass", does, "pass")
    others = [0, 1, 3]
    assert [codes[number] for number in others] == [code] * 3, errors
    assert all(message in errors[number] for number in others)


def test_processes_that_do_not_find_each_other(tmp_path):
    config = processes.write_config(make_table(tmp_path))
    addresses = [f"127.0.0.1:{processes.free_port()}" for _ in range(2)]

    def flags(number):
        return ["--coordinator", addresses[number], "--processes", 2, "--process", number]

    code = dict.fromkeys((0, 1), "launch.JOIN_SECONDS = 3")
    codes, _, errors = processes.finish(processes.start(config, 2, 1, code, flags), 60)
    assert codes == [1, 1], errors
    for address, error in zip(addresses, errors, strict=True):
        assert error.startswith(f"mlmjax: not all processes reached {address} within 3 s; ")
        assert len(error.splitlines()) == 1
