"""Ways to learn that `fit` takes: adapters, chosen parameters, restarts, a rate that is found."""

import json
import shutil

import numpy as np
import pytest
from tables import labelled_rows, write_table
from task_files import REVIEWS

from mlmjax import Choice, Classifier, Decider, load_pretrained
from mlmjax.cli import main
from mlmjax.cli.tables.choice import choose
from mlmjax.errors import InputError
from mlmjax.model.modernbert import parameters

ADAPTER = ("--adapter", "lora", "--rank", "4", "--alpha", "32")


def fit(folder, model, *options):
    """Fit a table in a folder, and return the folder of the classifier and its results."""
    out = folder / "out"
    table = write_table(folder / "tickets.csv", labelled_rows(60))
    given = ["fit", str(table), "--out", str(out), "--model", str(model), *options]
    assert main.run(given) == 0
    return out, json.loads((out / "report" / "results.json").read_text())


@pytest.fixture(scope="module")
def adapted(word_folder, tmp_path_factory):
    """A classifier that is an adapter with a pointer to its base, which is a copy."""
    folder = tmp_path_factory.mktemp("adapted")
    shutil.copytree(word_folder, folder / "base")
    options = ("--learning-rate", "1e-1", "--epochs", "3")
    return *fit(folder, folder / "base", *ADAPTER, *options), folder / "base"


def test_an_adapter_is_saved_with_a_pointer_to_its_base(adapted):
    out, results, base = adapted
    names = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "mlmjax_adapter.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 32)
    assert config["base_model_name_or_path"] == str(base)
    assert 0 < results["trained_share"] < 0.2


def test_an_adapter_is_classified_with_served_and_evaluated(adapted, tmp_path, monkeypatch, capsys):
    out, _, _ = adapted
    monkeypatch.chdir(tmp_path)
    rows = labelled_rows(60)
    table = write_table(tmp_path / "new.csv", rows)
    lines = (out / "report" / "predictions.jsonl").read_text().splitlines()
    expected = {int(one["where"].rpartition(" ")[2]): one for one in map(json.loads, lines)}
    capsys.readouterr()
    assert main.run(["classify", "--model", str(out), "--text", "text", "--full", str(table)]) == 0
    for answer in map(json.loads, capsys.readouterr().out.splitlines()):
        if answer["line"] in expected:
            known = expected[answer["line"]]["probabilities"]
            assert answer["probabilities"] == pytest.approx(known, abs=1e-6)
    with pytest.warns(UserWarning, match="a choice among money, sports is asked as the classifier"):
        decider = Decider(out)
    asked = {"label": Choice("Which label?", ["sports", "money"])}
    answers = decider.decide_many([rows[line - 2]["text"] for line in expected], asked)
    for one, known in zip(answers, expected.values(), strict=True):
        assert one["label"].probabilities == pytest.approx(known["probabilities"], abs=1e-5)
    (tmp_path / "reviews.toml").write_text(
        REVIEWS.replace("reviews.csv", "new.csv").replace('["bad", "good"]', '["sports", "money"]')
    )
    evaluate = ["evaluate", "--task", "reviews.toml", "--data", "new.csv", "--order-rows", "0"]
    assert main.run([*evaluate, "--model", str(out)]) == 0
    assert "60 rows" in capsys.readouterr().out


def test_an_adapter_does_not_replace_its_base(adapted, tmp_path, capsys):
    base = shutil.copytree(adapted[2], tmp_path / "base")
    table = write_table(tmp_path / "a.csv", labelled_rows(40))
    given = ["fit", str(table), "--model", str(base), "--out", str(base), *ADAPTER]
    assert main.run(given) == 2
    assert "is the base of the adapter; name another folder" in capsys.readouterr().err
    assert (base / "model.safetensors").exists()


