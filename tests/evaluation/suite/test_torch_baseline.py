"""The torch baseline: it learns, its results are read by a suite, and what is rejected."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from suite_files import REVIEWS, questions, right, run_small, write_model, write_suite

from mlmjax.cli.main import run
from mlmjax.config.suite import Sweep
from mlmjax.errors import InputError
from mlmjax.evaluation.questions import Question
from mlmjax.evaluation.suite.entrants import DivergedError, Setting

tiny = pytest.importorskip("tiny_models")
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "torch_baseline.py"
SPEC = spec_from_file_location("torch_baseline", SCRIPT)
torch_baseline = module_from_spec(SPEC)
SPEC.loader.exec_module(torch_baseline)
FEW = ('heads=["mlm"]', "sweep.learning_rate=[3e-3]", "sweep.epochs=[10]")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A tiny model of transformers."""
    folder = tmp_path_factory.mktemp("tiny")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("pad", "cls", "sep")}
    tiny.write_model(folder, "ModernBertForSequenceClassification", vocab_size=50368, **ids)
    tokenizer.save(folder)
    return folder


def test_it_learns_by_its_seed(model):
    train, asked, sweep = questions(48, 1), questions(20, 2), Sweep(batch_size=8, max_length=40)
    asked.append(Question(9, "long", {**asked[0].row, "text": "fine " * 90}, 1, ""))

    def answer(seed, epochs=1, rate=5e-3):
        return torch_baseline.answer_by_transformers(
            model, REVIEWS, train, asked, Setting(epochs, rate), sweep, seed=seed
        )

    answers, once = answer(1, epochs=6), answer(1)
    assert right(answers.log_probs, asked) > 0.9
    np.testing.assert_allclose(np.exp(answers.log_probs).sum(axis=1), 1.0, atol=1e-5)
    assert answers.shortened == 1
    assert np.array_equal(answer(1).log_probs, once.log_probs)
    assert not np.array_equal(answer(2).log_probs, once.log_probs)
    with pytest.raises(DivergedError):
        answer(1, rate=1e30)


@pytest.mark.long
def test_a_suite_reads_its_results(model, tmp_path):
    write_suite(tmp_path)
    write_model(tmp_path / "model")
    files = ["--suite", tmp_path / "small.toml", "--data", tmp_path / "data"]
    arguments = [model, *files, "--out", tmp_path / "torch", *FEW]
    assert run([str(one) for one in arguments], torch_baseline.main, "torch_baseline.py") == 0
    baselines = [str(tmp_path / "torch")]
    results, printed = run_small(tmp_path, tmp_path / "out", *FEW, baselines=baselines)
    (line,) = [line for line in results["lines"] if line["method"] == "transformers"]
    assert (line["n"], line["model"], len(line["scores"])) == (12, f"transformers:{model}", 1)
    assert line["score"] > 0.8
    assert line["ece"] is not None
    assert f"`transformers:{model}`" in (tmp_path / "out" / "suite.md").read_text()
    assert len(printed.computed) == len(printed.cells) - 1 == 3  # zero-shot, TF-IDF, the MLM head
    with pytest.raises(InputError, match="has no result for reviews with these rows and settings"):
        run_small(tmp_path, tmp_path / "other", *FEW, "seeds=2", baselines=baselines)
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_a_baseline_is_rejected(tmp_path, tokenizer):
    write_suite(tmp_path)
    for name, said in (
        ("transformers:bert", "torch_baseline.py bert --suite SUITE --out FOLDER"),
        ("bert", "is not a folder with results of baselines"),
        (str(tmp_path), "is not a folder with results of baselines"),
    ):
        with pytest.raises(InputError, match=said):
            run_small(tmp_path, tmp_path / "out", models=(), baselines=[name])
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        torch_baseline.make_baseline(str(tmp_path / "pickled"))
