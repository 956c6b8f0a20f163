"""Prompts packed for fine-tuning: each is there once, and training is that of single rows."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from small_models import noisy, small_config

from mlmjax.data.batch import ATP, UNUSED, Batch, LabelBatch
from mlmjax.data.packing import pack
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import (
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    labelled_config,
)
from mlmjax.text.prompts import Prompt
from mlmjax.training import finetune
from mlmjax.training.finetune import Shape, answer_batch, common_shape, fine_tune, label_batch
from mlmjax.training.flops import forward_flops
from mlmjax.training.loss import label_loss
from mlmjax.training.step import masked_token_loss

PAD = 7
IDS = dict.fromkeys((f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep")), 0)
LENGTHS = st.lists(st.integers(2, 300), min_size=1, max_size=40)


def drawn(lengths, seed=0, vocabulary=60):
    rng = np.random.default_rng(seed)
    return [
        Prompt(rng.integers(10, vocabulary, n).tolist(), int(rng.integers(1, n)), {})
        for n in lengths
    ]


def single_rows(prompts, answers, rows, length, slots=1):
    """One prompt in each row: what packed batches have to be equal to."""
    filled = [[*prompt.ids, *[PAD] * (length - len(prompt.ids))] for prompt in prompts]
    filled += [[PAD] * length] * (rows - len(prompts))
    segments = [[int(i < len(prompt.ids)) for i in range(length)] for prompt in prompts]
    segments += [[0] * length] * (rows - len(prompts))
    targets = np.full((3, rows, slots), UNUSED, np.int32)
    targets[0, : len(prompts), 0] = [prompt.slot for prompt in prompts]
    targets[1, : len(prompts), 0], targets[2, : len(prompts), 0] = answers, ATP
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Batch(np.int32(filled), np.int32(segments), positions, *targets)


@given(LENGTHS, st.integers(1, 8))
def test_a_packed_batch_holds_every_prompt_once(lengths, parts):
    prompts, answers = drawn(lengths), np.arange(len(lengths)) + 100
    shape = common_shape([lengths], ModelConfig(), parts)
    assert shape.rows % parts == 0
    batch = answer_batch(prompts, answers, shape=shape, pad_id=PAD)
    assert batch.input_ids.shape == shape[:2]
    assert batch.target_ids.shape == (shape.rows, shape.slots)
    found = []
    for row in range(shape.rows):
        for number in range(1, batch.segment_ids[row].max() + 1):
            (places,) = np.nonzero(batch.segment_ids[row] == number)
            slot, target = (
                batch.target_positions[row, number - 1],
                batch.target_ids[row, number - 1],
            )
            assert batch.target_objective[row, number - 1] == ATP
            assert batch.position_ids[row, places].tolist() == list(range(len(places)))
            found.append((target, batch.input_ids[row, places].tolist(), slot - places[0]))
    assert sorted(found) == [
        (a, prompt.ids, prompt.slot) for a, prompt in zip(answers, prompts, strict=True)
    ]
    assert np.all(batch.input_ids[batch.segment_ids == 0] == PAD)
    assert np.count_nonzero(batch.target_ids != UNUSED) == len(prompts)


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
    return noisy(
        ModernBertForMaskedLM(small_config(vocab_size=512, **IDS), rngs=nnx.Rngs(0)), scale=0.05
    )


def test_loss_and_gradients_are_those_of_single_rows(model):
    lengths = [9, 30, 14, 22, 5, 40, 17]
    prompts, answers = drawn(lengths, vocabulary=model.config.vocab_size), np.arange(7) + 11
    packed = answer_batch(prompts, answers, shape=Shape(7, 48, 3), pad_id=PAD)
    assert not packed.segment_ids[4:].any()
    single = single_rows(prompts, answers, 7, 48, slots=3)
    graphdef, params = nnx.split(model)

    @jax.jit
    def losses(params, batch):
        return jax.value_and_grad(
            lambda params: masked_token_loss(nnx.merge(graphdef, params), batch)[0]
        )(params)

    (loss, gradient), (expected, reference) = losses(params, packed), losses(params, single)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for found, known in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(found, known, atol=1e-6 * max(1.0, np.abs(known).max()))


def test_training_packed_is_training_on_single_rows(model, monkeypatch):
    rng = np.random.default_rng(1)
    prompts = drawn(rng.integers(5, 40, 20), vocabulary=model.config.vocab_size)
    answers = rng.integers(10, 60, 20)
    settings = {
        "epochs": 2, "learning_rate": 1e-3, "batch_size": 8, "weight_decay": 0.01, "warmup": 0.1,
        "seed": 0, "pad_id": PAD,
    }  # fmt: skip
    losses = {}

    def trained(name):
        losses[name] = []
        return fine_tune(
            model,
            prompts,
            answers,
            **settings,
            after_epoch=lambda _, loss: losses[name].append(loss),
        )

    shapes = []

    def seen(*arguments):
        shapes.append(common_shape(*arguments))
        return shapes[-1]

    monkeypatch.setattr(finetune, "common_shape", seen)
    packed = trained("packed")
    assert shapes[0].rows < 8  # so that something was packed
    monkeypatch.setattr(
        finetune, "answer_batch", lambda prompts, answers, **_: single_rows(prompts, answers, 8, 40)
    )
    single = trained("single")
    np.testing.assert_allclose(losses["packed"], losses["single"], rtol=1e-5)
    before, after, expected = (
        jax.tree.leaves(nnx.state(one, nnx.Param)) for one in (model, packed, single)
    )
    for start, found, known in zip(before, after, expected, strict=True):
        moved = np.abs(np.asarray(known) - np.asarray(start)).max()
        # AdamW divides by the size of a gradient, so rounding is no small thing where it is near 0.
        assert np.abs(np.asarray(found) - np.asarray(known)).mean() <= 0.01 * moved


@pytest.mark.parametrize(
    ("labels", "pooling"),
    [(["bad", "good", "fair"], "cls"), ([], "mean")],
    ids=["classes", "regression"],
)
def test_packed_texts_have_the_logits_loss_and_gradients_of_single_rows(model, labels, pooling):
    config = replace(labelled_config(model.config, labels), classifier_pooling=pooling)
    head = ModernBertForSequenceClassification(config, rngs=nnx.Rngs(3))
    texts = drawn([9, 30, 14, 22, 5, 40, 17], vocabulary=config.vocab_size)
    answers = np.arange(7) % 3 if labels else np.linspace(-1, 2, 7)
    packed = label_batch(texts, answers, shape=Shape(4, 48, 3), pad_id=PAD)
    assert packed.segment_ids.max() == 3
    rows = single_rows(texts, answers, 7, 40)
    single = LabelBatch(rows.input_ids, rows.segment_ids, np.float32(answers))
    graphdef, params = nnx.split(head, nnx.Param)

    @jax.jit
    def losses(params, batch):
        return jax.value_and_grad(
            lambda params: label_loss(nnx.merge(graphdef, params), batch), has_aux=True
        )(params)

    (loss, metrics), gradient = losses(params, packed)
    (expected, known_metrics), reference = losses(params, single)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics.keys() == known_metrics.keys()
    assert metrics["loss_count"] == 7
    for found, known in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(found, known, atol=2e-6 * max(1.0, np.abs(known).max()))

    used = ~np.isnan(packed.labels)
    logits = np.asarray(head(packed.input_ids, packed.segment_ids, segments=3))[used]
    alone = np.asarray(head(single.input_ids, single.segment_ids))
    order = [i for row in pack([text.ids for text in texts], 48) for i in row]
    np.testing.assert_allclose(logits, alone[order], atol=2e-6)


def test_a_packed_batch_of_texts_holds_each_with_its_label():
    texts = [Prompt([1, 2, 3], -1, {}), Prompt([4, 5, 6, 7, 8], -1, {}), Prompt([9, 10], -1, {})]
    batch = label_batch(texts, [1.0, 0.0, 2.0], shape=Shape(3, 6, 2), pad_id=PAD)
    assert batch.input_ids.tolist() == [[4, 5, 6, 7, 8, PAD], [1, 2, 3, 9, 10, PAD], [PAD] * 6]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 2, 2, 0], [0] * 6]
    np.testing.assert_array_equal(batch.labels, np.float32([[0, np.nan], [1, 2], [np.nan, np.nan]]))
