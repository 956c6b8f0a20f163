"""The conversion tool: bit by bit both ways, differences are located, bad input is rejected."""

import dataclasses
import itertools
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest
from flax import nnx
from noisy_models import config_of
from safetensors.numpy import load_file, save_file
from training import write_tokenizer

from mlmjax import storage
from mlmjax.cli import main
from mlmjax.config.run import CheckpointConfig
from mlmjax.model.modernbert import CLASSES
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.step import create_train_state
from mlmjax.weights import pretrained
from mlmjax.weights.checkpoints import Checkpoints
from mlmjax.weights.tensors.tensor_files import WEIGHTS

pytestmark = pytest.mark.usefixtures("orbax_leftovers")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "convert_weights.py"
TOOL = runpy.run_path(str(SCRIPT))

NARROW = {"vocab_size": 384, "hidden_size": 4, "intermediate_size": 6}
CONFIG = config_of(**NARROW, attention_bias=True, extra={"note": "kept"})


def make_model(seed=0, name="ModernBertForMaskedLM", config=CONFIG):
    return CLASSES[name](config, rngs=nnx.Rngs(seed))


def make_folder(folder, tokenizer=None, dtype="float32", **options):
    pretrained.save_pretrained(make_model(**options), tokenizer, folder, dtype=dtype)
    return folder


@pytest.fixture
def run(capsys):
    """Run the tool in this process; return (exit code, standard output, standard error)."""

    def run(*arguments):
        code = TOOL["run"]([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        assert "Traceback" not in streams.err
        return code, streams.out, streams.err

    return run


def rewrite(folder, function):
    tensors = load_file(folder / WEIGHTS)
    save_file(function(tensors) or tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change(folder, name, index, value):
    rewrite(folder, lambda tensors: tensors[name].__setitem__(index, value))


def store_decoder(tensors):
    tensors[pretrained.DECODER] = tensors[pretrained.EMBEDDING].copy()


@pytest.fixture
def pair(tmp_path):
    """Return two folders of one model, the second for a test to change."""
    first = make_folder(tmp_path / "a")
    change(first, "decoder.bias", 3, 0.0)
    return first, Path(shutil.copytree(first, tmp_path / "b"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("ModernBertForMaskedLM", "bfloat16"),
        ("ModernBertForMaskedLM", "mixed, with a decoder"),
        ("ModernBertForSequenceClassification", "mixed, without"),
    ],
)
def test_there_and_back_is_bit_identical(name, dtype, run, tmp_path):
    source = tmp_path / "source"
    write_tokenizer(tmp_path / "words")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "words")
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("pad", "cls", "sep")}
    config = dataclasses.replace(CONFIG, **ids)
    make_folder(source, tokenizer, "float32" if "," in dtype else dtype, name=name, config=config)
    if "," in dtype:
        kinds = itertools.cycle(("float16", "bfloat16", "float32"))
        rewrite(
            source, lambda tensors: {n: tensors[n].astype(next(kinds)) for n in sorted(tensors)}
        )
        if name == "ModernBertForMaskedLM":
            rewrite(source, store_decoder)
    assert run("to-jax", source, tmp_path / "jax")[0] == 0
    assert run("to-hf", tmp_path / "jax", tmp_path / "hf")[0] == 0
    for file in (WEIGHTS, *tokenizer.files):
        assert (tmp_path / "hf" / file).read_bytes() == (source / file).read_bytes()
    assert '"note": "kept"' in (tmp_path / "hf" / storage.CONFIG).read_text()
    for first, second in (("source", "jax"), ("jax", "hf"), ("source", "hf")):
        code, out, _ = run("check", tmp_path / first, tmp_path / second)
        assert (code, out.splitlines()[0]) == (0, "largest difference 0")


def test_check_prints_the_largest_difference_and_where(run, pair, tmp_path):
    first, second = pair
    change(second, "decoder.bias", 7, 0.25)
    change(second, "model.layers.1.mlp.Wo.weight", (3, 2), -8.0)
    run("to-jax", second, tmp_path / "c")
    for other in (second, tmp_path / "c"):
        code, out, err = run("check", first, other)
        assert code == 1
        assert "decoder.bias: differs by up to 0.25" in out
        assert "largest difference 7.99" in out
        assert "at model.layers.1.mlp.Wo.weight[3, 2]: " in out
        assert "-8.0 in B" in out
        assert out.splitlines()[-1] == "different"
        assert err == ""


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (-0.0, "decoder.bias: differs by up to 0"),  # one bit
        (np.nan, "largest difference inf at decoder.bias[3]: 0.0 in A, nan in B"),
    ],
)
def test_one_value_is_a_difference(run, pair, value, says):
    change(pair[1], "decoder.bias", 3, value)
    code, out, _ = run("check", *pair)
    assert code == 1
    assert says in out


def test_other_dtypes_shapes_and_names_are_differences(run, tmp_path):
    first = make_folder(tmp_path / "a")
    code, out, _ = run("check", first, make_folder(tmp_path / "b", dtype="bfloat16"))
    assert code == 1
    assert "(float32 in A, bfloat16 in B)" in out
    other = make_folder(tmp_path / "c", name="ModernBertForSequenceClassification")
    rewrite(other, lambda tensors: tensors.update({"head.norm.weight": np.ones(3, np.float32)}))
    code, out, _ = run("check", first, other)
    assert code == 1
    assert "classifier.bias: only in B" in out
    assert "decoder.bias: only in A" in out
    assert "head.norm.weight: shape [4] in A, [3] in B" in out


