"""config.json and tokenizer.json from strangers."""

import json
from functools import partial
from pathlib import Path
from string import ascii_uppercase

import tokenizers
from hostile.case import Case, all_of, change_json, remove, update_json, write
from hostile.weights import CLASSIFY, outside
from labelled_texts import word_level
from tokenizers import pre_tokenizers

CONFIG, TOKENIZER = "model/config.json", "model/tokenizer.json"
SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[unused0]"]
NESTED = "[" * 100_000
HEAD, TOKENS = "ModernBertForSequenceClassification", "ModernBertForTokenClassification"


config = partial(update_json, CONFIG)


def raw(key, text):
    """Set a key to JSON text that Python would not write."""

    def spoil(folder: Path) -> None:
        table = json.loads((folder / CONFIG).read_text()) | {key: "HERE"}
        (folder / CONFIG).write_text(json.dumps(table).replace('"HERE"', text))

    return spoil


CONFIGS = {
    "absent": (remove(CONFIG), "config.json: is missing"),
    "no JSON": (write(CONFIG, "{'a': 1}"), "config.json: is not valid JSON"),
    "empty": (write(CONFIG, ""), "config.json: is not valid JSON"),
    "not UTF-8": (write(CONFIG, b'{"a": "\xff"}'), "config.json: is not valid JSON"),
    "a list": (write(CONFIG, "[1]"), "holds a JSON list; expected an object"),
    "nested deeply": (write(CONFIG, NESTED), "is not valid JSON"),
    "a value nested deeply": (raw("extra", NESTED), "is not valid JSON"),
    "too large": (write(CONFIG, b" " * (17 * 2**20)), "is larger than 16 MiB"),
    "linked from outside": (outside("config.json"), "outside its folder"),
    "vocabulary of 10^12": (config(vocab_size=10**12), "vocab_size: found 10000"),
    "vocabulary of 5000 digits": (raw("vocab_size", "9" * 5000), "config.json: is not valid JSON"),
    "vocabulary of another model": (config(vocab_size=4_000_000), "[384]; expected [4000000]"),
    "vocabulary of nothing": (config(vocab_size=0), "vocab_size: found 0"),
    "vocabulary smaller than the tokenizer": (config(vocab_size=20), "pad_token_id: found"),
    "layers by the thousand": (config(num_hidden_layers=10**6), "num_hidden_layers"),
    "layers that are not there": (
        config(num_hidden_layers=4, layer_types=None),
        "num_hidden_layers is 4; the weights are missing for all but 2 of them",
    ),
    "layers too few": (config(num_hidden_layers=1, layer_types=None), "layers.1."),
    "layers of another number than their types": (config(num_hidden_layers=3), "layer_types"),
    "layers of an unknown type": (config(layer_types=["full", "local"]), "layer_types"),
    "layer types of one text": (config(layer_types="full_attention"), "layer_types"),
    "another hidden size": (config(hidden_size=32), "the weights are not those"),
    "hidden size huge": (config(hidden_size=2**40), "hidden_size"),
    "hidden size negative": (config(hidden_size=-16), "hidden_size"),
    "hidden size of text": (config(hidden_size="16"), "hidden_size"),
    "hidden size a fraction": (config(hidden_size=16.5), "hidden_size"),
    "hidden size true": (config(hidden_size=True), "hidden_size"),
    "hidden size null": (config(hidden_size=None), "hidden_size: found None"),
    "hidden size a list": (config(hidden_size=[16]), "hidden_size"),
    "hidden size not cut by the heads": (config(num_attention_heads=3), "num_attention_heads 3"),
    "heads of odd size": (config(num_attention_heads=16), "an even head_dim"),
    "heads zero": (config(num_attention_heads=0), "num_attention_heads"),
    "intermediate size negative": (config(intermediate_size=-1), "intermediate_size"),
    "positions by the billion": (config(max_position_embeddings=2**40), "max_position_embed"),
    "window negative": (config(local_attention=-2), "local_attention"),
    "norm_eps NaN": (raw("norm_eps", "NaN"), "norm_eps: found nan"),
    "norm_eps infinite": (raw("norm_eps", "1e999"), "norm_eps: found inf"),
    "norm_eps zero": (config(norm_eps=0), "norm_eps"),
    "dropout above one": (config(mlp_dropout=1.5), "mlp_dropout"),
    "theta of text": (config(rope_parameters=None, global_rope_theta="1e4"), "global_rope_theta"),
    "theta zero": (config(rope_parameters=None, local_rope_theta=0), "local_rope_theta"),
    "rope_parameters a list": (config(rope_parameters=[1]), "rope_parameters"),
    "rope_parameters unknown": (config(rope_parameters={"x": {}}), "rope_parameters"),
    "RoPE of another type": (config(rope_scaling={"type": "yarn", "factor": 2}), "rope_scaling"),
    "RoPE nested of another type": (
        config(rope_parameters={"full_attention": {"rope_type": "yarn"}}),
        "rope_parameters.full_attention.rope_type: found 'yarn'",
    ),
    "quantised": (config(quantization_config={"bits": 4}), "quantization_config"),
    "unknown activation": (config(hidden_activation="snake"), "hidden_activation"),
    "activation of a list": (config(hidden_activation=["gelu"]), "hidden_activation"),
    "bias of text": (config(norm_bias="false"), "norm_bias: found 'false'"),
    "bias that is not there": (config(mlp_bias=True), "mlp.Wi.bias: is missing"),
    "pad_token_id beyond the vocabulary": (config(pad_token_id=9999), "pad_token_id"),
    "pad_token_id negative": (config(pad_token_id=-2), "pad_token_id"),
    "id2label with gaps": (config(id2label={"0": "a", "7": "b"}), "id2label"),
    "head_dim another": (config(head_dim=64), "head_dim: found 64"),
    "BERT": (config(model_type="bert"), "'bert', which is another architecture"),
    "model_type a list": (config(model_type=["modernbert"]), "model_type"),
    "BERT by its class": (config(architectures=["BertForMaskedLM"]), "is BertForMaskedLM"),
    "bare encoder": (config(architectures=["ModernBertModel"]), "architectures is ModernBertModel"),
    "token classifier": (config(architectures=[TOKENS]), f"architectures is {TOKENS}"),
    "two architectures": (config(architectures=["ModernBertForMaskedLM", HEAD]), "expected one of"),
    "architectures of numbers": (config(architectures=[1]), "architectures"),
    "a classifier that is none": (config(architectures=[HEAD]), f"are not those of the {HEAD}"),
    "another [PAD]": (config(pad_token_id=7), "; pad_token_id is 7"),
    "another [MASK]": (config(mask_token_id=7), "; mask_token_id is 7"),
}
GOOD = {
    "with code that is not run": all_of(
        config(auto_map={"AutoModelForMaskedLM": "evil.Evil"}, trust_remote_code=True),
        write("model/evil.py", "raise SystemExit('run')"),
    ),
    "without padding": config(pad_token_id=None),
    "with padding of -1": config(pad_token_id=-1),
    "with numbers of labels as text": config(id2label={"0": "a"}, label2id={"a": "0"}),
    "with label2id of another model": config(id2label={"0": "a"}, label2id={"x": 7}),
    "with a label2id that is no object": config(label2id=["a"]),
    "with labels that are numbers": config(id2label={"00": 1, "01": 2}),
    "with another [CLS]": config(cls_token_id=7),
    "with another [SEP]": config(sep_token_id=-1),
    "with another end of text": config(eos_token_id=[-1, 2**40], bos_token_id=-1),
    "with RoPE scaled by the default": config(rope_scaling={"type": "default"}),
    "with empty settings": config(rope_scaling={}, quantization_config={}),
    "with a value nested to the limit": raw("extra", "[" * 900 + "]" * 900),
    "with keys that mean nothing here": config(torch_dtype="float16", _name_or_path="../../x"),
}


