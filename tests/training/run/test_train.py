import json
import math
import os
import shutil
import signal
from contextlib import closing

import jax
import numpy as np
import pytest
from processes import write_config
from training import OTHERS, TASKS, assert_same, lines_of, make_config, make_table

import mlmjax.training.run.loop as loop_module
import mlmjax.training.run.train as train_module
from mlmjax.cli.main import run
from mlmjax.data.contamination import read_training_manifest
from mlmjax.errors import InputError, RunError
from mlmjax.storage import CARD
from mlmjax.training.run.log import MetricsLog
from mlmjax.training.run.resume import check_same_run
from mlmjax.training.run.timing import PHASES
from mlmjax.training.run.train import prepare_rows, run_training
from mlmjax.training.run.validation import read_finished
from mlmjax.weights import pretrained
from mlmjax.weights.checkpoints import Checkpoints
from mlmjax.weights.tensors import layout

pytestmark = pytest.mark.usefixtures("orbax_leftovers")

KEYS = {
    "step",
    "split",
    "loss",
    "loss_atp",
    "loss_dummy",
    "loss_mlm",
    "answer_accuracy",
    "grad_norm",
    "update_norm",
    "skipped_updates",
    "learning_rate",
    "tokens_per_second",
    "flops_per_second",
    "mfu",
    "target_share",
    "padding_share",
    "chip_tokens_per_second",
    *(f"seconds_{phase}" for phase in PHASES),
    "productive_share",
}


def test_a_run_leaves_what_it_promises(folder, straight):
    out = folder / "out"
    assert straight.step == 8
    text = (out / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(line.keys() == KEYS for line in lines)
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == [*range(1, 9)]
    assert [lines.index(line) for line in lines if line["split"] == "validation"] == [4, 9]
    assert train[-1]["loss"] < train[0]["loss"]
    assert math.isclose(train[0]["loss"], math.log(320), rel_tol=0.05)
    assert [line["learning_rate"] for line in train[:3]] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert all(0 < line["target_share"] < 1 and 0 <= line["padding_share"] < 1 for line in lines)
    assert json.loads((out / "config.json").read_text())["steps"] == 8
    assert list(out.glob("events.out.tfevents.*"))
    assert not (out / "profile").exists()
    model, tokenizer = pretrained.load_pretrained(out / "export")
    exported = dict(layout.to_hf_tensors(model))
    assert exported["model.final_norm.weight"].tolist() == (
        straight.params["model"]["final_norm"]["weight"][...].tolist()
    )
    assert tokenizer.vocab_size <= model.config.vocab_size == 320
    card = (out / "export" / "README.md").read_text()
    assert "80% answer token prediction" in card
    assert "300 records" in card


def test_the_report_counts_every_held_out_answer(folder, straight):
    report = json.loads((folder / "out" / "validation.json").read_text())
    per_task = report["per_task"]
    assert set(per_task) == set(TASKS)
    assert report["n"] == sum(row["n"] for row in per_task.values()) > 20
    correct = sum(row["n"] * row["accuracy"] for row in per_task.values())
    assert report["accuracy"] == pytest.approx(correct / report["n"])
    low, high = report["accuracy_ci95"]
    assert low <= report["accuracy"] <= high
    assert all(row["majority_answer"].strip() in TASKS[task] for task, row in per_task.items())
    majority = sum(row["n"] * row["majority"] for row in per_task.values()) / report["n"]
    assert report["majority"] <= report["per_task_majority"] == pytest.approx(majority)


def test_the_losses_of_each_source_are_reported(folder, capsys):
    """The sources are questions and plain text; each is masked as in training."""
    with (folder / "texts.jsonl").open("w") as file:
        for number in range(150):
            words = " ".join(OTHERS[number * i % 7] for i in range(1, 20))
            file.write(json.dumps({"text": f"{words}. {words}"}) + "\n")
    (source,) = make_table(folder)["data"]["sources"]
    texts = {"path": str(folder / "texts.jsonl"), "text": "text", "cut": "sentence"}
    out = folder / "two"
    changes = {
        "out": str(out),
        "data__rows": str(folder / "rows-two"),
        "data__validation_rows": 30,  # enough to hold out some of both
        "data__sources": [source | {"name": "questions"}, texts | {"name": "texts"}],
        "objective": {"mlm_share": 0.5, "masking": "whole_word"},
        "steps": 4,
    }
    for one in changes["data__sources"]:
        one["weight"] = 1.0
    run_training(make_config(folder, **changes))
    report = json.loads((out / "validation.json").read_text())["per_source"]
    assert set(report) == {"questions", "texts"}
    assert all(0 < report["questions"][key] < 7 for key in ("loss_atp", "loss_mlm"))
    assert report["questions"]["answer_accuracy"] is not None
    assert report["texts"].keys() == report["questions"].keys()
    assert report["texts"]["loss_atp"] is report["texts"]["answer_accuracy"] is None
    assert 0 < report["texts"]["loss_mlm"] < 7
    printed = capsys.readouterr().out
    assert f"texts      {'':8}  {report['texts']['loss_mlm']:8.3f}" in printed
    changes["objective"]["masking"] = "span"
    with pytest.raises(InputError, match=r"objective\.masking is 'span', the run there has 'whole"):
        run_training(make_config(folder, **changes))


def test_a_run_without_its_whole_report_or_weights_is_not_finished(tmp_path):
    (tmp_path / "export").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "export" / name).write_text("{}")
    report = tmp_path / "validation.json"
    for text in ("{", "[]", '{"step": 8, "n": 1}', '{"step": 8, "n": 0, "per_source": 3}'):
        report.write_text(text)
        assert read_finished(tmp_path, 8) is None
    report.write_text('{"step": 8, "n": 0, "per_source": {}}')
    assert read_finished(tmp_path, 7) is None
    assert read_finished(tmp_path, 8)
    (tmp_path / "export" / "model.safetensors").unlink()
    assert read_finished(tmp_path, 8) is None


