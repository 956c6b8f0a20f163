"""Log lines and the progress bar of a training."""

from mlmjax.training.run.log import RunDisplay


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
