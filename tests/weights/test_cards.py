"""What says where weights come from survives every road that weights take."""

import json
import shutil

import huggingface_hub
import jax.numpy as jnp
import pytest
from tiny_models import write_model

from mlmjax import resize_token_embeddings
from mlmjax.model.modernbert import with_classifier
from mlmjax.storage import CARD, CLASSIFIER, PROVENANCE, TRAINING
from mlmjax.weights import convert
from mlmjax.weights.cards import model_card
from mlmjax.weights.model_checkpoint import load_model, save_model
from mlmjax.weights.pretrained import load_pretrained, save_pretrained

README = b"""---
license: cc-by-4.0
language: en
tags: [theirs]
---
# A model of others

Made by Ada. caf\xe9
"""
RUN = {"init_from": None, "tasks": ["sst2"], "sources": [], "excluded_tasks": [], "excluded": []}
MANIFEST = json.dumps({"format": 1, "runs": [RUN]}).encode()
FILES = {CARD: README, TRAINING: MANIFEST, "LICENSE": b"Free.", "NOTICE": b"By Ada."}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    write_model(folder)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in PROVENANCE if (folder / name).exists()}


def check_derived(folder, runs=1):
    """Check that a folder of other weights has its own card, which holds that of its source."""
    found = files_of(folder)
    assert found.keys() == FILES.keys()
    assert (found["LICENSE"], found["NOTICE"]) == (b"Free.", b"By Ada.")
    card = huggingface_hub.ModelCard(found[CARD].decode())
    assert (card.data.license, card.data.language) == ("cc-by-4.0", "en")
    assert "mlmjax" in card.data.tags
    assert "## Source of the weights" in card.text
    assert "Made by Ada." in card.text
    manifest = json.loads(found[TRAINING])
    assert manifest["runs"][0]["tasks"] == ["sst2"]
    assert len(manifest["runs"]) == runs


def test_the_same_weights_keep_the_files_byte_by_byte(source, tmp_path):
    save_pretrained(*load_pretrained(source), tmp_path / "saved")
    save_model(tmp_path / "orbax", *load_pretrained(source))
    save_pretrained(*load_model(tmp_path / "orbax"), tmp_path / "back", dtype="source")
    for name in ("saved", "orbax", "back"):
        assert files_of(tmp_path / name) == FILES


@pytest.mark.usefixtures("orbax_leftovers")
def test_conversion_there_and_back_keeps_them(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "in")
    (folder / CLASSIFIER).write_bytes(b'{"settings": 1}')
    convert.to_jax(str(folder), tmp_path / "jax")
    convert.to_hf(tmp_path / "jax", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "jax") == FILES
    assert (tmp_path / "out" / CLASSIFIER).read_bytes() == b'{"settings": 1}'


def test_a_larger_vocabulary_keeps_them(source, tmp_path):
    resized = resize_token_embeddings(*load_pretrained(source), [], size=64)
    save_pretrained(*resized, tmp_path / "hf")
    check_derived(tmp_path / "hf")
    save_model(tmp_path / "orbax", *resized)
    check_derived(tmp_path / "orbax")
    save_pretrained(*load_model(tmp_path / "orbax"), tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "orbax")


def test_another_head_keeps_them(source, tmp_path):
    model, tokenizer = load_pretrained(source)
    save_pretrained(with_classifier(model, ["a", "b"], seed=0), tokenizer, tmp_path / "out")
    check_derived(tmp_path / "out")
    assert "AutoModelForSequenceClassification" in (tmp_path / "out" / CARD).read_text()


def test_a_training_of_ones_own_is_in_the_manifest(source, tmp_path):
    model, tokenizer = load_pretrained(source)
    norm = model.model.final_norm.weight
    norm[...] = norm[...] + jnp.float32(1e-6)
    save_pretrained(model, tokenizer, tmp_path / "out", card="---\nlicense: mit\n---\n# Mine\n")
    assert (tmp_path / "out" / CARD).read_text() == "---\nlicense: mit\n---\n# Mine\n"
    _, run = json.loads((tmp_path / "out" / TRAINING).read_text())["runs"]
    assert run["sources"] == [{"name": "a training that mlmjax did not record"}]
    save_pretrained(model, tokenizer, tmp_path / "plain")
    check_derived(tmp_path / "plain", runs=2)


def test_a_broken_manifest_does_not_keep_trained_weights_from_being_saved(source, tmp_path, caplog):
    folder = shutil.copytree(source, tmp_path / "in")
    (folder / TRAINING).write_bytes(b"{}")
    model, tokenizer = load_pretrained(folder)
    model.model.final_norm.weight[...] = model.model.final_norm.weight[...] * 2
    save_pretrained(model, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / TRAINING).read_bytes() == b"{}"
    assert "it is saved unchanged, without this training" in caplog.text


@pytest.mark.parametrize("text", [b"---\n: [\n---\n# A", b"---\n- a\n---\n", b"", b"\xff\xfe---\n"])
def test_a_card_that_is_broken_does_not_stop_the_model(text, source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "in")
    (folder / CARD).write_bytes(text)
    model, tokenizer = load_pretrained(folder)
    save_pretrained(model, tokenizer, tmp_path / "same")
    assert (tmp_path / "same" / CARD).read_bytes() == text
    save_pretrained(with_classifier(model, ["a", "b"], seed=0), tokenizer, tmp_path / "other")
    assert "Source of the weights" in (tmp_path / "other" / CARD).read_text()


def test_a_file_that_cannot_be_read_is_named(source, tmp_path, caplog):
    folder = shutil.copytree(source, tmp_path / "in")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("/etc/hostname")
    save_pretrained(*load_pretrained(folder), tmp_path / "out")
    assert "LICENSE: is a link to" in caplog.text
    assert files_of(tmp_path / "out").keys() == FILES.keys() - {"LICENSE"}


def test_a_card_holds_results_for_the_hub_and_sections_for_people(source):
    model, _ = load_pretrained(source)
    result = huggingface_hub.EvalResult(
        task_type="fill-mask",
        dataset_type="rows",
        dataset_name="held-out answers",
        metric_type="accuracy",
        metric_value=0.5,
    )
    text = model_card(model, sections="\n## Training\n\n{{ not a template }}\n", results=[result])
    card = huggingface_hub.ModelCard(text)
    assert card.data.eval_results == [result]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "fill-mask")
    assert "\n## Training\n\n{{ not a template }}\n\n## Source of the weights" in text
    plain = huggingface_hub.ModelCard(model_card(model))
    assert plain.data.eval_results is None
    assert "vocabulary 18" in plain.text