def test_a_finished_run_is_reported_and_not_changed(folder, straight, capsys):
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "export").iterdir()}
    state = run_training(make_config(folder))
    printed = capsys.readouterr()
    assert "is complete at step 8; nothing to do" in printed.err
    assert "95 % interval" in printed.out
    assert_same(state, straight)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(lines_of(folder / "out")) == 10


def signal_once(monkeypatch, number, owner, name):
    """Send this process a signal when a function is called next."""
    original = getattr(owner, name)

    def signalled(*args, **kwargs):
        monkeypatch.setattr(owner, name, original)
        os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)


def test_signals_at_any_time_lose_nothing(folder, straight, monkeypatch, capsys):
    """Stopped between lines of metrics, while it saves and twice while it validates."""
    out, place = folder / "stopped", folder / "elsewhere" / "deep"
    changes = {"out": str(out), "log__every": 4, "checkpoint": {"every": 4, "path": str(place)}}
    command = ["train", str(write_config(make_table(folder, **changes)))]
    for number, owner, name, saved in (
        (signal.SIGTERM, loop_module, "count_tokens", 1),  # The first step has just compiled.
        (signal.SIGTERM, Checkpoints, "save", 4),
        (signal.SIGINT, loop_module, "validate", 8),
        (signal.SIGTERM, loop_module, "validate", 8),
    ):
        signal_once(monkeypatch, number, owner, name)
        expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
        with pytest.raises(expected) as caught:
            run_training(make_config(folder, **changes)) if saved > 1 else run(command)
        assert expected is KeyboardInterrupt or caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert max(int(path.name) for path in place.glob("[0-9]*")) == saved
        said = capsys.readouterr().err
        assert saved == 8 or f"stopped by a signal; step {saved} is saved" in said
        assert "Traceback" not in said
    assert run(command) == 0
    assert "resumes from step 8" in capsys.readouterr().err
    assert not (out / "checkpoints").exists()
    assert_same(run_training(make_config(folder, **changes)), straight)
    lines, expected = lines_of(out), lines_of(folder / "out")
    assert [line for line in lines if line["split"] == "validation"] == [expected[4], expected[9]]
    for line, four in zip(lines[::2], (expected[:4], expected[5:9]), strict=True):
        norms = [line["grad_norm"] for line in four]
        assert line["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-12)


def test_a_run_resumes_on_another_mesh(folder, straight, monkeypatch):
    """There are more devices, and their peak is known, so there is an MFU."""
    monkeypatch.setattr(loop_module, "peak_flops", lambda kind, dtype: 1e12)
    out = folder / "moved"
    shutil.copytree(folder / "out", out)
    shutil.rmtree(out / "checkpoints" / "8")
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    state = run_training(make_config(folder, out=str(out), mesh=sizes, data__accumulate=2))
    assert not jax.tree.leaves(state.params)[0].is_fully_replicated
    losses, expected = ([line["loss"] for line in lines_of(o)] for o in (out, folder / "out"))
    assert losses[:5] == expected[:5]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    first, *others = [line for line in lines if line["split"] == "train" and line["step"] > 4]
    assert first["mfu"] is None  # The first update compiles.
    for line in others:
        assert line["mfu"] == pytest.approx(line["flops_per_second"] / 8e12)
        assert 1e3 < line["flops_per_second"] / line["tokens_per_second"] < 1e7


def test_a_loss_that_is_not_finite_stops_the_run(folder):
    out = folder / "diverged"
    changes = {"optimizer__learning_rate": 1e38, "schedule__warmup": 0, "checkpoint__every": 1}
    config = make_config(folder, out=str(out), **changes)
    with pytest.raises(RunError, match=r"step 2: the loss is .*nan.*examples \d+, \d+") as caught:
        run_training(config)
    assert "checkpoint of step 1 is whole" in str(caught.value)
    assert [line["step"] for line in lines_of(out)] == [1]


def test_steps_may_grow_if_no_update_that_was_made_changes(folder, straight):
    config = make_config(folder, steps=12)
    with Checkpoints(folder / "out" / "checkpoints", config.checkpoint) as checkpoints:
        metadata = checkpoints.metadata(4)
    identity = metadata["identity"]
    longer = {**identity, "rates": {**identity["rates"], "steps": 12}}
    check_same_run(config, 7, metadata, longer)
    with pytest.raises(InputError, match="update 8 of 8 already done had the learning rate"):
        check_same_run(config, 8, metadata, longer)


def test_starting_from_an_export(folder, straight):
    start = {"init_from": str(folder / "out" / "export"), "model": None, "tokenizer": None}
    run_training(make_config(folder, out=str(folder / "tuned"), **start))
    first = lines_of(folder / "tuned")[0]
    assert first["loss"] < lines_of(folder / "out")[0]["loss"] - 0.1
    one, two = (read_training_manifest(folder / name / "export") for name in ("out", "tuned"))
    assert one.runs == two.runs[:1]
    assert [run.init_from for run in two.runs] == [None, "export"]  # without its folder
    assert one.runs[0].tasks == ["animal", "color"]
    card = (folder / "tuned" / "export" / CARD).read_text()
    assert card.count("## Training") == 2  # its own, and that of its start
    assert "## Source of the weights" in card


def test_two_processes_do_not_train_in_one_folder(folder, straight):
    message = "another process uses it"
    with train_module.alone_in(folder / "out"), pytest.raises(InputError, match=message):
        run_training(make_config(folder))


def test_no_room_for_metrics_fails_the_run(tmp_path):
    with closing(MetricsLog(tmp_path)) as log:
        log._file.close()
        log._file = open("/dev/full", "w")  # noqa: SIM115
        with pytest.raises(RunError, match="No space left"):
            log.write(1, "train", {"loss": 1.0})


def test_prepare_says_what_it_kept(folder, straight, capsys):
    rows = prepare_rows(make_config(folder))
    assert rows == folder / "rows"
    assert "300 records, 300 examples" in capsys.readouterr().out
