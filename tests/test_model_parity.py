"""The model is ModernBERT: against transformers, against itself in every arrangement."""

import dataclasses
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlmjax import blockwise, layers, partition
from mlmjax.architecture import ACTIVATIONS, GLOBAL, LOCAL, ModelConfig
from mlmjax.errors import InputError
from mlmjax.modernbert import ModernBertForMaskedLM, ModernBertForSequenceClassification

TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "local_attention": 8,
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
}
BIASES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
PIECES = [
    {},
    *({name: True} for name in BIASES),
    {"decoder_bias": False},
    {"hidden_activation": "relu", "classifier_activation": "tanh", "mlp_bias": True},
    {"hidden_activation": "silu", "classifier_activation": "quick_gelu", "classifier_bias": True},
    {"hidden_activation": "gelu_new", "classifier_activation": "relu2", "norm_bias": True},
    {"num_attention_heads": 1, "hidden_size": 10, "intermediate_size": 7},
    {"num_attention_heads": 3, "hidden_size": 36, "vocab_size": 130, "num_hidden_layers": 1},
    {"norm_eps": 0.05, "classifier_pooling": "mean", "num_labels": 3, "norm_bias": True},
    {"pad_token_id": 7, "num_labels": 1, **dict.fromkeys(BIASES, True)},
    {"pad_token_id": None, "classifier_pooling": "mean", "num_labels": 5},
    {"global_rope_theta": 50.0, "local_rope_theta": 3.0},
    {"rope_parameters": {GLOBAL: {"rope_theta": 12.0}, LOCAL: {"rope_theta": 1e6}}},
]
PATTERNS = [
    {**dict.fromkeys(BIASES, True), "num_hidden_layers": 4},
    {"layer_types": [LOCAL] * 2},
    {"layer_types": [GLOBAL] * 2},
    {"layer_types": [LOCAL, GLOBAL, LOCAL], "num_hidden_layers": 3, "attention_bias": True},
    {"global_attn_every_n_layers": 2, "num_hidden_layers": 3},
    {"local_attention": 0},
    {"local_attention": 1},
    {"local_attention": 7},
    {"local_attention": 16, "num_attention_heads": 8},
    {"local_attention": 1000},
]
# Compiles twice as fast; these programs are too small to gain anything from more.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LINEAR = ("Wqkv.weight", "Wi.weight", "Wo.weight", "dense.weight", "classifier.weight")


def config_of(**changes):
    return ModelConfig(**{**TINY, **changes})


