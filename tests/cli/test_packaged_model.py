"""The packaged model: found by its name, the same in transformers, and what its card says it is."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_models import torch, transformers

import mlmjax
from mlmjax.cli import commands
from mlmjax.cli.demo import PROMPT, read_jsonl
from mlmjax.errors import InputError
from mlmjax.evaluation.suite.entrants import SuiteModel
from mlmjax.weights import hub

ROOT = Path(__file__).parents[2]
PACKAGE = Path(mlmjax.__file__).parent
PACKAGED = PACKAGE / "assets" / "small"
TEXTS = [row["text"] for row in read_jsonl(PACKAGE / "assets" / "openstax" / "test.jsonl")][::48]
SUBJECTS = ["biology", "history", "physics"]
MIB = 2**20


@pytest.fixture(scope="module")
def loaded():
    return mlmjax.load_pretrained("mlmjax-small")


def test_is_found_by_its_name_and_computes_in_float32(loaded):
    model, tokenizer = loaded
    assert hub.fetch("mlmjax-small") == PACKAGED
    assert model.model.final_norm.weight.dtype == np.float32
    assert tokenizer.vocab_size <= model.config.vocab_size


def test_a_folder_of_that_name_is_another_one(tmp_path, monkeypatch):
    (tmp_path / "mlmjax-small").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the packaged model and a folder"):
        hub.fetch("mlmjax-small")
    assert hub.fetch("./mlmjax-small") == hub.fetch(Path("mlmjax-small")) == Path("mlmjax-small")


def test_has_no_revisions():
    with pytest.raises(InputError, match="is the packaged model, but revision 'main'"):
        mlmjax.load_pretrained("mlmjax-small", revision="main")


def test_is_small_enough_to_be_packaged():
    size = sum(path.stat().st_size for path in PACKAGED.iterdir())
    whole = sum(path.stat().st_size for path in PACKAGE.rglob("*") if path.is_file())
    assert (PACKAGED / "model.safetensors").stat().st_size <= 40 * 10**6
    assert size < 40 * MIB
    assert whole < 60 * MIB


def test_transformers_gives_the_same_answers_from_our_export(loaded, tmp_path):
    folder = tmp_path / "export"
    mlmjax.save_pretrained(*loaded, folder, dtype="bfloat16")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    scorer = mlmjax.Scorer(
        *loaded,
        mlmjax.Template(PROMPT),
        mlmjax.Verbalizer({label: [f" {label}"] for label in SUBJECTS}),
    )
    ours = scorer.log_probs([{"text": text} for text in TEXTS])
    columns = [words.encode(f" {label}", add_special_tokens=False)[0] for label in SUBJECTS]
    found = []
    for text in TEXTS:
        inputs = words(PROMPT.format(text=text), return_tensors="pt")
        slot = (inputs["input_ids"][0] == words.mask_token_id).nonzero()[-1, 0]
        with torch.no_grad():
            logits = theirs(**inputs).logits[0, slot, columns]
        found.append(logits.log_softmax(-1).numpy())
    np.testing.assert_allclose(ours, np.stack(found), atol=1e-4)
    assert (ours.argmax(1) == np.stack(found).argmax(1)).all()
    assert np.ptp(ours, axis=0).min() > 0.01  # answers differ between texts


def test_every_command_uses_it_where_no_model_is_given(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:3]), encoding="utf-8")
    asked = ["classify", "--labels", ",".join(SUBJECTS), str(tmp_path / "texts.txt")]
    invoke = partial(CliRunner().invoke, commands.cli, catch_exceptions=False)
    plain, named = invoke(asked), invoke([*asked, "--model", "mlmjax-small"])
    assert plain.stdout == named.stdout
    assert len(plain.stdout.splitlines()) == 3
    assert "using the packaged mlmjax-small" in plain.stderr
    assert "packaged" not in named.stderr
    task = ROOT / "configs/tasks/subjects.toml"
    found = invoke(["evaluate", "--json", "--task", str(task), "--limit", "4", "--order-rows", "0"])
    assert json.loads(found.stdout)["n"] == 4
    assert "using the packaged mlmjax-small" in found.stderr


def test_tells_what_it_was_trained_on():
    manifest = json.loads((PACKAGED / "training_manifest.json").read_text())
    assert [run["init_from"] for run in manifest["runs"]] == [
        None,
        "start",
        "runs/small-mlm/export",
    ]
    card = (PACKAGED / "README.md").read_text(encoding="utf-8")
    for needed in ("OpenStax", "CC BY 4.0", "Super-NaturalInstructions", "Limits", "chance"):
        assert needed in card
    assert "$" not in card


def test_the_experiments_are_of_this_model():
    found = json.loads((ROOT / "docs/experiments/results.json").read_text())
    identity = SuiteModel("mlmjax-small", None, "float32", None).identity
    for name in ("small_zero_shot", "small_fine_tune"):
        assert found["suites"][name]["models"]["mlmjax-small"] == identity
