"""Prompts packed for fine-tuning: each is there once, and training is that of single rows."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from noisy_models import build
from small_models import small_model

from mlmjax.data.batch import ATP, UNUSED, Batch, LabelBatch
from mlmjax.data.packing import pack
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import (
    ModernBertForSequenceClassification,
    labelled_config,
    parameters,
)
from mlmjax.text.prompts import Prompt
from mlmjax.training import finetune
from mlmjax.training.finetune import (
    BestEpoch,
    Shape,
    answer_batch,
    common_shape,
    fine_tune,
    label_batch,
)
from mlmjax.training.flops import forward_flops
from mlmjax.training.loss import label_evaluation
from mlmjax.training.step import masked_token_loss

PAD = 7
IDS = dict.fromkeys((f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep")), 0)
SEVEN = [9, 30, 14, 22, 5, 40, 17]
LENGTHS = st.lists(st.integers(2, 300), min_size=1, max_size=40)


def drawn(lengths, seed=0, vocabulary=60):
    rng = np.random.default_rng(seed)
    return [
        Prompt(rng.integers(10, vocabulary, n).tolist(), int(rng.integers(1, n)), {})
        for n in lengths
    ]


def single_rows(prompts, answers, rows, length, slots=1):
    """One prompt in each row: what packed batches have to be equal to."""
    answers = getattr(answers, "ids", answers)
    lengths = np.array([len(prompt.ids) for prompt in prompts] + [0] * (rows - len(prompts)))
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    segments = np.int32(positions < lengths[:, None])
    ids = np.full((rows, length), PAD, np.int32)
    ids[segments == 1] = np.concatenate([prompt.ids for prompt in prompts])
    targets = np.full((3, rows, slots), UNUSED, np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        targets[:, row, 0] = prompt.slot, answer, ATP
    return Batch(ids, segments, positions, *targets)


@given(LENGTHS, st.integers(1, 8))
def test_a_packed_batch_holds_every_prompt_once(lengths, parts):
    prompts, answers = drawn(lengths), np.arange(len(lengths)) + 100
    shape = common_shape([lengths], ModelConfig(), parts)
    assert shape.rows % parts == 0
    batch = answer_batch(prompts, answers, shape=shape, pad_id=PAD)
    assert batch.input_ids.shape == shape[:2]
    assert batch.target_ids.shape == (shape.rows, shape.slots)
    found = []
    for row, number in np.argwhere(batch.target_ids != UNUSED):
        (places,) = np.nonzero(batch.segment_ids[row] == number + 1)
        slot = batch.target_positions[row, number] - places[0]
        assert batch.target_objective[row, number] == ATP
        assert batch.position_ids[row, places].tolist() == list(range(len(places)))
        ids = batch.input_ids[row, places].tolist()
        found.append((batch.target_ids[row, number], ids, slot))
    shown = zip(answers, prompts, strict=True)
    assert sorted(found) == [(answer, prompt.ids, prompt.slot) for answer, prompt in shown]
    assert np.all(batch.input_ids[batch.segment_ids == 0] == PAD)
    assert np.count_nonzero(batch.segment_ids) == sum(lengths)


@given(st.lists(LENGTHS, min_size=1, max_size=4), st.integers(1, 4))
def test_one_shape_holds_all_and_costs_no_more_than_single_rows(batches, parts):
    config = ModelConfig()
    shape = common_shape(batches, config, parts)
    for lengths in batches:
        answer_batch(drawn(lengths), np.zeros(len(lengths)), shape=shape, pad_id=PAD)
    most = -(-max(map(len, batches)) // parts) * parts
    longest = -(-max(map(max, batches)) // 16) * 16
    single = most * forward_flops(config, [longest], 0, 0)
    assert shape.rows * forward_flops(config, [shape.length], 0, 0) <= 1.25 * single


@pytest.fixture(scope="module")
def model():
    return small_model(scale=0.05, vocab_size=512, **IDS)


def assert_same_gradients(model, loss, packed, single, *, rtol, atol):
    """Compare loss, metrics and gradients of two batches; return the metrics of both."""
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def gradient(params, batch):
        return loss(nnx.merge(graphdef, params), batch)

    (found, metrics), grads = gradient(params, packed)
    (expected, known), reference = gradient(params, single)
    np.testing.assert_allclose(found, expected, rtol=rtol)
    assert metrics.keys() == known.keys()
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, atol=atol * max(1.0, np.abs(b).max()))
    return metrics, known


def test_loss_and_gradients_are_those_of_single_rows(model):
    prompts, answers = drawn(SEVEN, vocabulary=model.config.vocab_size), np.arange(7) + 11
    packed = answer_batch(prompts, answers, shape=Shape(7, 48, 3), pad_id=PAD)
    assert not packed.segment_ids[4:].any()
    single = single_rows(prompts, answers, 7, 48, slots=3)
    assert_same_gradients(model, masked_token_loss, packed, single, rtol=1e-6, atol=1e-6)


def test_training_packed_is_training_on_single_rows(model, monkeypatch):
    rng = np.random.default_rng(1)
    prompts = drawn(rng.integers(5, 40, 20), vocabulary=model.config.vocab_size)
    answers = rng.integers(10, 60, 20)
    settings = {
        "epochs": 2, "learning_rate": 1e-3, "batch_size": 8, "weight_decay": 0.01, "warmup": 0.1,
        "seed": 0, "pad_id": PAD,
    }  # fmt: skip
    rows = []

    def trained(make_batch):
        def make(*arguments, **options):
            batch = make_batch(*arguments, **options)
            rows.append(len(batch.input_ids))
            return batch

        losses = []
        monkeypatch.setattr(finetune, "answer_batch", make)
        settings["after_epoch"] = lambda _, epoch: losses.append(epoch.loss)
        return fine_tune(model, prompts, answers, **settings), losses

    packed, losses = trained(answer_batch)
    assert max(rows) < 8  # so that something was packed
    single, expected = trained(lambda shown, given, **_: single_rows(shown, given, 8, 40))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    leaves = (jax.tree.leaves(nnx.state(one, nnx.Param)) for one in (model, packed, single))
    for start, found, known in zip(*leaves, strict=True):
        moved = np.abs(np.asarray(known) - np.asarray(start)).max()
        # AdamW divides by the size of a gradient, so rounding is no small thing where it is near 0.
        assert np.abs(np.asarray(found) - np.asarray(known)).mean() <= 0.01 * moved


def one_update(model, **more):
    """Return the parameters before and after an update of eight prompts, in order."""
    prompts, answers = drawn([*SEVEN, 12], vocabulary=model.config.vocab_size), np.arange(8) + 11
    settings = {"epochs": 1, "learning_rate": 1e-2, "batch_size": 8, "weight_decay": 0.0}
    settings |= {"warmup": 0.0, "seed": 0, "pad_id": PAD, **more}
    trained = fine_tune(model, prompts, answers, **settings)
    return [{n: np.asarray(v) for n, v in parameters(one).items()} for one in (model, trained)]


def test_an_average_of_the_parameters_is_returned(model):
    """After the first update it has (1 + 1) / (10 + 1) of the start."""
    start, plain = one_update(model)
    seen = []
    _, averaged = one_update(
        model, ema=0.9, after_epoch=lambda one, _: seen.append({**parameters(one)})
    )
    for name, value in averaged.items():
        expected = (2 * start[name] + 9 * plain[name]) / 11
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(seen[0][name], value)


def test_layers_learn_at_lower_rates_the_deeper_they_are(model):
    start, plain = one_update(model)
    _, decayed = one_update(model, layer_decay=0.5)
    shares = {"head.dense": 1, "layers.1.": 0.5, "layers.0.": 0.25, "tok_embeddings": 0.125}
    for name, value in plain.items():
        for part, share in shares.items():
            if part in name:
                moved = share * (value - start[name])
                np.testing.assert_allclose(decayed[name] - start[name], moved, atol=1e-6)


def test_parts_of_a_batch_have_the_update_of_the_whole(model):
    (start, whole), (_, parts) = one_update(model), one_update(model, accumulate=2)
    for name, value in parts.items():
        moved = np.abs(whole[name] - start[name]).max()
        assert np.abs(value - whole[name]).mean() <= 0.01 * moved, name


def test_the_weights_of_the_best_epoch_are_kept():
    models = [small_model(scale=scale, vocab_size=32, **IDS) for scale in (0.1, 0.2, 0.3)]
    best, plain = BestEpoch(2), BestEpoch(None)
    figures = [(0.5, 1.0), (0.5, 0.9), (0.4, 0.1), (0.5, 0.9)]
    given = [*models, models[2]]
    found = [best.is_over(one, *own) for one, own in zip(given, figures, strict=True)]
    assert found == [False, False, False, True]
    kept, expected = parameters(best.restored(models[2])), parameters(models[1])
    assert all(np.array_equal(kept[name], value) for name, value in expected.items())
    assert not any(plain.is_over(models[0], 0.0, 9.0) for _ in range(9))
    assert plain.restored(models[0]) is models[0]


@pytest.mark.parametrize(
    ("labels", "pooling"),
    [(["bad", "good", "fair"], "cls"), ([], "mean")],
    ids=["classes", "regression"],
)
def test_packed_texts_have_the_logits_loss_and_gradients_of_single_rows(model, labels, pooling):
    config = replace(labelled_config(model.config, labels), classifier_pooling=pooling)
    head = build(ModernBertForSequenceClassification, config, scale=0.05)
    texts = drawn(SEVEN, vocabulary=config.vocab_size)
    answers = np.arange(7) % 3 if labels else np.linspace(-1, 2, 7)
    packed = label_batch(texts, answers, shape=Shape(4, 48, 3), pad_id=PAD)
    assert packed.segment_ids.max() == 3
    rows = single_rows(texts, answers, 7, 40)
    single = LabelBatch(rows.input_ids, rows.segment_ids, np.float32(answers))

    def loss(model, batch):
        metrics = label_evaluation(model, batch)
        return metrics["loss_sum"], metrics

    found, known = assert_same_gradients(head, loss, packed, single, rtol=1e-5, atol=2e-6)
    assert found["loss_count"] == 7
    logits = np.asarray(found["logits"])[~np.isnan(packed.labels).ravel()]
    order = [i for row in pack([text.ids for text in texts], 48) for i in row]
    np.testing.assert_allclose(logits, known["logits"][np.array(order)], atol=2e-6)


def test_a_packed_batch_of_texts_holds_each_with_its_label():
    texts = [Prompt([1, 2, 3], -1, {}), Prompt([4, 5, 6, 7, 8], -1, {}), Prompt([9, 10], -1, {})]
    batch = label_batch(texts, [1.0, 0.0, 2.0], shape=Shape(3, 6, 2), pad_id=PAD)
    assert batch.input_ids.tolist() == [[4, 5, 6, 7, 8, PAD], [1, 2, 3, 9, 10, PAD], [PAD] * 6]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 2, 2, 0], [0] * 6]
    np.testing.assert_array_equal(batch.labels, np.float32([[0, np.nan], [1, 2], [np.nan, np.nan]]))
