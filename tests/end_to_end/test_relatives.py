"""Published relatives of ModernBERT: their configurations, with small tokenizers of their kinds.

Widths and depths are smaller than those published where these are too large to run; every switch,
theta, window, activation and special token is as published, as far as it is known. Ids of special
tokens are those of the small tokenizer.
"""

import json

import jax
import numpy as np
import pytest
from other_tokenizers import (
    BERT,
    GEMMA,
    JAPANESE,
    LLAMA,
    byte_fallback,
    byte_level,
    template,
    unigram,
    word_piece,
    write,
)
from tiny_models import torch, transformers

from mlmjax import (
    Choice,
    Classifier,
    Decider,
    Scorer,
    Template,
    Verbalizer,
    YesNo,
    load_pretrained,
    save_pretrained,
)
from mlmjax.cli import main
from mlmjax.config.suite import load_suite
from mlmjax.data.rows import open_rows
from mlmjax.errors import InputError
from mlmjax.text.tokenizer import Tokenizer

FLAT = {
    "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3,
    "local_attention": 128, "norm_eps": 1e-5, "norm_bias": False, "attention_bias": False,
    "mlp_bias": False, "decoder_bias": True, "classifier_bias": False, "hidden_activation": "gelu",
    "classifier_activation": "gelu", "classifier_pooling": "mean", "initializer_range": 0.02,
    "initializer_cutoff_factor": 2.0, "sparse_prediction": False, "sparse_pred_ignore_index": -100,
    "deterministic_flash_attn": False, "reference_compile": None, "repad_logits_with_grad": False,
    "position_embedding_type": "absolute", "layer_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "gradient_checkpointing": False, "torch_dtype": "float32", "transformers_version": "4.48.0",
}  # fmt: skip
LLAMA_LIKE = {"cls": "<|startoftext|>", "sep": "<|return|>", "pad": "<|endoftext|>"}
LLAMA_LIKE |= {"mask": "<|mask|>", "unk": "<|unk|>"}
ENCODER = ["ModernBertModel"]


def modern(roles=BERT, spare=("[unused0]", "[unused1]")):
    return byte_level(roles, spare), roles, {roles["mask"]: {"lstrip": True}}


def gemma():
    return byte_fallback(spare=("<unused0>", "<unused1>")), GEMMA, {}


def sentence_piece(metaspace="never"):
    return byte_fallback(LLAMA, spare=(), metaspace=metaspace), LLAMA, {}


