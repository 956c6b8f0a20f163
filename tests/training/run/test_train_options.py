"""Options of a run file beyond the plain recipe, each through the whole loop."""

import json
import random
from contextlib import redirect_stderr
from copy import deepcopy
from io import StringIO
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from training import OTHERS, TASKS, assert_same, lines_of, make_config

import mlmjax.training.run.loop as loop_module
from mlmjax.cli.main import run
from mlmjax.data.manifest import read_manifest
from mlmjax.data.preparing.prepare import prepare
from mlmjax.errors import InputError, RunError
from mlmjax.model.modernbert import ModernBertForSequenceClassification, parameters
from mlmjax.parallel import processes
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.run import train
from mlmjax.training.run.initial_model import load_tokenizer
from mlmjax.training.run.inputs import open_loaders
from mlmjax.training.run.timing import profiled_updates
from mlmjax.training.run.train import prepare_rows, run_training
from mlmjax.weights import pretrained
from mlmjax.weights.convert import check

pytestmark = pytest.mark.usefixtures("orbax_leftovers")

COLORS = TASKS["color"]


@pytest.fixture(scope="module", autouse=True)
def labelled_table(folder):
    rng = random.Random(1)
    with (folder / "table.jsonl").open("w") as file:
        for _ in range(400):
            label = rng.randrange(len(COLORS))
            words = [COLORS[label], *rng.choices(OTHERS, k=rng.randint(1, 6))]
            rng.shuffle(words)
            line = {"text": " ".join(words), "label": label, "score": 2.0 * label - 1}
            file.write(json.dumps(line) + "\n")


def labelled(folder, name, **changes):
    """A run of the classification head on the table."""
    source = {"path": str(folder / "table.jsonl"), "prompt": "{text}", "answer": "label"}
    source |= changes.pop("source", {"labels": COLORS})
    rows = changes.pop("rows", f"rows-{'labels' in source}")
    settings = {
        "out": str(folder / name),
        "head": "classification",
        "steps": 30,
        "data__rows": str(folder / rows),
        "data__seq_length": 16,
        "data__batch_size": 16,
        "data__pack": False,
        "data__validation_rows": 60,
        "data__sources": [source],
        "objective": {},
        "optimizer__learning_rate": 1e-2,
        "checkpoint__every": 15,
        "evaluation__every": 15,
        "log__every": 10,
    }
    return make_config(folder, **settings | changes)


def test_the_classification_head_learns_and_is_exported(folder, stop_after, capsys):
    state = run_training(labelled(folder, "classes"))
    out = folder / "classes"
    report = json.loads((out / "validation.json").read_text())
    assert report["n"] >= 60
    assert report["accuracy"] > 0.9 > report["majority"] + 0.3
    assert report["macro_f1"] > 0.9
    assert report["majority_answer"] in COLORS
    assert "95 % interval" in capsys.readouterr().out
    lines = lines_of(out)
    assert lines[-1]["split"] == "validation"
    assert lines[-1]["answer_accuracy"] == pytest.approx(report["accuracy"])
    assert lines[-1]["loss_atp"] is None
    model, tokenizer = pretrained.load_pretrained(out / "export")
    assert isinstance(model, ModernBertForSequenceClassification)
    assert list(model.config.id2label.values()) == COLORS
    ids = [tokenizer.cls_id, *tokenizer.encode_plain("tree moon blue fish"), tokenizer.sep_id]
    assert COLORS[int(jax.jit(lambda ids: model(ids))(np.array([ids])).argmax())] == "blue"
    card = (out / "export" / "README.md").read_text()
    assert "trained to give the labels red, blue, green" in card
    stopped = labelled(folder, "classes-stopped")
    stop_after(20, lambda: run_training(stopped))
    assert_same(run_training(stopped), state)
    assert lines_of(folder / "classes-stopped") == lines


def test_classification_starts_from_a_masked_language_model(folder, straight):
    start = {"init_from": str(folder / "out" / "export"), "model": None, "tokenizer": None}
    start |= {"steps": 2, "schedule": {"warmup": 0, "decay": 0}, "parallel": "pmap", "mesh": {}}
    run_training(labelled(folder, "head", **start))
    model, _ = pretrained.load_pretrained(folder / "head" / "export")
    assert model.config.num_labels == 3
    before, _ = pretrained.load_pretrained(folder / "out" / "export")
    embedding = "model.embeddings.tok_embeddings.weight"
    moved = parameters(model)[embedding] - parameters(before)[embedding]
    assert 0 < abs(np.asarray(moved)).max() < 0.1  # Two updates away from where it started.
    start["init_from"] = str(folder / "head" / "export")
    config = make_config(folder, out=str(folder / "wrong"), **start)
    with pytest.raises(InputError, match="or head = 'classification'"):
        run_training(config)