def test_a_stored_decoder_is_the_embedding(run, pair):
    first, second = pair
    rewrite(second, store_decoder)
    assert run("check", first, second)[0] == 0
    assert run("check", second, first)[0] == 0
    change(second, pretrained.DECODER, (1, 1), 9.0)
    code, out, _ = run("check", first, second)
    assert code == 1
    assert f"at {pretrained.DECODER}[1, 1]" in out


def test_check_reads_the_checkpoints_of_a_run(run, tmp_path):
    state = create_train_state(make_model(), optax.adamw(1e-3))[1]
    with Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(3, state)
    export = make_folder(tmp_path / "run" / "export")
    for place in ("run", "run/checkpoints", "run/checkpoints/3"):
        assert run("check", tmp_path / place, export)[0] == 0
    assert run("check", export, make_folder(tmp_path / "other", seed=1))[0] == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a good folder, and some that cannot be converted."""
    parent = tmp_path_factory.mktemp("folders")
    found = {name: parent / name for name in ("good", "broken", "empty", "absent")}
    for name in ("good", "broken"):
        make_folder(found[name])
    whole = (found["broken"] / WEIGHTS).read_bytes()
    (found["broken"] / WEIGHTS).write_bytes(whole[:-5])
    found["empty"].mkdir()
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-jax", "{broken}", "{new}"], "is not a whole safetensors file"),
        (["to-jax", "{empty}", "{new}"], "config.json: is missing"),
        (["to-hf", "{absent}", "{new}"], "is no checkpoint that to-jax wrote"),
        (["check", "{good}", "{empty}"], "holds no weights"),
        (["check", "{broken}", "{good}"], "is not a whole safetensors file"),
        (["check", "{good}"], "Missing argument 'B'"),
        (["to-torch", "{good}", "{new}"], "No such command 'to-torch'"),
    ],
)
def test_bad_input_leaves_with_2_and_a_clear_line(arguments, message, folders, tmp_path, run):
    new = tmp_path / "new"
    code, out, err = run(*(argument.format(new=new, **folders) for argument in arguments))
    assert code == 2
    assert out == ""
    assert message in err
    assert not new.exists()


def test_a_checkpoint_with_the_tokenizer_of_another_model_is_not_exported(run, tmp_path):
    assert run("to-jax", make_folder(tmp_path / "hf"), tmp_path / "jax")[0] == 0
    Tokenizer.from_pretrained().save(tmp_path / "jax")  # the packaged one
    code, _, printed = run("to-hf", tmp_path / "jax", tmp_path / "back")
    assert code == 2
    assert "the tokenizer does not match the model" in printed
    assert not (tmp_path / "back").exists()


def test_mlmjax_convert_is_the_tool(folders, tmp_path, capsys):
    good = str(folders["good"])
    assert main.run(["convert", "to-jax", good, str(tmp_path / "jax")]) == 0
    assert main.run(["convert", "to-hf", str(tmp_path / "jax"), str(tmp_path / "hf")]) == 0
    assert main.run(["convert", "check", good, str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out.endswith("tensors\n")


@pytest.mark.parametrize("command", [[], ["to-jax"], ["to-hf"], ["check"]])
def test_help_has_an_example_in_the_tool_and_in_the_command(command, run, capsys):
    for option in ("-h", "--help"):
        code, out, err = run(*command, option)
        assert (code, err) == (0, "")
        assert main.run(["convert", *command, option]) == 0
        same = capsys.readouterr().out.replace("mlmjax convert", "convert_weights.py", 1)
        assert same.partition("\n")[2] == out.partition("\n")[2]
        assert "Example" in out


def test_every_command_has_short_help(capsys):
    for name in main.cli.commands:
        assert main.run([name, "-h"]) == 0
        assert capsys.readouterr().out.startswith(f"Usage: mlmjax {name}")


@pytest.mark.parametrize("name", CLASSES)
def test_check_against_torch(name, run, tmp_path):
    tied = name != "ModernBertForMaskedLM"
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    folder = make_folder(tmp_path / "hf", name=name, config=config)
    run("to-jax", folder, tmp_path / "jax")
    for model in (folder, tmp_path / "jax"):
        code, out, err = run("check", model, "--against-torch")
        assert (code, out.splitlines()[-1]) == (0, "equal to transformers"), err
    other = make_folder(tmp_path / "other", name=name, config=config, seed=1)
    code, out, _ = run("check", tmp_path / "jax", other, "--against-torch")
    assert (code, out.splitlines()[-1]) == (1, "different")
    assert "largest difference of logits" in out


def test_check_against_torch_names_the_extra(folders, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = run("check", folders["good"], "--against-torch")
    assert (code, out) == (2, "")
    assert "torch is not installed" in err
    assert "pip install 'mlmjax[oracle]'" in err


def test_names_of_either_side_come_first(run, tmp_path):
    first, second = make_folder(tmp_path / "a"), make_folder(tmp_path / "b")
    for folder, start in ((first, "a"), (second, "b")):
        rewrite(folder, lambda tensors, s=start: {f"{n}.{s}": tensors[n] for n in tensors})
    code, out, _ = run("check", first, second)
    assert code == 1
    assert [line.partition(": only in ")[2] for line in out.splitlines()[:6]] == [*"AAABBB"]


def test_check_takes_the_packaged_model_by_its_name(run, tmp_path):
    assert run("to-jax", "mlmjax-small", tmp_path / "jax")[0] == 0
    code, out, err = run("check", "mlmjax-small", tmp_path / "jax")
    assert (code, out.startswith("largest difference 0")) == (0, True), err


def test_the_command_itself(folders):
    command = [sys.executable, str(SCRIPT.relative_to(ROOT)), "check"]
    command += [folders["good"], folders["absent"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    said = f"convert_weights.py: {folders['absent']}: there is no such folder; give an existing "
    assert done.stderr == f"{said}folder or a hub id\n"
