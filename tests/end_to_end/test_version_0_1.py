"""This version reads what version 0.1 wrote: a run, its rows, a classifier and a suite."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import mlmjax
from mlmjax.cli.main import run
from mlmjax.config.suite import load_suite
from mlmjax.data.rows import open_rows
from mlmjax.evaluation.suite import suite
from mlmjax.weights.model_checkpoint import saved_tensors

WRITTEN = Path(__file__).parents[1] / "data" / "version_0_1"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Copy what version 0.1 wrote, and work in it, because its paths are relative."""
    folder = tmp_path / "written"
    shutil.copytree(WRITTEN, folder)
    monkeypatch.chdir(folder)
    return folder


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_rows_are_the_rows_asked_for(written, capfd):
    before = content(written / "rows")
    assert run(["prepare", "run.toml"]) == 0
    after = content(written / "rows")
    assert {path: after[path] for path in before} == before
    (rows,) = open_rows(written / "rows", "train")
    examples = [example for row in rows for example in row]
    assert (len(rows), len(examples), sum(len(one.ids) for one in examples)) == (16, 46, 910)


def test_a_finished_run_is_complete_and_exports_the_same_again(written, capfd):
    weights = (written / "run" / "export" / "model.safetensors").read_bytes()
    metrics = (written / "run" / "metrics.jsonl").read_bytes()
    assert run(["train", "run.toml"]) == 0
    shutil.rmtree(written / "run" / "export")
    assert run(["train", "run.toml"]) == 0
    assert (written / "run" / "export" / "model.safetensors").read_bytes() == weights
    assert (written / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_checkpoint_holds_the_exported_weights(written):
    tensors = saved_tensors(written / "run" / "checkpoints" / "4")
    expected = load_file(written / "run" / "export" / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)


def test_a_classifier_answers_as_it_did(written):
    answers = json.loads((written / "classifier_answers.json").read_text())
    classifier = mlmjax.Classifier.from_pretrained(written / "classifier")
    np.testing.assert_allclose(
        classifier.predict_proba(answers["texts"]), answers["probabilities"], rtol=1e-5, atol=1e-6
    )
    assert classifier.predict_set(answers["texts"], coverage=0.8).tolist() == answers["sets"]


def test_results_of_a_suite_are_found_and_kept(written, monkeypatch):
    monkeypatch.setattr(suite, "__version__", "0.1.0")  # results are named by it, too
    before = content(written / "suite" / "cells")
    lines = []

    @contextmanager
    def counting(what):
        yield lambda done, total: None

    suite.run_suite(
        *load_suite(written / "suite.toml", ()),
        ["model"],
        data=written / "data",
        out=written / "suite",
        tell=lines.append,
        counting=counting,
    )
    assert content(written / "suite" / "cells") == before
    assert not [line for line in lines if line.startswith("[") and "already computed" not in line]
