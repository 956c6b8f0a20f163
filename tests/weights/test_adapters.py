"""Adapters in PEFT's files, both ways, with PEFT as the oracle."""

import json
import shutil
from dataclasses import replace

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from noisy_models import BIASES
from safetensors.numpy import load_file, save_file
from tiny_models import CLASSES, torch, write_model

from mlmjax import InputError, load_pretrained, save_adapter, save_pretrained
from mlmjax.config.run import ADAPTED, AdapterConfig
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import (
    abstract_model,
    merged,
    parameters,
    with_adapter,
    with_classifier,
)
from mlmjax.training.adapters import joined, split_trained, trained_patterns
from mlmjax.training.run.initial_model import PUBLISHED
from mlmjax.weights.adapters import PREFIX

peft = pytest.importorskip("peft")
# PEFT asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
MLM, LABELLED = CLASSES
IDS = np.array([[1, 6, 7, 8, 3, 9, 2], [1, 9, 9, 10, 3, 2, 0]], np.int32)
MASK = (IDS != 0).astype(np.int32)


def shaken(model, adapter=None, seed=3):
    """Return a model with an adapter of noise, so that no result is right because B is 0."""
    model = with_adapter(model, adapter or AdapterConfig(rank=3, alpha=5.0))
    rng = np.random.default_rng(seed)
    trained, frozen = split_trained(nnx.state(model, nnx.Param), trained_patterns(model))
    noise = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32)) / 3, trained
    )
    return nnx.merge(nnx.split(model)[0], joined(noise, frozen))


def torch_logits(theirs):
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor(IDS).long(), attention_mask=torch.tensor(MASK))
    return found.logits.numpy()


def logits(model):
    return np.asarray(model(IDS, MASK))


def assert_near(found, expected):
    keep = MASK.astype(bool) if found.ndim == 3 else slice(None)
    np.testing.assert_allclose(found[keep], expected[keep], atol=1e-4)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(targets=("attn.Wo", "Wi"), alpha=2.5)])
@pytest.mark.parametrize("biases", [(), BIASES])
def test_peft_reads_our_adapter(tmp_path, adapter, biases):
    write_model(tmp_path / "base", **dict.fromkeys(biases, True))
    model, tokenizer = load_pretrained(tmp_path / "base")
    ours = shaken(model, adapter)
    save_adapter(ours, tokenizer, tmp_path / "adapter", card="about")
    base = CLASSES[MLM].from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_near(logits(ours), torch_logits(theirs))
    again, _ = load_pretrained(tmp_path / "adapter")
    np.testing.assert_array_equal(logits(again), logits(ours))
    kept, given = again.config.adapter, ours.config.adapter
    assert (kept.rank, kept.alpha) == (given.rank, given.alpha)
    assert [*map(kept.changes, ADAPTED)] == [*map(given.changes, ADAPTED)]
    assert (tmp_path / "adapter" / "README.md").read_text() == "about"
    save_adapter(again, None, tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == {
        PREFIX + name for name in parameters(ours) if "lora" in name
    }


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["Wqkv", "Wo", "Wi"]},
        {"r": 2, "lora_alpha": 3, "target_modules": r".*attn\.Wqkv", "lora_dropout": 0.1},
        {"r": 4, "lora_alpha": 8, "target_modules": ["mlp.Wo"], "use_rslora": True},
    ],
)
def test_we_read_an_adapter_of_peft(tmp_path, options):
    base = write_model(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **options)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours, tokenizer = load_pretrained(tmp_path / "adapter")
    expected = torch_logits(theirs)
    assert_near(logits(ours), expected)
    assert_near(logits(merged(ours)), expected)
    save_pretrained(ours, tokenizer, tmp_path / "merged")
    assert_near(torch_logits(CLASSES[MLM].from_pretrained(tmp_path / "merged")), expected)
    assert_near(logits(load_pretrained(tmp_path / "merged")[0]), expected)


