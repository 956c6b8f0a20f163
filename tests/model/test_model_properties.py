"""The model without an oracle: batching changes nothing, every field acts, bad input raises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from noisy_models import (
    BIASES,
    TINY,
    build,
    config_of,
    loss_and_gradients,
    padded_batch,
    run_jitted,
)

from mlmjax.config.run import AdapterConfig
from mlmjax.errors import InputError
from mlmjax.model.architecture import GLOBAL, LOCAL, ModelConfig, Provenance
from mlmjax.model.modernbert import (
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    abstract_model,
    parameters,
)
from mlmjax.parallel import sharding

KINDS = (ModernBertForMaskedLM, ModernBertForSequenceClassification)


def test_alone_batched_and_padded_are_the_same():
    model = build(ModernBertForMaskedLM, config_of())
    ids, mask, _ = padded_batch(61)
    positions = np.broadcast_to(np.arange(40), ids.shape)
    batched = run_jitted(model, ids, mask, positions)
    for width in (23, 300):
        row, segment_ids = np.zeros((2, 1, width), np.int32)
        row[0, :23], segment_ids[0, :23] = ids[1, :23], 1
        alone = run_jitted(model, row, segment_ids)
        np.testing.assert_allclose(alone[0, :23], batched[1, :23], atol=2e-5)
    # Rotary attention depends only on differences of positions.
    shifted = run_jitted(model, ids, mask, positions + 1000)
    real = mask == 1
    np.testing.assert_allclose(np.asarray(shifted)[real], np.asarray(batched)[real], atol=1e-3)


# What each field does to a forward pass; a new field has to be placed here.
CHANGED = {
    "vocab_size": 62,
    "hidden_size": 32,
    "intermediate_size": 25,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_activation": "relu",
    "norm_eps": 0.1,
    "norm_bias": True,
    "attention_bias": True,
    "local_attention": 10,
    "mlp_bias": True,
    "decoder_bias": False,
    "classifier_bias": True,
    "classifier_activation": "tanh",
    "classifier_pooling": "mean",
    "layer_types": (LOCAL, GLOBAL),
    "global_attn_every_n_layers": 1,
    "global_rope_theta": 10.0,
    "local_rope_theta": 10.0,
    "rope_parameters": {LOCAL: {"rope_theta": 10.0}},
    "num_labels": 3,
    "id2label": {0: "a", 1: "b", 2: "c"},
    "tie_word_embeddings": False,
    "adapter": AdapterConfig(rank=2),
}
UNCHANGED = {
    "max_position_embeddings": 16,
    **dict.fromkeys(("initializer_range", "initializer_cutoff_factor"), 0.5),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 9),
    **dict.fromkeys(("cls_token_id", "sep_token_id"), 9),
    **dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), 0.5),
    "classifier_dropout": 0.5,
    "label2id": {"a": 0, "b": 1},
    "problem_type": "regression",
    "architectures": ("Other",),
    "extra": {"other": 1},
    "source_dtypes": {"decoder.bias": "bfloat16"},
    "provenance": Provenance(norms=1),
}


def test_every_field_of_the_configuration_acts_or_is_known_not_to():
    assert CHANGED.keys() | UNCHANGED.keys() == {f.name for f in dataclasses.fields(ModelConfig)}
    ids, mask, _ = padded_batch(61)

    def shapes(kind, changes):
        described = parameters(abstract_model(kind.__name__, config_of(**changes)))
        return {name: leaf.shape for name, leaf in described.items()}

    def run(kind, changes):
        return np.asarray(build(kind, config_of(**changes))(ids, mask))

    plain = {kind: (shapes(kind, {}), run(kind, {})) for kind in KINDS}
    for name, value in CHANGED.items():
        acts = (
            shapes(kind, {name: value}) != plain_shapes
            or not np.array_equal(run(kind, {name: value}), outputs)
            for kind, (plain_shapes, outputs) in plain.items()
        )
        assert any(acts), name
    for kind, (_, outputs) in plain.items():
        np.testing.assert_array_equal(run(kind, UNCHANGED), outputs)


def test_initialisation_is_cut_and_its_variance_not_corrected():
    config = ModelConfig(
        **{**TINY, "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 192},
        **dict.fromkeys(BIASES, True),
        num_labels=50,
        initializer_range=0.05,
        initializer_cutoff_factor=1.5,
    )
    out = 0.05 / np.sqrt(2 * 2)
    stds = {"tok_embeddings": 0.05, "Wqkv": 0.05, "Wi": 0.05, "Wo": out, "dense": out}
    stds["classifier"] = 128**-0.5
    # Of a normal cut at 1.5 of its standard deviations: sqrt(1 - 3 pdf(1.5) / (2 cdf(1.5) - 1)).
    shrunk = 0.7426
    first, second, labelled = (
        parameters(kind(config, rngs=nnx.Rngs(seed)))
        for kind, seed in ((KINDS[0], 3), (KINDS[0], 4), (KINDS[1], 3))
    )
    seen = set()
    for found in (first, labelled):
        for name, leaf in found.items():
            part, leaf = name.split(".")[-2], np.asarray(leaf)
            if name.endswith("bias"):
                assert not leaf.any(), name
            elif part.endswith("norm"):
                assert (leaf == 1).all(), name
            else:
                seen.add(part)
                assert float(leaf.std()) == pytest.approx(shrunk * stds[part], rel=0.02), name
                assert float(np.abs(leaf).max()) <= 1.5 * stds[part] * (1 + 1e-6), name
                assert float(np.abs(leaf).max()) > 1.4 * stds[part], name
    assert seen == stds.keys()
    weights = [name for name in first if name.endswith("weight") and "norm" not in name]
    assert all(np.any(np.asarray(first[name]) != np.asarray(second[name])) for name in weights)
    assert len({float(np.sum(first[name])) for name in weights}) == len(weights)


def test_bfloat16_stays_close_and_answers_in_float32():
    config = config_of(norm_bias=True)
    (exact_loss, _, gradients), (loss, logits, low_gradients) = (
        loss_and_gradients(
            build(ModernBertForMaskedLM, config, 0.1, dtype=dtype),
            *padded_batch(61),
            compiled=dtype == "bfloat16",
        )
        for dtype in ("float32", "bfloat16")
    )
    assert logits.dtype == np.float32
    assert loss == pytest.approx(exact_loss, rel=0.02)
    for name, exact in gradients.items():
        low = low_gradients[name]
        assert low.dtype == jnp.float32
        cosine = np.vdot(low, exact) / (np.linalg.norm(low) * np.linalg.norm(exact))
        assert cosine > 0.99, name


def test_rows_of_padding_give_finite_numbers_and_gradients():
    ids, mask, targets = padded_batch(61)
    mask[0] = 0
    targets[0] = -100
    model = build(ModernBertForMaskedLM, config_of())
    loss, logits, grads = loss_and_gradients(model, ids, mask, targets)
    assert np.isfinite(loss)
    assert np.isfinite(logits).all()
    assert all(np.isfinite(g).all() for g in grads.values())
    for pooling in ("cls", "mean"):
        kind = ModernBertForSequenceClassification
        assert np.isfinite(build(kind, config_of(classifier_pooling=pooling))(ids, mask)).all()


def test_pooling_takes_the_first_token_that_is_no_padding():
    ids, mask, _ = padded_batch(61)
    model = build(ModernBertForSequenceClassification, config_of())
    left = run_jitted(model, ids, mask)[2]
    right = run_jitted(model, ids[2:, -31:])[0]
    np.testing.assert_allclose(left, right, atol=2e-5)


def test_logits_of_chosen_words_and_of_any_shape():
    model = build(ModernBertForMaskedLM, config_of())
    ids, mask, _ = padded_batch(61)
    hidden = model.encode(ids, mask)
    full = model.mlm_logits(hidden)
    words = np.array([5, 60, 0, 5])
    np.testing.assert_allclose(model.mlm_logits(hidden, words), full[..., words], atol=1e-5)
    np.testing.assert_allclose(model.mlm_logits(hidden[1, 3]), full[1, 3], atol=1e-5)
    np.testing.assert_allclose(model.mlm_logits(hidden[None]), full[None], atol=1e-5)


def test_a_mesh_changes_nothing():
    model = build(ModernBertForMaskedLM, config_of())
    ids, mask, _ = padded_batch(61)
    ids, mask = ids[:2], mask[:2]
    expected = run_jitted(model, ids, mask)
    with jax.set_mesh(sharding.make_mesh({"data": 2, "tensor": 2})):
        np.testing.assert_allclose(run_jitted(model, ids, mask), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "others", "says"),
    [
        (np.zeros(5, int), {}, r"input_ids: found int32 \[5\]; expected whole numbers"),
        (np.zeros((1, 5)), {}, "input_ids: found float32"),
        (np.full((1, 5), 61), {}, "found 61; expected ids from 0 to 60"),
        (np.full((1, 5), -1), {}, "found -1; expected ids from 0 to 60"),
        (np.zeros((1, 5), int), {"segment_ids": np.ones((1, 4), int)}, "segment_ids: found"),
        (np.zeros((1, 5), int), {"segment_ids": np.ones((1, 5))}, "segment_ids: found float32"),
        (np.zeros((1, 5), int), {"position_ids": np.ones((5,), int)}, "position_ids: found"),
    ],
)
def test_wrong_inputs_are_rejected(ids, others, says):
    model = build(ModernBertForMaskedLM, config_of())
    with pytest.raises(InputError, match=says):
        model(ids, **others)


def test_traced_ids_outside_the_vocabulary_give_nan():
    model = build(ModernBertForMaskedLM, config_of())
    logits = run_jitted(model, jnp.asarray([[3, 61, 4], [1, 2, 3], [-1, 5, 6]]))
    unknown = np.isnan(np.asarray(logits)).all(axis=(1, 2))
    np.testing.assert_array_equal(unknown, [True, False, True])
    assert np.isfinite(logits[1]).all()
    with pytest.raises(InputError, match="vocabulary_ids"):
        model.mlm_logits(jnp.zeros((1, 16)), [61])


def test_rows_may_score_words_of_their_own():
    model = build(ModernBertForMaskedLM, config_of(decoder_bias=True))
    model.decoder.bias[...] = jnp.arange(61.0)
    hidden = jax.random.normal(jax.random.key(1), (2, 16))
    words = jnp.array([[3, 60, 4], [0, 0, 7]])
    expected = jnp.take_along_axis(model.mlm_logits(hidden), words, axis=1)
    np.testing.assert_allclose(model.mlm_logits(hidden, words), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"attention": "flash"}, {"dtype": jnp.float16}])
def test_wrong_options_are_rejected(options):
    with pytest.raises(InputError, match="|".join(options)):
        ModernBertForMaskedLM(config_of(), rngs=nnx.Rngs(0), **options)
