"""Embeddings: pooled as by hand, whatever runs beside a text; the folders of others."""

import json

import jax
import numpy as np
import pytest
from labelled_texts import word_model, word_tokenizer
from noisy_models import run_jitted

import mlmjax
from mlmjax.errors import InputError
from mlmjax.model.modernbert import (
    ModernBertForSequenceClassification,
    ModernBertModel,
    encoder_of,
)
from mlmjax.parallel import sharding
from mlmjax.scoring.vectors.embedding import Embedder
from mlmjax.storage import EMBEDDING_POOLING, EMBEDDING_PROMPTS
from mlmjax.text.tokenizer import Tokenizer

POOLINGS = ("mean", "cls", "max")
TEXTS = ["rain", "the new bank", "", "stock price the a old " * 9, "[MASK] goal [SEP]", "team"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    word_tokenizer(folder)
    names = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "cls", "sep", "mask", "unk")}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))  # which transformers needs
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    return word_model(tokenizer, num_hidden_layers=2, max_position_embeddings=64)


@pytest.fixture(scope="module")
def by_hand(model, tokenizer):
    """The vectors of each text by every pooling, from the encoder without any engine."""
    ids = [tokenizer.wrap(tokenizer.encode_plain(text)) for text in TEXTS]
    rows = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, own in zip(rows, ids, strict=True):
        row[: len(own)] = own
    mask = np.arange(rows.shape[1]) < np.array([[len(own)] for own in ids])
    hidden = [
        row[: len(own)]
        for row, own in zip(run_jitted(encoder_of(model).model, rows, mask), ids, strict=True)
    ]
    return {
        "mean": [one.mean(0) for one in hidden],
        "cls": [one[0] for one in hidden],
        "max": [one.max(0) for one in hidden],
    }


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_vector_is_the_same_alone_batched_and_padded(model, tokenizer, by_hand, pooling):
    options = {"pooling": pooling}
    found = mlmjax.embed(model, tokenizer, TEXTS, **options)
    assert found.dtype == np.float32
    assert found.shape == (len(TEXTS), model.config.hidden_size)
    np.testing.assert_allclose(found, by_hand[pooling], **TOLERANCE)
    alone = [mlmjax.embed(model, tokenizer, [text], **options)[0] for text in TEXTS]
    np.testing.assert_allclose(found, alone, **TOLERANCE)
    again = mlmjax.embed(model, tokenizer, iter(TEXTS), **options)
    np.testing.assert_array_equal(found, again)
    unit = mlmjax.embed(model, tokenizer, TEXTS, normalize=True, **options)
    np.testing.assert_allclose(
        unit, found / np.linalg.norm(found, axis=1, keepdims=True), **TOLERANCE
    )


def test_all_devices_share_the_texts(model, tokenizer, monkeypatch):
    expected = mlmjax.embed(model, tokenizer, TEXTS)
    monkeypatch.setattr(sharding, "local_devices", jax.local_devices)
    embedder = Embedder(model, tokenizer)
    assert embedder.engine.mesh.size == len(jax.local_devices()) == 8
    np.testing.assert_allclose(embedder.embed(TEXTS), expected, **TOLERANCE)


def test_every_model_has_vectors_and_no_text_is_no_error(model, tokenizer):
    head = word_model(tokenizer, kind=ModernBertForSequenceClassification)
    alone = word_model(tokenizer, kind=ModernBertModel)
    vectors = [mlmjax.embed(one, tokenizer, TEXTS) for one in (head, alone)]
    np.testing.assert_array_equal(*vectors)
    assert mlmjax.embed(model, tokenizer, []).shape == (0, model.config.hidden_size)


