"""Checkpoints: bit-identical, newest and best together, never half, never another model's."""

import dataclasses
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from noisy_models import build, config_of

from mlmjax.config.run import CheckpointConfig
from mlmjax.errors import InputError, RunError
from mlmjax.model.modernbert import CLASSES
from mlmjax.parallel import sharding
from mlmjax.training.step import create_train_state
from mlmjax.weights import checkpoints as checkpoints_module
from mlmjax.weights import pretrained
from mlmjax.weights.checkpoints import Checkpoints, fingerprints
from mlmjax.weights.model_checkpoint import load_model, save_model, saved_tensors
from mlmjax.weights.tensors import layout

pytestmark = pytest.mark.usefixtures("orbax_leftovers")

CONFIG = config_of(vocab_size=64)
KEEP = CheckpointConfig(keep_last=2, keep_best=1)


def make_model(config=CONFIG, name="ModernBertForMaskedLM", scale=0.3):
    return build(CLASSES[name], config, scale)


def make_state(config=CONFIG, scale=0.3, mesh=None):
    return create_train_state(make_model(config, scale=scale), optax.adamw(1e-3), mesh=mesh)[1]


@pytest.fixture(scope="module")
def state():
    return make_state()


@pytest.fixture(scope="module")
def two_steps(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, KEEP) as checkpoints:
        checkpoints.save(1, make_state(scale=0.5))
        checkpoints.save(2, state)
    return folder


@pytest.fixture
def saved(two_steps, tmp_path):
    """Two steps for a test to spoil; `state` is the second."""
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def bits(tree):
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def data_files(step_folder):
    """The files that hold arrays, the largest first."""
    files = [f for f in (step_folder / "state").rglob("*") if f.is_file() and f.parent.name == "d"]
    return sorted(files, key=lambda file: -file.stat().st_size)


# --- what comes back ---------------------------------------------------------------------------


def test_restoring_is_bit_identical_and_of_the_same_kind(state, tmp_path):
    odd = state._replace(
        step=jnp.asarray(7, jnp.int32),
        opt_state={
            "subnormal": jnp.asarray([1e-45, -0.0, 3.4e38], jnp.float32),
            "bfloat16": jnp.asarray([1.0, 1e-40, -3.0], jnp.bfloat16),
            "flag": jnp.asarray([True, False]),
            "inner": state.opt_state,
        },
    )
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(7, odd, metadata={"model": "a", "n": [1, 2]})
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        assert checkpoints.latest() == 7
        assert checkpoints.metadata(7) == {"model": "a", "n": [1, 2]}
        restored = checkpoints.restore(7, abstract(odd))
    assert jax.tree.structure(restored) == jax.tree.structure(odd)
    assert bits(restored) == bits(odd)


def test_restoring_onto_another_mesh_gives_the_same_bits(tmp_path):
    first = sharding.make_mesh({"data": 2, "fsdp": 2})
    second = sharding.make_mesh({"tensor": 2})
    state = make_state(mesh=first)
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(1, state)
        target = make_state(mesh=second)
        restored = checkpoints.restore(1, abstract(target))
        plain = checkpoints.restore(1, abstract(make_state()))
    assert bits(restored) == bits(state) == bits(plain)
    for found, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)


def test_saving_does_not_wait_for_a_state_that_is_then_donated(state, tmp_path):
    own = jax.tree.map(jnp.copy, state)
    expected = bits(own)
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(1, own)
        jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(own)
        assert bits(checkpoints.restore(1, abstract(state))) == expected


