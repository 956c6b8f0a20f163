"""Hidden states equal those of transformers, in memory and in a file."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from labelled_texts import word_tokenizer
from tiny_models import torch, torch_model, transformers

from mlmjax import embed, hidden_states, load_pretrained, save_hidden_states
from mlmjax.errors import InputError
from mlmjax.scoring import likelihood
from mlmjax.scoring.vectors import hidden_states as states

TEXTS = ["the goal", "a new bank price - rain", "old " * 33, "text"]
MASKED = ["the [MASK] goal", "[MASK]", "rain old [MASK] ."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hidden") / "model"
    torch_model(vocab_size=128, max_position_embeddings=48).save_pretrained(folder)
    word_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return load_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()

    def states(ids):
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        return np.stack([layer[0].numpy() for layer in found], axis=1)

    return states


def check(found, expected):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_states_of_tokens_means_and_slots_are_those_of_transformers(ours, theirs):
    texts = TEXTS
    ids = [ours[1].wrap(ours[1].encode_plain(text)) for text in texts]
    expected = [theirs(own) for own in ids]
    found = hidden_states(*ours, texts, layers=[0, 1, -1], at="tokens")
    assert found.tokens.tolist() == [token for own in ids for token in own]
    assert found.texts.tolist() == [i for i, own in enumerate(ids) for _ in own]
    check(found.vectors, np.concatenate(expected))
    found = hidden_states(*ours, texts, layers=[2, 0])
    assert found.texts.tolist() == list(range(len(texts)))
    assert set(found.tokens.tolist()) == {-1}
    check(found.vectors, [own.mean(axis=0)[[2, 0]] for own in expected])
    check(hidden_states(*ours, texts).vectors[:, 0], embed(*ours, texts))
    slots = []
    for text in MASKED:
        parts = text.split("[MASK]")
        own = ours[1].wrap(ours[1].encode_parts_batch([[parts[0], ours[1].mask_id, parts[1]]])[0])
        slots.append(theirs(own)[own.index(ours[1].mask_id)])
    found = hidden_states(*ours, MASKED, layers=range(3), at="slot")
    assert set(found.tokens.tolist()) == {ours[1].mask_id}
    check(found.vectors, slots)


@pytest.mark.parametrize("at", ["mean", "tokens"])
def test_a_file_has_what_is_returned_in_memory(ours, tmp_path, monkeypatch, at):
    texts = TEXTS
    whole = hidden_states(*ours, texts, layers=[1, 2], at=at)
    monkeypatch.setattr(likelihood, "CHUNK_CHARACTERS", 12)
    monkeypatch.setattr(states, "CHUNK_NUMBERS", 40)
    counted = []
    options = {"layers": [1, -1], "at": at, "progress": counted.append}
    rows = save_hidden_states(tmp_path / "s.parquet", *ours, iter(texts), **options)
    assert len(counted) > 1
    assert sum(counted) == len(texts)
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column_names == ["text", "token", "layer_1", "layer_2"]
    assert rows == table.num_rows == len(whole.texts)
    assert table["text"].to_pylist() == whole.texts.tolist()
    assert table["token"].to_pylist() == whole.tokens.tolist()
    for place, name in enumerate(("layer_1", "layer_2")):
        check(np.array(table[name].to_pylist(), np.float32), whole.vectors[:, place])


def test_bad_input_leaves_no_file(ours, tmp_path):
    out = tmp_path / "s.parquet"
    for options, message in (
        ({"layers": [3]}, "layers has 3; expected 0 to 2, or -1"),
        ({"layers": [True]}, "layers has True"),
        ({"layers": [0, 0]}, "expected at least one, each once"),
        ({"layers": [-1, 2]}, "expected at least one, each once"),
        ({"at": "cls"}, "at is 'cls'; expected one of 'slot', 'mean', 'tokens'"),
        ({"at": "slot"}, r"row 1 \(index 0\): has no \[MASK\]"),
        ({"layer": [1]}, "layer"),
    ):
        with pytest.raises(InputError, match=message):
            save_hidden_states(out, *ours, TEXTS[:1], **options)
    with pytest.raises(InputError, match=r"row 2 \(index 1\): has 2 masks; expected one"):
        hidden_states(*ours, [*MASKED[:1], "[MASK] [MASK]"], at="slot")
    with pytest.raises(InputError, match=r"s\.csv: hidden states are written as \.parquet"):
        save_hidden_states(tmp_path / "s.csv", *ours, TEXTS[:1])
    with pytest.raises(InputError, match="the list is empty"):
        hidden_states(*ours, [])
    assert list(tmp_path.iterdir()) == []