def test_without_labels_a_number_is_predicted(folder, capsys):
    run_training(labelled(folder, "scores", source={"answer": "score"}))
    report = json.loads((folder / "scores" / "validation.json").read_text())
    assert report["mse"] < 0.2 * report["mse_of_mean"]
    assert "mean squared error" in capsys.readouterr().out
    model, _ = pretrained.load_pretrained(folder / "scores" / "export")
    assert model.config.num_labels == 1
    assert model.config.problem_type == "regression"
    assert lines_of(folder / "scores")[-1]["answer_accuracy"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__pack": True}, r"set data.pack = false"),
        ({"objective": {"mlm_share": 0.1}}, "is for the MLM head"),
        ({"source": {"labels": ["red"]}}, "labels are 'red'; expected two or more"),
        ({"source": {"labels": ["red", "red"]}}, "'red' appears twice; expected distinct names"),
        ({"source": {"answer": "text"}}, "line 1: column 'text' is .* expected a number"),
        ({"source": {"labels": COLORS[:2]}}, "column 'label' is 2; expected one of"),
        (
            {"source": {"labels": COLORS, "prompt": "{text} [MASK]"}},
            "head does not read; leave it out",
        ),
    ],
)
def test_what_a_classification_head_cannot_be_trained_on_is_rejected(folder, changes, message):
    with pytest.raises(InputError, match=message):
        run_training(labelled(folder, "refused", rows="rows-refused", **changes))


def test_a_batch_of_more_rows_than_there_are_is_a_warning(folder, capsys):
    for size, warns in ((16, False), (4096, True)):
        config = labelled(folder, "batches", data__batch_size=size)
        train._open_rows(config, load_tokenizer(config))
        said = capsys.readouterr().err
        assert ("warning: data.batch_size is 4,096, and there are only " in said) == warns


def test_rows_are_for_one_head(folder):
    prepare_rows(make_config(folder))
    other = {"head": "classification", "objective": {}, "data__pack": False}
    with pytest.raises(InputError, match="head is 'classification', the rows have 'mlm'"):
        run_training(make_config(folder, out=str(folder / "other-head"), **other))


OPTIONS = {
    "data__batch_start": 4,
    "data__batch_warmup": 6,
    "data__accumulate": 2,
    "objective": {"mlm_share": 0.5, "mlm_rate": 0.4, "mlm_rate_end": 0.1},
    "optimizer": {
        "name": "stable_adamw",
        "learning_rate": 1e-3,
        "layer_decay": 0.8,
        "ema": 0.9,
        "skip_spikes": 1.0001,
    },
    "remat": "layer",
}


