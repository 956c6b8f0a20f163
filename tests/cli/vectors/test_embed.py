"""`mlmjax embed`: lines or tables in, an array or a table of vectors out."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from labelled_texts import word_model, word_tokenizer

import mlmjax
from mlmjax.cli.main import run

TEXTS = ["rain", "the new bank", "goal team " * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = word_tokenizer(path / "words")
    model = word_model(tokenizer, max_position_embeddings=64)
    embedder = mlmjax.Embedder(model, tokenizer, pooling="max", prompts={"query": "the "})
    embedder.save_pretrained(path / "out")
    return path / "out"


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    return str(tmp_path / "texts.txt")


def test_lines_become_an_array(folder, lines, tmp_path, capsys):
    out = tmp_path / "v.npy"
    given = ["embed", "--model", str(folder), "--out", str(out), lines]
    assert run(given) == 0
    embedder = mlmjax.Embedder.from_pretrained(folder)
    np.testing.assert_array_equal(np.load(out), embedder.embed(TEXTS))
    assert "3 vectors of 32 numbers (pooling max)" in capsys.readouterr().err
    changes = ["--pooling", "cls", "--normalize", "--prompt", "query"]
    assert run([*given, *changes, "--max-length", "8", "--truncate"]) == 0
    changed = mlmjax.Embedder.from_pretrained(
        folder, pooling="cls", normalize=True, max_length=8, truncate=True
    )
    np.testing.assert_array_equal(np.load(out), changed.embed(TEXTS, prompt="query"))
    found = capsys.readouterr().err
    assert "pooling cls, of length 1" in found
    warning = "1 of the texts did not fit and were truncated: a text has at most 8 tokens, the "
    assert f"{warning}max_length of the embedder\n" in found


def test_a_table_becomes_a_table(folder, tmp_path):
    table, out = tmp_path / "t.csv", tmp_path / "v.parquet"
    table.write_text("key,body\nx,rain\n7,the new bank\n")
    given = ["embed", "--model", str(folder), "--text", "body", "--out", str(out), str(table)]
    expected = mlmjax.Embedder.from_pretrained(folder).embed(TEXTS[:2])
    for more, name, keys in (([], "line", [2, 3]), (["--id", "key"], "id", ["x", "7"])):
        assert run([*given, *more]) == 0
        found = pq.read_table(out)
        assert found.column_names == [name, "embedding"]
        assert found[name].to_pylist() == keys
        vectors = np.array(found["embedding"].to_pylist(), np.float32)
        np.testing.assert_array_equal(vectors, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--out", "v.csv"], "expected a file that ends in .npy, .parquet"),
        (["--out", "v.npy", "--id", "key"], "give --text COLUMN too"),
        (
            ["--out", "v.npy", "--max-length", "9"],
            "at most 9 tokens, the max_length of the embedder, fit",
        ),
        (["--out", "v.npy", "--prompt", "quer"], "did you mean 'query'"),
    ],
)
def test_bad_input_is_one_message(folder, lines, tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    assert run(["embed", "--model", str(folder), *given, lines]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("v.*"))


def test_ids_need_a_place(folder, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("key,body\nx,rain\n")
    given = ["--text", "body", "--id", "key", "--out", str(tmp_path / "v.npy")]
    assert run(["embed", "--model", str(folder), *given, str(tmp_path / "t.csv")]) == 2
    assert "has no place for ids" in capsys.readouterr().err