# Name: sizes (hidden, intermediate, layers, heads), other switches, tokenizer.
RELATIVES = {
    "ModernBERT-base": ((48, 72, 4, 3), {}, modern),
    "ModernBERT-large": ((64, 164, 4, 4), {}, modern),
    "ettin-encoder-17m": ((32, 48, 7, 4), {"max_position_embeddings": 7999}, modern),
    "ettin-encoder-32m": ((48, 72, 4, 6), {"max_position_embeddings": 7999}, modern),
    "ettin-encoder-68m": ((64, 96, 4, 8), {"max_position_embeddings": 7999}, modern),
    "ettin-encoder-1b": ((64, 140, 4, 4), {"max_position_embeddings": 7999}, modern),
    "mmBERT-small": ((48, 144, 4, 6), {"local_rope_theta": 160000.0}, gemma),
    "mmBERT-base": ((48, 72, 4, 3), {"local_rope_theta": 160000.0}, gemma),
    "gte-modernbert-base": ((48, 72, 4, 3), {"architectures": ENCODER}, modern),
    "modernbert-embed-base": ((48, 72, 4, 3), {"architectures": ENCODER}, modern),
    "granite-embedding-english-r2": (
        (48, 72, 4, 3),
        {"architectures": ENCODER, "global_rope_theta": 80000.0},
        modern,
    ),
    "granite-embedding-97m-multilingual-r2": (
        (48, 192, 4, 6),
        {
            "architectures": ENCODER,
            "hidden_activation": "silu",
            "global_rope_theta": 150000.0,
            "local_rope_theta": 160000.0,
            "max_position_embeddings": 32768,
        },
        lambda: modern(LLAMA_LIKE, ()),
    ),
    "modernbert-ja-30m": ((32, 128, 4, 4), {"mlp_dropout": 0.0}, sentence_piece),
    "modernbert-ja-310m": (
        (48, 192, 4, 3),
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
        sentence_piece,
    ),
    "llm-jp-modernbert-base": (
        (48, 72, 4, 3),
        {"global_rope_theta": 10000.0, "reference_compile": True},
        lambda: (unigram(JAPANESE), JAPANESE, {}),
    ),
    "ModernGBERT_134M": ((48, 72, 4, 3), {}, lambda: modern(spare=())),
    "BioClinical-ModernBERT-base": ((48, 72, 4, 3), {"torch_dtype": "bfloat16"}, modern),
    "a Turkish one of WordPiece": ((48, 72, 4, 3), {}, lambda: (word_piece(spare=()), BERT, {})),
    "a Korean one with biases": (
        (48, 72, 4, 3),
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
        lambda: (unigram(scheme="first"), LLAMA, {}),
    ),
}
SHORT = ("mmBERT-small", "modernbert-ja-30m")
"""Those that the default tests build."""
CASES = [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in RELATIVES]
TEXTS = ["the cat sat on the mat", "Guten Tag, wie geht es dir? Schön.", "今日の天気は 晴れ です"]


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    """Write the folder of a relative by transformers."""
    return write_relative(tmp_path_factory.mktemp("relative") / "model", request.param)


def write_relative(folder, name):
    sizes, switches, make = RELATIVES[name]
    backend, roles, flags = make()
    first, last = roles["cls"], roles["sep"]
    backend.post_processor = template(backend, f"{first} $A {last}")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ids = {f"{role}_token_id": backend.token_to_id(name) for role, name in roles.items()}
    ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    size = -(-backend.get_vocab_size() // 64) * 64
    values = FLAT | dict(zip(names, sizes, strict=True)) | ids | {"vocab_size": size} | switches
    kind = values.setdefault("architectures", ["ModernBertForMaskedLM"])[0]
    if "rope_parameters" in values:  # the newer dialect has no flat keys
        values = {key: value for key, value in values.items() if "theta" not in key}
    torch.manual_seed(0)
    config = transformers.ModernBertConfig.from_dict(json.loads(json.dumps(values)))
    model = getattr(transformers, kind)(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "modernbert"}))
    write(folder, backend, roles, flags, model_max_length=8192)
    return folder


def test_a_relative_computes_as_in_transformers(folder, tmp_path):
    model, tokenizer = load_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    kind = getattr(transformers, type(model).__name__)
    original = kind.from_pretrained(folder, dtype=torch.float32).eval()
    mask = tokenizer.names["mask"]
    # The last is longer than the window of the local layers.
    texts = [*TEXTS, f"the cat {mask} on the mat", " ".join(TEXTS * 8)]
    shown = theirs(texts, padding=True, return_tensors="pt")
    for text, ids, own in zip(texts, shown["input_ids"], shown["attention_mask"], strict=True):
        before, *after = text.split(mask)
        parts = [before, *(part for one in after for part in (tokenizer.mask_id, one))]
        assert tokenizer.wrap(tokenizer.encode_parts_batch([parts])[0]) == ids[own == 1].tolist()
    assert shown["input_ids"].shape[1] > 130
    is_text = shown["attention_mask"].numpy() == 1
    with torch.no_grad():
        found = original(**shown, output_hidden_states=True)
    ids, segments = shown["input_ids"].numpy(), shown["attention_mask"].numpy()
    hidden = jax.jit(model.encode)(ids, segments)
    np.testing.assert_allclose(hidden[is_text], found.hidden_states[-1].numpy()[is_text], atol=1e-4)
    if hasattr(found, "logits"):
        logits = model.mlm_logits(hidden)
        np.testing.assert_allclose(logits[is_text], found.logits.numpy()[is_text], atol=1e-4)
    save_pretrained(model, tokenizer, tmp_path / "out")
    again = kind.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        same = again(**shown)[0].numpy()
    np.testing.assert_allclose(same[is_text], found[0].numpy()[is_text], atol=1e-5)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported(texts)["input_ids"] == theirs(texts)["input_ids"]


