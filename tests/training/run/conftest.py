"""The inputs and the one finished run that all tests of runs share."""

import os
import signal

import pytest
from training import make_config

from mlmjax.training.run.log import MetricsLog
from mlmjax.training.run.train import run_training


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The inputs of all runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def straight(folder):
    """The final state of a run that nothing stopped; its folder is `folder / "out"`."""
    return run_training(make_config(folder))


@pytest.fixture
def stop_after(monkeypatch):
    """Call `run` until the line of a step is written, where SIGTERM arrives."""

    def stop(step, run):
        write = MetricsLog.write

        def write_and_stop(self, number, split, values):
            write(self, number, split, values)
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(MetricsLog, "write", write_and_stop)
            with pytest.raises(SystemExit) as caught:
                run()
        assert caught.value.code == 143

    return stop
