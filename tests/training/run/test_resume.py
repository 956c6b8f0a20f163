"""Runs that are killed at any moment: what is listed is whole, and they end as if nothing happened.

`pytest -m long tests/training/run/test_resume.py` kills at fifty moments.
"""

import random
import signal
import time

import jax
import pytest
from processes import spawn, write_config
from training import assert_same, lines_of, make_config, make_table

from mlmjax.training.run.train import run_training
from mlmjax.weights.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("orbax_leftovers")

# Slow enough to be killed anywhere: each of its saves is drawn out. tensorboardX takes seconds to
# import, and no checkpoint depends on it.
CHILD = """
import sys, time
sys.modules["tensorboardX"] = None
import jax
jax.config.update("jax_num_cpu_devices", 8)
from mlmjax.cli.main import run
from mlmjax.weights.checkpoints import Checkpoints
save = Checkpoints.save
def slow_save(self, *args, **kwargs):
    time.sleep(0.05)
    save(self, *args, **kwargs)
    print("saving", flush=True)
Checkpoints.save = slow_save
print("started", flush=True)
sys.exit(run(["train", sys.argv[1]]))
"""


def kill(config, moment, rng):
    """Train in a child process and kill it, most times after the first save."""
    with spawn(CHILD, config) as child:
        # Some anywhere, in the middle of starting or compiling.
        word = "started" if moment % 5 == 4 else "saving"
        for line in child.stdout:
            if line.strip() == word:
                break
        time.sleep(rng.uniform(0, 3.0 if word == "started" else 0.25))
        child.send_signal(signal.SIGKILL)
        return child.stderr.read(), child.wait()


def check_listed(out, config, state):
    """Restore, and by that verify every bit of, whatever is listed; return those steps."""
    if not (out / "checkpoints").is_dir():
        return []
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpoints(out / "checkpoints", config.checkpoint) as checkpoints:
        for step in checkpoints.steps():
            assert int(checkpoints.restore(step, shapes).step) == step
        return checkpoints.steps()


def survive(folder, straight, changes, moments, rng):
    """Kill a run again and again; return how often, and how often inside a save."""
    expected, steps = straight
    config = make_config(folder, **changes)
    path = write_config(make_table(folder, **changes))
    out = folder / changes["out"]
    newest, kills, inside = 0, 0, 0
    for moment in range(moments):
        error, code = kill(path, moment, rng)
        if code == 0:  # It had come to its end.
            assert max(check_listed(out, config, expected)) == steps
            break
        assert code == -signal.SIGKILL, error
        kills += 1
        inside += any(out.glob("checkpoints/*.orbax-checkpoint-tmp*"))
        listed = check_listed(out, config, expected)
        assert not listed or max(listed) >= newest  # nothing that was whole is lost
        newest = max(listed, default=0)
    if (out / "metrics.jsonl").exists():
        # A half-written last line, as a kill in the middle of a write leaves it.
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "spl')
    assert_same(run_training(config), expected)
    return kills, inside


def test_a_run_survives_a_kill(folder, straight):
    changes = {"out": str(folder / "killed"), "checkpoint": {"every": 2}}
    assert survive(folder, (straight, 8), changes, 1, random.Random(0))[0] == 1
    assert lines_of(folder / "killed") == lines_of(folder / "out")


@pytest.mark.long
def test_runs_survive_fifty_kills(folder):
    changes = {
        "steps": 24,
        "checkpoint": {"every": 2, "keep_last": 2, "keep_best": 1},
        "evaluation": {"every": 6},
        "model__hidden_size": 64,
        "model__intermediate_size": 64,
    }
    expected = run_training(make_config(folder, out=str(folder / "long"), **changes))
    rng, kills, inside, runs = random.Random(time.time_ns()), 0, 0, 0
    while kills < 50:
        out = folder / f"run-{runs}"
        found = survive(
            folder, (expected, 24), {**changes, "out": str(out)}, rng.randint(4, 8), rng
        )
        assert lines_of(out) == lines_of(folder / "long")
        kills, inside, runs = kills + found[0], inside + found[1], runs + 1
    print(f"{kills} kills of {runs} runs, {inside} of them inside a save")
    assert inside
