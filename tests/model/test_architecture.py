"""Model configurations: both dialects as transformers reads them, and what is rejected."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import transformers

from mlmjax.errors import InputError
from mlmjax.model.architecture import GLOBAL, LOCAL, ModelConfig

# The keys and values of the published base model, in the dialect of its time.
LEGACY = json.loads(
    (Path(__file__).parents[1] / "data" / "modernbert_base_config.json").read_text()
)


THETAS = {"global_rope_theta": 9.0, "local_rope_theta": 8.0}
FLAT = {"global_attn_every_n_layers": 3, **THETAS}


def nested(full, sliding):
    return {GLOBAL: full, LOCAL: sliding}


def test_defaults_are_base():
    config = ModelConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (22, 768, 64)
    assert hash(config) == hash(ModelConfig())
    assert config == ModelConfig() != ModelConfig(norm_bias=True)
    assert_same(config, transformers.ModernBertConfig())
    assert set(config.to_hf()) - FLAT.keys() <= set(transformers.ModernBertConfig().to_dict())


def test_published_configuration_survives_a_round_trip():
    config = ModelConfig.from_hf(LEGACY)
    assert config.extra["layer_norm_eps"] == 1e-5
    assert config.extra["torch_dtype"] == "float32"
    written = config.to_hf()
    assert {key: written[key] for key in LEGACY} == LEGACY
    assert written["rope_parameters"] == nested(
        {"rope_type": "default", "rope_theta": 160_000.0},
        {"rope_type": "default", "rope_theta": 10_000.0},
    )
    assert written["layer_types"] == list(config.layer_types)
    assert ModelConfig.from_hf(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"global_rope_theta": 5e5},
        {"local_rope_theta": 77},
        {"global_attn_every_n_layers": 1},
        {"global_attn_every_n_layers": 2, "global_rope_theta": 1.5},
        {"global_attn_every_n_layers": 100},
        {"layer_types": [LOCAL] * 5},
        {"layer_types": [GLOBAL] * 5, "global_attn_every_n_layers": 3},
        {"layer_types": [LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL], "global_attn_every_n_layers": 2},
        {"layer_types": None, "global_attn_every_n_layers": 4},
        {"rope_parameters": nested({"rope_theta": 3.0}, {"rope_theta": 4})},
        {"rope_parameters": nested({"rope_theta": 3.0}, {"rope_theta": 4.0}), **THETAS},
        {"rope_parameters": nested({"rope_type": "default"}, {"rope_theta": 4.0})},
        {"rope_parameters": nested({"rope_type": "default"}, {}), **THETAS},
        {"rope_parameters": {GLOBAL: {"rope_theta": 3.0}}, "local_rope_theta": 8.0},
        {"rope_parameters": {}, "local_rope_theta": 8.0},
        {"rope_theta": 1234.0},
        {"sliding_window": 7},
        {"local_attention": 9},
        {"num_labels": 3},
        {"num_labels": 1, "problem_type": "regression"},
        {"id2label": {"0": "a", "1": "b", "2": "c"}},
        {"id2label": {"0": "a", "1": "b", "2": "c"}, "num_labels": 3, "label2id": {"a": 0}},
        {"id2label": {"1": "b", "0": "a"}},
        {"eos_token_id": [1, 2]},
        {"pad_token_id": None},
        {"torch_dtype": "bfloat16", "an_unknown_key": {"deep": [1, None]}},
    ],
)
def test_reads_as_transformers_reads(values):
    values = {"num_hidden_layers": 5, **values}
    theirs = transformers.ModernBertConfig(**json.loads(json.dumps(values)))
    for config in (ModelConfig.from_hf(values), ModelConfig.from_hf(theirs.to_dict())):
        assert_same(config, theirs)
        assert_same(config, transformers.ModernBertConfig(**config.to_hf()))
        assert ModelConfig.from_hf(config.to_hf()) == config
    if set(values) <= {field.name for field in dataclasses.fields(ModelConfig)}:
        assert ModelConfig(**values) == ModelConfig.from_hf(values)


def assert_same(config, theirs):
    assert list(config.layer_types) == theirs.layer_types
    for kind in (GLOBAL, LOCAL):
        assert config.rope_theta(kind) == theirs.rope_parameters[kind]["rope_theta"]
    assert config.window == theirs.sliding_window
    derived = {"layer_types", "rope_parameters", "architectures", *FLAT}
    derived |= {"label2id"}  # id2label decides what label2id is
    for field in dataclasses.fields(config):
        if field.compare and field.name not in derived:
            assert getattr(config, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize(
    ("kinds", "n"),
    [
        ([GLOBAL], 3),
        ([GLOBAL, LOCAL], 3),
        ([GLOBAL, GLOBAL], 1),
        ([GLOBAL, LOCAL, GLOBAL, LOCAL], 2),
        ([GLOBAL, LOCAL, LOCAL, LOCAL, GLOBAL], 4),
        ([LOCAL, LOCAL], None),
        ([LOCAL], None),
        ([GLOBAL, LOCAL, LOCAL, GLOBAL, GLOBAL], None),
    ],
)
def test_flat_dialect_is_written_only_where_it_can_express_the_model(kinds, n):
    config = ModelConfig(num_hidden_layers=len(kinds), layer_types=kinds)
    assert config.global_attn_every_n_layers == n
    written = config.to_hf()
    assert written.keys() & FLAT.keys() == (FLAT.keys() if n else set())
    if n:
        nested_keys = ("layer_types", "rope_parameters")
        found = {key: value for key, value in written.items() if key not in nested_keys}
        assert ModelConfig.from_hf(found) == config
    assert ModelConfig.from_hf(written) == config


WRONG = {
    "vocab_size": [10.0, "50368", None, True, 10**6000],
    "pad_token_id": ["x", [3]],
    "eos_token_id": [[1, True]],
    "num_hidden_layers": [0],
    "num_attention_heads": [-12],
    "intermediate_size": [2**20],
    "local_attention": [None],
    "norm_eps": [-1e-5, "1e-5"],
    "initializer_range": [float("inf")],
    "mlp_dropout": [False],
    "norm_bias": [1],
    "decoder_bias": ["yes"],
    "hidden_activation": [None],
    "classifier_pooling": ["max"],
    "global_attn_every_n_layers": [0, None, 2.0],
    "global_rope_theta": [0],
    "local_rope_theta": [None],
    "rope_parameters": [nested({}, [1]), {"rope_theta": 10_000.0}],
    "per_layer_config": [{"0": {"hidden_size": 8}}],
    "num_labels": [0, 10**9],
    "id2label": [
        {},
        {"0": "a", "1": ["b"]},
        {"0": "a", "00": "b"},
        {"0": "a", "2": "b"},
        ["a", "b"],
    ],
    "problem_type": [3],
    "architectures": ["ModernBertModel"],
    "model_type": [None],
}


@pytest.mark.parametrize(
    ("values", "key"),
    [
        *(({key: value}, key) for key, values in WRONG.items() for value in values),
        ({"vocab_size": 100}, "pad_token_id"),
        ({"num_hidden_layers": 1, "layer_types": [{}]}, "layer_types"),
        ({"sliding_window": "x"}, "local_attention"),
        ({"rope_parameters": nested({}, {"type": "linear", "factor": 2})}, "rope_type"),
        ({"rope_parameters": nested({}, {"rope_theta": None})}, "local_rope_theta"),
        ({"num_labels": 3, "id2label": {"0": "a", "1": "b"}}, "num_labels"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "problem_type"),
        *((values, "expected an object") for values in ([], None, "config", 3)),
    ],
)
def test_a_wrong_value_is_rejected_by_name(values, key):
    with pytest.raises(InputError) as caught:
        ModelConfig.from_hf(values)
    assert key in caught.value.message
    assert "found" in caught.value.message
    assert len(caught.value.message) < 400


def test_all_problems_are_listed_at_once():
    with pytest.raises(InputError) as caught:
        ModelConfig(vocab_size=-1, norm_eps=0.0, hidden_activation="x", layer_types=("y",))
    assert len(caught.value.details) == 4 + 1  # layer_types: entry and number
    for key in ("vocab_size", "norm_eps", "hidden_activation", "layer_types"):
        assert key in str(caught.value)


def test_harmless_keys_are_carried():
    values = {"rope_scaling": None, "head_dim": 64, "reference_compile": None, "dtype": "bfloat16"}
    config = ModelConfig.from_hf(values)
    assert config.extra == values
    assert {key: config.to_hf()[key] for key in values} == values
    inner = nested({"rope_theta": 5.0, "note": "kept"}, {"type": "default"})
    written = ModelConfig(rope_parameters=inner).to_hf()["rope_parameters"]
    assert written[GLOBAL] == {"rope_type": "default", "rope_theta": 5.0, "note": "kept"}
    assert written[LOCAL] == {"rope_type": "default", "rope_theta": 10_000.0, "type": "default"}


def test_strict_reading_suggests_the_nearest_key():
    assert ModelConfig.from_hf({"hidden_size": 384}, strict=True).hidden_size == 384
    with pytest.raises(InputError, match="did you mean 'hidden_size'"):
        ModelConfig.from_hf({"hiden_size": 128}, strict=True)
    assert ModelConfig.from_hf({"hiden_size": 128}).extra == {"hiden_size": 128}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KEYS = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "extra"]


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*KEYS, "rope_scaling", "sliding_window", "head_dim", "other"]),
        JSON,
        max_size=4,
    )
)
def test_any_json_is_a_configuration_or_rejected(values):
    try:
        config = ModelConfig.from_hf(values)
    except InputError:
        return
    json.dumps(config.to_hf(), allow_nan=True)
    assert len(config.layer_types) == config.num_hidden_layers


TWO = {"0": "a", "1": "b"}


@pytest.mark.parametrize(
    ("values", "labels", "warns"),
    [
        ({"id2label": TWO, "label2id": {"a": "0", "b": "1"}}, ["a", "b"], False),
        ({"id2label": TWO, "label2id": {"a": 0.0}}, ["a", "b"], False),
        ({"id2label": TWO, "label2id": {}}, ["a", "b"], False),
        ({"id2label": {"00": "a", "01": "b"}, "label2id": None}, ["a", "b"], False),
        ({"id2label": {"0": 1, "1": 2}, "label2id": {"1": "0", "2": "1"}}, ["1", "2"], False),
        ({"id2label": {"0": False, "1": True}, "label2id": {"false": 0}}, ["false", "true"], False),
        ({"id2label": {" 0": 1.0, "1": None}, "label2id": {}}, ["1", "LABEL_1"], False),
        ({"id2label": {"0": "a", "1": "a"}, "label2id": {"a": 1}}, ["a", "a"], False),
        ({"id2label": TWO, "label2id": {"a": 1, "b": 0}}, ["a", "b"], True),
        ({"id2label": TWO, "label2id": {"c": "x"}}, ["a", "b"], True),
        ({"id2label": TWO, "label2id": ["a"]}, ["a", "b"], True),
        ({"label2id": {"a": 0, "b": 1, "c": 2}}, ["LABEL_0", "LABEL_1"], True),
    ],
)
def test_id2label_decides_and_label2id_follows(values, labels, warns, caplog):
    theirs = transformers.ModernBertConfig(**json.loads(json.dumps(values)))
    assert theirs.num_labels == len(labels)
    if all(isinstance(name, str | int) for name in theirs.id2label.values()):
        assert [str(theirs.id2label[i]).lower() for i in range(theirs.num_labels)] == [
            label.lower() for label in labels
        ]
    config = ModelConfig.from_hf(values)
    assert [config.id2label[index] for index in range(config.num_labels)] == labels
    assert config.label2id == {label: index for index, label in enumerate(labels)}
    assert ("id2label decides" in caplog.text) == warns
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {}, "quantization_config": {}, "per_layer_config": {}},
        dict.fromkeys(("bos_token_id", "cls_token_id", "sep_token_id"), -1),
        {"cls_token_id": 2**40, "eos_token_id": [-1]},
        {"problem_type": ""},
        {"problem_type": "text-classification"},
    ],
    ids=str,
)
def test_what_changes_no_computation_is_read(values):
    config = ModelConfig.from_hf(values)
    assert ModelConfig.from_hf(config.to_hf()) == config