def named(tree):
    return {partition.leaf_path(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def noise(name, shape, scale):
    """Noise that depends on the parameter's name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return scale * rng.normal(size=shape).astype(np.float32)


def build(kind, config, scale=0.3, **options):
    """Return a model with noise on every parameter, norms and biases included."""
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), **options))
    graphdef, params = nnx.split(model)

    def shaken(path, leaf):
        name = partition.leaf_path(path)
        ones = 1.0 if name.endswith("norm.weight") else 0.0
        return jnp.asarray(ones + noise(name, leaf.shape, scale))

    return nnx.merge(graphdef, jax.tree.map_with_path(shaken, params))


def to_torch_layout(name, array):
    if name.endswith(LINEAR):
        out_first = "Wo" not in name
        inputs = array.shape[0] if out_first else -1
        array = array.reshape(inputs, -1 if out_first else array.shape[-1]).T
    elif name.endswith("bias"):
        array = array.reshape(-1)
    return np.array(array)


def oracle(model):
    """Return the transformers model with the same parameters."""
    transformers = pytest.importorskip("transformers")
    import torch

    config = transformers.ModernBertConfig(**model.config.to_hf())
    config._attn_implementation = "sdpa"
    theirs = getattr(transformers, type(model).__name__)(config).eval()
    ours = {name: to_torch_layout(name, a) for name, a in named(nnx.state(model)).items()}
    tensors = {name: torch.from_numpy(array) for name, array in ours.items()}
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"decoder.weight"}
    return theirs


def padded_batch(vocab_size, lengths=(40, 23, 31), seed=0):
    """Ids, a mask (full, padded behind, padded in front) and targets (-100: none)."""
    rng = np.random.default_rng(seed)
    width = max(lengths)
    ids = rng.integers(0, vocab_size, (len(lengths), width), dtype=np.int32)
    mask = np.ones_like(ids)
    mask[1, lengths[1] :] = 0
    mask[2, : width - lengths[2]] = 0
    chosen = (rng.random(ids.shape) < 0.3) & (mask == 1)
    targets = np.where(chosen, rng.integers(0, vocab_size, ids.shape), -100)
    return ids, mask, targets


def cross_entropy(logits, targets):
    safe = jnp.maximum(targets, 0)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), safe[..., None], axis=-1)[..., 0]
    return -jnp.where(targets >= 0, chosen, 0.0).sum() / (targets >= 0).sum()


def loss_and_gradients(model, ids, mask, targets):
    graphdef, params = nnx.split(model)

    @partial(jax.value_and_grad, has_aux=True)
    def run(params):
        logits = nnx.merge(graphdef, params)(ids, mask)
        return cross_entropy(logits, targets), logits

    (loss, logits), grads = quick_jit(run)(params)
    return float(loss), np.asarray(logits), named(grads)


@pytest.fixture
def small_blocks(monkeypatch):
    """Let the banded path cut rows that are short enough for a test."""
    monkeypatch.setattr(blockwise, "_BLOCK", 4)


@pytest.mark.parametrize(
    ("changes", "implementation"),
    [(changes, "auto") for changes in PIECES]
    + [(changes, "banded") for changes in PATTERNS]
    + [(changes, "dense") for changes in PATTERNS[1:8:3]],
    ids=str,
)
def test_masked_lm_is_that_of_transformers(small_blocks, changes, implementation):
    """Logits within 1e-4; loss and every gradient within 1e-4 relative."""
    torch = pytest.importorskip("torch")
    config = config_of(**changes)
    model = build(ModernBertForMaskedLM, config, attention=implementation)
    ids, mask, targets = padded_batch(config.vocab_size)
    loss, logits, grads = loss_and_gradients(model, ids, mask, targets)

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
        found = to_torch_layout(name, grads[name])
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize("changes", PIECES[4:6] + PIECES[11:14], ids=str)
def test_sequence_classification_is_that_of_transformers(changes):
    torch = pytest.importorskip("torch")
    config = config_of(**changes)
    model = build(ModernBertForSequenceClassification, config)
    ids, mask, _ = padded_batch(config.vocab_size)
    ids, mask = ids[:2], mask[:2]
    with torch.no_grad():
        out = oracle(model)(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
        full = oracle(model)(input_ids=torch.tensor(ids))
    found = run_jitted(model, ids, mask)
    assert found.shape == (2, config.num_labels)
    np.testing.assert_allclose(found, out.logits, atol=1e-4)
    np.testing.assert_allclose(run_jitted(model, ids), full.logits, atol=1e-4)


@pytest.mark.parametrize("length", [63, 64, 65, 128, 129, 300])
def test_lengths_around_the_window(length):
    torch = pytest.importorskip("torch")
    config = config_of(local_attention=128, global_attn_every_n_layers=2)
    ids, mask, _ = padded_batch(config.vocab_size, (length, length - 9, length - 3), seed=length)
    model = build(ModernBertForMaskedLM, config)
    with torch.no_grad():
        out = oracle(model)(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    real = mask == 1
    found = np.asarray(run_jitted(model, ids, mask))
    np.testing.assert_allclose(found[real], out.logits.numpy()[real], atol=1e-4)


def run_jitted(model, *inputs):
    graphdef, params = nnx.split(model)
    return quick_jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))(params, *inputs)


def test_a_row_of_8192():
    torch = pytest.importorskip("torch")
    config = config_of(hidden_size=8, num_attention_heads=1, local_attention=128)
    ids = np.random.default_rng(0).integers(1, config.vocab_size, (1, 8192))
    model = build(ModernBertForMaskedLM, config)
    with torch.no_grad():
        out = oracle(model)(input_ids=torch.tensor(ids))
    np.testing.assert_allclose(run_jitted(model, ids), out.logits, atol=1e-4)


def test_hidden_states_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    model = build(ModernBertForMaskedLM, config_of(norm_bias=True))
    ids, mask, _ = padded_batch(61)
    with torch.no_grad():
        out = oracle(model).model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            output_hidden_states=True,
        )
    hidden, states = model.encode(ids, mask, output_hidden_states=True)
    assert len(states) == model.config.num_hidden_layers + 1
    real = mask == 1
    for found, expected in zip(states, out.hidden_states, strict=True):
        np.testing.assert_allclose(np.asarray(found)[real], expected.numpy()[real], atol=1e-4)
    np.testing.assert_array_equal(states[-1], hidden)


@pytest.mark.parametrize("implementation", ["dense", "banded"])
def test_packed_is_alone_as_transformers_computes_it(small_blocks, implementation):
    torch = pytest.importorskip("torch")
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
        with torch.no_grad():
            alone = theirs(input_ids=torch.tensor(part[None])).logits.numpy()
        np.testing.assert_allclose(packed[0, start : start + len(part)], alone[0], atol=1e-4)


def test_alone_batched_and_padded_are_the_same():
    model = build(ModernBertForMaskedLM, config_of())
    ids, mask, _ = padded_batch(61)
    batched = run_jitted(model, ids, mask)
    for width in (23, 24, 64, 300):
        row, segment_ids = np.zeros((2, 1, width), np.int32)
        row[0, :23], segment_ids[0, :23] = ids[1, :23], 1
        alone = run_jitted(model, row, segment_ids)
        np.testing.assert_allclose(alone[0, :23], batched[1, :23], atol=2e-5)
    # Rotary attention depends on differences of positions alone.
    shifted = run_jitted(model, ids, mask, np.arange(40)[None] + np.full((3, 1), 1000))
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
}
UNCHANGED = {
    "max_position_embeddings": 16,
    **dict.fromkeys(("initializer_range", "initializer_cutoff_factor"), 0.5),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 9),
    **dict.fromkeys(("cls_token_id", "sep_token_id"), 9),
    **dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), 0.5),
    "classifier_dropout": 0.5,
    "tie_word_embeddings": False,
    "label2id": {"a": 0, "b": 1},
    "problem_type": "regression",
    "architectures": ("Other",),
    "extra": {"other": 1},
}


def test_every_field_of_the_configuration_acts_or_is_known_not_to():
    assert CHANGED.keys() | UNCHANGED.keys() == {f.name for f in dataclasses.fields(ModelConfig)}
    ids, mask, _ = padded_batch(61)

    def outputs(config):
        kinds = (ModernBertForMaskedLM, ModernBertForSequenceClassification)
        return [np.asarray(build(kind, config)(ids, mask)) for kind in kinds]

    plain = outputs(config_of())
    for fields, acts in ((CHANGED, True), (UNCHANGED, False)):
        for name, value in fields.items():
            found = outputs(config_of(**{name: value}))
            same = [
                a.shape == b.shape and np.array_equal(a, b)
                for a, b in zip(plain, found, strict=True)
            ]
            assert all(same) == (not acts), name


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    activations = pytest.importorskip("transformers.activations")
    import torch

    x = np.concatenate([np.linspace(-8, 8, 201), [0.0, -30.0, 30.0]]).astype(np.float32)
    expected = activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(layers.ACTIVATIONS[name](jnp.asarray(x)), expected, atol=3e-6)
    assert layers.ACTIVATIONS.keys() == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ({}, 149_655_232),
        (
            {
                "hidden_size": 1024,
                "intermediate_size": 2624,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
            },
            395_881_664,
        ),
    ],
)
@pytest.mark.parametrize("kind", [ModernBertForMaskedLM, ModernBertForSequenceClassification])
def test_real_sizes_have_the_parameters_of_transformers(shape, count, kind):
    """Names and sizes, without the memory of either."""
    transformers = pytest.importorskip("transformers")
    import torch

    config = ModelConfig(**shape)
    abstract = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    ours = {name: leaf.size for name, leaf in named(nnx.state(abstract)).items()}
    with torch.device("meta"):
        theirs = getattr(transformers, kind.__name__)(
            transformers.ModernBertConfig(**config.to_hf())
        )
    assert ours == {name: p.numel() for name, p in theirs.named_parameters()}
    if kind is ModernBertForMaskedLM:
        assert sum(ours.values()) == count


def test_parameters_have_the_agreed_paths_and_shapes():
    config = config_of(**dict.fromkeys(BIASES, True))
    found = {n: a.shape for n, a in named(nnx.state(build(ModernBertForMaskedLM, config))).items()}
    agreed = {
        "model.embeddings.tok_embeddings.weight": (61, 16),
        "model.embeddings.norm.weight": (16,),
        "model.layers.1.attn_norm.weight": (16,),
        "model.layers.0.attn.Wqkv.weight": (16, 3, 2, 8),
        "model.layers.0.attn.Wqkv.bias": (3, 2, 8),
        "model.layers.0.attn.Wo.weight": (2, 8, 16),
        "model.layers.0.attn.Wo.bias": (16,),
        "model.layers.0.mlp_norm.weight": (16,),
        "model.layers.0.mlp.Wi.weight": (16, 2, 24),
        "model.layers.0.mlp.Wi.bias": (2, 24),
        "model.layers.0.mlp.Wo.weight": (24, 16),
        "model.final_norm.weight": (16,),
        "head.dense.weight": (16, 16),
        "head.norm.weight": (16,),
        "decoder.bias": (61,),
    }
    assert agreed.items() <= found.items()
    assert "model.layers.0.attn_norm.weight" not in found
    sequence = build(ModernBertForSequenceClassification, config_of(num_labels=3))
    last = {n: a.shape for n, a in named(nnx.state(sequence)).items() if "classifier" in n}
    assert last == {"classifier.weight": (16, 3), "classifier.bias": (3,)}


def test_initialisation_is_cut_and_its_variance_not_corrected():
    config = ModelConfig(
        **{**TINY, "vocab_size": 3000, "hidden_size": 192, "intermediate_size": 256},
        **dict.fromkeys(BIASES, True),
        num_labels=50,
        initializer_range=0.05,
        initializer_cutoff_factor=1.5,
    )
    out = 0.05 / np.sqrt(2 * 2)
    stds = {"tok_embeddings": 0.05, "Wqkv": 0.05, "Wi": 0.05, "Wo": out, "dense": out}
    stds["classifier"] = 192**-0.5
    # Of a normal cut at 1.5 of its standard deviations: sqrt(1 - 3 pdf(1.5) / (2 cdf(1.5) - 1)).
    shrunk = 0.7426
    seen = set()
    for kind in (ModernBertForMaskedLM, ModernBertForSequenceClassification):
        for name, leaf in named(nnx.state(kind(config, rngs=nnx.Rngs(3)))).items():
            part = name.split(".")[-2]
            if name.endswith("bias"):
                assert not leaf.any(), name
            elif part.endswith("norm"):
                assert (leaf == 1).all(), name
            else:
                seen.add(part)
                assert float(leaf.std()) == pytest.approx(shrunk * stds[part], rel=0.02), name
                assert float(jnp.abs(leaf).max()) <= 1.5 * stds[part] * (1 + 1e-6), name
                assert float(jnp.abs(leaf).max()) > 1.4 * stds[part], name
    assert seen == stds.keys()
    first, second = (
        named(nnx.state(ModernBertForMaskedLM(config, rngs=nnx.Rngs(seed)))) for seed in (0, 1)
    )
    weights = [name for name in first if name.endswith("weight") and "norm" not in name]
    assert all((first[name] != second[name]).any() for name in weights)
    assert len({float(first[name].sum()) for name in weights}) == len(weights)


def test_bfloat16_stays_close_and_answers_in_float32():
    config = config_of(norm_bias=True)
    ids, mask, targets = padded_batch(61)
    results = {
        dtype: loss_and_gradients(
            build(ModernBertForMaskedLM, config, 0.1, dtype=dtype), ids, mask, targets
        )
        for dtype in ("float32", "bfloat16")
    }
    assert results["bfloat16"][1].dtype == np.float32
    assert results["bfloat16"][0] == pytest.approx(results["float32"][0], rel=0.02)
    for name, exact in results["float32"][2].items():
        low = results["bfloat16"][2][name]
        assert low.dtype == jnp.float32
        cosine = np.vdot(low, exact) / (np.linalg.norm(low) * np.linalg.norm(exact))
        assert cosine > 0.99, name


@pytest.mark.parametrize("how", ["dots", "layer"])
def test_remat_changes_memory_alone(how):
    ids, mask, targets = padded_batch(61)
    results = [
        loss_and_gradients(
            build(ModernBertForMaskedLM, config_of(), remat=remat), ids, mask, targets
        )
        for remat in ("none", how)
    ]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, expected in results[0][2].items():
        np.testing.assert_allclose(results[1][2][name], expected, atol=1e-5, err_msg=name)


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
    left = model(ids, mask)[2]
    right = model(ids[2:, -31:])[0]
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
    with jax.set_mesh(partition.make_mesh({"data": 2, "tensor": 2})):
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
def test_wrong_inputs_are_refused(ids, others, says):
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


@pytest.mark.parametrize(
    ("options", "says"),
    [({"attention": "flash"}, "attention"), ({"dtype": jnp.float16}, "dtype")],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        ModernBertForMaskedLM(config_of(), rngs=nnx.Rngs(0), **options)
