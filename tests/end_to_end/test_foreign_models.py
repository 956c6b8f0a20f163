"""Models of other trainers: another layout of special tokens, no anchor, wrapped weights."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
from labelled_texts import word_level
from other_tokenizers import GEMMA, byte_fallback, template, write
from other_tokenizers import WORDS as WORDS_OF_TEXT
from tiny_models import CLASSES, change_config, torch, transformers, write_model
from tokenizers import processors

from mlmjax import (
    Classifier,
    Template,
    Verbalizer,
    fill_mask,
    load_pretrained,
    pseudo_log_likelihood,
)
from mlmjax.cli import main
from mlmjax.data.rows import open_rows
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
    backend = tokenizers.Tokenizer.from_str(json.dumps(table))
    backend.post_processor = processors.BertProcessing(("<eos>", 1), ("<bos>", 2))
    backend.save(str(folder / "tokenizer.json"))
    roles = {f"{role}_token": token for role, token in ROLES.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


def test_masks_are_filled_as_by_transformers(folder, caplog):
    model, tokenizer = load_pretrained(folder)
    assert "its [CLS] is 2; cls_token_id is 1 in config.json" in caplog.text
    ((found,),) = fill_mask(model, tokenizer, ["a [MASK] b"], top_k=3)
    check_filled(folder, [2, WORDS.index("a"), 4, WORDS.index("b"), 1], found)


def check_filled(folder, ids, found):
    """Compare answers at the mask with those of transformers."""
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        at_mask = theirs(torch.tensor([ids])).logits[0, ids.index(4)]
    for one in found:
        expected = float(at_mask.softmax(0)[one.id])
        np.testing.assert_allclose(one.probability, expected, rtol=1e-3)


def copied(folder, parent):
    """Return a copy of a model folder, to be changed."""
    return shutil.copytree(folder, parent / "model")


def test_a_prompt_without_anchor_says_so_once(folder, tmp_path, capsys, caplog):
    model, tokenizer = load_pretrained(folder)
    scorer = Scorer(model, tokenizer, Template("{text}"), Verbalizer.words(["red", "blue"]))
    (found,) = np.exp(scorer.log_probs([{"text": "good"}]))
    ids = [2, WORDS.index("good"), 4, 1]
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0, 2, [WORDS.index("red"), WORDS.index("blue")]]
    np.testing.assert_allclose(found, logits.softmax(0), atol=1e-5)
    scorer.log_probs([{"text": "good"}])
    assert caplog.text.count("has no token [unused0], so prompts have no anchor") == 1
    (tmp_path / "texts.txt").write_text("good\n")
    command = ["classify", "--model", str(folder), "--labels", "red,blue"]
    assert main.run([*command, str(tmp_path / "texts.txt")]) == 0
    assert main.run([*command, "--anchor", "<pod>", str(tmp_path / "texts.txt")]) == 2
    assert "anchor '<pod>' is not a token of this tokenizer" in capsys.readouterr().err


def test_a_text_gets_the_tokens_that_its_own_tokenizer_puts_around_it(folder, tmp_path):
    model = copied(folder, tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for single in ("$A", "<bos> $A", "$A <eos>", "<bos> $A <eos> <eos>"):
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<bos>", 2), ("<eos>", 1)]
        )
        backend.save(str(model / "tokenizer.json"))
        ours, tokenizer = load_pretrained(model)
        ((found,), (same,)) = fill_mask(ours, tokenizer, ["a [MASK] b", "a <mask> b"], top_k=3)
        assert found == same
        ids = transformers.AutoTokenizer.from_pretrained(model)("a <mask> b")["input_ids"]
        check_filled(model, ids, found)
        (score,) = pseudo_log_likelihood(ours, tokenizer, ["a b"])
        assert [token.id for token in score.tokens] == tokenizer.encode_plain("a b")


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
    model = copied(folder, tmp_path)
    change_config(model, **ids)
    with pytest.raises(InputError, match=f"or if this is it, correct {next(iter(ids))}"):
        load_pretrained(model)


RUN = """
out = "run"
steps = 3
init_from = "model"
[data]
rows = "rows"
seq_length = 32
batch_size = 8
validation_rows = 1
[[data.sources]]
path = "texts.jsonl"
text = "text"
[objective]
mlm_share = 1.0
dummy_mlm_share = 0.0
mlm_rate = 0.3
[optimizer]
learning_rate = 1e-3
[log]
every = 1
"""


@pytest.mark.long
def test_a_model_without_anchor_goes_on_with_its_pretraining(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    backend = byte_fallback(spare=())
    backend.post_processor = template(backend, "<bos> $A <eos>")
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "cls_token_id": 1}
    size = -(-backend.get_vocab_size() // 64) * 64
    write_model(tmp_path / "model", vocab_size=size, sep_token_id=1, num_hidden_layers=1, **ids)
    write(tmp_path / "model", backend, GEMMA)
    texts = [" ".join(WORDS_OF_TEXT[at : at + 9]) for at in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "run.toml").write_text(RUN)
    assert main.run(["prepare", "run.toml"]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    (rows,) = open_rows(tmp_path / "rows", "train")
    held_out = open_rows(tmp_path / "rows", "validation")
    found = sorted(
        tuple(one.ids.tolist()) for file in (rows, *held_out) for row in file for one in row
    )
    assert found == sorted(tuple(theirs(text)["input_ids"]) for text in texts)
    assert main.run(["train", "run.toml"]) == 0
    exported = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "export").eval()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    shown = again("the cat <mask> on the mat", return_tensors="pt")
    with torch.no_grad():
        logits = exported(**shown).logits[0].numpy()
    model, tokenizer = load_pretrained(tmp_path / "run" / "export")
    assert tokenizer.files == load_pretrained(tmp_path / "model")[1].files
    np.testing.assert_allclose(model(shown["input_ids"].numpy())[0], logits, atol=1e-4)
    before = load_pretrained(tmp_path / "model")[0](shown["input_ids"].numpy())[0]
    assert np.abs(before - logits).max() > 1e-3
