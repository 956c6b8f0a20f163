"""Hugging Face folders in and out: parity with transformers, exact round trips, the hub."""

import itertools
import json
import os
import resource
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import errors as hub_errors
from safetensors.numpy import load_file, save_file
from tiny_models import (
    BIASES,
    CLASSES,
    SIZES,
    change_config,
    tensors_of,
    torch,
    torch_model,
    transformers,
    write_model,
)

from mlmjax import fill_mask, storage
from mlmjax.errors import InputError, RunError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import abstract_model, parameters
from mlmjax.storage import CARD, CLASSIFIER, CONFIG, PROVENANCE, TOKENIZER_FILES
from mlmjax.weights import pretrained
from mlmjax.weights.pretrained import load_pretrained, save_pretrained
from mlmjax.weights.tensors import layout
from mlmjax.weights.tensors.tensor_files import INDEX, WEIGHTS, Weights

EMBEDDING, DECODER = pretrained.EMBEDDING, pretrained.DECODER


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
    """A copy of a good folder for a test to spoil."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def export(source, out, **options):
    """Load a folder and save it; return the model."""
    model, tokenizer = load_pretrained(source)
    save_pretrained(model, tokenizer, out, **options)
    return model


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_by_transformers(folder, name="ModernBertForMaskedLM"):
    model, info = CLASSES[name].from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model


# --- the mapping -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_mapping_covers_exactly_the_parameters(name):
    default = transformers.ModernBertConfig()
    for flipped in ((), BIASES, *((bias,) for bias in BIASES)):
        options = {bias: not getattr(default, bias) for bias in flipped}
        theirs = {n: tuple(p.shape) for n, p in torch_model(name, **options).named_parameters()}
        abstract = abstract_model(name, ModelConfig(**SIZES, **options))
        assert theirs == {
            n: layout.hf_shape(n, leaf.shape) for n, leaf in parameters(abstract).items()
        }


def test_a_parameter_without_a_layout_is_an_error():
    with pytest.raises(ValueError, match=r"model\.new\.thing has no layout"):
        layout.hf_shape("model.new.thing", (2, 3))


# --- from transformers, and back -----------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("shard", "dtype"), [("5GB", torch.float32), ("1KB", torch.bfloat16), ("5GB", torch.float16)]
)
def test_transformers_to_mlmjax_to_transformers(name, shard, dtype, tmp_path):
    biases = dict.fromkeys(BIASES, shard == "1KB")
    write_model(tmp_path / "in", name, dtype, shard=shard, num_labels=3, **biases)
    assert (len(list((tmp_path / "in").glob("*.safetensors"))) > 1) == (shard == "1KB")
    model, tokenizer = load_pretrained(tmp_path / "in")
    assert type(model).__name__ == name
    assert {leaf.dtype for leaf in parameters(model).values()} == {jnp.dtype("float32")}
    # Read again: a module cast down and up has lost bits of its RoPE buffers as well.
    theirs = CLASSES[name].from_pretrained(tmp_path / "in", dtype=torch.float32)
    expected = torch_logits(theirs, IDS)
    np.testing.assert_allclose(model(IDS), expected, atol=1e-5)

    save_pretrained(model, tokenizer, tmp_path / "out", dtype="source")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "in")

    save_pretrained(model, tokenizer, tmp_path / "float32")
    again = read_by_transformers(tmp_path / "float32", name)
    assert type(again).__name__ == name
    assert again.dtype == torch.float32
    np.testing.assert_array_equal(torch_logits(again, IDS), expected)


def test_sharded_folder_comes_back_with_the_same_tensors(source, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 3000)
    model = export(source, tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors_of(source))
    assert tensors_of(tmp_path / "out") == tensors_of(source)
    read_by_transformers(tmp_path / "out")
    again, _ = load_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(again(IDS), model(IDS))


def test_bfloat16_export_is_rounded_and_loads_in_bfloat16(source, tmp_path):
    export(source, tmp_path / "out", dtype="bfloat16")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    expected = torch_model().to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in theirs.state_dict().items())


def store_decoder(tensors):
    tensors[DECODER] = tensors[EMBEDDING].copy()


def test_each_dtype_and_an_equal_decoder_go_back_with_source(folder, tmp_path):
    def cast(tensors):
        dtypes = itertools.cycle(["float16", "bfloat16", "float32"])
        for name, dtype in zip(sorted(tensors), dtypes, strict=False):
            tensors[name] = tensors[name].astype(dtype)
        store_decoder(tensors)

    change_tensors(folder, cast)
    model = export(folder, tmp_path / "out", dtype="source")
    assert len(set(model.config.source_dtypes.values())) == 3
    assert DECODER not in parameters(model)
    assert tensors_of(tmp_path / "out") == tensors_of(folder)
    save_pretrained(model, None, tmp_path / "float32")
    assert DECODER not in tensors_of(tmp_path / "float32")


def test_untied_config_needs_the_decoder(folder):
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"decoder\.weight: is missing"):
        load_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_of_its_own_is_that_of_transformers(dtype, tmp_path):
    write_model(tmp_path / "in", dtype=dtype, tie_word_embeddings=False)
    model, tokenizer = load_pretrained(tmp_path / "in")
    values = parameters(model)
    assert not np.array_equal(values[DECODER], values[EMBEDDING])
    theirs = read_by_transformers(tmp_path / "in").float()
    np.testing.assert_allclose(model(IDS), torch_logits(theirs, IDS), atol=1e-4)
    np.testing.assert_allclose(
        model.mlm_logits(model.encode(IDS), [7, 3]), np.asarray(model(IDS))[..., [7, 3]], atol=1e-6
    )
    save_pretrained(model, tokenizer, tmp_path / "out", dtype="source")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "in")
    read_by_transformers(tmp_path / "out")


def test_a_decoder_that_differs_from_a_tied_one_is_rejected_with_the_way_out(folder):
    change_tensors(folder, store_decoder)
    change_tensors(folder, lambda tensors: tensors[DECODER].__imul__(2))
    with pytest.raises(InputError, match="set tie_word_embeddings to false"):
        load_pretrained(folder)
    change_config(folder, tie_word_embeddings=False)
    load_pretrained(folder)


def rename(folder, function):
    def change(tensors):
        renamed = {function(name): value for name, value in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    change_tensors(folder, change)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("_orig_mod.{}".format, "torch.compile"),
        ("module.{}".format, "DistributedDataParallel"),
        ("module._orig_mod.{}".format, "torch.compile"),
        ("model.{}".format, "the prefix model."),
        (lambda name: name.removeprefix("model."), "added to the names of the encoder"),
        (lambda name: "_orig_mod." + name.removeprefix("model."), "the names of the encoder"),
        (lambda name: name.replace("layers.0.", "layers.0._orig_mod."), "torch.compile"),
        (lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."), "FSDP"),
        ("base_model.model.{}".format, "the prefix base_model.model."),
        ("base_model.model.model.{}".format, "the prefix base_model.model.model."),
        (lambda name: name.replace("model.", "encoder."), "model. in place of encoder."),
        (lambda name: name.replace("model.", "bert.encoder."), "model. in place of bert.encoder."),
        (lambda name: "net." + name.removeprefix("model."), "the prefix net."),
        (lambda name: "module.encoder." + name, "the prefix encoder."),
    ],
)
def test_names_of_wrapped_models_are_read_and_this_is_said(function, said, folder, source, caplog):
    rename(folder, function)
    model, _ = load_pretrained(folder)
    assert said in caplog.text
    expected, _ = load_pretrained(source)
    for name, value in parameters(expected).items():
        np.testing.assert_array_equal(parameters(model)[name], value)


def test_a_mismatch_shows_names_of_either_side(folder):
    rename(folder, "transformer.{}.x".format)
    with pytest.raises(InputError, match="for all but 0 of them") as caught:
        load_pretrained(folder)
    assert str(caught.value).count("is missing") >= 3
    assert str(caught.value).count("is in the files") >= 3
    change_config(folder, num_hidden_layers=1, layer_types=None)
    rename(folder, lambda name: name.replace("transformer.model.layers.0", "model.layers.0"))
    with pytest.raises(InputError, match="the weights are not those") as caught:
        load_pretrained(folder)
    shown = str(caught.value).splitlines()[:7]
    assert sum("is missing" in line for line in shown) >= 3
    assert sum("is unexpected" in line for line in shown) >= 3


def test_an_encoder_alone_is_loaded_and_saved_as_such(folder, tmp_path):
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    theirs.save_pretrained(folder)
    model, tokenizer = load_pretrained(folder)
    ids = np.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(model.encode(ids), expected, atol=1e-4)
    with pytest.raises(InputError, match=r"no masked-language-model head.*classification head"):
        fill_mask(model, tokenizer, ["A [MASK]"])
    save_pretrained(model, tokenizer, tmp_path / "out", dtype="source")
    assert tensors_of(tmp_path / "out") == tensors_of(folder)
    again = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(ids)).last_hidden_state, expected)
    change_config(folder, architectures=["ModernBertForMaskedLM"])
    with pytest.raises(InputError, match="these are the weights of an encoder"):
        load_pretrained(folder)


def test_float64_is_read_as_float32_and_said(folder, source, tmp_path, caplog):
    tensors = load_file(source / WEIGHTS)
    name = sorted(tensors)[3]
    save_file(tensors | {name: tensors[name].astype("f8")}, folder / WEIGHTS)
    model, tokenizer = load_pretrained(folder)
    said = f"float64 values are read as float32, in 1 of {len(tensors)} tensors, such as {name}"
    assert [said in record.message for record in caplog.records] == [True]
    same = layout.to_hf_tensors(load_pretrained(source)[0])
    for key, value in layout.to_hf_tensors(model).items():
        np.testing.assert_array_equal(value, same[key])
    save_pretrained(model, tokenizer, tmp_path / "out", dtype="source")
    assert load_file(tmp_path / "out" / WEIGHTS)[name].dtype == np.float32
    tensors[name] = np.full(tensors[name].shape, 1e200)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match="values are NaN or infinite"):
        load_pretrained(folder)


@pytest.mark.parametrize("pad", [None, -1])
def test_a_model_without_a_padding_id_takes_that_of_the_tokenizer(pad, folder, source, caplog):
    model, _ = load_pretrained(source)
    values = json.loads((folder / CONFIG).read_text()) | {"pad_token_id": pad}
    (folder / CONFIG).write_text(json.dumps(values))
    other, tokenizer = load_pretrained(folder)
    assert other.config.pad_token_id is None
    assert ("pad_token_id: -1 is the id of no token" in caplog.text) == (pad == -1)
    ids = np.array([[*IDS[0], tokenizer.pad_id]])
    np.testing.assert_array_equal(model(ids), other(ids))


def test_ids_that_change_no_computation_are_a_warning(folder, caplog):
    change_config(folder, cls_token_id=7, sep_token_id=8, bos_token_id=9, eos_token_id=[10])
    _, tokenizer = load_pretrained(folder)
    assert (tokenizer.cls_id, tokenizer.sep_id) == (1, 2)
    assert "its [CLS] is 1; cls_token_id is 7 in config.json" in caplog.text
    change_config(folder, pad_token_id=5)
    with pytest.raises(InputError, match=r"or if this is it, correct pad_token_id in config\.json"):
        load_pretrained(folder)


def test_unknown_keys_are_carried_through(folder, tmp_path):
    change_config(folder, my_note={"a": [1, 2]}, torch_dtype="float32", auto_map={"x": "evil.py"})
    export(folder, tmp_path / "out", dtype="bfloat16")
    values = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert values["my_note"] == {"a": [1, 2]}
    assert values["dtype"] == values["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", CLASSES)
def test_architectures_missing_follows_the_tensors(name, tmp_path):
    write_model(tmp_path, name)
    change_config(tmp_path, architectures=None)
    assert type(load_pretrained(tmp_path)[0]).__name__ == name


def test_derived_buffers_of_older_exports_are_dropped(folder):
    name = "model.layers.0.attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    assert name not in load_pretrained(folder)[0].config.source_dtypes


def test_computing_in_bfloat16_keeps_float32_parameters(source):
    model, _ = load_pretrained(source, dtype="bfloat16")
    assert model.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in parameters(model).values()} == {jnp.dtype("float32")}
    with pytest.raises(InputError, match="dtype: found 'int8'"):
        load_pretrained(source, dtype="int8")


# --- writing -----------------------------------------------------------------------------------


def test_older_export_is_replaced_and_other_folders_are_not(source, tmp_path):
    model, tokenizer = load_pretrained(source)
    out = tmp_path / "deep" / "out"
    save_pretrained(model, tokenizer, out, card="# Mine\n")
    assert (out / CARD).read_text() == "# Mine\n"
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of an older, larger model")
    save_pretrained(model, tokenizer, out)
    assert "ModernBertForMaskedLM" in (out / CARD).read_text()
    assert not (out / "model-00001-of-00002.safetensors").exists()
    (out / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match=r"holds files that are not part of a model.*notes\.txt"):
        save_pretrained(model, tokenizer, out)
    with pytest.raises(InputError, match="is a file"):
        save_pretrained(model, tokenizer, out / "notes.txt")
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_has_the_mode_of_the_umask(source, tmp_path, umask):
    model, tokenizer = load_pretrained(source)
    before = os.umask(umask)
    try:
        save_pretrained(model, tokenizer, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert WEIGHTS in modes
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_loading_and_saving_in_one_place(folder):
    before = tensors_of(folder)
    export(folder, folder, dtype="source")
    assert tensors_of(folder) == before


def test_failed_export_leaves_the_older_one(source, tmp_path):
    model, tokenizer = load_pretrained(source)
    out = tmp_path / "out"
    save_pretrained(model, tokenizer, out)
    before = {entry.name: entry.read_bytes() for entry in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as if the disk were full
    try:
        with pytest.raises(RunError, match="cannot be written"):
            save_pretrained(model, tokenizer, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {entry.name: entry.read_bytes() for entry in out.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_values_the_dtype_cannot_hold_are_rejected(folder, tmp_path):
    change_tensors(
        folder, lambda tensors: tensors.update({n: x.astype("f2") for n, x in tensors.items()})
    )
    model, tokenizer = load_pretrained(folder)
    model.head.dense.weight[...] = model.head.dense.weight[...] * 1e7
    with pytest.raises(InputError, match=r"head\.dense\.weight: holds values .*float16"):
        save_pretrained(model, tokenizer, tmp_path / "out", dtype="source")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="dtype: found 'float8'"):
        save_pretrained(model, tokenizer, tmp_path / "out", dtype="float8")


def test_finite_values_may_have_a_sum_that_is_not(folder):
    name = "model.layers.0.mlp.Wo.weight"
    change_tensors(folder, lambda tensors: tensors[name].fill(3e38))
    model, _ = load_pretrained(folder)
    assert (parameters(model)[name] == np.float32(3e38)).all()
    change_tensors(folder, lambda tensors: tensors[name].put(1, np.inf))
    with pytest.raises(InputError, match=f"{name}: 1 of "):
        load_pretrained(folder)


def test_a_file_that_changes_while_it_is_read_is_rejected(folder):
    path = folder / WEIGHTS
    before = load_file(path)
    changed = pytest.raises(InputError, match="was changed while it was read")
    with changed, Weights(folder) as weights:  # its end raises the error, too
        for name, value in before.items():
            np.testing.assert_array_equal(weights.read(name), value)
        save_file({name: value + 1 for name, value in before.items()}, path)
        with pytest.raises(InputError, match="was changed while it was read"):
            weights.read(next(iter(before)))
        path.write_bytes(path.read_bytes()[:-200])
        last = max(before, key=lambda name: weights.headers[name].start)
        with pytest.raises(InputError, match=f"{last} cannot be read"):
            weights.read(last)


def test_weights_go_to_the_device_the_caller_chose(folder):
    other = jax.devices()[3]
    with jax.default_device(other):
        model, _ = load_pretrained(folder)
    assert {leaf.device for leaf in parameters(model).values()} == {other}


# --- the hub -----------------------------------------------------------------------------------


def test_a_folder_that_a_killed_save_moved_away_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "_is_alive", lambda process: False)
    moved = storage._hidden(Path("model"), "old")
    moved.mkdir()
    with pytest.raises(InputError, match=f"was killed while it .* rename {moved.name}, which is"):
        load_pretrained("model")


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
    with pytest.raises(InputError, match=r"some/model \(revision v2\): is not a local folder,"):
        load_pretrained("some/model", revision="v2")
    with pytest.raises(InputError, match="some/other: is not a local folder, not in the cache"):
        load_pretrained("some/other")


def test_only_safetensors_and_small_files_are_fetched(source, tmp_path, monkeypatch):
    requested = []

    def download(name, *, revision, local_files_only, allow_patterns):
        requested.append((revision, tuple(allow_patterns)))
        folder = tmp_path / "abc"
        folder.mkdir(exist_ok=True)
        for file in allow_patterns:
            if (source / file).exists():
                shutil.copy(source / file, folder / file)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_pretrained("some/model", revision="v1")
    small = requested[0][1]
    assert {CONFIG, INDEX, CLASSIFIER, *PROVENANCE, *TOKENIZER_FILES} <= set(small)
    assert not any(file.endswith((".safetensors", ".bin")) or "*" in file for file in small)
    assert requested == [("v1", small), ("abc", (WEIGHTS,))]


def hub_error(kind):
    return kind.__new__(kind)  # what the hub's errors are made of differs; their class counts


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(hub_errors.RepositoryNotFoundError), "the hub has no such model"),
        (hub_error(hub_errors.GatedRepoError), "asks for permission"),
        (hub_error(hub_errors.RevisionNotFoundError), "no such revision"),
        (hub_errors.OfflineModeIsEnabled("off"), "switched off"),
        (ConnectionError("reset by peer"), "the hub cannot be used now"),
    ],
)
def test_an_error_of_the_hub_is_an_input_error(error, message, monkeypatch):
    def download(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=rf"some/model: is not a local folder, and .*{message}"):
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
        ("x" * 5000, "not a usable path"),
        ("nul\0byte", "is not a valid hub id|not a usable path"),
    ],
)
def test_names_that_are_no_model(name, message):
    with pytest.raises(InputError, match=message):
        load_pretrained(name)


def test_folder_with_a_revision_and_a_file_are_rejected(source):
    with pytest.raises(InputError, match="leave the revision out"):
        load_pretrained(source, revision="main")
    with pytest.raises(InputError, match="is a file"):
        load_pretrained(source / CONFIG)
