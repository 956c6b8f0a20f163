"""Models go to a hub and come back from it whole, and nothing else goes with them."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner
from labelled_texts import word_model, word_tokenizer
from pages import ROOT, blocks, commands
from processes import free_port
from stand_in_hub import READER, TOKEN, stand_in_hub, using_hub
from tables import labelled_rows, write_table

from mlmjax import Choice, Classifier, Decider, load_pretrained, save_adapter, save_pretrained
from mlmjax.cli.commands import cli
from mlmjax.cli.main import run
from mlmjax.config.run import AdapterConfig
from mlmjax.errors import InputError
from mlmjax.evaluation.summary import RESULTS
from mlmjax.model.modernbert import parameters, with_adapter
from mlmjax.storage import CARD, CONFIG
from mlmjax.weights.hub import push

# What the hub's client says to its own transport is not ours to change.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

TEXTS = ["the goal", "a bank"]
FIGURES = {
    "task": "sst2",
    "n": 200,
    "accuracy": 0.875,
    "accuracy_ci95": [0.8219, 0.9139],
    "macro_f1": 0.8712,
    "macro_f1_ci95": [0.8201, 0.9155],
    "contamination": "excluded",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small model, and with files that are nobody else's business."""
    folder = tmp_path_factory.mktemp("push") / "model"
    tokenizer = word_tokenizer(folder.parent / "words")
    save_pretrained(word_model(tokenizer), tokenizer, folder)
    (folder / "LICENSE").write_text("Free.")
    (folder / "notes.txt").write_text("secret")
    (folder / "old.safetensors").write_bytes(b"secret")
    (folder / "report").mkdir()
    (folder / "report" / "predictions.jsonl").write_text("secret")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with stand_in_hub() as (hub, base), using_hub(base, tmp_path / "cache", monkeypatch):
        yield hub


def same_weights(one, other):
    one, other = parameters(one), parameters(other)
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def test_a_model_comes_back_and_only_its_own_files_leave(hub, folder, tmp_path, capsys):
    address = push(folder, "team/model")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/team/model/tree/[0-9a-f]{40}", address)
    assert "stays here: notes.txt, old.safetensors, report" in capsys.readouterr().err
    assert hub.repositories["team/model"].private
    files = hub.files("team/model")
    names = {CARD, CONFIG, "LICENSE", "model.safetensors", "tokenizer.json"}
    assert names <= files.keys() <= names | {"tokenizer_config.json", "special_tokens_map.json"}
    assert all(content == (folder / name).read_bytes() for name, content in files.items())
    texts = b"\n".join(content for name, content in files.items() if "safetensors" not in name)
    for secret in (TOKEN, str(folder), str(Path.home()), socket.gethostname(), "secret"):
        assert not re.search(rb"\b%s\b" % re.escape(secret.encode()), texts)
    assert not any(word in b"".join(hub.received) for word in (TOKEN.encode(), b"notes.txt"))
    model, _ = load_pretrained("team/model")
    assert same_weights(model, load_pretrained(folder)[0])
    with pytest.raises(InputError, match="no such revision"):
        load_pretrained("team/model", revision="other")
    model.model.final_norm.weight[...] += 1
    save_pretrained(model, None, tmp_path / "trained")
    card = huggingface_hub.ModelCard((tmp_path / "trained" / CARD).read_text())
    assert card.data.base_model == "team/model"


def test_a_classifier_and_a_decider_come_back(hub, folder, tmp_path):
    classifier = Classifier(folder, ["sports", "money"])
    classifier.save_pretrained(tmp_path / "c", push_to="team/c", private=False)
    assert not hub.repositories["team/c"].private
    back = Classifier("team/c").predict_proba(TEXTS)
    np.testing.assert_array_equal(back, classifier.predict_proba(TEXTS))
    decider = Decider(folder)
    decider.save_pretrained(tmp_path / "d", push_to="team/d")
    asked = TEXTS[0], {"kind": Choice("Which?", {"sports": None, "money": None})}
    there = Decider("team/d").decide(*asked)["kind"].probabilities
    assert there == decider.decide(*asked)["kind"].probabilities


def test_an_adapter_comes_back_with_its_base_from_the_hub(hub, folder, tmp_path):
    model, tokenizer = load_pretrained(folder)
    local = with_adapter(model, AdapterConfig(rank=2))
    with pytest.raises(InputError, match=r"whose base is a folder of this machine .*push the base"):
        save_adapter(local, tokenizer, tmp_path / "local", push_to="team/adapter")
    assert not hub.repositories
    push(folder, "team/base")
    adapted = with_adapter(load_pretrained("team/base")[0], AdapterConfig(rank=2))
    save_adapter(adapted, tokenizer, tmp_path / "adapter", push_to="team/adapter")
    assert same_weights(load_pretrained("team/adapter")[0], adapted)
    card = huggingface_hub.ModelCard(hub.files("team/adapter")[CARD].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", "team/base")
    assert "Its base" not in card.text
    assert "The base is 'team/base'" in card.text


def test_a_second_push_replaces_the_model_and_keeps_what_others_wrote(hub, folder, capsys):
    push(folder, "team/model")
    files = hub.files("team/model")
    stale = {"adapter_config.json", "model-00001-of-00002.safetensors"}
    files |= dict.fromkeys(stale, b"old")
    kept = {"logo.png": b"mine", "NOTICE": b"mine", "runs/a.safetensors": b"mine"}
    files |= kept
    push(folder, "team/model", private=False)
    assert not stale & files.keys()
    assert kept.items() <= files.items()
    assert "team/model: exists and stays private" in capsys.readouterr().err
    push(folder, "team/model", revision="next")
    assert hub.files("team/model", "next").keys() == files.keys()
    assert same_weights(
        load_pretrained("team/model", revision="next")[0], load_pretrained(folder)[0]
    )


@pytest.mark.parametrize(
    ("name", "token", "reason"),
    [
        ("team/model", None, r"nobody is logged in; run `hf auth login`"),
        ("team/model", READER, r"the token may not write there"),
        ("others/model", TOKEN, r"the token may not write there"),
        ("model", TOKEN, r"is not a hub id; expected organisation/name"),
        ("team/a b", TOKEN, r"not a valid hub id"),
    ],
)
def test_what_the_hub_rejects_is_said_in_words(
    hub, folder, tmp_path, monkeypatch, name, token, reason
):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=reason) as error:
        push(folder, name)
    assert not hub.repositories
    assert "hf_" not in str(error.value)