def tokenizer(function):
    return change_json(TOKENIZER, function)


def without(*names):
    """Remove added tokens; the ids of those that follow decrease."""

    def function(table):
        kept = [entry for entry in table["added_tokens"] if entry["content"] not in names]
        first = min(entry["id"] for entry in table["added_tokens"])
        for number, entry in enumerate(kept):
            entry["id"] = first + number
        table["added_tokens"] = kept

    return tokenizer(function)


part = partial(update_json, TOKENIZER)
added = partial(update_json, TOKENIZER, "added_tokens")
model_part = partial(update_json, TOKENIZER, "model")


def words_only(count, unknown="[UNK]", split=pre_tokenizers.Whitespace):
    """Write a word-level tokenizer of `count` ids."""

    def spoil(folder: Path) -> None:
        others = (f"w{i}" for i in range(count - len(SPECIALS) - 26))
        vocabulary = [*SPECIALS, *ascii_uppercase, *others]
        (folder / TOKENIZER).write_text(word_level(vocabulary, unknown, split))

    return spoil


ITS_IDS = config(pad_token_id=0, cls_token_id=1, bos_token_id=1, sep_token_id=2, eos_token_id=2)
NO_TOKENIZER, NOT_READ = "has no tokenizer.json", "is not a tokenizer the library can read"
COMPANION = "model/tokenizer_config.json"
TOKENIZERS = {
    "absent": (remove(TOKENIZER), NO_TOKENIZER),
    "empty": (write(TOKENIZER, ""), "is not valid JSON"),
    "no JSON": (write(TOKENIZER, "tokenizer"), "is not valid JSON"),
    "a list": (write(TOKENIZER, "[]"), "holds a JSON list"),
    "an empty object": (write(TOKENIZER, "{}"), NOT_READ),
    "nested deeply": (write(TOKENIZER, NESTED), "is not valid JSON"),
    "not UTF-8": (write(TOKENIZER, b'{"\xff": 1}'), "is not valid JSON"),
    "linked from outside": (outside("tokenizer.json"), "outside its folder"),
    "of no known model": (model_part(type="Magic"), NOT_READ),
    "without a vocabulary": (model_part(vocab={}), NOT_READ),
    "with ids of text": (model_part(vocab={"a": "0"}), NOT_READ),
    "with holes in its ids": (part("model", "vocab", hole=9999), "expected"),
    "with a negative id": (added(0, id=-1), "tokenizer.json: "),
    "with an id of text": (added(0, id="1"), NOT_READ),
    "with an id twice": (
        tokenizer(lambda table: table["added_tokens"][1].update(id=table["added_tokens"][0]["id"])),
        "added_tokens repeats '[SEP]'",
    ),
    "with a token twice": (added(1, content="[CLS]"), "added_tokens repeats '[CLS]'"),
    "with a wrong id": (added(4, id=9999), "expected ids without gaps"),
    "with added tokens of text": (part(added_tokens="x"), "tokenizer.json: "),
    "without [MASK]": (without("[MASK]"), "has no token [MASK]"),
    "without any special": (
        without("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[unused0]"),
        "has no token [CLS], [SEP], [PAD], [MASK]; expected",
    ),
    "that calls one token two names": (
        write(COMPANION, '{"mask_token": "[SEP]"}'),
        "are one token; expected different",
    ),
    "that calls a special by a number": (write(COMPANION, '{"mask_token": 7}'), "mask_token is 7"),
    "whose companions differ": (
        all_of(
            write(COMPANION, '{"cls_token": "[CLS]"}'),
            write("model/special_tokens_map.json", '{"cls_token": "[SEP]"}'),
        ),
        "one name in all files",
    ),
    "whose companion is no JSON": (write(COMPANION, "{"), "is not valid JSON"),
    "too large for the model": (words_only(999), "it has 999 ids; the model's vocab_size is 384"),
    "of another model": (words_only(300), "the tokenizer does not match the model: its [PAD] is 0"),
    "with a broken expression": (
        part(normalizer={"type": "Replace", "pattern": {"Regex": "(("}, "content": ""}),
        NOT_READ,
    ),
    "that knows no unknown token": (
        all_of(words_only(300, unknown="[NOTHING]"), ITS_IDS),
        "cannot encode a text",
    ),
}


def baked_in(folder: Path) -> None:
    """Save settings that would truncate and pad every text."""
    backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(folder / TOKENIZER))


GOOD_TOKENIZERS = {
    "that would cut and pad": baked_in,
    "that would drop merges at random": model_part(dropout=0.5),
    "without [unused0]": without("[unused0]"),
    "whose special tokens are words": all_of(
        words_only(300, split=pre_tokenizers.WhitespaceSplit), ITS_IDS
    ),
}


def cases():
    needs = ("model", "texts.txt")
    for name, (spoil, says) in CONFIGS.items():
        yield Case(f"config {name}", CLASSIFY, 2, says, needs, spoil)
    for name, (spoil, says) in TOKENIZERS.items():
        yield Case(f"tokenizer {name}", CLASSIFY, 2, says, needs, spoil)
    for kind, table in (("config", GOOD), ("tokenizer", GOOD_TOKENIZERS)):
        for name, spoil in table.items():
            yield Case(f"{kind} {name}", CLASSIFY, 0, '"label"', needs, spoil)
