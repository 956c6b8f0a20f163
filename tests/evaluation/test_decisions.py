"""Tasks of several questions per row: figures by question and by type."""

import itertools
import json

import numpy as np
import pytest
from labelled_texts import examples, word_model, word_tokenizer
from pictures import read_picture

from mlmjax import Decider, InputError
from mlmjax.cli.main import run
from mlmjax.config.decisions import find_decision_task
from mlmjax.data.contamination import Contamination, add_unknown_run
from mlmjax.evaluation.decisions import decision_lines, evaluate_decisions
from mlmjax.statistics.levels import level_metrics
from mlmjax.storage import TRAINING

TASK = """
name = "reviews"
data = "reviews.jsonl"
state = { text = "body", new = "meta" }
[[questions]]
id = "topic"
type = "choice"
instructions = "text"
criteria = { sports = "", money = "stock" }
answer = "label"
[[questions]]
id = "sports"
type = "noul"
answer = "is_sports"
[[questions]]
id = "stars"
type = "score"
instructions = "price"
criteria = ["old", "new", "a"]
answer = "stars"
values = { "1" = 0, "2" = 1, "3" = 2 }
[[questions]]
id = "price"
type = "score"
instructions = "price"
criteria = ["old", "new"]
answer = "level"
"""


@pytest.fixture(scope="module")
def decider(tmp_path_factory):
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("words"))
    return Decider((word_model(tokenizer, scale=0.3), tokenizer))