@pytest.mark.parametrize("load", [Classifier.from_pretrained, Decider, load_pretrained])
def test_a_changed_base_is_rejected_in_words(adapted, tmp_path, load):
    out, _, base = adapted
    shutil.copytree(out, tmp_path / "moved")
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "moved" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(base), str(tmp_path / "base")))
    load_pretrained(tmp_path / "moved")
    weights = bytearray((tmp_path / "base" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "base" / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="has other weights than those that the adapter was"):
        load(tmp_path / "moved")


def test_an_adapter_is_no_start_of_a_table(adapted, tmp_path):
    out, _, base = adapted
    with pytest.raises(InputError, match="is already a classifier"):
        choose(str(out), ["a", "b"], 100)
    shutil.copytree(out, tmp_path / "plain")
    (tmp_path / "plain" / "mlmjax_classifier.json").unlink()
    with pytest.raises(InputError, match=f"plain: is an adapter; give its base .{base}"):
        choose(str(tmp_path / "plain"), ["a", "b"], 100)


def test_chosen_parameters_learn_and_a_rate_is_found(word_folder, tmp_path, capsys):
    given = ("--train", "*bias", "--train", "*norm*", "--learning-rate", "auto", "--epochs", "2")
    out, results = fit(tmp_path, word_folder, *given)
    said = capsys.readouterr().err
    assert "learning rate found by a short training, epochs 2" in said
    assert "% of the parameters; the others are frozen" in said
    assert 1e-5 < results["learning_rate"] < 1e-1
    before, after = (parameters(load_pretrained(one)[0]) for one in (word_folder, out))
    changed = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    assert changed
    assert all("norm" in name or name.endswith("bias") for name in changed)


def test_restarts_choose_on_training_rows(word_folder, tmp_path, capsys):
    given = ("--restarts", "1", "--learning-rate", "1e-7", "--epochs", "1")
    _, results = fit(tmp_path, word_folder, *given)
    printed, said = capsys.readouterr()
    assert "trains up to 1 time more if nothing was learned, and keeps the best on 20% of" in said
    assert "2 trainings, of which the best on held-out training rows was kept" in printed
    assert results["fit"]["attempts"] == 2
    assert results["n"] == 12


@pytest.mark.parametrize("way", ["words", "head"])
def test_the_rate_follows_what_is_trained(word_folder, tmp_path, tokenizer, way):
    """An adapter of a large model is small."""
    config = json.loads((word_folder / "config.json").read_text())
    config |= {"vocab_size": 50368, "hidden_size": 2048, "pad_token_id": tokenizer.pad_id}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer.save(tmp_path)
    (tmp_path / "model.safetensors").touch()
    found = {
        name: choose(str(tmp_path), ["yes", "no"], 100, way=way, **options)
        for name, options in {
            "whole": {},
            "adapter": {"adapter": {"kind": "lora"}},
            "norms": {"train": ["*norm*"]},
        }.items()
    }
    assert [one.learning_rate for one in found.values()] == [3e-5, 1e-3, 1e-3]
    assert found["whole"].trained == 1
    assert found["norms"].trained < found["adapter"].trained < 0.02


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--adapter", "dora"], "'dora' is not 'lora'"),
        (["--rank", "4"], "--rank belongs to --adapter lora"),
        (["--adapter", "lora", "--rank", "0"], "Invalid value for '--rank'"),
        (["--adapter", "lora", "--alpha", "nan"], "'--alpha': nan is not a finite number"),
        (["--adapter", "lora", "--train", "*bias"], "leave out either it or train"),
        (["--train", "*bais"], "train: '*bais' names no parameter"),
        (["--learning-rate", "fast"], "Invalid value for '--learning-rate'"),
        (["--restarts", "-1"], "Invalid value for '--restarts'"),
    ],
)
def test_settings_that_cannot_work_are_rejected_before_training(
    word_folder, tmp_path, capsys, arguments, says
):
    table = write_table(tmp_path / "a.csv", labelled_rows(40))
    out = tmp_path / "out"
    given = ["fit", str(table), "--model", str(word_folder), "--out", str(out), *arguments]
    assert main.run(given) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()
