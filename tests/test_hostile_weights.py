"""Hostile model folders: each is refused with one clear line, and takes no memory."""

import json
import os
import resource
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tiny_models import (
    CLASSES,
    WORDS,
    change_config,
    write_model,
)
from tokenizers import models, pre_tokenizers

from mlmjax import hf, hub
from mlmjax.errors import InputError
from mlmjax.hf import load_pretrained

EMBEDDING, DECODER = hf.EMBEDDING, hf.DECODER


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_model(folder)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """A good folder of its own for a test to spoil."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def change_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / hub.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / hub.WEIGHTS)

    return spoil


def change_bytes(change):
    def spoil(folder):
        path = folder / hub.WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return spoil


def change_header(change):
    """Rewrite the JSON header, its length kept true, the data as they are."""

    def rewrite(data):
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header = change(header) or header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return change_bytes(rewrite)


def config(**values):
    return lambda folder: change_config(folder, **values)


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def shards(weight_map=None, second=None):
    """Turn the folder into two shards: the first layer apart; then spoil the index or a shard."""

    def spoil(folder):
        tensors = load_file(folder / hub.WEIGHTS)
        os.remove(folder / hub.WEIGHTS)
        files = {n: "b.safetensors" if ".0." in n else "a.safetensors" for n in tensors}
        parts = {f: {n: x for n, x in tensors.items() if files[n] == f} for f in files.values()}
        (second or (lambda parts: None))(parts)
        for file, part in parts.items():
            save_file(part, folder / file)
        (folder / hub.INDEX).write_text(json.dumps({"weight_map": files | (weight_map or {})}))

    return spoil


def link(name, target):
    def spoil(folder):
        outside = folder.parent / "outside"
        outside.mkdir()
        shutil.move(folder / name, outside / name)
        (folder / name).symlink_to(target.format(outside=outside))

    return spoil


def pickle_only(name):
    def spoil(folder):
        (folder / hub.WEIGHTS).unlink()
        (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")

    return spoil


def tokenizer_of(*words):
    def spoil(folder):
        vocabulary = [*WORDS, *words]
        backend = tokenizers.Tokenizer(
            models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]")
        )
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.add_special_tokens(WORDS[:6])
        backend.save(str(folder / "tokenizer.json"))

    return spoil


def other_architecture(name):
    def spoil(folder):
        shutil.rmtree(folder)
        write_model(folder, name)

    return spoil


def cast(name, dtype):
    def change(tensors):
        tensors[name] = tensors[name].astype(dtype)

    return change_tensors(change)


def put(name, value, index=None):
    def change(tensors):
        if index is None:
            tensors[name] = value(tensors)
        else:
            tensors[name][index] = value

    return change_tensors(change)


NORM = "model.final_norm.weight"
HOSTILE = {
    "truncated data": (change_bytes(lambda data: data[:-7]), "not a whole safetensors file"),
    "truncated header": (change_bytes(lambda data: data[:100]), "truncated or no safetensors"),
    "empty file": (change_bytes(lambda data: b""), "truncated or no safetensors"),
    "length of the header a lie": (
        change_bytes(lambda data: struct.pack("<Q", 2**60) + data[8:]),
        "truncated or no safetensors",
    ),
    "header no JSON": (change_header(lambda header: b"x" * 200), "not a whole safetensors file"),
    "header too long": (
        change_header(lambda header: b" " * (17 * 2**20)),
        "has a header of",
    ),
    "offsets beyond the file": (
        change_header(lambda header: header[NORM].update(data_offsets=[0, 2**40])),
        "not a whole safetensors file",
    ),
    "shape of 10^12": (
        change_header(lambda header: header[NORM].update(shape=[10**12])),
        "not a whole safetensors file",
    ),
    "shape that overflows": (
        change_header(lambda header: header[NORM].update(shape=[2**62, 4, 4])),
        "not a whole safetensors file",
    ),
    "offsets that overlap": (
        change_header(lambda h: h[NORM].update(data_offsets=h[EMBEDDING]["data_offsets"])),
        "not a whole safetensors file",
    ),
    "unknown dtype": (
        change_header(lambda header: header[NORM].update(dtype="F31")),
        "not a whole safetensors file",
    ),
    "bytes after the end": (change_bytes(lambda data: data + b"evil"), "not a whole safetensors"),
    "a pickle by another name": (
        change_bytes(lambda data: b"\x80\x02cos\nsystem\n" * 30),
        "truncated or no safetensors",
    ),
    "missing": (change_tensors(lambda t: t.pop(NORM)), rf"{NORM}: is missing"),
    "unexpected": (
        put("model.layers.7.mlp.Wi.weight", lambda t: np.ones(3, np.float32)),
        r"model\.layers\.7\.mlp\.Wi\.weight: is unexpected",
    ),
    "wrong shape": (
        put(NORM, lambda t: np.ones(8, np.float32)),
        rf"{NORM}: has shape \[8\]; expected \[16\]",
    ),
    "transposed": (
        put("model.layers.0.mlp.Wo.weight", lambda t: np.ones((12, 16), np.float32)),
        r"mlp\.Wo\.weight: has shape \[12, 16\]; expected \[16, 12\]",
    ),
    "float64": (cast(NORM, np.float64), rf"{NORM}: has dtype F64"),
    "int8": (cast("head.dense.weight", np.int8), r"head\.dense\.weight: has dtype I8"),
    "bool": (cast("head.dense.weight", bool), r"head\.dense\.weight: has dtype BOOL"),
    "NaN": (put("head.dense.weight", np.nan, (3, 4)), r"head\.dense\.weight: 1 of 256 values"),
    "infinite": (put(EMBEDDING, np.inf, (3, 4)), rf"{EMBEDDING}: 1 of 288 values are NaN or inf"),
    "decoder that differs": (
        put(DECODER, lambda t: t[EMBEDDING] + np.float32(1e-7)),
        rf"{DECODER}: differs from {EMBEDDING}",
    ),
    "decoder of another shape": (
        put(DECODER, lambda t: np.ones((4, 16), np.float32)),
        rf"{DECODER}: has shape \[4, 16\]",
    ),
    "index with a path": (
        shards({NORM: "../../x.safetensors"}),
        "no plain .*names",
    ),
    "index with an absolute path": (shards({NORM: "/etc/x.safetensors"}), "no plain .*names"),
    "index with a Windows path": (shards({NORM: "c:\\x.safetensors"}), "no plain .*names"),
    "index with a folder": (shards({NORM: "sub/a.safetensors"}), "no plain .*names"),
    "index with a pickle": (shards({NORM: "a.bin"}), "no plain .*names"),
    "index with a number": (shards({NORM: 7}), "no plain .*names"),
    "index with an absent shard": (shards({NORM: "c.safetensors"}), r"c\.safetensors: is missing"),
    "index with the wrong shard": (
        shards({NORM: "b.safetensors"}),
        rf"{NORM}: is in a\.safetensors, though",
    ),
    "index with a tensor that is nowhere": (
        shards({"model.extra": "b.safetensors"}),
        r"model\.extra: is missing, though",
    ),
    "one tensor in two shards": (
        shards(second=lambda parts: parts["b.safetensors"].update({NORM: np.ones(16, "f4")})),
        rf"{NORM}: stands in a\.safetensors and in b\.safetensors",
    ),
    "index without a map": (
        lambda folder: (shards()(folder), text(hub.INDEX, b"{}")(folder)),
        "has no weight_map",
    ),
    "index no JSON": (
        lambda folder: (shards()(folder), text(hub.INDEX, b"{")(folder)),
        "is not valid JSON",
    ),
    "weights linked from outside": (link(hub.WEIGHTS, "{outside}/model.safetensors"), "outside"),
    "weights linked by a relative path": (
        link(hub.WEIGHTS, "../outside/model.safetensors"),
        "outside its folder",
    ),
    "config linked from outside": (link(hub.CONFIG, "../outside/config.json"), "outside its"),
    "tokenizer linked from outside": (
        link("tokenizer.json", "../outside/tokenizer.json"),
        "outside its folder",
    ),
    "link in a circle": (link(hub.WEIGHTS, "model.safetensors"), "cannot be read|is missing"),
    "dangling link": (link(hub.WEIGHTS, "nowhere.safetensors"), "is missing"),
    "weights are a folder": (
        lambda folder: ((folder / hub.WEIGHTS).unlink(), (folder / hub.WEIGHTS).mkdir()),
        "is missing",
    ),
    "weights are a pipe": (
        lambda folder: ((folder / hub.WEIGHTS).unlink(), os.mkfifo(folder / hub.WEIGHTS)),
        "is missing",
    ),
    "no weights": (lambda folder: (folder / hub.WEIGHTS).unlink(), "holds no weights"),
    "pickle only": (
        pickle_only("pytorch_model.bin"),
        r"can run code.*pytorch_model\.bin.*save_pretrained",
    ),
    "checkpoint pickle only": (pickle_only("last.ckpt"), r"last\.ckpt"),
    "msgpack only": (pickle_only("flax_model.msgpack"), r"flax_model\.msgpack"),
    "npz only": (pickle_only("weights.npz"), r"weights\.npz"),
    "no config": (lambda folder: (folder / hub.CONFIG).unlink(), r"config\.json: is missing"),
    "config no JSON": (text(hub.CONFIG, b"{'a': 1}"), r"config\.json: is not valid JSON"),
    "config not UTF-8": (text(hub.CONFIG, b'{"a": "\xff"}'), r"config\.json: is not valid JSON"),
    "config a list": (text(hub.CONFIG, b"[1]"), "holds a JSON list; expected an object"),
    "config deeply nested": (text(hub.CONFIG, b"[" * 100_000), "is not valid JSON"),
    "config too large": (text(hub.CONFIG, b" " * (17 * 2**20)), "bytes long; expected at most"),
    "vocabulary of 10^12": (config(vocab_size=10**12), r"config\.json: .*vocab_size"),
    "vocabulary of another model": (config(vocab_size=4_000_000), rf"{EMBEDDING}: has shape"),
    "layers by the thousand": (config(num_hidden_layers=10**6), "num_hidden_layers"),
    "layers that are not there": (
        config(num_hidden_layers=4, layer_types=None),
        r"num_hidden_layers is 4; the weights are missing for all but 2 of them",
    ),
    "another hidden size": (config(hidden_size=32), "the weights are not those"),
    "negative size": (config(intermediate_size=-1), "intermediate_size"),
    "size that is text": (config(hidden_size="16"), "hidden_size"),
    "BERT": (config(model_type="bert"), "'bert', which is another architecture"),
    "bare encoder": (other_architecture("ModernBertModel"), "architectures is ModernBertModel"),
    "token classifier": (
        other_architecture("ModernBertForTokenClassification"),
        "architectures is ModernBertForTokenClassification",
    ),
    "BERT by its class": (config(architectures=["BertForMaskedLM"]), "is BertForMaskedLM"),
    "two architectures": (config(architectures=[*CLASSES]), "expected one of"),
    "architectures of numbers": (config(architectures=[1]), "architectures"),
    "a classifier that is none": (
        config(architectures=["ModernBertForSequenceClassification"]),
        r"classifier\.(weight|bias): is missing|decoder\.bias: is unexpected",
    ),
    "RoPE of another type": (config(rope_scaling={"type": "yarn", "factor": 2}), "rope_scaling"),
    "unknown activation": (config(hidden_activation="snake"), "hidden_activation"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    "tokenizer too large for the model": (
        tokenizer_of(*"KLMNOPQ"),
        "the tokenizer does not match the model: it has 23 ids; the model's vocab_size is 18",
    ),
    "tokenizer with another [PAD]": (config(pad_token_id=7), r"its \[PAD\] is 0; pad_token_id is"),
    "tokenizer with another [CLS]": (config(cls_token_id=7), r"its \[CLS\] is 1; cls_token_id is"),
    "tokenizer with another [SEP]": (config(sep_token_id=7), r"its \[SEP\] is 2; sep_token_id is"),
    "tokenizer with another [MASK]": (config(mask_token_id=7), r"\[MASK\] is 3; mask_token_id"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folder_is_refused_with_a_clear_line(case, folder):
    spoil, message = HOSTILE[case]
    spoil(folder)
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 200 * 1024  # KiB
    with pytest.raises(InputError, match=message) as caught:
        load_pretrained(folder)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < limit


def test_all_problems_are_listed_at_once(folder):
    tensors = load_file(folder / hub.WEIGHTS)
    del tensors[NORM]
    tensors["extra.weight"] = np.ones(2, np.float32)
    tensors["head.norm.weight"] = np.ones(3, np.int32)
    save_file(tensors, folder / hub.WEIGHTS)
    with pytest.raises(InputError) as caught:
        load_pretrained(folder)
    lines = [caught.value.message, *caught.value.details]
    for expected in (
        f"{NORM}: is missing",
        "extra.weight: is unexpected",
        "head.norm.weight: has shape [3]; expected [16]",
        "head.norm.weight: has dtype I32",
    ):
        assert sum(expected in line for line in lines) == 1


def test_single_file_comes_before_an_index_as_in_transformers(folder):
    (folder / hub.INDEX).write_text('{"weight_map": {"a": "../evil.safetensors"}}')
    load_pretrained(folder)


def test_truncation_at_every_length_is_refused(folder):
    data = (folder / hub.WEIGHTS).read_bytes()
    for length in np.random.default_rng(0).integers(0, len(data), 40):
        (folder / hub.WEIGHTS).write_bytes(data[:length])
        with pytest.raises(InputError):
            load_pretrained(folder)


def test_code_of_a_stranger_is_never_run(folder, monkeypatch, caplog):
    (folder / "modeling_evil.py").write_text("raise SystemExit('run')")
    change_config(folder, auto_map={"AutoModelForMaskedLM": "modeling_evil.Evil"})
    load_pretrained(folder)
    assert "auto_map" in caplog.text
