"""Embeddings from counts of neighbours: what is alike is near, and nothing else is touched."""

import doctest
import json
import random
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from training import make_table, write_tokenizer

import mlmjax
from mlmjax.config.run import parse_config
from mlmjax.data.contamination import read_training_manifest
from mlmjax.model.modernbert import parameters
from mlmjax.training.run.initial_model import load_start
from mlmjax.training.run.train import prepare_rows

SCRIPT = Path(__file__).parents[3] / "tools" / "make_small_start.py"
SPEC = spec_from_file_location("make_small_start", SCRIPT)
TOOL = module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A network before and after, whose texts hold cat where they may as well hold dog."""
    folder = tmp_path_factory.mktemp("start")
    write_tokenizer(folder / "tokenizer")
    rng = random.Random(0)
    near = {"cat": ["fish", "bird"], "dog": ["fish", "bird"], "red": ["stone", "sun"]}
    near["blue"] = near["red"]
    with (folder / "texts.jsonl").open("w") as file:
        for _ in range(400):
            word = rng.choice(sorted(near))
            others = " ".join(rng.choices(near[word], k=4))
            file.write(json.dumps({"text": f" {word} {others}"}) + "\n")
    sources = [{"path": str(folder / "texts.jsonl"), "text": "text"}]
    changes = {"data__sources": sources, "objective": {"mlm_share": 1.0}}
    config = parse_config(make_table(folder, data__validation_rows=0, **changes))
    prepare_rows(config)
    described, tokenizer, _ = load_start(config)
    model = mlmjax.ModernBertForMaskedLM(described.config, rngs=nnx.Rngs(0))
    mlmjax.save_pretrained(model, tokenizer, folder / "untrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_tool(patch, "untrained", "rows", "start")
    return folder, tokenizer


def run_tool(patch, model, rows, out):
    words = ["--model", model, "--rows", str(rows), "--out", out]
    patch.setattr("sys.argv", [str(SCRIPT), *words])
    TOOL.main()


def test_the_examples_hold():
    assert doctest.testmod(TOOL).attempted
    assert not doctest.testmod(TOOL).failed


def test_only_embeddings_of_what_was_read_change_and_neighbours_bring_words_together(made):
    folder, tokenizer = made
    models = (mlmjax.load_pretrained(folder / name)[0] for name in ("untrained", "start"))
    before, after = map(parameters, models)
    (changed,) = [name for name in before if not np.array_equal(before[name], after[name])]
    assert "tok_embeddings" in changed
    old, new = np.asarray(before[changed]), np.asarray(after[changed])
    words = ("cat", "dog", "red", "blue", "fish", "bird", "stone", "sun")
    read = [tokenizer.encode_plain(f" {word}")[0] for word in words]
    assert set(np.flatnonzero((old != new).any(axis=1))) == set(read)
    usual = np.linalg.norm(old, axis=1).mean()
    np.testing.assert_allclose(np.linalg.norm(new[read], axis=1), usual, rtol=1e-5)
    cosine = new[read] @ new[read].T / usual**2
    assert min(cosine[0, 1], cosine[2, 3]) > 0.9
    assert np.abs(cosine[:2, 2:4]).max() < 0.2
    (run,) = read_training_manifest(folder / "start").runs
    assert run.init_from is None
    assert [file.name for file in run.sources[0].files] == ["texts.jsonl"]


def test_neighbours_do_not_cross_examples_and_blocks_make_no_difference():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 40)
    tokens = rng.integers(0, 12, lengths.sum())
    expected = np.zeros((12, 12))
    for example in np.split(tokens, np.cumsum(lengths)[:-1]):
        for i, one in enumerate(example):
            for j, other in enumerate(example):
                expected[one, other] += 0 < abs(i - j) <= 3
    cut = np.cumsum(lengths)[19]
    halves = [(tokens[:cut], lengths[:20]), (tokens[cut:], lengths[20:])]
    for blocks in ([(tokens, lengths)], halves):
        found = TOOL.count_neighbours(blocks, 12, window=3)
        np.testing.assert_array_equal(found.toarray(), expected)


def test_rows_of_another_tokenizer_are_rejected(made, monkeypatch):
    folder, _ = made
    with pytest.raises(SystemExit, match="with another tokenizer than mlmjax-small's"):
        run_tool(monkeypatch, "mlmjax-small", folder / "rows", "never")