# --- which are kept ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "losses", "kept"),
    [
        ((2, 1), [0.5, 0.1, None, 0.9, None], [2, 4, 5]),
        ((2, 2), [0.5, 0.1, 0.7, 0.9, 0.95], [1, 2, 4, 5]),
        ((2, 0), [0.5, None, 0.7, 0.8], [3, 4]),
        ((1, 1), [0.5, float("nan"), float("inf"), None], [1, 4]),
        ((1, 3), [None, None, None, None], [4]),
        ((2, 1), [0.3, 0.2, 0.1], [2, 3]),
        ((1, 1), [0.5, {"answer_accuracy": 1.0}, {}], [1, 3]),  # only a loss ranks
    ],
)
def test_newest_and_best_are_kept_together(keep, losses, kept, tmp_path):
    config = CheckpointConfig(keep_last=keep[0], keep_best=keep[1])
    state = {"x": jnp.arange(3.0)}
    for half in (range(len(losses) // 2), range(len(losses) // 2, len(losses))):
        with Checkpoints(tmp_path, config) as checkpoints:  # a second process knows the losses too
            for index in half:
                loss = losses[index]
                metrics = {"loss": loss} if isinstance(loss, float) else loss
                checkpoints.save(index + 1, state, metrics)
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.steps() == kept
        assert checkpoints.latest() == kept[-1]


def test_a_step_that_is_not_there_and_one_that_is_left_alone(tmp_path):
    with Checkpoints(tmp_path / "new", KEEP) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.steps() == []
        with pytest.raises(InputError, match="has no checkpoint of step 3; it has none"):
            checkpoints.restore(3, {})
        checkpoints.save(5, {"x": jnp.zeros(2)})
        with pytest.raises(InputError, match="has no checkpoint of step 3; it has 5"):
            checkpoints.metadata(3)
        checkpoints.save(5, {"x": jnp.ones(2)})
        assert not checkpoints.restore(5, {"x": jnp.zeros(2)})["x"].any()


# --- another model's, or damaged ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "leaf", "message"),
    [
        ({"hidden_size": 32}, "Wqkv", "has float32"),
        ({"num_hidden_layers": 3}, "layers.2", "the checkpoint has nothing"),
        ({"num_hidden_layers": 1}, "layers.1", "the model nothing"),
        ({"norm_bias": True}, "norm.bias", "the checkpoint has nothing"),
        ({"decoder_bias": False}, "decoder.bias", "the model nothing"),
    ],
)
def test_another_model_is_rejected_by_its_first_difference(change, leaf, message, two_steps):
    other = make_state(dataclasses.replace(CONFIG, layer_types=None, **change))
    with (
        Checkpoints(two_steps, KEEP) as checkpoints,
        pytest.raises(InputError, match="is the checkpoint of another model: ") as caught,
    ):
        checkpoints.restore(1, abstract(other))
    lines = [caught.value.message, *caught.value.details]
    assert "\n" not in caught.value.message
    assert any(leaf in line and message in line for line in lines)
    assert any(name in caught.value.message for name in ("params", "opt_state"))


def test_another_optimizer_and_another_dtype_are_rejected(state, two_steps):
    with Checkpoints(two_steps, KEEP) as checkpoints:
        other = state._replace(opt_state=optax.sgd(0.1).init(state.params))
        with pytest.raises(InputError, match=r"opt_state\..*the model nothing"):
            checkpoints.restore(1, abstract(other))
        half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state.params)
        with pytest.raises(InputError, match=r"the checkpoint has float32 .* the model bfloat16"):
            checkpoints.restore(1, abstract(state)._replace(params=half))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(data_files(folder)[0], 100),
        lambda folder: data_files(folder)[0].unlink(),
        lambda folder: (folder / "record" / "metadata").unlink(),
    ],
)
def test_damaged_checkpoint_says_which_step_and_what_to_do(damage, state, saved, capfd):
    damage(saved / "2")
    with Checkpoints(saved, KEEP) as checkpoints:
        with pytest.raises(InputError) as caught:
            checkpoints.restore(2, abstract(state))
        assert bits(checkpoints.restore(1, abstract(state))) == bits(make_state(scale=0.5))
    message = caught.value.message
    assert f"{saved / '2'}: " in message
    assert "step 2 is damaged" in message
    assert "delete this folder, and the run resumes from step 1" in message
    assert "\n" not in message
    assert "Traceback" not in capfd.readouterr().err


def test_a_changed_bit_is_found(state, saved):
    """Orbax has no checksum over the data themselves; the fingerprints are it."""
    file = data_files(saved / "2")[0]
    original = file.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(original), 8):
        changed = bytearray(original)
        changed[position] ^= 1 << int(position % 8)
        file.write_bytes(changed)
        with Checkpoints(saved, KEEP) as checkpoints:
            try:
                restored = checkpoints.restore(2, abstract(state))
            except InputError as error:
                assert "step 2 is damaged" in error.message  # noqa: PT017
            else:
                assert bits(restored) == bits(state)  # the bit had no meaning


def test_fingerprint_tells_every_bit_apart_and_no_sharding():
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    original = fingerprints({"x": x})
    for bit in range(32):
        words = x.copy().view(np.uint32)
        words[3, 2] ^= np.uint32(1 << bit)
        assert fingerprints({"x": words.view(np.float32)}) != original
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    cut = jax.device_put(x, NamedSharding(mesh, P("fsdp", "tensor")))
    assert fingerprints({"x": cut}) == original


def test_folders_that_are_no_whole_step_are_not_listed(state, saved):
    (saved / "9").mkdir()
    shutil.copytree(saved / "1", saved / "3.orbax-checkpoint-tmp-3")
    shutil.copytree(saved / "1", saved / "4")
    shutil.rmtree(saved / "4" / "record")
    with Checkpoints(saved, KEEP) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.latest() == 2
        with pytest.raises(RunError, match="9 already exists"):
            checkpoints.save(9, state)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used for checkpoints"):
        Checkpoints(tmp_path / "file", KEEP)


def test_a_damaged_loss_names_its_step(state, tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, metrics={"loss": 1.0})
    (tmp_path / "2" / "metrics" / "metrics").write_text("{")
    with pytest.raises(InputError, match=r"cannot be read .*; delete the folder of that step, 2$"):
        Checkpoints(tmp_path, KEEP)


# --- saves that fail, and processes that die -----------------------------------------------------