@pytest.fixture(scope="module")
def optioned(folder):
    """A run with many options: its state, its lines, and what it used and printed on the way."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as printed:
        # Every norm above the mean is a spike.
        patch.setattr("mlmjax.training.optimizer.SPIKE_WARMUP", 2)
        used = {name: record_first(patch, name) for name in ("count_tokens", "validate")}
        config = make_config(folder, out=str(folder / "options"), **OPTIONS)
        state = run_training(config, profile="2:3")
        yield state, lines_of(folder / "options"), used, printed.getvalue()


def record_first(patch, name):
    """Have a function of the loop record its first two arguments."""
    function, calls = getattr(loop_module, name), []
    patch.setattr(loop_module, name, lambda *a, **k: calls.append(a[:2]) or function(*a, **k))
    return calls


def test_a_decoder_of_its_own_is_trained_and_exported(folder):
    changes = {"model__tie_word_embeddings": False, "steps": 2, "schedule__warmup": 0}
    out = folder / "untied"
    run_training(make_config(folder, out=str(out), **changes))
    model, _ = pretrained.load_pretrained(out / "export")
    assert not model.config.tie_word_embeddings
    values = parameters(model)
    assert not np.array_equal(values["decoder.weight"], values[pretrained.EMBEDDING])
    assert check(out, out / "export").lines == []


def test_a_batch_grows_and_its_mask_rate_falls(folder, straight, optioned):
    """The first updates read few rows; the devices have to take each size."""
    _, lines, used, _ = optioned
    assert [len(batch.input_ids) for (batch,) in used["count_tokens"]] == [4] * 6 + [8] * 2
    shares = [line["target_share"] for line in lines if line["split"] == "train" and line["loss"]]
    assert shares[0] > shares[-1]
    # Padding of validation does not depend on the size of its batches.
    plain = lines_of(folder / "out")[-1]["padding_share"]
    assert lines[-1]["padding_share"] == pytest.approx(plain)


def test_averages_are_validated_and_exported(folder, optioned):
    state, _, used, _ = optioned
    exported, _ = pretrained.load_pretrained(folder / "options" / "export")
    average = state.opt_state.inner.average["model"]["final_norm"]["weight"][...]
    assert abs(average - state.params["model"]["final_norm"]["weight"][...]).max() > 0
    _, validated = used["validate"][-1]
    for params in (nnx.state(exported, nnx.Param), validated):
        np.testing.assert_array_equal(params["model"]["final_norm"]["weight"][...], average)


def test_spikes_are_skipped_and_counted(optioned):
    state, lines, _, printed = optioned
    train = [line for line in lines if line["split"] == "train"]
    skipped = sum(line["skipped_updates"] for line in train)
    assert 0 < skipped == int(state.opt_state.skipped)
    assert printed.count(": update skipped; its gradient norm is ") == skipped
    for line in train:  # Each is of one update.
        assert (line["loss"] is None) == bool(line["skipped_updates"])
        assert (line["grad_norm"] is None) == bool(line["skipped_updates"])
        assert line["padding_share"] is not None


def test_a_run_with_options_resumes_exactly(folder, optioned, stop_after):
    stopped = make_config(folder, out=str(folder / "options-stopped"), **OPTIONS)
    stop_after(5, lambda: run_training(stopped))
    assert_same(run_training(stopped), optioned[0])
    assert lines_of(folder / "options-stopped") == optioned[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 7}, "at step 8, past steps = 7"),
        (
            {"data__batch_warmup": 4},
            "update 5 of 8 already done had the number of rows 4; this configuration says 8",
        ),
        ({"objective": {"mlm_share": 0.5, "mlm_rate": 0.4}}, "had the mask rate"),
        ({"optimizer__learning_rate": 2e-3}, "update 1 of 8 already done had the learning rate"),
        ({"optimizer__layer_decay": 0.9}, "optimizer.layer_decay is 0.9, the run there has 0.8"),
        (
            {"data__batch_start": 2, "data__accumulate": 1, "mesh": {"data": 4}},
            "batch of 2 rows cannot be divided",
        ),
    ],
)
def test_another_run_in_the_same_folder_is_rejected(folder, optioned, change, message):
    out = folder / "options"
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=message):
        run_training(make_config(folder, out=str(out), **deepcopy(OPTIONS) | change))
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_profile_is_written(folder, optioned):
    assert list((folder / "options" / "profile").rglob("*.xplane.pb"))
    finished = make_config(folder, out=str(folder / "options"), **OPTIONS)
    with pytest.raises(InputError, match="has no updates left"):
        run_training(finished, profile="2:3")
    for updates, message in (("2:1", "expected FIRST:LAST"), ("2:9", "has updates 1 to 8 left")):
        with pytest.raises(InputError, match=message):
            profiled_updates(updates, 0, 8)
    assert run(["train", "missing.toml", "--profile", "1:2"]) == 2
    fresh = make_config(folder, out=str(folder / "fresh"), data__rows=str(folder / "fresh-rows"))
    with pytest.raises(InputError, match=r"--profile '3'"):
        run_training(fresh, profile="3")
    assert not (folder / "fresh-rows").exists()  # rejected before the rows are prepared


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation__every": 1}, "step 1: the validation loss is nan"),
        (
            {"data__validation_rows": 0, "data__rows": "all-rows"},
            "step 1: the parameters are not all finite",
        ),
    ],
)
def test_a_run_that_diverges_before_it_saves_fails_and_saves_nothing(
    folder, monkeypatch, changes, message
):
    """The first update already takes the parameters beyond float32."""
    monkeypatch.chdir(folder)
    changes["optimizer"] = {"learning_rate": 3e38, "weight_decay": 10.0}
    settings = {"schedule__warmup": 0, "checkpoint__every": 1, **changes}
    out = "diverged-" + message.split()[-1]
    with pytest.raises(RunError, match=message):
        run_training(make_config(folder, out=out, **settings))
    assert not list(Path(out, "checkpoints").glob("[0-9]*"))


def test_a_weighted_source_without_a_row_is_rejected(folder):
    # The hash of this prompt is low, so that it is held out.
    (folder / "one.jsonl").write_text('{"prompt": "the color: green red", "answer": "red"}\n')
    sources = [
        {"path": str(folder / f"{name}.jsonl"), "prompt": "{prompt}", "answer": "answer"}
        for name in ("records", "one")
    ]
    changes = {"data__validation_rows": 0.3, "data__rows": str(folder / "weighted-rows")}
    weighted = [source | {"weight": 0.5} for source in sources]
    config = make_config(folder, out=str(folder / "w"), data__sources=weighted, **changes)
    rows = prepare(config.data, Tokenizer.from_pretrained(folder / "tokenizer"))
    assert len({file.name for file in read_manifest(rows).splits["train"]}) == 1
    with pytest.raises(InputError, match=r"one.jsonl has the weight 0.5 and no row to draw"):
        run_training(config)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("score", v) for v in ("1_0", "١", 10**400, 1e7, "1" * 5000, "", "0x10", True, None)),
        *(("label", v) for v in (None, "1" * 5000, "²", 7)),
    ],
)
def test_what_is_no_number_or_no_label_is_rejected(folder, column, value):
    (folder / "odd.jsonl").write_text(json.dumps({"text": "red", column: value}) + "\n")
    source = {"path": str(folder / "odd.jsonl")}
    source |= {"answer": "score"} if column == "score" else {"labels": COLORS}
    with pytest.raises(InputError, match="line 1"):
        prepare_rows(labelled(folder, "odd", source=source, rows="rows-odd"))


def test_a_subset_is_what_is_drawn(folder):
    """The rows hold both sets; training draws those of the smaller, epoch after epoch."""

    changes = {"data__rows": str(folder / "rows-nested"), "data__select": {"sizes": [50, 150]}}
    changes |= {"data__batch_size": 2, "data__validation_rows": 1}

    def drawn(**subset):
        config = make_config(folder, **changes, **subset)
        tokenizer = Tokenizer.from_pretrained(config.tokenizer)
        prepare(config.data, tokenizer)
        train = open_loaders(config, tokenizer).train
        batches = range(3 * train.epoch_steps())
        return {int(i) for step in batches for row in train.example_indices(step) for i in row}

    small, large = drawn(data__subset=50), drawn()
    assert small < large == drawn(data__subset=150)
    assert 30 < len(small) <= 60
    assert 100 < len(large) <= 160


def test_a_run_that_only_skips_fails(folder, monkeypatch):
    monkeypatch.setattr("mlmjax.training.run.loop.MOST_SKIPPED", 2)
    changes = {"optimizer": {"learning_rate": 1e30, "skip_spikes": 2.0}, "schedule__warmup": 0}
    out = folder / "only-spikes"
    with pytest.raises(RunError, match="and the 2 updates before it were skipped") as caught:
        run_training(make_config(folder, out=str(out), **changes))
    assert "No checkpoint was saved yet" in str(caught.value)
    assert [line["loss"] is None for line in lines_of(out)][1:] == [True, True]


REMOTE = "gs://bucket/run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__vocab_size": 301}, "the tokenizer does not match the model"),
        ({"mesh": {"data": 3}}, "batch of 8 rows cannot be divided"),
        ({"mesh": {"data": 1, "tensor": 4}}, "tensor = 4 does not divide 2"),
        ({"attention": "splash"}, "needs a TPU"),
        ({"out": REMOTE}, f"^out = {REMOTE}: has to be .*only checkpoint.path"),
        ({"data__rows": "s3://bucket/rows"}, "^data.rows = s3://bucket/rows: has to be a folder"),
        ({"checkpoint": {"path": REMOTE}}, f"^{REMOTE}: cannot be reached .*gcsfs"),
        ({"checkpoint": {"path": "ftp://host/run"}}, "^ftp://host/run: cannot be reached"),
        *(
            ({"checkpoint": {"path": place}}, r"^checkpoint\.path: .* choose another folder")
            for place in ("rows-of-it", "rows-of-it/ck", "refused/export", "refused")
        ),
    ],
)
def test_what_cannot_be_trained_is_rejected(folder, monkeypatch, changes, message):
    monkeypatch.chdir(folder)
    changes = {"out": "refused", "data__rows": "rows-of-it", **changes}
    with pytest.raises(InputError, match=message):
        run_training(make_config(folder, **changes))
    assert not (folder / "gs:").exists()


def test_pmap_is_for_one_process(folder, monkeypatch):
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    with pytest.raises(InputError, match="uses the devices of one process, and there are 2"):
        run_training(make_config(folder, parallel="pmap", mesh={}))
