"""The model is ModernBERT: outputs, gradients and parameters are those of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
from noisy_models import BIASES, build, config_of, loss_and_gradients, padded_batch, run_jitted
from tiny_models import torch, transformers

from mlmjax.model import blockwise, layers
from mlmjax.model.architecture import ACTIVATIONS, GLOBAL, LOCAL, ModelConfig
from mlmjax.model.modernbert import (
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    abstract_model,
    parameters,
)
from mlmjax.weights.tensors.layout import to_hf_layout, to_hf_tensors

SMALL = {"num_attention_heads": 1, "hidden_size": 10, "intermediate_size": 7}
SMALL |= {"vocab_size": 130, "num_hidden_layers": 1}
PIECES = [
    {},
    {"decoder_bias": False},
    {"tie_word_embeddings": False},
    {"hidden_activation": "relu", "classifier_activation": "tanh", "mlp_bias": True},
    {"hidden_activation": "silu", "classifier_activation": "quick_gelu", "classifier_bias": True},
    {"hidden_activation": "gelu_new", "classifier_activation": "relu2", "norm_bias": True},
    SMALL,
    {"norm_eps": 0.05, "classifier_pooling": "mean", "num_labels": 3, "norm_bias": True},
    {"pad_token_id": 7, "num_labels": 1, **dict.fromkeys(BIASES, True)},
    {"pad_token_id": None, "classifier_pooling": "mean", "num_labels": 5},
    {"global_rope_theta": 50.0, "local_rope_theta": 3.0},
    {"rope_parameters": {GLOBAL: {"rope_theta": 12.0}, LOCAL: {"rope_theta": 1e6}}},
]
PATTERNS = [
    {**dict.fromkeys(BIASES, True), "num_hidden_layers": 4},
    {"layer_types": [LOCAL] * 2},
    {"layer_types": [LOCAL, GLOBAL, LOCAL], "num_hidden_layers": 3, "attention_bias": True},
    {"global_attn_every_n_layers": 2, "num_hidden_layers": 3},
    {"local_attention": 0},
    {"local_attention": 7},
    {"local_attention": 1000},
]
MORE = [
    *({name: True} for name in BIASES),
    {"layer_types": [GLOBAL] * 2},
    {"local_attention": 1},
    {"local_attention": 16},
    {"local_attention": 16, "num_attention_heads": 8},
    {"num_attention_heads": 3, "hidden_size": 36},
]


def oracle(model):
    """Return the transformers model with the same parameters."""
    config = transformers.ModernBertConfig(**model.config.to_hf())
    config._attn_implementation = "sdpa"
    theirs = getattr(transformers, type(model).__name__)(config).eval()
    tensors = {name: torch.tensor(array) for name, array in to_hf_tensors(model).items()}
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= ({"decoder.weight"} if config.tie_word_embeddings else set())
    return theirs


def run_oracle(theirs, ids, mask=None, **options):
    """Return what a transformers model gives, without gradients."""
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return theirs(input_ids=torch.tensor(ids), attention_mask=mask, **options)


@pytest.fixture
def small_blocks(monkeypatch):
    """Let the banded path cut rows that are short enough for a test."""
    monkeypatch.setattr(blockwise, "_BLOCK", 4)


@pytest.mark.parametrize(
    ("changes", "implementation"),
    [(changes, "auto") for changes in PIECES]
    + [pytest.param(changes, "banded", marks=pytest.mark.long) for changes in MORE]
    + [(changes, "banded") for changes in PATTERNS]
    + [(changes, "dense") for changes in ({"layer_types": [LOCAL] * 2}, {"local_attention": 7})],
    ids=str,
)
def test_masked_lm_is_that_of_transformers(small_blocks, changes, implementation):
    """Logits within 1e-4; loss and every gradient within 1e-4 relative."""
    config = config_of(**changes)
    model = build(ModernBertForMaskedLM, config, attention=implementation)
    ids, mask, targets = padded_batch(config.vocab_size)
    compiled = changes == PATTERNS[0] or "hidden_size" in changes
    loss, logits, grads = loss_and_gradients(model, ids, mask, targets, compiled=compiled)

    theirs = oracle(model)
    out = theirs(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        labels=torch.tensor(targets, dtype=torch.long),
    )
    out.loss.backward()
    real = mask == 1
    assert np.isfinite(logits).all()
    assert np.abs(logits[real]).max() > 0.5
    np.testing.assert_allclose(logits[real], out.logits.detach().numpy()[real], atol=1e-4)
    assert loss == pytest.approx(out.loss.item(), rel=1e-5)
    their_grads = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert their_grads.keys() == grads.keys()
    for name, expected in their_grads.items():
        found = to_hf_layout(name, np.asarray(grads[name]))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize("changes", [{"classifier_bias": True}, *PIECES[6:9]], ids=str)
def test_sequence_classification_is_that_of_transformers(changes):
    config = config_of(**changes)
    model = build(ModernBertForSequenceClassification, config)
    ids, mask, _ = padded_batch(config.vocab_size)
    theirs = oracle(model)
    found, expected = model(ids, mask), run_oracle(theirs, ids, mask).logits
    assert found.shape == (3, config.num_labels)
    # transformers takes the first token of the third row, which is padding.
    np.testing.assert_allclose(found[:2], expected[:2], atol=1e-4)
    np.testing.assert_allclose(model(ids), run_oracle(theirs, ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    "length",
    [65, 66, 300, *(pytest.param(n, marks=pytest.mark.long) for n in (63, 64, 128, 129))],
)
def test_lengths_around_the_window(length):
    """All tokens see each other up to 65; the longest row is computed in blocks."""
    config = config_of(local_attention=128, global_attn_every_n_layers=2)
    ids, mask, _ = padded_batch(config.vocab_size, (length, length - 9, length - 3), seed=length)
    model = build(ModernBertForMaskedLM, config)
    expected = run_oracle(oracle(model), ids, mask).logits.numpy()
    real = mask == 1
    found = np.asarray(run_jitted(model, ids, mask))
    np.testing.assert_allclose(found[real], expected[real], atol=1e-4)


def test_a_row_of_8192():
    config = config_of(hidden_size=8, num_attention_heads=1, local_attention=128)
    ids = np.random.default_rng(0).integers(1, config.vocab_size, (1, 8192))
    model = build(ModernBertForMaskedLM, config)
    expected = run_oracle(oracle(model), ids).logits
    np.testing.assert_allclose(run_jitted(model, ids), expected, atol=1e-4)


def test_hidden_states_are_those_of_transformers():
    model = build(ModernBertForMaskedLM, config_of(norm_bias=True))
    ids, mask, _ = padded_batch(61)
    out = run_oracle(oracle(model).model, ids, mask, output_hidden_states=True)
    hidden, states = model.encode(ids, mask, output_hidden_states=True)
    assert len(states) == model.config.num_hidden_layers + 1
    real = mask == 1
    for found, expected in zip(states, out.hidden_states, strict=True):
        np.testing.assert_allclose(np.asarray(found)[real], expected.numpy()[real], atol=1e-4)
    np.testing.assert_array_equal(states[-1], hidden)


@pytest.mark.parametrize("implementation", ["dense", "banded"])
def test_packed_is_alone_as_transformers_computes_it(small_blocks, implementation):
    model = build(ModernBertForMaskedLM, config_of(norm_bias=True), attention=implementation)
    theirs = oracle(model)
    rng = np.random.default_rng(1)
    parts = [rng.integers(1, 61, length) for length in (3, 21, 1, 30, 9)]
    row, segment_ids, position_ids = np.zeros((3, 1, 72), np.int32)
    starts = np.cumsum([0, *map(len, parts)])
    for number, (part, start) in enumerate(zip(parts, starts, strict=False), start=1):
        here = slice(start, start + len(part))
        row[0, here], segment_ids[0, here], position_ids[0, here] = part, number, range(len(part))
    packed = np.asarray(run_jitted(model, row, segment_ids, position_ids))
    assert np.isfinite(packed).all()
    for part, start in zip(parts, starts, strict=False):
        alone = run_oracle(theirs, part[None]).logits
        np.testing.assert_allclose(packed[0, start : start + len(part)], alone[0], atol=1e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    x = np.concatenate([np.linspace(-8, 8, 201), [0.0, -30.0, 30.0]]).astype(np.float32)
    expected = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(layers.ACTIVATIONS[name](jnp.asarray(x)), expected, atol=3e-6)
    assert layers.ACTIVATIONS.keys() == set(ACTIVATIONS)


LARGE = {"hidden_size": 1024, "intermediate_size": 2624}
LARGE |= {"num_hidden_layers": 28, "num_attention_heads": 16}


@pytest.mark.parametrize(
    ("kind", "shape", "count"),
    [
        ("ModernBertForMaskedLM", {}, 149_655_232),
        ("ModernBertForMaskedLM", LARGE, 395_881_664),
        ("ModernBertForSequenceClassification", LARGE, 395_833_346),
    ],
)
def test_real_sizes_have_the_parameters_of_transformers(kind, shape, count):
    """Names and sizes, without the memory of either."""
    config = ModelConfig(**shape)
    ours = {name: leaf.size for name, leaf in parameters(abstract_model(kind, config)).items()}
    with torch.device("meta"):
        theirs = getattr(transformers, kind)(transformers.ModernBertConfig(**config.to_hf()))
    assert ours == {name: p.numel() for name, p in theirs.named_parameters()}
    assert sum(ours.values()) == count
