"""The pages on embedding and deploying are true: their programs and commands run."""

import json
import subprocess
import sys

import numpy as np
import pytest
from pages import ROOT, blocks, commands
from small_models import small_model
from tables import labelled_rows, write_table

import mlmjax
from mlmjax.cli import main
from mlmjax.model.modernbert import ModernBertForSequenceClassification

EMBEDDING = (ROOT / "docs" / "embedding.md").read_text()
DEPLOYING = (ROOT / "docs" / "deploying.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    mlmjax.save_pretrained(small_model(num_hidden_layers=3), tokenizer, "HF_FOLDER")
    return tmp_path


def test_programs_of_the_embedding_page_run(folder, capsys):
    names = {}
    for block in blocks("python", EMBEDDING):
        small = block.replace("mlmjax-small", "HF_FOLDER").replace(
            "max_length=256", "max_length=96"
        )
        exec(compile(small, "embedding.md", "exec"), names)
    own = json.loads((ROOT / "mlmjax" / "assets" / "small" / "config.json").read_text())
    assert f"# (3, {own['hidden_size']}) float32" in EMBEDDING
    assert capsys.readouterr().out.startswith("(3, 32) float32\n")
    assert names["again"].settings == names["embedder"].settings


def test_commands_of_the_embedding_page_run(folder):
    (folder / "texts.txt").write_text("rain\nsun\n")
    rows = [{"ticket": row["id"], "body": row["text"]} for row in labelled_rows(3)]
    write_table(folder / "tickets.csv", rows)
    lines, table = commands(blocks("bash", EMBEDDING)[0])
    assert main.run([*lines.arguments, "--model", "HF_FOLDER"]) == 0
    assert main.run([*table.arguments, "--model", "HF_FOLDER"]) == 0
    assert np.load("vectors.npy").shape == (2, 32)
    assert (folder / "vectors.parquet").is_file()


def test_commands_of_the_deploying_page_run(folder):
    classifier = mlmjax.Classifier.from_pretrained("HF_FOLDER", ["rain", "sun"], answer="letters")
    classifier.save_pretrained("tickets-classifier")
    (folder / "new.txt").write_text("one text\nanother text\n")
    export, script = commands(blocks("bash", DEPLOYING)[0])
    shorter = [{"512": "160"}.get(word, word) for word in export.arguments]
    assert main.run(shorter) == 0
    run = [sys.executable, *script.arguments]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [list(json.loads(line)["probabilities"].values()) for line in lines]
    expected = classifier.predict_proba(["one text", "another text"])
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_gives_the_same_logits(folder):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    names = {}
    for block in blocks("python", DEPLOYING):
        exec(compile(block, "deploying.md", "exec"), names)
    model, _ = mlmjax.load_pretrained("HF_FOLDER")
    ids = np.array([names["encoded"].ids], np.int32)
    np.testing.assert_allclose(names["logits"], model(ids), rtol=0, atol=1e-4)
    # Other shapes, with padding.
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 50000, (3, 100)), np.ones((3, 100), np.int64)
    mask[1, 60:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    (found,) = names["session"].run(None, given)
    expected = np.asarray(model(ids.astype(np.int32), mask.astype(np.int32)))
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)


@pytest.mark.long
def test_pipelines_of_transformers_give_the_same_answers(folder, tokenizer):
    import transformers

    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}, "num_labels": 2}
    head = small_model(ModernBertForSequenceClassification, **labels)
    classifier = mlmjax.Classifier.from_pretrained((head, tokenizer), progress=False)
    classifier.save_pretrained("my-head-classifier")
    call = 'pipeline("text-classification", model="my-head-classifier")'
    assert call in DEPLOYING
    answers = eval(call, {"pipeline": transformers.pipeline})(["one text", "two"], top_k=None)
    found = [[{one["label"]: one["score"] for one in own}[n] for n in "ab"] for own in answers]
    prompts = classifier.asking_.scorer.template.around("text", {})
    assert prompts == ["", ""]  # the head reads the text alone
    np.testing.assert_allclose(found, classifier.predict_proba(["one text", "two"]), atol=1e-5)

    asking = mlmjax.Classifier.from_pretrained("HF_FOLDER", ["rain", "sun"], answer="letters")
    asking.save_pretrained("my-classifier")
    call = 'pipeline("fill-mask", model="my-classifier", targets=[" A", " B"])(prompt)'
    assert call in DEPLOYING
    parts, forms = asking.asking_.recipe()
    assert list(forms.values()) == [" A", " B"]
    prompt = "one text".join(parts)
    answers = eval(call, {"pipeline": transformers.pipeline, "prompt": prompt})
    scores = {one["token_str"]: one["score"] for one in answers}
    found = np.array([scores[" A"], scores[" B"]])
    expected = asking.predict_proba(["one text"])[0]
    np.testing.assert_allclose(found / found.sum(), expected, atol=1e-5)
