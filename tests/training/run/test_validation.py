"""The report on held-out answers, as lines."""

from mlmjax.training.run.validation import report_lines

TASK = {
    "n": 123456,
    "accuracy": 0.5,
    "majority": 0.25,
    "majority_answer": " a long answer of words",
}
REPORT = {
    **TASK,
    "accuracy_ci95": [0.25, 0.75],
    "per_task_majority": 0.5,
    "per_task": {"a/folder/of/others/with/rows.jsonl": TASK, "short": TASK},
    "per_source": {"a/folder/of/others/with/rows.jsonl": {"loss_atp": 1.0, "loss_mlm": None}},
}


def test_lines_fit_80_columns_and_names_lose_their_middle():
    lines = report_lines(REPORT)
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == (
        ["task", "n", "accuracy", "95", "%", "interval", "majority", "most", "common"]
    )
    assert lines[1].startswith("a/folder…ws.jsonl  123456     0.500")
    assert lines[1].endswith("   0.250  ' a long…f words'")
    assert lines[3].startswith("all                123456     0.500  0.250 to 0.750     0.250")
    assert lines[4].split() == ["majority,", "by", "task", "0.500"]
    assert lines[-1].split() == ["a/folder…ws.jsonl", "1.000"]


def test_a_card_has_whole_names():
    lines = report_lines(REPORT, most=None)
    assert lines[1].startswith("a/folder/of/others/with/rows.jsonl  123456")
    assert lines[1].endswith("' a long answer of words'")
