"""One small model for all tests of evaluations, so that programs are shared."""

import json

import pytest
from small_models import small_model
from task_files import REVIEWS, ROWS, read_lines, task, write_csv

from mlmjax.evaluation import report
from mlmjax.evaluation.evaluate import run_evaluation


@pytest.fixture(scope="session")
def model():
    return small_model(num_hidden_layers=1)


@pytest.fixture
def no_report(monkeypatch):
    """Leave out the page of an evaluation and its picture."""
    monkeypatch.setattr(report, "write_evaluation_report", lambda *arguments, **options: None)


@pytest.fixture
def reviews(tmp_path):
    """Write a task file and its table; give the task file."""
    (tmp_path / "reviews.toml").write_text(REVIEWS)
    write_csv(tmp_path / "reviews.csv", ROWS)
    return tmp_path / "reviews.toml"


@pytest.fixture
def answer(model, tokenizer, tmp_path):
    """Return a function that evaluates rows under a task; it gives results and predictions."""

    def answer(rows, by=model, **changes):
        data, out = tmp_path / "rows.jsonl", tmp_path / "out"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = run_evaluation(by, tokenizer, task(**changes), data=data, out=out)
        return results, read_lines(out / "predictions.jsonl")

    return answer
