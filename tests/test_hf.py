"""Hugging Face folders in and out: parity with transformers, exact round trips, hostile files."""

import dataclasses
import json
import os
import resource
import shutil
import struct
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from flax import nnx
from huggingface_hub import errors as hub_errors
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import models, pre_tokenizers

from mlmjax import hf, hub, layout
from mlmjax.architecture import ModelConfig
from mlmjax.errors import InputError, RunError
from mlmjax.hf import load_pretrained, save_pretrained
from mlmjax.tokenizer import Tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[unused0]", *"ABCDEFGHIJ"]
SIZES = {
    "vocab_size": 18,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "bos_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
}
BIASES = ("norm_bias", "attention_bias", "mlp_bias", "decoder_bias", "classifier_bias")
EMBEDDING, DECODER = hf.EMBEDDING, hf.DECODER
CLASSES = {
    "ModernBertForMaskedLM": transformers.AutoModelForMaskedLM,
    "ModernBertForSequenceClassification": transformers.AutoModelForSequenceClassification,
}


def write_tokenizer(folder):
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(WORDS[:5])
    backend.add_tokens(["[unused0]"])
    backend.save(str(folder / "tokenizer.json"))


def torch_model(name="ModernBertForMaskedLM", dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    model = getattr(transformers, name)(transformers.ModernBertConfig(**{**SIZES, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def write_model(folder, *arguments, shard="5GB", **options):
    model = torch_model(*arguments, **options)
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return model


def tensors_of(folder):
    """Every tensor of a folder as (dtype, shape, bytes), whatever file it is in."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                value = opened.get_tensor(name)
                assert name not in found
                found[name] = (str(value.dtype), value.shape, value.tobytes())
    return found


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


IDS = np.random.default_rng(0).integers(5, 16, (2, 9))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_model(folder)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """A good folder of its own for a test to spoil."""
    return Path(shutil.copytree(source, tmp_path / "model"))


# --- the mapping -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("flipped", [(), BIASES, *((bias,) for bias in BIASES)])
def test_mapping_covers_exactly_the_parameters(name, flipped):
    default = transformers.ModernBertConfig()
    options = {bias: not getattr(default, bias) for bias in flipped}
    theirs = {n: tuple(p.shape) for n, p in torch_model(name, **options).named_parameters()}
    abstract = hf.abstract_model(name, ModelConfig(**SIZES, **options))
    ours = {n: layout.hf_shape(n, leaf.shape) for n, leaf in hf.parameters(abstract).items()}
    assert ours == theirs


def test_layouts_are_each_others_inverse():
    abstract = hf.abstract_model("ModernBertForMaskedLM", ModelConfig(**SIZES, attention_bias=True))
    for name, leaf in hf.parameters(abstract).items():
        value = np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape)
        there = layout.to_hf_layout(name, value)
        assert there.flags.c_contiguous
        np.testing.assert_array_equal(layout.from_hf_layout(name, there, leaf.shape), value)


def test_a_parameter_without_a_layout_is_an_error():
    with pytest.raises(ValueError, match=r"model\.new\.thing has no layout"):
        layout.hf_shape("model.new.thing", (2, 3))


# --- from transformers, and back -----------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("shard", ["5GB", "1KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_to_mlmjax_to_transformers(name, shard, dtype, tmp_path):
    biases = dict.fromkeys(BIASES, shard == "1KB")
    write_model(tmp_path / "in", name, dtype, shard=shard, num_labels=3, **biases)
    assert (len(list((tmp_path / "in").glob("*.safetensors"))) > 1) == (shard == "1KB")
    model, tokenizer = load_pretrained(tmp_path / "in")
    assert type(model).__name__ == name
    assert {leaf.dtype for leaf in hf.parameters(model).values()} == {jnp.dtype("float32")}
    # Read again: a module cast down and up has lost bits of its RoPE buffers as well.
    theirs = CLASSES[name].from_pretrained(tmp_path / "in", dtype=torch.float32)
    expected = torch_logits(theirs, IDS)
    np.testing.assert_allclose(model(IDS), expected, atol=1e-5)

    save_pretrained(model, tokenizer, tmp_path / "out", dtype="source")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "in")

    save_pretrained(model, tokenizer, tmp_path / "float32")
    again, info = CLASSES[name].from_pretrained(tmp_path / "float32", output_loading_info=True)
    assert not any(info.values())
    assert type(again).__name__ == name
    assert again.dtype == torch.float32
    np.testing.assert_array_equal(torch_logits(again, IDS), expected)


def test_sharded_folder_comes_back_with_the_same_tensors(source, tmp_path, monkeypatch):
    model, tokenizer = load_pretrained(source)
    monkeypatch.setattr(hf, "SHARD_BYTES", 3000)
    save_pretrained(model, tokenizer, tmp_path / "out")
    index = json.loads((tmp_path / "out" / hub.INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors_of(source))
    assert tensors_of(tmp_path / "out") == tensors_of(source)
    assert not any(
        transformers.AutoModelForMaskedLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )[1].values()
    )
    again, _ = load_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(again(IDS), model(IDS))


def test_bfloat16_export_is_rounded_and_loads_in_bfloat16(source, tmp_path):
    model, tokenizer = load_pretrained(source)
    save_pretrained(model, tokenizer, tmp_path / "out", dtype="bfloat16")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    expected = torch_model().to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in theirs.state_dict().items())


def test_each_tensor_keeps_its_own_dtype(folder, tmp_path):
    tensors = load_file(folder / hub.WEIGHTS)
    for name, dtype in zip(sorted(tensors), ["float16", "bfloat16", "float32"] * 20, strict=False):
        tensors[name] = tensors[name].astype(dtype)
    save_file(tensors, folder / hub.WEIGHTS, metadata={"format": "pt"})
    model, tokenizer = load_pretrained(folder)
    assert len(set(dict(model.source_dtypes).values())) == 3
    save_pretrained(model, tokenizer, tmp_path / "out", dtype="source")
    assert tensors_of(tmp_path / "out") == tensors_of(folder)


def test_equal_decoder_is_accepted_and_goes_back_with_source(folder, tmp_path):
    tensors = load_file(folder / hub.WEIGHTS)
    tensors[DECODER] = tensors[EMBEDDING].copy()
    save_file(tensors, folder / hub.WEIGHTS)
    model, tokenizer = load_pretrained(folder)
    assert DECODER not in hf.parameters(model)
    save_pretrained(model, tokenizer, tmp_path / "out", dtype="source")
    assert tensors_of(tmp_path / "out") == tensors_of(folder)
    save_pretrained(model, tokenizer, tmp_path / "float32")
    assert DECODER not in tensors_of(tmp_path / "float32")


def test_untied_config_needs_and_writes_the_decoder(folder, tmp_path):
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"decoder\.weight: is missing"):
        load_pretrained(folder)
    tensors = load_file(folder / hub.WEIGHTS)
    save_file({**tensors, DECODER: tensors[EMBEDDING].copy()}, folder / hub.WEIGHTS)
    model, tokenizer = load_pretrained(folder)
    save_pretrained(model, tokenizer, tmp_path / "out")
    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    np.testing.assert_allclose(torch_logits(theirs, IDS), model(IDS), atol=1e-5)


def test_unknown_keys_are_carried_through(folder, tmp_path):
    change_config(folder, my_note={"a": [1, 2]}, torch_dtype="float32", auto_map={"x": "evil.py"})
    model, tokenizer = load_pretrained(folder)
    save_pretrained(model, tokenizer, tmp_path / "out", dtype="bfloat16")
    values = json.loads((tmp_path / "out" / hub.CONFIG).read_text())
    assert values["my_note"] == {"a": [1, 2]}
    assert values["dtype"] == values["torch_dtype"] == "bfloat16"


def test_both_dialects_give_the_same_model(folder, tmp_path):
    nested, _ = load_pretrained(folder)
    values = json.loads((folder / hub.CONFIG).read_text())
    del values["rope_parameters"], values["layer_types"]
    flat = {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    (folder / hub.CONFIG).write_text(json.dumps(values | flat | {"global_attn_every_n_layers": 3}))
    np.testing.assert_array_equal(load_pretrained(folder)[0](IDS), nested(IDS))


def test_real_tokenizer_goes_through_unchanged(tokenizer, tmp_path):
    config = ModelConfig(**{**SIZES, "vocab_size": 50368, "pad_token_id": 50283}, mlp_bias=True)
    config = dataclasses.replace(config, cls_token_id=50281, sep_token_id=50282)
    model = hf.CLASSES["ModernBertForMaskedLM"](config, rngs=nnx.Rngs(0))
    save_pretrained(model, tokenizer, tmp_path / "out", dtype="source")
    again, same = load_pretrained(tmp_path / "out")
    assert same.files == tokenizer.files
    np.testing.assert_array_equal(again(IDS), model(IDS))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Answer: [unused0] [MASK]"
    assert theirs(text)["input_ids"] == tokenizer.backend.encode(text).ids


def test_architectures_missing_follows_the_tensors(folder, tmp_path):
    change_config(folder, architectures=None)
    assert type(load_pretrained(folder)[0]).__name__ == "ModernBertForMaskedLM"
    write_model(tmp_path / "c", "ModernBertForSequenceClassification")
    change_config(tmp_path / "c", architectures=None)
    found = type(load_pretrained(tmp_path / "c")[0]).__name__
    assert found == "ModernBertForSequenceClassification"


def test_derived_buffers_of_older_exports_are_dropped(folder):
    tensors = load_file(folder / hub.WEIGHTS)
    tensors["model.layers.0.attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, folder / hub.WEIGHTS)
    model, _ = load_pretrained(folder)
    assert "model.layers.0.attn.rotary_emb.inv_freq" not in dict(model.source_dtypes)


def test_computing_in_bfloat16_keeps_float32_parameters(source):
    model, _ = load_pretrained(source, dtype="bfloat16")
    assert model.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in hf.parameters(model).values()} == {jnp.dtype("float32")}
    with pytest.raises(InputError, match="dtype: found 'int8'"):
        load_pretrained(source, dtype="int8")


def test_model_splits_and_hashes(source):
    graphdef, _ = nnx.split(load_pretrained(source)[0])
    assert hash(graphdef) == hash(nnx.split(load_pretrained(source)[0])[0])


# --- writing -----------------------------------------------------------------------------------


def test_older_export_is_replaced_and_other_folders_are_not(source, tmp_path):
    model, tokenizer = load_pretrained(source)
    out = tmp_path / "deep" / "out"
    save_pretrained(model, tokenizer, out, card="# Mine\n")
    assert (out / hub.CARD).read_text() == "# Mine\n"
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of an older, larger model")
    save_pretrained(model, tokenizer, out)
    assert "ModernBertForMaskedLM" in (out / hub.CARD).read_text()
    assert not (out / "model-00001-of-00002.safetensors").exists()
    (out / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match=r"holds other things than a model.*notes\.txt"):
        save_pretrained(model, tokenizer, out)
    with pytest.raises(InputError, match="is a file"):
        save_pretrained(model, tokenizer, out / "notes.txt")
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_loading_and_saving_in_one_place(folder):
    before = tensors_of(folder)
    model, tokenizer = load_pretrained(folder)
    save_pretrained(model, tokenizer, folder, dtype="source")
    assert tensors_of(folder) == before


def test_failed_export_leaves_the_older_one(source, tmp_path):
    model, tokenizer = load_pretrained(source)
    out = tmp_path / "out"
    save_pretrained(model, tokenizer, out)
    before = {entry.name: entry.read_bytes() for entry in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as if the disk were full
    try:
        with pytest.raises(RunError, match="could not be written"):
            save_pretrained(model, tokenizer, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {entry.name: entry.read_bytes() for entry in out.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_values_the_dtype_cannot_hold_are_refused(folder, tmp_path):
    tensors = {n: x.astype(np.float16) for n, x in load_file(folder / hub.WEIGHTS).items()}
    save_file(tensors, folder / hub.WEIGHTS)
    model, tokenizer = load_pretrained(folder)
    model.head.dense.weight[...] = model.head.dense.weight[...] * 1e7
    with pytest.raises(InputError, match=r"head\.dense\.weight: holds values .*float16"):
        save_pretrained(model, tokenizer, tmp_path / "out", dtype="source")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="dtype: found 'float8'"):
        save_pretrained(model, tokenizer, tmp_path / "out", dtype="float8")


# --- the hub -----------------------------------------------------------------------------------


def test_hub_cache_is_read_offline_with_links_to_blobs(source, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--some--model"
    snapshot = repo / "snapshots" / commit
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for arguments in ({}, {"revision": commit}, {"local_files_only": True}):
        model, _ = load_pretrained("some/model", **arguments)
        np.testing.assert_array_equal(model(IDS), load_pretrained(source)[0](IDS))
    load_pretrained(snapshot)  # the same folder, named as a folder
    with pytest.raises(InputError, match=r"some/model \(revision v2\): is no folder here, and"):
        load_pretrained("some/model", revision="v2")
    with pytest.raises(InputError, match="some/other: is no folder here, and neither the hub"):
        load_pretrained("some/other")


def test_only_safetensors_and_small_files_are_fetched(source, tmp_path, monkeypatch):
    asked = []

    def download(name, *, revision, local_files_only, allow_patterns):
        asked.append((revision, tuple(allow_patterns)))
        folder = tmp_path / "abc"
        folder.mkdir(exist_ok=True)
        for file in allow_patterns:
            if (source / file).exists():
                shutil.copy(source / file, folder / file)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_pretrained("some/model", revision="v1")
    small = (hub.CONFIG, hub.INDEX, hub.CLASSIFIER, *hub.TOKENIZER_FILES)
    assert asked == [("v1", small), ("abc", (hub.WEIGHTS,))]


def refusal(kind):
    return kind.__new__(kind)  # what the hub's errors are made of differs; their class counts


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(hub_errors.RepositoryNotFoundError), "the hub has no such model"),
        (refusal(hub_errors.GatedRepoError), "asks for permission"),
        (refusal(hub_errors.RevisionNotFoundError), "no such revision"),
        (hub_errors.OfflineModeIsEnabled("off"), "switched off"),
        (ConnectionError("reset by peer"), "the hub cannot be used now"),
    ],
)
def test_what_the_hub_refuses_is_an_input_error(error, message, monkeypatch):
    def download(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=rf"some/model: is no folder here, and .*{message}"):
        load_pretrained("some/model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is empty"),
        ("./nowhere", "there is no such folder"),
        ("/nowhere/at/all", "there is no such folder"),
        ("runs/a/export", "there is no such folder"),
        ("~/nowhere-at-all", "there is no such folder"),
        ("what is this?", "is not a valid hub id"),
        ("x" * 5000, "no usable path"),
        ("nul\0byte", "is not a valid hub id|no usable path"),
    ],
)
def test_names_that_are_no_model(name, message):
    with pytest.raises(InputError, match=message):
        load_pretrained(name)


def test_folder_with_a_revision_and_a_file_are_refused(source):
    with pytest.raises(InputError, match="leave the revision out"):
        load_pretrained(source, revision="main")
    with pytest.raises(InputError, match="is a file"):
        load_pretrained(source / hub.CONFIG)


# --- hostile folders ---------------------------------------------------------------------------


def change_config(folder, **values):
    path = folder / hub.CONFIG
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (old | values).items() if v is not None}))


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


def test_arrays_do_not_share_memory_with_the_file(source):
    model, _ = load_pretrained(source)
    before = np.asarray(model(IDS))
    state = nnx.state(model, nnx.Param)
    donated = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)(
        jax.tree.map(jnp.copy, state)
    )
    assert jax.tree.leaves(donated)
    np.testing.assert_array_equal(model(IDS), before)


def test_tokenizer_of_the_folder_is_the_one_returned(source):
    _, tokenizer = load_pretrained(source)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.mask_id == 3
