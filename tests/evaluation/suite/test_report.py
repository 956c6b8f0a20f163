"""The page and picture of a suite: everything is shown, and text has no power in them."""

import json
import re
from dataclasses import replace

from pictures import has_named_axes, read_picture
from suite_files import SWEEP
from task_files import task

from mlmjax.config.suite import Entry, Part, Planned
from mlmjax.data.contamination import Contamination
from mlmjax.evaluation.questions import Question
from mlmjax.evaluation.suite.entrants import Setting
from mlmjax.evaluation.suite.report import scores_picture, summarize, write_report
from mlmjax.evaluation.suite.results import Prediction, Result
from mlmjax.evaluation.suite.rows import Rows
from mlmjax.statistics.metrics import classification_metrics, macro_f1, mean_interval

HOSTILE = "<b>|`$x_1$`\n# y"
TASK = task(name=HOSTILE, metric="macro_f1")
QUESTIONS = [
    Question(i, "", {"text": "a", "options": ["bad", "good"]}, i % 2, "") for i in range(8)
]
ABOUT = {"suite": HOSTILE, "description": HOSTILE, "limit": 1000, "seeds": 2, "order_rows": 200}


def result(wrong, **changes):
    """Make a result whose answers to some questions are wrong."""
    gold = [TASK.label_names[question.gold] for question in QUESTIONS]
    answers = ["good" if i in wrong else label for i, label in enumerate(gold)]
    return Result(
        metrics={**classification_metrics(gold, answers), "calibration": {"ece": 0.25}},
        order={"changed": 0.5},
        predictions=[
            Prediction(index=i, gold=one, prediction=other, probabilities={})
            for i, (one, other) in enumerate(zip(gold, answers, strict=True))
        ],
        **changes,
    )


def lines():
    """Give fine-tuned lines of two models on two tasks, and a zero-shot line."""
    entry = Entry(task="t", kind="fine-tune", tables=(2, 3), train=Part(files=("t",)))
    rows = Rows(TASK, None, QUESTIONS, QUESTIONS, QUESTIONS, held_out=True, left_out=1234)
    results = [result({0}, shortened=3), result({0, 2}), Result(diverged="loss")]
    first = summarize(
        Planned(entry, TASK),
        rows,
        results,
        model=HOSTILE,
        method="MLM head",
        published=12.5,
        known=Contamination("found", [HOSTILE], []),
        chosen=Setting(1, 3e-5),
        tried={Setting(1, 3e-5): 0.75, Setting(2, 3e-5): None},
    )
    second = replace(first, model="other", score=0.25, chosen=None, trained_on=[])
    lost = replace(first, score=None, ci95=None, spread=None)
    zero = replace(first, kind="zero-shot", method="zero-shot", metric="mcc", ci95=(-0.5, 0.5))
    more = [replace(one, task=name) for name in ("u", "v") for one in (first, second)]
    return [zero, first, second, *more, replace(lost, task="w"), replace(second, task="w")]


def test_seeds_are_summed_up():
    line = lines()[1]
    first, second = result({0}), result({0, 2})
    scores = [one.metrics["macro_f1"] for one in (first, second)]
    assert line.scores == scores
    assert line.score == sum(scores) / 2
    gold = [one.gold for one in first.predictions]
    answers = [[one.prediction for one in found.predictions] for found in (first, second)]
    assert line.ci95 == mean_interval(gold, answers, macro_f1)
    assert (line.diverged, line.shortened, line.ece, line.order_changed) == (1, 3, 0.25, 0.5)


def test_the_page_shows_everything_and_text_has_no_power_in_it(tmp_path):
    missing = [{"task": HOSTILE, "tables": (2,), "reason": HOSTILE}]
    about = {**ABOUT, "sweep": SWEEP.model_dump()}
    results = write_report(tmp_path, about, lines(), missing)
    assert json.loads((tmp_path / "suite.json").read_text()) == json.loads(json.dumps(results))
    shown = read_picture((tmp_path / "suite.svg").read_text())
    assert {"headline metric and its 95 % interval", "task", "majority label"} <= set(shown)
    assert has_named_axes(scores_picture(lines()))
    page = (tmp_path / "suite.md").read_text()
    assert "<b>" not in page
    assert "\n# y" not in page
    for table in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    headings = [line for line in page.splitlines() if line.startswith("##")]
    assert headings == [
        "## Zero-shot",
        "## Fine-tuned",
        "## Settings tried: epochs x learning rate, scores on validation rows",
        "## Notes",
        "## Not run",
    ]
    for shown in (
        "**Not all of the data**: at most 1,000 rows",
        "| diverged |",
        "| -50.00% to 50.00% |",
        "| 1 x 3e-05 | 8\\* |",
        "| 75.00% | diverged | 8 |",
        "Mean over 3 tasks:",
        "| MLM head | `other` | 25.00% |",
        "MLM head, `other`: 1 of the seeds diverged",
        "MLM head, `other`: the text of 3 rows was truncated to 32 tokens, the max_length of the",
        "the text of 3 rows was truncated to what the model reads",
        "the model was <code>",
        "`u`: 1,234 rows were left out",
        "| 12.50% |",
        "| 2, 3 |",
    ):
        assert shown in page, shown
    assert "None" not in page
