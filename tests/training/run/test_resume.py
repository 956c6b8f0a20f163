"""Runs that are killed at any moment: what is listed is whole, and they end as if nothing happened.

`pytest -m long tests/training/run/test_resume.py` kills at fifty moments.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import pytest
from processes import ROOT, write_config
from training import (
    assert_same,
    compile_settings,
    lines_of,
    make_config,
    make_table,
    quick_compiles,
)

from mlmjax.training.run.train import run_training
from mlmjax.weights.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("orbax_leftovers")

# Slow enough to be killed anywhere: a save at every second update, each of them drawn out.
CHILD = """
import json, sys, time
import jax
settings, slow, config = json.loads(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
for name, value in settings.items():
    jax.config.update(name, value)
from mlmjax.weights.checkpoints import Checkpoints
from mlmjax.cli.main import run
save, wait = Checkpoints.save, Checkpoints.wait
def slow_save(self, *args, **kwargs):
    time.sleep(slow)
    save(self, *args, **kwargs)
    print("saving", flush=True)
Checkpoints.save = slow_save
print("started", flush=True)
sys.exit(run(["train", config]))
"""
STEPS = 24


def settings(out):
    return {
        "out": str(out),
        "steps": STEPS,
        "checkpoint": {"every": 2, "keep_last": 2, "keep_best": 1},
        "evaluation": {"every": 6},
        "model": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with quick_compiles(tmp_path_factory.mktemp("survive")) as folder:
        yield folder


@pytest.fixture(scope="module")
def straight(folder):
    """The final state of a run that nothing stopped."""
    return run_training(make_config(folder, **settings(folder / "straight")))


def start(folder, config):
    arguments = [json.dumps({**compile_settings(folder), "jax_num_cpu_devices": 8}), "0.05"]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments, str(config)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_listed(out, config, state):
    """Restore, and by that verify every bit of, whatever is listed; return those steps."""
    if not (out / "checkpoints").is_dir():
        return []
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpoints(out / "checkpoints", config.checkpoint) as checkpoints:
        for step in checkpoints.steps():
            assert int(checkpoints.restore(step, shapes).step) == step
        return checkpoints.steps()


def survive(folder, straight, name, moments, rng):
    """Kill a run again and again; return how often, and how often inside a save."""
    out = folder / name
    config = make_config(folder, **settings(out))
    path = write_config(make_table(folder, **settings(out)))
    newest, kills, inside = 0, 0, 0
    for moment in range(moments):
        child = start(folder, path)
        with child:
            # Most from the first save on; some anywhere, in the middle of starting or compiling.
            word = "started" if moment % 5 == 4 else "saving"
            for line in child.stdout:
                if line.strip() == word:
                    break
            time.sleep(rng.uniform(0, 3.0 if word == "started" else 0.25))
            child.send_signal(signal.SIGKILL)
            error = child.stderr.read()
        if child.returncode == 0:  # It had come to its end.
            assert max(check_listed(out, config, straight)) == STEPS
            break
        assert child.returncode == -signal.SIGKILL, error
        kills += 1
        inside += any(out.glob("checkpoints/*.orbax-checkpoint-tmp*"))
        steps = check_listed(out, config, straight)
        assert not steps or max(steps) >= newest  # nothing that was whole is lost
        newest = max(steps, default=0)
    assert_same(run_training(config), straight)
    assert lines_of(out) == lines_of(folder / "straight")
    return kills, inside


def test_a_run_survives_kills(folder, straight):
    assert survive(folder, straight, "killed", 2, random.Random(0))[0] == 2


@pytest.mark.long
def test_runs_survive_fifty_kills(folder, straight):
    rng, kills, inside, runs = random.Random(time.time_ns()), 0, 0, 0
    while kills < 50:
        found = survive(folder, straight, f"run-{runs}", rng.randint(4, 8), rng)
        kills, inside, runs = kills + found[0], inside + found[1], runs + 1
    print(f"{kills} kills of {runs} runs, {inside} of them inside a save")
    assert inside