@pytest.fixture
def task_file(tmp_path):
    texts, labels = examples(24, seed=1)
    rows = [
        {
            "body": text,
            "meta": n,
            "label": label,
            "is_sports": label == "sports",
            "stars": 1 + n % 3,
        }
        | ({} if n % 4 == 0 else {"level": ("new", 0)[n % 2]})
        for n, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "reviews.toml"
    path.write_text(TASK)
    return path


def test_figures_are_those_of_each_questions_answers(decider, task_file, tmp_path):
    task = find_decision_task(task_file)
    results = evaluate_decisions(decider, task, out=tmp_path / "out")
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == results["n"] == 24
    figures = results["questions"]
    right = [one["answers"]["topic"]["choice"] == one["gold"]["topic"] for one in found]
    assert figures["topic"]["accuracy"] == np.mean(right)
    nll = [-np.log(one["answers"]["topic"]["probabilities"][one["gold"]["topic"]]) for one in found]
    assert figures["topic"]["nll"] == pytest.approx(np.mean(nll))
    off = [abs(one["answers"]["stars"]["score"] - int(one["gold"]["stars"])) for one in found]
    assert figures["stars"]["mae"] == pytest.approx(np.mean(off))
    assert [figures[key]["n"] for key in figures] == [24, 24, 24, 18]
    assert set(results["types"]) == {"choice", "noul", "score"}
    assert results["types"]["score"]["n"] == 42
    weighted = (24 * figures["stars"]["rps"] + 18 * figures["price"]["rps"]) / 42
    assert results["types"]["score"]["rps"] == pytest.approx(weighted)
    shown = list(decision_lines(results))
    assert shown[0] == "reviews: 24 rows"
    names = [*figures, "all", "all", "all", "contamination"]
    assert [line.split()[0] for line in shown[2:]] == names


def test_the_order_of_options_and_the_page_are_those_of_ordinary_tasks(
    decider, task_file, tmp_path
):
    task = find_decision_task(task_file)
    known = Contamination("found", ["trained on the file <b>|"], [])
    results = evaluate_decisions(decider, task, out=tmp_path / "out", order_rows=9, known=known)
    for key, options in (("topic", 2), ("sports", 2), ("stars", 3), ("price", 2)):
        order = results["questions"][key]["order_sensitivity"]
        assert (order["rows"], order["shifts"]) == (9, options)
    assert results["contamination"] == "found"
    assert list(decision_lines(results))[-1] == "  trained on the file <b>|"
    page = (tmp_path / "out" / "report.md").read_text()
    lines = page.split("\n")
    assert "<b>" not in page.replace("`trained on the file <b>|`", "")
    for key, one in results["questions"].items():
        assert f"| `{key}` | {one['type']} | {one['n']} | {one['accuracy']:.4f} |" in page
        assert f"| `{key}` | 9 |" in page
    tables = [at for at, line in enumerate(lines) if line.startswith("| ---")]
    assert len(tables) == 3
    for at in tables:
        rows = itertools.takewhile(lambda line: line.startswith("|"), lines[at - 1 :])
        assert len({row.count(" | ") for row in rows}) == 1
    for kind in results["types"]:
        assert read_picture((tmp_path / "out" / f"reliability_{kind}.svg").read_text())
        assert f'src="reliability_{kind}.svg"' in page
    alone = evaluate_decisions(decider, task, order_rows=0, out=tmp_path / "out")
    assert alone["questions"]["topic"]["order_sensitivity"] is None
    assert "Not measured: " in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(InputError, match="order_rows is -1"):
        evaluate_decisions(decider, task, order_rows=-1)


def test_the_command_prints_a_table_or_all_figures(decider, task_file, tmp_path, capsys):
    decider.save_pretrained(tmp_path / "model")
    command = ["evaluate", "--model", str(tmp_path / "model"), "--task", str(task_file)]
    assert run([*command, "--limit", "5"]) == 0
    assert capsys.readouterr().out.startswith("reviews: 5 rows\n")
    (tmp_path / "model" / TRAINING).write_bytes(
        add_unknown_run(b'{"format": 1, "runs": []}', "tickets")
    )
    assert run([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["questions"]["topic"]["n"] == 24
    assert json.loads(out)["contamination"] == "unknown"
    assert "what tickets held is not known" in err
    for option in ("--protocol=published", "--anchor=x"):
        assert run([*command, option]) == 2
        assert "belongs to a task of one question" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('type = "noul"', 'type = "boolean"', "questions.1.type: found 'boolean'"),
        ('id = "stars"', 'id = "topic"', "two have the same id"),
        ('["old", "new", "a"]', '["old"]', "questions: 'stars': criteria: has 1 levels"),
        ('"3" = 2', '"4" = 2', "question 'stars': the answer is '3'; expected one of '1', '2'"),
        ('answer = "label"', 'answer = "body"', "question 'topic': the answer is"),
        ('data = "reviews.jsonl"', "", "has neither data nor hub"),
        ('text = "body"', 'text = "absent"', "'absent'"),
    ],
)
def test_wrong_tasks_are_rejected_in_words(decider, task_file, old, new, message):
    task_file.write_text(TASK.replace(old, new))
    with pytest.raises(InputError) as caught:
        evaluate_decisions(decider, find_decision_task(task_file))
    assert message in str(caught.value)


def test_the_shipped_task_has_ordered_levels(decider, tmp_path):
    task = find_decision_task("sst5_levels")
    lines = [json.dumps({"text": "a new goal", "label": n}) + "\n" for n in range(5)]
    (tmp_path / "sst5.jsonl").write_text("".join(lines))
    figures = evaluate_decisions(decider, task, data=tmp_path / "sst5.jsonl")["questions"]
    assert figures["sentiment"]["n"] == 5
    assert 0 <= figures["sentiment"]["rps"] <= 1
    assert find_decision_task("sst5") is None


def test_an_unknown_task_is_answered_with_all_names(capsys):
    assert run(["evaluate", "--task", "sst5_level"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean 'sst5_levels'? shipped are 20newsgroups, " in line
    assert "sst5, sst5_levels, trec" in line


def test_level_metrics_agree_with_their_definitions():
    rng = np.random.default_rng(0)
    probs, gold = rng.dirichlet(np.ones(5), 50), rng.integers(0, 5, 50)
    found = level_metrics(np.log(probs), gold)
    from sklearn.metrics import cohen_kappa_score

    kappa = cohen_kappa_score(gold, probs.argmax(1), weights="quadratic", labels=range(5))
    assert found["quadratic_kappa"] == pytest.approx(kappa)
    one_hot = np.eye(5)[gold]
    rps = ((probs.cumsum(1) - one_hot.cumsum(1)) ** 2).sum(1) / 4
    assert found["rps"] == pytest.approx(rps.mean())
    assert level_metrics(np.log([[0.9, 0.1]]), [0])["quadratic_kappa"] is None
