"""Runs that stop early: when, with which parameters, and bit by bit after any stop."""

import json

import jax
import numpy as np
import pytest
from training import assert_same, lines_of, make_config

from mlmjax import load_pretrained
from mlmjax.errors import InputError
from mlmjax.model.modernbert import parameters
from mlmjax.parallel.sharding import named_leaves
from mlmjax.training.run.loop import Loop
from mlmjax.training.run.train import run_training

pytestmark = pytest.mark.usefixtures("orbax_leftovers")
LOSSES = {2: 0.9, 4: 0.5, 6: 0.7, 8: 0.5}
"""By step; an equal loss is no improvement."""


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    """Replace the loss of each validation by that of `LOSSES`."""
    evaluate = Loop._evaluate

    def found(self, step, state):
        figures = evaluate(self, step, state)
        return None if figures is None else {**figures, "loss": LOSSES[step]}

    monkeypatch.setattr(Loop, "_evaluate", found)


def config_of(folder, name, **changes):
    usual = {"steps": 20, "evaluation": {"every": 2, "patience": 2}, "log": {"every": 3}}
    usual |= {"schedule": {"warmup": 2, "decay": 0}, "optimizer__ema": 0.5}
    return make_config(folder, out=str(folder / name), **usual | changes)


@pytest.fixture(scope="module")
def stopped(folder):
    with pytest.MonkeyPatch.context() as patch:
        scripted.__wrapped__(patch)
        return run_training(config_of(folder, "early"))


def test_the_best_parameters_are_exported(folder, stopped, capsys):
    out = folder / "early"
    assert int(stopped.step) == 8
    report = json.loads((out / "validation.json").read_text())
    assert (report["step"], report["best_step"]) == (8, 4)
    exported = parameters(load_pretrained(out / "export")[0])
    for name, value in named_leaves(stopped.opt_state.params).items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)
    # They are the averaged parameters of a run that ends at that step.
    short = run_training(config_of(folder, "short", steps=4, evaluation={"every": 2}))
    assert_same(stopped.opt_state.params, short.opt_state.average)
    steps = [line["step"] for line in lines_of(out) if line["split"] == "train"]
    assert steps == [3, 6, 8]
    capsys.readouterr()
    assert_same(run_training(config_of(folder, "early")), stopped)
    assert "is complete at step 8; nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("step", [3, 6])
def test_a_stopped_run_ends_as_if_nothing_had_happened(folder, stopped, stop_after, step):
    """At step 6 the signal is there before the validation, which the next start makes up."""
    name = f"again-{step}"
    stop_after(step, lambda: run_training(config_of(folder, name)))
    assert_same(run_training(config_of(folder, name)), stopped)
    assert lines_of(folder / name) == lines_of(folder / "early")


def test_eight_devices_stop_as_one(folder, stopped):
    spread = run_training(config_of(folder, "spread", mesh={"data": 4, "fsdp": 2}))
    assert int(spread.step) == 8
    for one, other in zip(jax.tree.leaves(spread), jax.tree.leaves(stopped), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_other_patience_is_another_run(folder, stopped):
    for patience in (3, None):
        other = config_of(folder, "early", evaluation={"every": 2, "patience": patience})
        with pytest.raises(InputError, match=r"early: holds another run.*evaluation"):
            run_training(other)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluation": {"patience": 0}}, "evaluation.patience: found 0"),
        ({"evaluation": {"every": 0, "patience": 2}}, "set evaluation.every above 0"),
        (
            {"data__validation_rows": 0},
            "evaluation.patience counts validations, which",
        ),
    ],
)
def test_patience_that_cannot_work_is_rejected(folder, changes, says):
    with pytest.raises(InputError, match=says):
        config_of(folder, "wrong", **changes)
