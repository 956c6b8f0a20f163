"""Tasks of several questions per row: figures by question and by type."""

import json

import numpy as np
import pytest
from labelled_texts import examples, word_model, word_tokenizer

from mlmjax import Decider, InputError
from mlmjax.cli.main import run
from mlmjax.config.decisions import find_decision_task
from mlmjax.evaluation.decisions import decision_lines, evaluate_decisions
from mlmjax.statistics.levels import level_metrics

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
    assert [line.split()[0] for line in shown[2:]] == [*figures, "all", "all", "all"]


def test_the_command_prints_a_table_or_all_figures(decider, task_file, tmp_path, capsys):
    decider.save_pretrained(tmp_path / "model")
    command = ["evaluate", "--model", str(tmp_path / "model"), "--task", str(task_file)]
    assert run([*command, "--limit", "5"]) == 0
    assert capsys.readouterr().out.startswith("reviews: 5 rows\n")
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["questions"]["topic"]["n"] == 24
    assert run([*command, "--protocol", "published"]) == 2
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