def test_failed_save_is_a_run_error_and_leaves_the_others_whole(state, tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path, KEEP)
    checkpoints.save(1, state)
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))  # as if the disk were full
    try:
        checkpoints.save(2, state)
        with pytest.raises(RunError, match="the checkpoint of step 2 could not be saved"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Checkpoints(tmp_path, KEEP) as again:
        assert again.steps() == [1]
        assert bits(again.restore(1, abstract(state))) == bits(state)
    assert "Traceback" not in capfd.readouterr().err


KILLED = """
import sys, jax.numpy as jnp
from mlmjax.weights.checkpoints import Checkpoints
from mlmjax.config.run import CheckpointConfig
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep_last=2, keep_best=0))
step = checkpoints.latest() or 0
while True:
    step += 1
    checkpoints.save(step, {"x": jnp.full((256, 256), float(step)), "y": jnp.arange(9) * step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("pauses", [(0.1,), pytest.param((0.05, 0.3), marks=pytest.mark.long)])
def test_killed_in_the_middle_of_saving_always_comes_back(pauses, tmp_path):
    shape = {"x": jnp.zeros((256, 256)), "y": jnp.zeros(9, jnp.int32)}
    root = Path(__file__).parents[2]
    for pause in pauses:
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, stdout=subprocess.PIPE
        ) as process:
            process.stdout.readline()
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        with Checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_best=0)) as checkpoints:
            for step in checkpoints.steps():
                restored = checkpoints.restore(step, shape)
                assert (np.asarray(restored["x"]) == step).all()
                np.testing.assert_array_equal(restored["y"], np.arange(9) * step)


def test_orbax_is_quiet_and_others_are_not(state, tmp_path, caplog, capfd):
    with caplog.at_level(logging.DEBUG), Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.restore(1, abstract(state))
        logging.getLogger("absl").warning("something else")
    assert [r.message for r in caplog.records if r.name == "absl"] == ["something else"]
    assert capfd.readouterr().out == ""


def test_an_error_of_a_reader_that_nobody_waits_for_is_not_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(checkpoints_module, "_unraisable", shown.append)
    reader, other = (
        SimpleNamespace(cr_code=compile("", f"/lib/{name}/reader.py", "exec"))
        for name in ("orbax", "other")
    )
    found = [
        SimpleNamespace(object=source, exc_value=ValueError("bad"))
        for source in (reader, other, None)
    ]
    for one in found:
        checkpoints_module._report(one)
    assert shown == found[1:]


# --- a model without a run -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    save_model(folder, make_model(), None)
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_model_checkpoint_keeps_everything(name, tokenizer, tmp_path):
    said = {"extra": {"note": 1}, "source_dtypes": {"head.dense.weight": "bfloat16"}}
    model = make_model(dataclasses.replace(CONFIG, **said), name)
    save_model(tmp_path / "m", model, None)
    again, nothing = load_model(tmp_path / "m", dtype="bfloat16")
    assert nothing is None
    assert type(again).__name__ == name
    assert again.dtype == jnp.bfloat16
    assert again.config.extra["note"] == 1
    assert again.config.source_dtypes == model.config.source_dtypes
    assert bits(nnx.state(again)) == bits(nnx.state(model))
    save_model(tmp_path / "m", again, tokenizer)  # replaces the older one
    assert load_model(tmp_path / "m")[1].files == tokenizer.files


def edit(name, **values):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "params" / "_METADATA").unlink(), "is damaged"),
        (edit("config.json", vocab_size=10**12), "vocab_size"),
        (edit("config.json", architectures=[]), "architectures is"),
        (lambda folder: (folder / "config.json").write_text("no"), "is not valid JSON"),
        (edit("checkpoint.json", arrays=None), "is not a record of format"),
        (edit("checkpoint.json", source_dtypes=[1]), "is not a record of format"),
        (lambda folder: (folder / "checkpoint.json").unlink(), r"checkpoint\.json: is missing"),
    ],
)
def test_damaged_model_checkpoint(damage, message, whole_model, tmp_path):
    folder = Path(shutil.copytree(whole_model, tmp_path / "m"))
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert "\n" not in caught.value.message


def test_parameters_of_a_run_are_read_as_tensors(saved):
    expected = dict(layout.to_hf_tensors(make_model()))
    for place in (saved.parent, saved, saved / "2"):
        found = saved_tensors(place)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    older = saved_tensors(saved / "1")
    assert not np.array_equal(older[pretrained.EMBEDDING], expected[pretrained.EMBEDDING])
    assert saved_tensors(saved / "2" / "state" / "d") is None
    record = saved / "2" / "record" / "metadata"
    values = json.loads(record.read_text())
    values["fingerprints"]["params.decoder.bias"] += 1
    record.write_text(json.dumps(values))
    with pytest.raises(InputError, match="is damaged"):
        saved_tensors(saved)


def test_the_first_error_is_the_one_raised(state, tmp_path, monkeypatch):
    def close(self):
        raise RunError("second")

    def work():
        with Checkpoints(tmp_path, KEEP) as checkpoints:
            checkpoints.save(1, state)
            monkeypatch.setattr(Checkpoints, "close", close)
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        work()
