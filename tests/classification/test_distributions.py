"""Labels as distributions: their loss is torch's, and a hard label is the one-hot case."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from labelled_texts import FAST, SHORT, examples
from small_models import small_model

from mlmjax.classification.classifier import Classifier
from mlmjax.data.batch import UNUSED, Answers, Options
from mlmjax.errors import InputError
from mlmjax.model.modernbert import with_classifier
from mlmjax.text.prompts import Prompt
from mlmjax.training.finetune import Shape, answer_batch, label_batch
from mlmjax.training.loss import target_losses
from mlmjax.training.step import head_of

RNG = np.random.default_rng(0)
NAMES = ["sports", "money"]
IDS = dict.fromkeys((f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep")), 0)


def weights(classifier):
    return jax.tree.leaves(nnx.state(classifier.asking_.scorer.model))


def equal(one, other):
    return all(map(np.array_equal, weights(one), weights(other)))


def torch_loss(logits, probs, kind, used):
    """The losses of `[n, options]` logits, whose unused options are -inf."""
    if kind == "ranked":
        shares = torch.softmax(torch.where(used, logits, -torch.inf), 1)
        ahead = torch.cumsum(torch.where(used, shares - probs, 0.0), 1)
        return torch.where(used, ahead**2, 0.0).sum(1) / (used.sum(1) - 1)
    return torch.nn.functional.cross_entropy(logits, probs, reduction="none")


@pytest.mark.parametrize("kind", ["vocabulary", "labels", "ranked"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_are_those_of_torch(kind, weighted):
    model = small_model(**IDS, vocab_size=64)
    n, options = 6, 4
    prompts = [Prompt(RNG.integers(5, 60, 12).tolist(), 4, {}) for _ in range(n)]
    ids = np.array([RNG.permutation(np.arange(5, 60))[:options] for _ in range(n)], np.int32)
    probs = RNG.dirichlet([1] * options, n).astype(np.float32)
    ids[0, -1], probs[0] = UNUSED, [0.2, 0.3, 0.5, 0]
    weight = RNG.uniform(0.1, 2, n).astype(np.float32) if weighted else None
    answers = Answers(ids[np.arange(n), probs.argmax(1)], weight, Options(ids, probs))
    batch = answer_batch(prompts, answers, shape=Shape(4, 24, 2), pad_id=0)
    single = answer_batch(prompts, answers, shape=Shape(6, 12, 1), pad_id=0)
    graphdef, params = nnx.split(model)
    hidden = model.encode(single.input_ids, single.segment_ids, single.position_ids)
    loss = head_of("mlm", kind).loss
    found, metrics = loss(model, batch)

    def ours(hidden):
        return target_losses(nnx.merge(graphdef, params), hidden, single, kind)[0]

    value, gradient = jax.value_and_grad(ours)(hidden)
    np.testing.assert_allclose(found, value, rtol=1e-4)
    logits, pull_back = jax.vjp(lambda h: model.mlm_logits(h[np.arange(n), 4]), hidden)
    given = torch.tensor(np.asarray(logits), requires_grad=True)
    used = torch.tensor(ids >= 0)
    places = torch.tensor(np.maximum(ids, 0), dtype=torch.int64)
    if kind == "vocabulary":
        dense = np.zeros(logits.shape, np.float32)
        np.put_along_axis(dense, np.maximum(ids, 0), probs, 1)
        losses = torch_loss(given, torch.tensor(dense), kind, None)
    else:
        picked = torch.where(used, given.gather(1, places), -1e30)
        losses = torch_loss(picked, torch.tensor(probs), kind, used)
    total = (losses * (torch.tensor(weight) if weighted else 1)).sum()
    total.backward()
    np.testing.assert_allclose(value, total.item(), rtol=1e-4)
    (expected,) = pull_back(given.grad.numpy())
    np.testing.assert_allclose(gradient, expected, atol=1e-4)
    np.testing.assert_allclose(metrics["loss_count"], weight.sum() if weighted else n, rtol=1e-6)


@pytest.mark.parametrize("kind", ["labels", "ranked"])
def test_a_head_has_the_loss_of_torch(kind):
    model = with_classifier(small_model(**IDS), ["a", "b", "c"], seed=0)
    prompts = [Prompt(RNG.integers(5, 60, 12).tolist(), -1, {}) for _ in range(5)]
    probs = RNG.dirichlet([1, 1, 1], 5).astype(np.float32)
    # The options may come in any order: here classes 2, 0, 1.
    ids = np.tile(np.array([2, 0, 1], np.int32), (5, 1))
    answers = Answers(ids[0][probs.argmax(1)], np.arange(5, dtype=np.float32), Options(ids, probs))
    batch = label_batch(prompts, answers, shape=Shape(3, 24, 2), pad_id=0)
    value, metrics = head_of("classification", kind).loss(model, batch)
    logits = model(np.array([one.ids for one in prompts], np.int32), np.ones((5, 12), np.int32))
    by_class = torch.tensor(probs[:, [1, 2, 0]])
    used = torch.ones(5, 3, dtype=torch.bool)
    losses = torch_loss(torch.tensor(np.asarray(logits)), by_class, kind, used)
    np.testing.assert_allclose(value, (losses * torch.arange(5)).sum(), rtol=1e-4)
    assert metrics["loss_count"] == 10


@pytest.mark.parametrize("options", [{}, {"head": "classification"}, {"orders": 2}])
def test_a_hard_label_is_the_one_hot_case_to_the_bit(pair, options):
    texts, labels = examples(24)
    if "head" not in options:
        options = {**options, "template": SHORT}
    recipe = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-2}
    hard = Classifier(pair, NAMES, **options).fit(texts, labels, **recipe)
    rows = [[float(name == label) for name in NAMES] for label in labels]
    for given in (rows, np.float32(rows), [{label: 1.0} for label in labels]):
        assert equal(hard, Classifier(pair, NAMES, **options).fit(texts, given, **recipe))
    # Among other distributions it takes another program, and the loss is still the same.
    soft = Classifier(pair, NAMES, **options).fit(texts, rows, normalize="vocabulary", **recipe)
    assert equal(hard, soft)


def test_one_hot_options_have_loss_and_gradient_of_the_token_to_the_bit():
    model = small_model(**IDS)
    prompts = [Prompt(RNG.integers(5, 60, 12).tolist(), 4, {}) for _ in range(4)]
    hard = np.array([7, 9, 11, 7], np.int32)
    ids = np.tile(np.array([9, 7, 11], np.int32), (4, 1))
    soft = Answers(hard, None, Options(ids, np.float32(ids == hard[:, None])))
    graphdef, params = nnx.split(model)

    @jax.jit
    def both(params, batch):
        loss = head_of("mlm").loss
        return jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p), batch)[0])(params)

    shape = Shape(2, 24, 2)
    batches = [answer_batch(prompts, one, shape=shape, pad_id=0) for one in (hard, soft)]
    found = [jax.tree.leaves(both(params, batch)) for batch in batches]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_classifier_learns_the_probabilities_that_it_is_given(pair):
    texts, labels = examples(96)
    sure = {"sports": 0.8, "money": 0.3}  # of sports
    rows = [{"sports": sure[label], "money": 1 - sure[label]} for label in labels]
    options = {**FAST, "epochs": 8, "validation_share": 0.25}
    for more in ({"normalize": "labels"}, {"ordered": True}, {"head": "classification"}):
        own = {k: v for k, v in more.items() if k != "normalize"}
        template = {} if "head" in more else {"template": SHORT}
        classifier = Classifier(pair, NAMES, **own, **template)
        classifier.fit(texts, rows, **options, **{k: more[k] for k in more if k not in own})
        given = classifier.predict_proba(texts)[:, 0]
        expected = np.array([sure[label] for label in labels])
        assert np.abs(given - expected).mean() < 0.08
        assert classifier.fit_summary_.validation.accuracy > 0.9


def test_weights_decide_between_contradictions(pair):
    texts, labels = examples(48)
    swapped = [NAMES[1 - NAMES.index(label)] for label in labels]
    classifier = Classifier(pair, NAMES, template=SHORT)
    weights = [1.0] * 48 + [0.1] * 48
    classifier.fit(texts * 2, labels + swapped, sample_weight=weights, **FAST)
    assert classifier.score(texts, labels) > 0.95


def test_figures_are_weighted_and_a_text_without_weight_is_left_out(pair):
    texts, labels = examples(48)
    swapped = [NAMES[1 - NAMES.index(label)] for label in labels]
    options = {**FAST, "epochs": 1, "validation_share": 0.25}
    more, others = texts + texts[:8], labels + swapped[:8]
    fits = [
        Classifier(pair, NAMES, template=SHORT).fit(*given, sample_weight=weights, **options)
        for *given, weights in (
            (texts, labels, [1.0] * 48),
            (more, others, [1.0] * 48 + [0.0] * 8),
            (more, others, [1.0] * 56),
        )
    ]
    assert equal(*fits[:2])
    assert not equal(*fits[1:])
    assert fits[0].fit_summary_ == fits[1].fit_summary_
    # Money weighs three times as much, so that it has three quarters of the weight.
    heavy = Classifier(pair, NAMES, template=SHORT)
    heavy.fit(
        texts, labels, sample_weight=[1.0 + 2 * (one == "money") for one in labels], **options
    )
    for measured in (heavy.fit_summary_.training, heavy.fit_summary_.validation):
        assert measured.majority == pytest.approx(0.75, abs=0.04)
        assert measured.effective_n < measured.n
    shares = np.array([0.25, 0.75])
    expected = -(shares * np.log(shares)).sum()
    assert heavy.history_[0]["baseline_loss"] == pytest.approx(expected, abs=0.02)


def test_smoothing_keeps_answers_less_sure(pair):
    texts, labels = examples(96)
    classifier = Classifier(pair, NAMES, template=SHORT, label_smoothing=0.4)
    classifier.fit(texts, labels, **FAST, normalize="labels")
    sure = classifier.predict_proba(texts).max(axis=1).mean()
    assert 0.7 < sure < 0.87


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([[0.5, 0.6]], {}, r"row 1 \(index 0\): its probabilities sum to 1.1; expected 1"),
        ([[0.5, 0.5], [1.5, -0.5]], {}, r"row 2 .*gives 'money' the probability -0.5; expected"),
        ([[0.5, 0.2, 0.3]], {}, r"row 1 .*has 3 probabilities; expected 2, one for each of 'spor"),
        ([{"sport": 1.0}], {}, r"row 1 .*gives a probability to 'sport', which is not a label"),
        (
            [{"sports": float("nan"), "money": 1.0}],
            {},
            r"row 1 .*gives 'sports' the probability nan",
        ),
        ([{"sports": "1"}], {}, r"row 1 .*gives 'sports' the probability '1'; expected a number"),
        ([[True, False]], {}, r"row 1 .*gives 'sports' the probability True"),
        ([{}], {}, r"row 1 .*sum to 0; expected 1"),
        (
            [[0.5, 0.5]],
            {"labels": None},
            r"row 1 .*is a list of probabilities, which have no names",
        ),
        ([["sports"]], {}, r"row 1 .*label is list"),
    ],
)
def test_numbers_that_are_no_distribution_are_rejected_by_row(pair, rows, options, says):
    texts = [f"text {i}" for i in range(len(rows) + 1)]
    classifier = Classifier(pair, **{"labels": NAMES, "template": SHORT} | options)
    with pytest.raises(InputError, match=says):
        classifier.fit(texts, [*rows, "money"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([1.0], "there are 2 texts and 1 weights"),
        ([1.0, -1.0], r"row 2 \(index 1\): weight is -1.0; expected a number from 0"),
        ([0.0, 0.0], "all weights are 0"),
    ],
)
def test_weights_that_are_none_are_rejected(pair, given, says):
    classifier = Classifier(pair, NAMES, template=SHORT)
    with pytest.raises(InputError, match=says):
        classifier.fit(["a", "b"], NAMES, sample_weight=given)
