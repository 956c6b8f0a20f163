"""The short table of an evaluation."""

import json
import re

from mlmjax.cli.main import run
from mlmjax.evaluation.summary import summary_lines
from mlmjax.weights.pretrained import save_pretrained

RESULTS = {
    "task": "reviews\x1b", "protocol": "default", "metric": "mcc", "n": 1200, "shortened": 3,
    "max_length": 8192, "dropped": 0, "blank": 0, "accuracy": 0.8, "accuracy_ci95": [0.77, 0.82],
    "majority": 0.5,
    "macro_f1": 0.79, "macro_f1_ci95": [0.76, 0.81], "mcc": -0.1, "mcc_ci95": [-0.2, 0.05],
    "calibration": {"ece": 0.0432, "confidence": 0.85}, "contamination": "found",
    "trained_on": ["trained on the file of this evaluation, a.csv"],
}  # fmt: skip


def test_the_table_has_the_figures_that_a_reader_needs_first():
    assert list(summary_lines(RESULTS)) == [
        "reviews⟨U+001B⟩, protocol default: 1200 rows (3 truncated to the 8,192 tokens that the "
        "model reads)",
        "                     value  95 % interval",
        "accuracy            0.8000  0.7700 to 0.8200",
        "majority            0.5000  always the most common answer",
        "MCC                -0.1000  -0.2000 to 0.0500",
        "macro-F1            0.7900  0.7600 to 0.8100",
        "calibration error   0.0432  confidence is 5 points above accuracy",
        "contamination      found",
        "  trained on the file of this evaluation, a.csv",
    ]


def test_the_command_prints_the_table_or_json(model, tokenizer, reviews, capsys, no_report):
    folder = reviews.parent
    save_pretrained(model, tokenizer, folder / "model")
    command = ["evaluate", "--model", str(folder / "model"), "--task", str(reviews)]
    assert run([*command, "--out", str(folder / "out")]) == 0
    table, err = capsys.readouterr()
    few, report = err.splitlines()[-2:]
    assert few.startswith("warning: only ")
    assert few.endswith(" are tested, so the figures may be chance")
    assert report == f"report: {folder / 'out' / 'report.md'}"
    assert run([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    stored = json.loads((folder / "out" / "results.json").read_text())
    assert results | {"seconds": 0} == stored | {"seconds": 0}
    assert table.splitlines() == list(summary_lines(results))
    assert re.search(rf"accuracy +{results['accuracy']:.4f} ", table)
    assert "contamination      unknown" in table
    assert run(["evaluate", "--suite", "paper", "--out", str(folder / "s"), "--json"]) == 2
    assert "--json belongs to a task" in capsys.readouterr().err
