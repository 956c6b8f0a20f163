"""Log lines and the progress bar of a training."""

import re
import time

from mlmjax.training.run import log
from mlmjax.training.run.log import RunDisplay, describe_step_compiling


def test_a_training_is_shown_by_lines_or_by_a_bar(capsys, monkeypatch):
    values = {"loss": 0.71, "answer_accuracy": 0.8, "tokens_per_second": 1732.0}
    with RunDisplay(40) as display:
        display.advance(20)
        display.show(20, "train", values)
        display.show(30, "train", {"loss": 0.712, "loss_atp": 0.711})
        display.show(20, "validation", {"loss": 0.5, "mfu": float("nan")})
        display.show(
            40, "train", {"loss": 1.0, "loss_atp": 1.0, "loss_dummy": 1.0, "loss_mlm": None}
        )
        display.say("[saved]")
    assert capsys.readouterr().err.splitlines() == [
        "step 20/40 | loss 0.710 | accuracy 0.800 | 1,732 tok/s",
        "step 30/40 | loss 0.712",
        "step 20/40 | validation | loss 0.500",
        "step 40/40 | loss 1.000 | atp 1.000 | dummy 1.000",
        "[saved]",
    ]
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RunDisplay(40, done=10) as display:
        display.advance(20)
        display.show(20, "train", values)
        display.show(20, "validation", values)
    shown = capsys.readouterr().err
    assert "20/40" in shown
    assert "validation | loss 0.710" in shown


def test_at_80_columns_a_training_keeps_bar_step_and_time_left(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    names = ["loss", "loss_atp", "loss_dummy", "answer_accuracy", "grad_norm", "learning_rate"]
    with RunDisplay(20_000) as display:
        for step in (1, 2, 12_345):
            display.advance(step)
            display.show(step, "train", dict.fromkeys(names, 0.5) | {"tokens_per_second": 12345.0})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    *_, last = (line for line in re.split(r"[\r\n]+", shown) if line.strip())
    assert len(last) <= 80
    assert "training" in last
    assert "━" in last
    assert re.search(r"12345/20000 +\d+:\d\d:\d\d +loss 0.500( \| [a-z]+ [\d.]+)*\s*$", last)


def test_a_pipe_hears_of_compiling_and_of_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(log, "PATIENCE_SECONDS", 0.02)
    monkeypatch.setattr(log, "LINE_SECONDS", 0.1)
    with RunDisplay(400) as display:
        with display.doing(describe_step_compiling(22, 2, 8)):
            time.sleep(0.3)
        for step in range(1, 21):
            display.advance(step)
            time.sleep(0.02)
    lines = capsys.readouterr().err.splitlines()
    compiling = "step 0/400 | compiling program 2 for batches of 8 rows"
    assert lines[0] == f"{compiling}, about 40 s | first time on this machine"
    assert 1 <= lines.count(f"{compiling} | 0 s so far") <= 3
    assert re.fullmatch(r"step \d+/400 \| about \d+ s left", lines[-1])
    assert len(lines) < 9
