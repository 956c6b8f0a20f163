"""The engine: all local devices, batches that fit memory, and results in the given order."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from labelled_texts import SHORT, examples, word_model, word_tokenizer
from noisy_models import build
from small_models import noisy, small_model

from mlmjax.classification.classifier import Classifier
from mlmjax.errors import RunError
from mlmjax.model.modernbert import ModernBertForMaskedLM, parameters
from mlmjax.parallel import sharding
from mlmjax.scoring.engine import Engine


@pytest.fixture(autouse=True)
def all_devices(monkeypatch):
    monkeypatch.setattr(sharding, "local_devices", jax.local_devices)


@pytest.fixture(scope="module")
def model():
    names = ("pad", "cls", "bos", "sep", "eos")
    return small_model(vocab_size=90, **{f"{name}_token_id": i for i, name in enumerate(names)})


def summed(model, ids, segment_ids, weights):
    hidden = model.encode(ids, segment_ids)
    total = jnp.sum(jnp.where(segment_ids[..., None] > 0, hidden, 0), axis=1)
    return {"weighted": total * weights[:, None], "length": segment_ids.sum(axis=1)}


def sequences(count, seed=0, shortest=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 90, rng.integers(shortest, 48)).tolist() for _ in range(count)]


def make(model, forward=summed, **options):
    tokenizer = SimpleNamespace(pad_id=0, vocab_size=90)
    return Engine(model, tokenizer, forward, max_length=48, **options)


def test_results_are_in_order_and_the_same_on_any_devices(model):
    items, weights = sequences(21), np.arange(21, dtype=np.float32) + 1
    everywhere = make(model)
    alone = make(model, batch_size=1)
    assert everywhere.mesh.size == len(jax.local_devices()) == 8
    assert alone.mesh.size == 1
    found, expected = everywhere.run(items, weights), alone.run(items, weights)
    assert list(found["length"]) == [len(ids) for ids in items]
    np.testing.assert_allclose(found["weighted"], expected["weighted"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (3, 3), (4, 4), (9, 3), (24, 8)])
def test_a_batch_is_cut_into_equal_parts(model, batch_size, devices):
    engine = make(model, batch_size=batch_size)
    assert (engine.mesh.size, engine.rows_of(32, 99)) == (devices, batch_size)


def test_a_sequence_that_comes_alone_is_a_batch_of_its_own(model):
    engine = make(model)
    (item, *_), weights = sequences(2), np.ones(1, np.float32)
    engine.run([item], weights)
    bucket = next(length for length in engine.buckets if length >= len(item))
    assert engine.padded_tokens == bucket * engine.mesh.size
    engine.jitted = ScarceMemory(engine, tokens=0)
    with pytest.raises(RunError, match=f"one text of {len(item)} tokens"):
        engine.run([item], weights)
    assert engine.jitted.rejected == 1


def test_a_sequence_that_comes_alone_joins_the_batch_that_is_compiled(model):
    """After batches of every length have come, whatever comes next compiles nothing."""
    engine = make(model)
    item = list(range(1, 20))
    engine.run([item] * 2, np.ones(2, np.float32))
    found, expected = (e.run([item], np.ones(1, np.float32)) for e in (engine, make(model)))
    assert len(engine._shapes) == 1
    np.testing.assert_allclose(found["weighted"], expected["weighted"], rtol=1e-4, atol=1e-4)


def test_facts_of_files_do_not_change_the_program(model):
    said = {"extra": {"dtype": "bfloat16"}, "source_dtypes": {"decoder.bias": "bfloat16"}}
    same = build(ModernBertForMaskedLM, replace(model.config, **said))
    wider = build(ModernBertForMaskedLM, replace(same.config, local_attention=4))
    ours = make(model)
    assert make(same).jitted is ours.jitted
    assert make(wider).jitted is not ours.jitted
    assert same.config.extra == {"dtype": "bfloat16"}
    assert same.config.source_dtypes == {"decoder.bias": "bfloat16"}


class ScarceMemory:
    """Reject batches of more than some tokens, as a device without memory for them does."""

    def __init__(self, engine, tokens):
        self.call, self.tokens, self.rejected = engine.jitted, tokens, 0

    def __call__(self, state, ids, *arrays):
        if ids.size > self.tokens:
            self.rejected += 1
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory, 9.9G")
        return self.call(state, ids, *arrays)


def test_batches_without_memory_are_halved_and_nothing_is_lost(model):
    items, weights = sequences(150, seed=1, shortest=33), np.ones(150, np.float32)
    expected = make(model, batch_size=48).run(items, weights)
    engine, done = make(model, batch_size=48), []
    engine.jitted = ScarceMemory(engine, 8 * 2 * 48)
    found = engine.run(items, weights, progress=done.append)
    np.testing.assert_allclose(found["weighted"], expected["weighted"], rtol=1e-4, atol=1e-4)
    assert sum(done) == 150
    rejected = engine.jitted.rejected
    assert rejected == 2  # 6 rows a device, then 3
    engine.run(items, weights)
    assert engine.jitted.rejected == rejected


def test_fine_tuning_on_all_devices_is_that_on_one(tmp_path, monkeypatch):
    tokenizer = word_tokenizer(tmp_path)
    source = word_model(tokenizer), tokenizer
    texts, labels = examples(32)
    # As in `test_fitting`, so that one program is compiled for both.
    options = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 16}
    short = {"labels": ["sports", "money"], "template": SHORT}
    everywhere = Classifier(source, **short).fit(texts, labels, **options)
    devices = everywhere.asking_.scorer.engine.mesh.size
    monkeypatch.setattr(sharding, "local_devices", lambda: jax.local_devices()[:1])
    alone = Classifier(source, **short).fit(texts, labels, **options)
    assert devices == 8
    assert everywhere.history_[1]["loss"] == pytest.approx(alone.history_[1]["loss"], rel=1e-5)
    np.testing.assert_allclose(
        everywhere.predict_proba(texts), alone.predict_proba(texts), atol=1e-4
    )


def test_other_failures_of_the_device_are_raised(model):
    def broken(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    engine = make(model)
    engine.jitted = broken
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        engine.run([[7] * 40, [7] * 4], np.ones(2))


def test_parameters_are_placed_again_only_when_they_change(model):
    engine = make(model)
    engine.run([[7, 8]], np.ones(1))
    placed = engine._placed[1]
    engine.run([[7, 9]], np.ones(1))
    assert engine._placed[1] is placed
    engine.model = noisy(model)
    engine.run([[7, 9]], np.ones(1))
    assert engine._placed[1] is not placed


def test_weights_of_products_are_rounded_once(model):
    config = model.config
    half = build(ModernBertForMaskedLM, config, dtype=jnp.bfloat16)

    def forward(model, ids, segment_ids):
        kinds = {name: leaf.dtype for name, leaf in parameters(model).items()}
        assert {name for name, kind in kinds.items() if kind == jnp.bfloat16} == {
            f"model.layers.{n}.{part}.weight"
            for n in range(config.num_hidden_layers)
            for part in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")
        } | {"head.dense.weight"}
        return model(ids, segment_ids)

    found = make(half, forward, batch_size=8).run([[7] * 32] * 3)
    ids, segment_ids = np.full((8, 32), 7, np.int32), np.ones((8, 32), np.int32)
    plain = nnx.jit(lambda model: model(ids, segment_ids))(half)
    np.testing.assert_array_equal(found, plain[:3])
    assert {leaf.dtype for leaf in parameters(half).values()} == {np.dtype(np.float32)}


def test_an_exact_engine_gives_equal_bits_whatever_runs_beside(model):
    items, weights = sequences(40), np.arange(40, dtype=np.float32) + 1
    engine = make(model, exact=True)
    found = engine.run(items, weights)["weighted"]
    compiled = engine.compilations
    for members in ([7], [3, 7], list(range(39, -1, -1))):
        alone = engine.run([items[i] for i in members], weights[members])["weighted"]
        np.testing.assert_array_equal(alone, found[members])
    assert engine.compilations == compiled == 2  # one program for each bucket