def test_a_relative_is_fitted_and_exported(folder, tmp_path, caplog):
    tokenizer = Tokenizer.from_pretrained(folder)
    texts, labels = ["the red house", "a blue sun", "red", "under blue"] * 4, ["red", "blue"] * 8
    recipe = {"epochs": 3, "learning_rate": 3e-3, "batch_size": 16}
    classifier = Classifier(folder, ["red", "blue"]).fit(texts, labels, **recipe)
    assert classifier.history_[-1]["loss"] < classifier.history_[0]["loss"]
    classifier.save_pretrained(tmp_path / "out")
    again = Classifier.from_pretrained(tmp_path / "out")
    expected = classifier.predict_proba(texts[:4])
    np.testing.assert_allclose(again.predict_proba(texts[:4]), expected, atol=1e-6)
    kind = getattr(transformers, type(again.asking_.scorer.model).__name__)
    exported = kind.from_pretrained(tmp_path / "out").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    if kind is transformers.ModernBertForSequenceClassification:
        with pytest.raises(InputError, match="no masked-language-model head"):
            Classifier(folder, ["red", "blue"], head="mlm").predict(texts[:1])
        shown = theirs(texts[0], return_tensors="pt")
        with torch.no_grad():
            found = exported(**shown).logits[0].softmax(0)
        assert list(exported.config.id2label.values()) == ["red", "blue"]
    else:
        assert ("no anchor" in caplog.text) == (tokenizer.anchor is None)
        assert ("anchor" in again.settings_.model_dump(exclude_none=True)) == (
            tokenizer.anchor is None
        )
        (before, after), answers = again.asking_.recipe()
        forms = [theirs(form, add_special_tokens=False)["input_ids"] for form in answers.values()]
        shown = theirs(before + texts[0] + after, return_tensors="pt")
        slot = shown["input_ids"][0].tolist().index(theirs.mask_token_id)
        with torch.no_grad():
            found = exported(**shown).logits[0, slot, [form[0] for form in forms]].softmax(0)
        assert {len(form) for form in forms} == {1}
    np.testing.assert_allclose(found, expected[0], atol=1e-4)


PRETRAIN = """
out = "run"
steps = 3
init_from = "model"
[data]
rows = "rows"
seq_length = 64
batch_size = 8
[[data.sources]]
path = "texts.jsonl"
text = "text"
[objective]
mlm_share = 1.0
mlm_rate = 0.3
"""