def test_a_last_layer_is_part_of_the_adapter(tmp_path):
    write_model(tmp_path / "base")
    model, tokenizer = load_pretrained(tmp_path / "base")
    ours = shaken(with_classifier(model, ["bad", "good", "ok"], seed=1))
    save_adapter(ours, tokenizer, tmp_path / "adapter")
    base = CLASSES[LABELLED].from_pretrained(tmp_path / "base", num_labels=3)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_near(logits(ours), torch_logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    for folder, labels in (("adapter", ["bad", "good", "ok"]), ("theirs", ["LABEL_0", "LABEL_1"])):
        again, _ = load_pretrained(tmp_path / folder)
        assert_near(logits(again), logits(ours))
        assert list(again.config.id2label.values())[: len(labels)] == labels


def test_gradients_are_those_of_peft(tmp_path):
    write_model(tmp_path / "base")
    model, tokenizer = load_pretrained(tmp_path / "base")
    ours = shaken(model)
    save_adapter(ours, tokenizer, tmp_path / "adapter")
    base = CLASSES[MLM].from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    weights = np.random.default_rng(0).normal(size=(*IDS.shape, 18)).astype(np.float32)
    weights *= MASK[..., None]
    output = theirs(input_ids=torch.tensor(IDS).long(), attention_mask=torch.tensor(MASK))
    (output.logits * torch.tensor(weights)).sum().backward()
    expected = {
        name.replace(".default.", "."): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    graphdef, params = nnx.split(ours)
    trained, frozen = split_trained(params, trained_patterns(ours))

    @jax.jit
    @jax.grad
    def gradient(trained):
        return (nnx.merge(graphdef, joined(trained, frozen))(IDS, MASK) * weights).sum()

    found = gradient(trained)
    like = nnx.merge(graphdef, joined(found, frozen))
    save_adapter(like, None, tmp_path / "gradients")
    tensors = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4, rtol=1e-4)


@pytest.fixture
def adapter(tmp_path):
    write_model(tmp_path / "base")
    model, _ = load_pretrained(tmp_path / "base")
    save_adapter(shaken(model), None, tmp_path / "adapter")
    return tmp_path / "adapter"


def change(adapter, **values):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"peft_type": "IA3"}, "not supported: peft_type: 'IA3'; expected 'LORA'"),
        ({"use_dora": True}, "not supported: use_dora: True"),
        ({"rank_pattern": {"Wi": 4}}, "not supported: rank_pattern"),
        ({"bias": "all"}, "bias: 'all'; expected 'none'"),
        ({"r": 0}, "adapter_config.json: rank: found 0"),
        ({"r": 4}, r"lora_A.weight: has shape \[3, 16\]; expected \[4, 16\]"),
        ({"lora_alpha": "big"}, "alpha: found 'big'"),
        ({"lora_alpha": float("nan")}, "adapter_config.json"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None; expected the folder"),
        ({"base_model_name_or_path": "./none"}, "there is no such folder.*is the base of the adap"),
    ],
)
def test_other_settings_are_rejected(adapter, values, says):
    change(adapter, **values)
    with pytest.raises(InputError, match=says):
        load_pretrained(adapter)


def test_other_tensors_are_rejected(adapter):
    file = adapter / "adapter_model.safetensors"
    right = load_file(file)
    first = next(iter(sorted(right)))
    nan = np.full_like(right[first], np.nan)
    for tensors, says in (
        ({k: v for k, v in right.items() if k != first}, "is missing; every layer needs"),
        ({**right, PREFIX + "decoder.lora_A.weight": nan}, "decoder.lora_A.weight: is unexpected"),
        ({**right, "lora": nan}, "lora: does not begin with base_model.model."),
        ({**right, first: nan}, "holds values that are NaN or infinite"),
        ({**right, first: right[first].astype(np.int64)}, "has dtype I64; expected one of F32"),
    ):
        save_file(tensors, file)
        with pytest.raises(InputError, match=says):
            load_pretrained(adapter)
    file.unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        load_pretrained(adapter)


