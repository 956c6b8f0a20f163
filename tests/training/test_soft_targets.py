"""Distributions as targets: loss and all gradients of a model are those of torch."""

import jax
import numpy as np
import pytest
from flax import nnx
from noisy_models import BIASES
from tiny_models import CLASSES, torch, write_model

from mlmjax import load_pretrained
from mlmjax.data.batch import UNUSED, Answers, Options
from mlmjax.text.prompts import Prompt
from mlmjax.training.finetune import Shape, answer_batch, label_batch
from mlmjax.training.step import head_of
from mlmjax.weights.tensors.layout import to_hf_tensors

MLM, LABELLED = CLASSES
RNG = np.random.default_rng(4)
ROWS, LENGTH, SLOT, OPTIONS, VOCABULARY = 6, 9, 4, 4, 18
PROMPTS = [Prompt(RNG.integers(5, VOCABULARY, LENGTH).tolist(), SLOT, {}) for _ in range(ROWS)]
PROBS = RNG.dirichlet([1] * OPTIONS, ROWS).astype(np.float32)
WEIGHTS = RNG.uniform(0.1, 2, ROWS).astype(np.float32)
SHAPE = Shape(4, 2 * LENGTH, 2)


def mean_loss(scores, probs, kind):
    """The weighted mean loss of `[rows, options]` scores, by torch alone."""
    if kind == "ranked":
        ahead = torch.cumsum(torch.softmax(scores, 1) - probs, 1)
        losses = (ahead**2).sum(1) / (scores.shape[1] - 1)
    else:
        losses = torch.nn.functional.cross_entropy(scores, probs, reduction="none")
    weights = torch.tensor(WEIGHTS)
    return (losses * weights).sum() / weights.sum()


def assert_same_gradients(folder, batch, head, kind, theirs, loss):
    """Compare the mean loss of a batch and the gradient of every parameter with torch's."""
    model, _ = load_pretrained(folder)
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        loss_sum, metrics = head_of(head, kind).loss(nnx.merge(graphdef, params), batch)
        return loss_sum / metrics["loss_count"]

    value, grads = ours(params)
    loss.backward()
    assert float(value) == pytest.approx(loss.item(), abs=1e-4)
    nnx.update(model, grads)
    found = dict(to_hf_tensors(model))
    expected = {name: value.grad.numpy() for name, value in theirs.named_parameters()}
    assert found.keys() >= expected.keys()
    assert sum(np.abs(value).max() > 1e-3 for value in expected.values()) > len(expected) / 2
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)


@pytest.fixture
def inputs():
    return torch.tensor([prompt.ids for prompt in PROMPTS])


@pytest.mark.parametrize("kind", ["vocabulary", "labels", "ranked"])
def test_the_answer_at_a_slot(tmp_path, inputs, kind):
    theirs = write_model(tmp_path, **dict.fromkeys(BIASES, True)).eval()
    ids = np.array([RNG.permutation(np.arange(5, VOCABULARY))[:OPTIONS] for _ in range(ROWS)])
    options = Options(ids.astype(np.int32), PROBS)
    best = ids[np.arange(ROWS), PROBS.argmax(axis=1)].astype(np.int32)
    batch = answer_batch(PROMPTS, Answers(best, WEIGHTS, options), shape=SHAPE, pad_id=0)
    assert (batch.target_ids != UNUSED).sum() == ROWS
    logits = theirs(input_ids=inputs).logits[:, SLOT]
    if kind == "vocabulary":
        probs = torch.zeros(ROWS, VOCABULARY).scatter(1, torch.tensor(ids), torch.tensor(PROBS))
        loss = mean_loss(logits, probs, kind)
    else:
        loss = mean_loss(logits.gather(1, torch.tensor(ids)), torch.tensor(PROBS), kind)
    assert_same_gradients(tmp_path, batch, "mlm", kind, theirs, loss)


@pytest.mark.parametrize("kind", ["labels", "ranked"])
def test_a_classification_head(tmp_path, inputs, kind):
    labels = {number: f"level {number}" for number in range(OPTIONS)}
    theirs = write_model(tmp_path, LABELLED, id2label=labels, classifier_pooling="mean").eval()
    options = Options(np.tile(np.arange(OPTIONS, dtype=np.int32), (ROWS, 1)), PROBS)
    answers = Answers(PROBS.argmax(axis=1).astype(np.int32), WEIGHTS, options)
    batch = label_batch(PROMPTS, answers, shape=SHAPE, pad_id=0)
    loss = mean_loss(theirs(input_ids=inputs).logits, torch.tensor(PROBS), kind)
    assert_same_gradients(tmp_path, batch, "classification", kind, theirs, loss)
