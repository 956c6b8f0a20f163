"""The conversion tool: bit by bit both ways, differences found and placed, bad input refused."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mlmjax import storage
from mlmjax.config.run import CheckpointConfig
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import CLASSES
from mlmjax.training.step import create_train_state
from mlmjax.weights import pretrained
from mlmjax.weights.checkpoints import Checkpoints
from mlmjax.weights.model_checkpoint import load_model
from mlmjax.weights.tensor_files import WEIGHTS

pytestmark = pytest.mark.usefixtures("orbax_leftovers")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "convert_weights.py"
SPEC = importlib.util.spec_from_file_location("convert_weights", SCRIPT)
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)

CONFIG = ModelConfig(
    vocab_size=32,
    pad_token_id=0,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    attention_bias=True,
    extra={"note": "kept"},
)


def make_model(seed=0, name="ModernBertForMaskedLM", config=CONFIG):
    return CLASSES[name](config, rngs=nnx.Rngs(seed))


def make_folder(folder, tokenizer=None, dtype="float32", **options):
    pretrained.save_pretrained(make_model(**options), tokenizer, folder, dtype=dtype)
    return folder


def run(capsys, *arguments):
    """Run the tool in this process; return (exit code, standard output, standard error)."""
    code = TOOL.run([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    return code, streams.out, streams.err


def change(folder, name, index, value):
    tensors = load_file(folder / WEIGHTS)
    tensors[name][index] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("ModernBertForMaskedLM", "float32"),
        ("ModernBertForMaskedLM", "bfloat16"),
        ("ModernBertForMaskedLM", "mixed, with a decoder"),
        ("ModernBertForSequenceClassification", "mixed, without"),
    ],
)
def test_there_and_back_is_bit_identical(name, dtype, tokenizer, tmp_path, capsys):
    source = tmp_path / "source"
    config = dataclasses.replace(CONFIG, vocab_size=50368, pad_token_id=tokenizer.pad_id)
    make_folder(source, tokenizer, "float32" if "," in dtype else dtype, name=name, config=config)
    if "," in dtype:
        tensors = load_file(source / WEIGHTS)
        kinds = ("float16", "bfloat16", "float32")
        tensors = {n: x.astype(kinds[i % 3]) for i, (n, x) in enumerate(sorted(tensors.items()))}
        if name == "ModernBertForMaskedLM":
            tensors[pretrained.DECODER] = tensors[pretrained.EMBEDDING].copy()
        save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    assert run(capsys, "to-jax", source, tmp_path / "jax")[0] == 0
    assert run(capsys, "to-hf", tmp_path / "jax", tmp_path / "hf")[0] == 0
    for file in (WEIGHTS, *tokenizer.files):
        assert (tmp_path / "hf" / file).read_bytes() == (source / file).read_bytes()
    assert '"note": "kept"' in (tmp_path / "hf" / storage.CONFIG).read_text()
    for other in (tmp_path / "jax", tmp_path / "hf", source):
        code, out, _ = run(capsys, "check", source, other)
        assert (code, out.splitlines()[0]) == (0, "largest difference 0")
        assert run(capsys, "check", other, tmp_path / "jax")[0] == 0


def test_check_prints_the_largest_difference_and_where(tmp_path, capsys):
    first = make_folder(tmp_path / "a")
    second = Path(shutil.copytree(first, tmp_path / "b"))
    change(second, "decoder.bias", 7, 0.25)
    change(second, "model.layers.1.mlp.Wo.weight", (3, 2), -8.0)
    run(capsys, "to-jax", second, tmp_path / "c")
    for other in (second, tmp_path / "c"):
        code, out, err = run(capsys, "check", first, other)
        assert code == 1
        assert "decoder.bias: differs by up to 0.25" in out
        assert "largest difference 7.99" in out
        assert "at model.layers.1.mlp.Wo.weight[3, 2]: " in out
        assert "-8.0 in B" in out
        assert out.splitlines()[-1] == "different"
        assert err == ""


def test_one_bit_is_a_difference(tmp_path, capsys):
    first = make_folder(tmp_path / "a")
    change(first, "decoder.bias", 3, 0.0)
    second = Path(shutil.copytree(first, tmp_path / "b"))
    change(second, "decoder.bias", 3, -0.0)
    code, out, _ = run(capsys, "check", first, second)
    assert code == 1
    assert "decoder.bias: differs by up to 0" in out


def test_not_a_number_is_the_largest_difference(tmp_path, capsys):
    first = make_folder(tmp_path / "a")
    second = Path(shutil.copytree(first, tmp_path / "b"))
    change(second, "decoder.bias", 3, np.nan)
    code, out, _ = run(capsys, "check", first, second)
    assert code == 1
    assert "largest difference inf at decoder.bias[3]: 0.0 in A, nan in B" in out


def test_other_dtypes_shapes_and_names_are_differences(tmp_path, capsys):
    first = make_folder(tmp_path / "a")
    code, out, _ = run(capsys, "check", first, make_folder(tmp_path / "b", dtype="bfloat16"))
    assert code == 1
    assert "(float32 in A, bfloat16 in B)" in out
    other = make_folder(tmp_path / "c", name="ModernBertForSequenceClassification")
    tensors = load_file(other / WEIGHTS)
    tensors["head.norm.weight"] = np.ones(3, np.float32)
    save_file(tensors, other / WEIGHTS)
    code, out, _ = run(capsys, "check", first, other)
    assert code == 1
    assert "classifier.bias: only in B" in out
    assert "decoder.bias: only in A" in out
    assert "head.norm.weight: shape [4] in A, [3] in B" in out


def test_a_stored_decoder_is_the_embedding(tmp_path, capsys):
    first = make_folder(tmp_path / "a")
    second = Path(shutil.copytree(first, tmp_path / "b"))
    tensors = load_file(second / WEIGHTS)
    save_file(
        {**tensors, pretrained.DECODER: tensors[pretrained.EMBEDDING].copy()}, second / WEIGHTS
    )
    assert run(capsys, "check", first, second)[0] == 0
    assert run(capsys, "check", second, first)[0] == 0
    change(second, pretrained.DECODER, (1, 1), 9.0)
    code, out, _ = run(capsys, "check", first, second)
    assert code == 1
    assert f"at {pretrained.DECODER}[1, 1]" in out


def test_check_reads_the_checkpoints_of_a_run(tmp_path, capsys):
    state = create_train_state(make_model(), optax.adamw(1e-3))[1]
    with Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(3, state)
    export = make_folder(tmp_path / "run" / "export")
    for place in ("run", "run/checkpoints", "run/checkpoints/3"):
        assert run(capsys, "check", tmp_path / place, export)[0] == 0
    assert run(capsys, "check", export, make_folder(tmp_path / "other", seed=1))[0] == 1


def test_the_model_computes_the_same_on_the_other_side(tmp_path, capsys):
    source = make_folder(tmp_path / "a")
    run(capsys, "to-jax", source, tmp_path / "b")
    ids = jnp.arange(12).reshape(2, 6)
    model, _ = load_model(tmp_path / "b")
    np.testing.assert_array_equal(model(ids), make_model()(ids))


def broken(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])


def pickled(folder):
    os.rename(folder / WEIGHTS, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-jax", "./absent", "{new}"], "there is no such folder"),
        (["to-jax", "{broken}", "{new}"], "is not a whole safetensors file"),
        (["to-jax", "{pickled}", "{new}"], "can run code"),
        (["to-jax", "{empty}", "{new}"], "config.json: is missing"),
        (["to-jax", "{good}", "{good}/sub.txt"], "is a file"),
        (["to-jax", "{good}", "{good}"], "holds files that are not part of a model"),
        (["to-hf", "{good}", "{new}"], "is no checkpoint that to-jax wrote"),
        (["to-hf", "{absent}", "{new}"], "is no checkpoint that to-jax wrote"),
        (["check", "{good}", "{absent}"], "there is no such folder"),
        (["check", "{good}", "{empty}"], "holds no weights"),
        (["check", "{broken}", "{good}"], "is not a whole safetensors file"),
        (["check", "{good}"], "Missing argument 'B'"),
        (["to-torch", "{good}", "{new}"], "No such command 'to-torch'"),
    ],
)
def test_bad_input_leaves_with_2_and_a_clear_line(arguments, message, tmp_path, capsys):
    folders = {name: tmp_path / name for name in ("good", "broken", "pickled", "empty", "new")}
    for name in ("good", "broken", "pickled"):
        make_folder(folders[name])
    (folders["good"] / "sub.txt").write_text("")
    broken(folders["broken"])
    pickled(folders["pickled"])
    folders["empty"].mkdir()
    filled = [a.format(absent=tmp_path / "absent", **folders) for a in arguments]
    code, out, err = run(capsys, *filled)
    assert code == 2
    assert out == ""
    assert message in err
    assert not folders["new"].exists()


def test_the_command_itself(tmp_path):
    make_folder(tmp_path / "a")

    def command(*arguments):
        line = [sys.executable, str(SCRIPT.relative_to(ROOT)), *map(str, arguments)]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)

    good = command("to-jax", tmp_path / "a", tmp_path / "b")
    assert (good.returncode, good.stderr) == (0, "")
    bad = command("check", tmp_path / "a", tmp_path / "absent")
    assert bad.returncode == 2
    assert bad.stderr.splitlines() == [
        f"convert_weights.py: {tmp_path / 'absent'}: there is no such folder"
    ]