def test_long_texts_are_an_error_or_truncated(model, tokenizer):
    embedder = Embedder(model, tokenizer, max_length=8)
    texts = ["rain", "goal " * 7, "team " * 6, "bank " * 9]
    with pytest.raises(
        InputError, match=r"row 2 \(index 1\): has 9 tokens .* most 8 tokens, the max_len"
    ) as found:
        embedder.embed(texts)
    assert len(found.value.details) == 1
    cut = Embedder(model, tokenizer, max_length=8, truncate=True)
    expected = embedder.embed(["rain", "goal " * 6, "team " * 6, "bank " * 6])
    np.testing.assert_allclose(cut.embed(texts), expected, **TOLERANCE)
    assert cut.truncated == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "sum"}, "pooling is 'sum'; expected one of 'mean', 'cls', 'max'"),
        ({"max_length": 2}, "max_length is 2; expected more than 2"),
        ({"max_length": "long"}, "max_length is 'long'; expected a number"),
        ({"max_length": 65}, "max_length is 65; expected 1 to 64"),
        ({"poling": "cls"}, "did you mean 'pooling'"),
    ],
)
def test_bad_options(model, tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        mlmjax.embed(model, tokenizer, ["rain"], **options)


def test_texts_that_are_none_are_named(model, tokenizer):
    with pytest.raises(InputError, match=r"row 2 \(index 1\): the text is int \(3\)"):
        mlmjax.embed(model, tokenizer, ["rain", 3])
    with pytest.raises(InputError, match="expected a list of texts"):
        mlmjax.embed(model, tokenizer, "rain")


def test_a_folder_keeps_pooling_length_and_prompts(model, tokenizer, tmp_path):
    embedder = Embedder(
        *(model, tokenizer),
        pooling="max",
        normalize=True,
        max_length=32,
        prompts={"query": "the new ", "text": ""},
        default_prompt="query",
    )
    embedder.save_pretrained(tmp_path / "out")
    embedder.save_pretrained(tmp_path / "out")  # which replaces the older export
    again = Embedder.from_pretrained(tmp_path / "out")
    assert again.settings == embedder.settings
    texts = ["rain", "goal team"]
    np.testing.assert_array_equal(again.embed(texts), embedder.embed(texts))
    expected = embedder.embed([f"the new {text}" for text in texts], prompt="text")
    np.testing.assert_array_equal(again.embed(texts), expected)
    with pytest.raises(InputError, match="no prompt of this name; did you mean 'query'"):
        again.embed(texts, prompt="querry")
    plain = Embedder.from_pretrained(tmp_path / "out", normalize=False)
    assert not np.allclose(np.linalg.norm(plain.embed(texts), axis=1), 1)
    assert isinstance(mlmjax.load_pretrained(tmp_path / "out")[0], ModernBertModel)


def rewrite(path, change):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(change(values) or values))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "modules.json",
            lambda modules: modules.append({"type": "models.Dense", "path": "2_Dense"}),
            "models.Dense; expected Transformer, Pooling and at most Normalize",
        ),
        ("modules.json", lambda modules: modules[1].update(path="../1"), "and 1_Pooling"),
        ("modules.json", lambda modules: modules[0].update(path="0"), "expected the model beside"),
        ("modules.json", lambda modules: {"type": 1}, "expected a list of modules"),
        (EMBEDDING_POOLING, lambda own: {"pooling_mode": "lasttoken"}, "pools by 'lasttoken'"),
        (EMBEDDING_POOLING, lambda own: {"pooling_mode": ["cls", "max"]}, "expected one of mean"),
        (EMBEDDING_POOLING, lambda own: {"pooling_mode": 7}, "pools by 7"),
        (EMBEDDING_POOLING, lambda own: {"pooling_mode": [{}]}, "pools by {}"),
        (EMBEDDING_POOLING, lambda own: own.update(include_prompt=False), "include_prompt"),
        (EMBEDDING_PROMPTS, lambda own: {"prompts": [1]}, "expected {name: text}"),
        (EMBEDDING_PROMPTS, lambda own: {"prompts": {"a": 1}}, "expected {name: text}"),
        (EMBEDDING_PROMPTS, lambda own: {"default_prompt_name": "b"}, "no prompt of this name"),
        ("sentence_bert_config.json", lambda own: own.update(do_lower_case=True), "do_lower_case"),
        ("sentence_bert_config.json", lambda own: {"max_seq_length": "x"}, "expected a number"),
    ],
)
def test_a_folder_that_cannot_be_computed_is_an_error(
    model, tokenizer, tmp_path, name, change, message
):
    Embedder(model, tokenizer).save_pretrained(tmp_path)
    rewrite(tmp_path / name, change)
    with pytest.raises(InputError, match=message):
        Embedder.from_pretrained(tmp_path)


def test_a_snapshot_of_the_hub_is_links_to_blobs(model, tokenizer, tmp_path):
    Embedder(model, tokenizer, pooling="cls").save_pretrained(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123"
    for file in [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]:
        link = snapshot / file.relative_to(tmp_path / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    assert Embedder.from_pretrained(snapshot).settings.pooling == "cls"
    (snapshot / EMBEDDING_POOLING).unlink()
    (snapshot / EMBEDDING_POOLING).symlink_to(tmp_path / "outside.json")
    with pytest.raises(InputError, match="outside its folder"):
        Embedder.from_pretrained(snapshot)


def test_both_ways_to_write_pooling_are_read(model, tokenizer, tmp_path):
    Embedder(model, tokenizer).save_pretrained(tmp_path)
    rewrite(tmp_path / EMBEDDING_POOLING, lambda own: {"pooling_mode": "cls"})
    assert Embedder.from_pretrained(tmp_path).settings.pooling == "cls"
    rewrite(tmp_path / EMBEDDING_POOLING, lambda own: {"pooling_mode_max_tokens": True})
    assert Embedder.from_pretrained(tmp_path).settings.pooling == "max"


@pytest.mark.long
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sentence_transformers_has_the_same_vectors(model, tokenizer, tmp_path, pooling):
    """Both read the folder of the other, and long texts are truncated at the same token."""
    library = pytest.importorskip("sentence_transformers")
    prompts = {"prompts": {"query": "the new ", "document": ""}, "default_prompt": "query"}
    own = Embedder(
        *(model, tokenizer),
        pooling=pooling,
        normalize=pooling != "max",
        max_length=24,
        truncate=True,
        **prompts,
    )
    own.save_pretrained(tmp_path / "ours")
    theirs = library.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    texts = [text for text in TEXTS if "[" not in text]  # theirs reads names of special tokens
    found = theirs.encode(texts)
    np.testing.assert_allclose(own.embed(texts), found, rtol=0, atol=1e-4)
    assert own.truncated == 1

    theirs.save(str(tmp_path / "theirs"))
    again = Embedder.from_pretrained(tmp_path / "theirs", truncate=True)
    assert again.settings == own.settings
    np.testing.assert_allclose(again.embed(texts), found, rtol=0, atol=1e-4)