def test_a_public_repository_is_not_written_to_by_accident(hub, folder):
    push(folder, "team/model", private=False)
    before = dict(hub.files("team/model"))
    with pytest.raises(InputError, match="exists on the hub and is public; give --public"):
        push(folder, "team/model")
    assert hub.files("team/model") == before


def test_without_a_net_or_with_the_hub_switched_off_nothing_happens(folder, tmp_path, monkeypatch):
    nowhere = f"http://127.0.0.1:{free_port()}"
    with using_hub(nowhere, tmp_path / "cache", monkeypatch):
        with pytest.raises(InputError, match="the hub is unreachable"):
            push(folder, "team/model")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(InputError, match="the hub is switched off; unset HF_HUB_OFFLINE"):
            push(folder, "team/model")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (CARD, f"use {TOKEN}", "holds your token of the hub"),
        (CARD, "use hf_" + "x" * 34, "holds what looks like a token of the hub"),
        (CARD, f"from {Path.home()}/data", "holds the path of your home directory"),
        (CARD, "from {here}/data", "holds the path of this folder"),
        ("export/config.json", "{}", "is the folder of a run; push .*export"),
        (CONFIG, None, "holds neither config.json nor adapter_config.json"),
        ("model.safetensors", None, "model.safetensors: is missing"),
    ],
)
def test_a_folder_that_should_not_leave_stays(hub, folder, tmp_path, file, content, reason):
    for name in (CARD, CONFIG, "model.safetensors", "tokenizer.json"):
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / name).write_bytes((folder / name).read_bytes())
    path = tmp_path / "m" / file
    if content is None:
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content.replace("{here}", str(tmp_path)))
    with pytest.raises(InputError, match=reason):
        push(tmp_path / "m", "team/model")
    assert not hub.repositories


def test_a_link_out_of_the_folder_is_not_followed(hub, folder, tmp_path):
    (tmp_path / "m").mkdir()
    for name in (CONFIG, "model.safetensors"):
        (tmp_path / "m" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "m" / "NOTICE").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="NOTICE: is a link to"):
        push(tmp_path / "m", "team/model")


def test_the_card_shows_what_was_measured(hub, folder, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    for figures in (FIGURES, FIGURES | {"accuracy": 0.9}):
        (results / RESULTS).write_text(json.dumps(figures))
        done = CliRunner().invoke(
            cli, ["push", str(folder), "team/model", "--results", str(results)]
        )
        assert done.exit_code == 0, done.output
        text = hub.files("team/model")[CARD].decode()
        accuracy, macro_f1 = huggingface_hub.ModelCard(text).data.eval_results
        assert accuracy.metric_value == figures["accuracy"]
        expected = {"n": 200, "interval_95": [0.8219, 0.9139], "contamination": "excluded"}
        assert accuracy.metric_args == expected
        assert macro_f1.metric_name == "macro-F1"
        assert text.count("## Measured results") == 1
        assert f"| {figures['accuracy']:.4f} | 0.8219 to 0.9139 | 200 | excluded |" in text
    assert (folder / CARD).read_text() != text
    (results / RESULTS).write_text("{}")
    done = CliRunner().invoke(cli, ["push", str(folder), "team/model", "--results", str(results)])
    assert isinstance(done.exception, InputError)
    assert "is not the result of mlmjax evaluate --out" in str(done.exception)


def test_the_commands_of_the_page_run(hub, tmp_path, monkeypatch, capsys):
    """The fit before them writes figures into the card, which the push keeps."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "sharing.md").read_text()
    write_table(tmp_path / "tickets.csv", labelled_rows(40))
    rows = [{"text": f"fine {n}", "label": n % 2} for n in range(6)]
    (tmp_path / "sst2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = word_tokenizer(tmp_path / "words")
    save_pretrained(word_model(tokenizer), tokenizer, tmp_path / "small")
    fit = ["fit", "tickets.csv", "--model", "small", "--epochs", "1"]
    for arguments in (fit, *(one.arguments for one in commands(blocks("bash", page)[0]))):
        assert run(arguments) == 0, capsys.readouterr().err
    card = huggingface_hub.ModelCard(hub.files("my-team/tickets")[CARD].decode())
    tests = {(one.dataset_name, one.metric_args["n"]) for one in card.data.eval_results}
    assert tests == {("held-out rows of tickets.csv", 8), ("sst2", 6)}
    assert not {"report", "report/results.json"} & hub.files("my-team/tickets").keys()


def test_the_command_uses_the_settings_of_the_hubs_client(folder, tmp_path):
    with stand_in_hub() as (hub, base):
        settings = {"HF_ENDPOINT": base, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
        settings |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "mlmjax", "push", str(folder), "team/model"],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{folder}: uploaded to {base}/team/model/tree/")
        assert TOKEN not in done.stdout + done.stderr
        assert "model.safetensors" in hub.files("team/model")
