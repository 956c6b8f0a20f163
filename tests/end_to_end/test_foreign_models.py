"""Models of other trainers: another layout of special tokens, no anchor, wrapped weights."""

import json

import numpy as np
import pytest
import tokenizers
from labelled_texts import word_level
from tiny_models import CLASSES, change_config, torch, transformers, write_model
from tokenizers import processors

from mlmjax import Classifier, Template, Verbalizer, fill_mask, load_pretrained
from mlmjax.cli import main
from mlmjax.errors import InputError
from mlmjax.scoring.scorers import Scorer

# As in a vocabulary of Gemma: end of text before its beginning, and a mask of another name.
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"abcABCD", "red", "blue", "good", "bad"]
IDS = {"pad": 0, "eos": 1, "bos": 2, "cls": 1, "sep": 1, "mask": 4}
ROLES = {"pad": "<pad>", "unk": "<unk>", "cls": "<bos>", "sep": "<eos>", "mask": "<mask>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "model"
    special = {f"{role}_token_id": number for role, number in IDS.items()}
    write_model(folder, **special, tie_word_embeddings=False)
    table = json.loads(word_level(WORDS, "<unk>"))
    table["added_tokens"] = table["added_tokens"][:5]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    roles = {f"{role}_token": token for role, token in ROLES.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


def test_masks_are_filled_as_by_transformers(folder, caplog):
    model, tokenizer = load_pretrained(folder)
    assert "its [CLS] is 2; cls_token_id is 1 in config.json" in caplog.text
    ((found,),) = fill_mask(model, tokenizer, ["a [MASK] b"], top_k=3)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = [2, WORDS.index("a"), 4, WORDS.index("b"), 1]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0, 2].softmax(0).numpy()
    for one in found:
        np.testing.assert_allclose(one.probability, expected[one.id], rtol=1e-3)


def test_a_prompt_says_that_the_anchor_is_missing_and_what_works_without(folder, tmp_path, capsys):
    scorer = Scorer(*load_pretrained(folder), Template("{text}"), Verbalizer.words(["red", "blue"]))
    with pytest.raises(InputError, match=r"has no token \[unused0\].*have a classification head"):
        scorer.log_probs([{"text": "good"}])
    (tmp_path / "texts.txt").write_text("good\n")
    command = ["classify", "--model", str(folder), "--labels", "red,blue"]
    assert main.run([*command, str(tmp_path / "texts.txt")]) == 2
    assert "has no token [unused0]" in capsys.readouterr().err


def test_a_tokenizer_that_puts_other_tokens_around_a_text_is_named(folder, tmp_path, caplog):
    (tmp_path / "model").mkdir()
    for file in folder.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for template, says in (("<bos> $A", True), ("<bos> $A <eos>", False)):
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)]
        )
        backend.save(str(tmp_path / "model" / "tokenizer.json"))
        caplog.clear()
        load_pretrained(tmp_path / "model")
        assert ("around a text its own settings put [2]" in caplog.text) == says


def test_a_classification_head_needs_no_anchor(folder, tmp_path):
    classifier = Classifier(folder, ["bad", "good"], head="classification", epochs=1)
    texts, labels = ["good a", "bad b"] * 4, ["good", "bad"] * 4
    classifier.fit(texts, labels, batch_size=4).save_pretrained(tmp_path / "out")
    theirs = CLASSES["ModernBertForSequenceClassification"].from_pretrained(tmp_path / "out")
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    again = Classifier.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(again.predict_proba(texts), classifier.predict_proba(texts))


@pytest.mark.parametrize("ids", [{"mask_token_id": 7}, {"pad_token_id": 5}])
def test_the_advice_holds_where_the_tokenizer_is_the_models_own(ids, folder, tmp_path):
    (tmp_path / "model").mkdir()
    for file in folder.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    change_config(tmp_path / "model", **ids)
    with pytest.raises(InputError, match=f"or if this is it, correct {next(iter(ids))}"):
        load_pretrained(tmp_path / "model")