def test_an_adapter_needs_the_base_it_was_trained_on(adapter, tmp_path):
    write_model(tmp_path / "other", seed=1)
    change(adapter, base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(InputError, match="has other weights than those that the adapter was"):
        load_pretrained(adapter)
    change(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(InputError, match="is an adapter, too; expected a model"):
        load_pretrained(adapter)


def test_an_adapter_and_its_base_come_from_the_hub(adapter, tmp_path, monkeypatch):
    """The base is fetched by the commit that it was trained on."""
    change(adapter, base_model_name_or_path="some/base", revision="c0ffee")
    requested, folders = [], {"some/base": tmp_path / "base", "some/adapter": adapter}

    def download(name, *, revision, local_files_only, allow_patterns):
        requested.append((name, revision))
        folder = tmp_path / "hub" / name.replace("/", "--") / "snapshots" / (revision or "beef")
        folder.mkdir(parents=True, exist_ok=True)
        for file in allow_patterns:
            if (folders[name] / file).exists():
                shutil.copy(folders[name] / file, folder / file)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    expected, _ = load_pretrained_locally(adapter, tmp_path)
    model, tokenizer = load_pretrained("some/adapter")
    np.testing.assert_array_equal(logits(model), logits(expected))
    assert ("some/base", "c0ffee") in requested
    save_adapter(model, tokenizer, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("some/base", "c0ffee")


def load_pretrained_locally(adapter, tmp_path):
    """Load a copy of the adapter that points to the base's folder."""
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    change(copy, base_model_name_or_path=str(tmp_path / "base"), revision=None)
    return load_pretrained(copy)


def test_an_adapter_of_large_takes_eight_megabytes(tmp_path):
    """At rank 8 in bfloat16; counted from shapes, since the model is not here."""
    config = ModelConfig.from_hf(PUBLISHED["answerdotai/ModernBERT-large"])
    config = replace(config, adapter=AdapterConfig(rank=8))
    sizes = {n: leaf.size for n, leaf in parameters(abstract_model(MLM, config)).items()}
    assert 6e6 < 2 * sum(size for name, size in sizes.items() if "lora" in name) < 8e6
    write_model(tmp_path / "base")
    ours = shaken(load_pretrained(tmp_path / "base")[0])
    bytes_of = {}
    for dtype in ("float32", "bfloat16"):
        save_adapter(ours, None, tmp_path / dtype, dtype=dtype)
        tensors = load_file(tmp_path / dtype / "adapter_model.safetensors")
        bytes_of[dtype] = sum(value.nbytes for value in tensors.values())
        near, _ = load_pretrained(tmp_path / dtype)
        np.testing.assert_allclose(logits(near), logits(ours), atol=0.3)
    assert bytes_of["float32"] == 2 * bytes_of["bfloat16"]
    with pytest.raises(InputError, match="dtype: found 'int8'"):
        save_adapter(ours, None, tmp_path / "x", dtype="int8")


def test_what_cannot_be_saved_as_an_adapter(adapter, tmp_path):
    model, _ = load_pretrained(adapter)
    with pytest.raises(InputError, match="is the base of the adapter; name another folder"):
        save_adapter(model, None, tmp_path / "x" / ".." / "base")
    assert (tmp_path / "base" / "model.safetensors").exists()
    with pytest.raises(InputError, match="the model has one already"):
        with_adapter(model, AdapterConfig())
    assert with_adapter(model, AdapterConfig(rank=3, alpha=5.0)) is model
    with pytest.raises(InputError, match="has no adapter to save"):
        save_adapter(merged(model), None, tmp_path / "x")
    provenance = model.config.provenance._replace(origin=None)
    model.config = replace(model.config, provenance=provenance)
    with pytest.raises(InputError, match="was not loaded from a folder or hub id"):
        save_adapter(model, None, tmp_path / "x")
    assert not (tmp_path / "x").exists()