@pytest.mark.long
def test_a_relative_continues_pretraining(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(folder)
    rows = [{"text": f"{text}. " * 6} for text in TEXTS] * 16
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "texts.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "run.toml").write_text(PRETRAIN)
    kind = json.loads((folder / "config.json").read_text())["architectures"]
    if kind == ENCODER:
        assert main.run(["train", "run.toml"]) == 2
        message = "this training needs a ModernBertForMaskedLM, or head = 'classification'"
        assert message in capfd.readouterr().err
        return
    assert main.run(["train", "run.toml", "--quiet"]) == 0
    export = tmp_path / "run" / "export"
    model, _ = load_pretrained(export)
    theirs = transformers.AutoTokenizer.from_pretrained(export)
    before = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(TEXTS)["input_ids"] == before(TEXTS)["input_ids"]
    shown = theirs(TEXTS[1], return_tensors="pt")
    original = transformers.ModernBertForMaskedLM.from_pretrained(export).eval()
    with torch.no_grad():
        expected = original(**shown).logits.numpy()
    ids, segments = shown["input_ids"].numpy(), shown["attention_mask"].numpy()
    np.testing.assert_allclose(model.mlm_logits(model.encode(ids, segments)), expected, atol=1e-4)


def test_an_anchor_that_is_named_is_kept_with_the_classifier(tmp_path, caplog):
    folder = write_relative(tmp_path / "model", "mmBERT-small")
    texts = ["the red house", "a <unused1> sun"]
    usual = Classifier(folder, ["red", "blue"]).predict_proba(texts)
    assert "name a token with anchor, such as <unused0>" in caplog.text
    classifier = Classifier(folder, ["red", "blue"], anchor="<unused1>")
    expected = classifier.predict_proba(texts)
    assert np.abs(expected - usual).max() > 1e-4
    assert "before the mask of a prompt stands <unused1>" in caplog.text
    classifier.save_pretrained(tmp_path / "out")
    again = Classifier.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(again.predict_proba(texts), expected, atol=1e-6)
    assert again.settings_.anchor == "<unused1>"
    assert "<unused1>" in (tmp_path / "out" / "README.md").read_text()
    _, tokenizer = load_pretrained(tmp_path / "out")
    assert tokenizer.anchor == "<unused1>"
    (ids,) = (Template("{text}").encode(tokenizer, {"text": text}, 99)[0] for text in texts[:1])
    assert ids.count(tokenizer.anchor_id) == 1
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("the red house <unused1> <mask>")["input_ids"] == ids
    without = Classifier(tmp_path / "out", anchor="none").predict_proba(texts)
    np.testing.assert_allclose(without, usual, atol=1e-6)


def test_a_decider_and_a_scorer_take_an_anchor_and_keep_it(tmp_path, caplog, capfd):
    folder = write_relative(tmp_path / "model", "mmBERT-small")
    states = ["the red house", "a <unused1> sun"]
    asked = {"c": Choice("Which?", {"red": None, "blue": None}), "y": YesNo("Is it good?")}

    def found(decider):
        answers = decider.decide_many(states, asked)
        return [(one["c"].probabilities, one["y"].probability) for one in answers]

    usual = found(Decider(folder))
    assert "name a token with anchor, such as <unused0>" in caplog.text
    decider = Decider(folder, anchor="<unused1>")
    expected = found(decider)
    assert expected != usual
    right = [{"y": probability > 0.5} for _, probability in expected]
    wrong = [{"y": not one["y"]} for one in right]
    decider.calibrate(states * 4, asked, [*right * 3, *wrong])
    assert list(decider.calibrations) == ["noul/2"]
    decider.save_pretrained(tmp_path / "out")
    again = Decider(tmp_path / "out")
    assert found(again) == found(decider)
    assert again.settings.anchor == "<unused1>"
    assert "<unused1>" in (tmp_path / "out" / "README.md").read_text()
    without = Decider(tmp_path / "out", anchor="none")
    assert (without.settings.anchor, dict(without.calibrations)) == ("none", {})
    assert found(without) == usual
    assert Decider(tmp_path / "out", anchor="<unused1>").calibrations == decider.calibrations
    (tmp_path / "asked.json").write_text('{"y": {"type": "noul", "instructions": "Is it good?"}}')
    (tmp_path / "states.jsonl").write_text('"the red house"\n')
    command = ["decide", "--model", str(folder), "--questions", str(tmp_path / "asked.json")]
    command += ["--anchor", "<unused1>", str(tmp_path / "states.jsonl")]
    capfd.readouterr()
    assert main.run(command) == 0
    assert json.loads(capfd.readouterr().out)["y"]["noul"] == expected[0][1]

    model, tokenizer = load_pretrained(folder)
    words = Template("{text} is"), Verbalizer({"red": [" red"], "blue": [" blue"]})
    rows = [{"text": text} for text in states]
    scores = Scorer(model, tokenizer, *words, anchor="<unused1>").log_probs(rows)
    named = Template("{text} is", anchor="<unused1>")
    same = Scorer(model, tokenizer, named, words[1]).log_probs(rows)
    np.testing.assert_array_equal(scores, same)
    assert np.abs(scores - Scorer(model, tokenizer, *words).log_probs(rows)).max() > 1e-4


def test_a_decider_of_a_classifier_has_the_anchor_of_the_classifier(tmp_path):
    folder = write_relative(tmp_path / "model", "mmBERT-small")
    classifier = Classifier(folder, ["red", "blue"], anchor="<unused1>")
    classifier.predict(["a sun"])
    classifier.save_pretrained(tmp_path / "out")
    with pytest.warns(UserWarning, match="is asked as the classifier was fitted"):
        decider = Decider(tmp_path / "out")
    assert decider.settings.anchor == "<unused1>"
    with (
        pytest.warns(UserWarning, match="is asked as the classifier was fitted"),
        pytest.raises(InputError, match="uses its anchor, <unused1>; leave anchor out"),
    ):
        Decider(tmp_path / "out", anchor="none")


def test_the_command_line_and_a_suite_name_the_anchor_of_all_tasks(tmp_path, capfd):
    _, planned = load_suite("paper", ['anchor="<unused1>"', 'tasks=["sst2"]'])
    assert [task.anchor for _, task in planned] == ["<unused1>"]
    assert [task.anchor for _, task in load_suite("paper", ['tasks=["sst2"]'])[1]] == [None]
    folder = write_relative(tmp_path / "model", "mmBERT-small")
    rows = [{"text": f"the cat {word}", "label": word} for word in ("red", "blue")] * 16
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.toml").write_text(TASK)
    command = ["evaluate", "--model", str(folder), "--task", str(tmp_path / "task.toml"), "--json"]
    command += ["--order-rows", "0", "--data", str(tmp_path / "rows.jsonl")]
    found = []
    for more in ([], ["--anchor", "none"], ["--anchor", "<unused0>"]):
        capfd.readouterr()
        assert main.run([*command, *more]) == 0
        found.append(json.loads(capfd.readouterr().out)["calibration"]["ece"])
    assert found[0] == found[2] != found[1]


TASK = """
name = "colours"
prompt = "{text} is"
verbalizer = "words"
answer = "label"
labels = ["red", "blue"]
anchor = "<unused0>"
"""

RUN = """
out = "run"
steps = 2
init_from = "model"
anchor = "<unused0>"
[data]
rows = "rows"
seq_length = 64
batch_size = 8
[[data.sources]]
path = "texts.jsonl"
prompt = "{text}\\nAnswer: [unused0][MASK]"
answer = "label"
"""


def test_a_run_file_names_the_anchor_of_its_prompts(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_relative(tmp_path / "model", "mmBERT-small")
    rows = [{"text": f"the cat <unused0> {word}", "label": "red"} for word in ("sat", "ran")] * 20
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(RUN)
    assert main.run(["prepare", "run.toml"]) == 0
    (prepared,) = open_rows(tmp_path / "rows", "train")
    tokenizer = Tokenizer.from_pretrained("model").with_anchor("<unused0>")
    examples = [example for row in prepared for example in row]
    assert len(examples) == len(rows)
    for example in examples:
        slot = example.answer_position
        assert example.ids[slot - 1] == tokenizer.anchor_id
        assert np.isin(example.ids, tokenizer.anchor_id).sum() == 1
        assert tokenizer.decode([example.ids[slot]]).strip() == "red"
    capfd.readouterr()
    assert main.run(["train", "run.toml", "anchor=<unused1>"]) == 2
    assert "the tokenizer" in capfd.readouterr().err
