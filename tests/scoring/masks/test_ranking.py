"""Tasks that rank texts: the ranks are those of pseudo-log-likelihoods."""

import json

import numpy as np
import pytest
from labelled_texts import word_model
from scipy.integrate import quad
from scipy.stats import norm

from mlmjax import pseudo_log_likelihood, run_evaluation
from mlmjax.config.suite import load_suite
from mlmjax.config.task import Task
from mlmjax.errors import InputError
from mlmjax.model.modernbert import ModernBertForSequenceClassification
from mlmjax.statistics.metrics import js_of_normals, js_of_rows

ROWS = [
    {"good": "the goal is new", "bad": "goal new the is", "kind": "a"},
    {"good": "a bank", "bad": "bank a the old rain cloud", "kind": "b"},
    {"good": "the old price - stock", "bad": "price", "kind": "a"},
    {"good": "rain text", "bad": "text rain the", "kind": "b"},
]
PAIRS = {"prompt": "{option}", "options": ("good", "bad"), "group": "kind"}


def ranked(**changes):
    return Task(**{"name": "t", "scorer": "pll", **PAIRS, **changes})


@pytest.fixture
def evaluate(words, tmp_path):
    def evaluate(task, rows=ROWS):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = run_evaluation(*words, task, data=data, out=tmp_path / "out")
        lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
        return results, [json.loads(line) for line in lines]

    return evaluate


@pytest.mark.parametrize("method", ["word_l2r", "unmasked"])
@pytest.mark.parametrize("average", ["total", "token"])
def test_pairs_are_ranked_by_their_likelihood(words, evaluate, method, average):
    results, lines = evaluate(ranked(method=method, average=average))
    scores = np.array(
        [
            [
                score.total if average == "total" else score.per_token
                for score in pseudo_log_likelihood(*words, [row["good"], row["bad"]], method=method)
            ]
            for row in ROWS
        ]
    )
    right = scores[:, 0] > scores[:, 1]
    assert results["accuracy"] == np.mean(right)
    assert results["chance"] == 0.5
    assert [line["gold"] for line in lines] == ["A", "B", "A", "B"]  # rotated
    is_right = [line["prediction"] == line["gold"] for line in lines]
    assert is_right == right.tolist()
    for line, (good, bad) in zip(lines, scores, strict=True):
        share = 1 / (1 + np.exp(bad - good))
        assert line["probabilities"][line["gold"]] == pytest.approx(share, abs=1e-4)
    assert results["per_group"].keys() == {"a", "b"}
    found = results["likelihood"]
    assert (found["method"], found["average"]) == (method, average)
    means, deviations = scores.mean(axis=0), scores.std(axis=0)
    assert found["js_divergence"] == pytest.approx(js(means, deviations), abs=2e-3)
    low, high = found["js_divergence_ci95"]
    assert 0 <= low < high <= 1


def js(means, deviations):
    """The divergence by numerical integration, in bits."""
    one, other = (norm(*pair) for pair in zip(means, deviations, strict=True))

    def integrand(x, of):
        middle = (one.pdf(x) + other.pdf(x)) / 2
        return of.pdf(x) * np.log2(of.pdf(x) / middle) if of.pdf(x) > 1e-200 else 0.0

    bounds = min(means - 9 * deviations), max(means + 9 * deviations)
    points = [*means]
    return sum(quad(integrand, *bounds, args=(of,), points=points)[0] for of in (one, other)) / 2


def test_divergence_of_normals_is_that_of_integration():
    for means, deviations in (([0, 1], [1, 1]), ([0, 0.1], [1, 3]), ([-5, 5], [2, 1])):
        means, deviations = np.array(means, float), np.array(deviations, float)
        assert js_of_normals(means, deviations) == pytest.approx(js(means, deviations), abs=2e-3)


def test_the_interval_covers_the_truth_and_shrinks_with_rows():
    rng = np.random.default_rng(0)
    kinds = np.array([[True, False]]), np.array([[False, True]])
    truth, widths = js(np.array([0.0, 1.0]), np.ones(2)), []
    for rows in (40, 2000):
        scores = rng.normal([0, 1], 1, (rows, 2))
        _, (low, high) = js_of_rows(scores, *(np.repeat(kind, rows, axis=0) for kind in kinds))
        assert low < truth < high
        widths.append(high - low)
    assert widths[1] < 0.3 * widths[0]
    constant = np.zeros((3, 2))
    assert js_of_rows(constant, *(np.repeat(kind, 3, axis=0) for kind in kinds)) is None


def test_options_complete_a_statement(words, evaluate):
    rows = [{"x": "goal", "number": 1}, {"x": "bank", "number": 2}]
    labels = ("old", "new text", "rain")
    task = ranked(
        prompt="the {x} is {option} .", options=None, labels=labels, answer="number", group=None
    )
    results, lines = evaluate(task, rows)
    texts = [f"the {row['x']} is {label} ." for row in rows for label in labels]
    scores = np.reshape([one.total for one in pseudo_log_likelihood(*words, texts)], (2, 3))
    assert [line["prediction"] for line in lines] == [labels[i] for i in scores.argmax(axis=1)]
    assert [line["gold"] for line in lines] == ["new text", "rain"]
    assert results["likelihood"]["average"] == "total"


def test_bad_tasks_rows_and_models_are_rejected(words, evaluate, tmp_path):
    for changes, message in (
        ({"prompt": "{text}"}, r"prompt has \{option\}"),
        ({"prompt": "{option} {options}"}, r"prompt has \{option\}"),
        ({"anchor": "none"}, "anchor is for prompts"),
        ({"shorten": {"option": "tail"}}, "shorten is for prompts"),
        ({"strip": ("option",)}, "'option' is not a field"),
        ({"labels": ("a", "b"), "options": None}, "answer is missing"),
        ({"scorer": "slot"}, "answer is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            ranked(**changes)
    long = {**ROWS[0], "bad": "goal " * 200}
    with pytest.raises(InputError, match=r"jsonl line 2: the text of option 1 has 202 tokens"):
        evaluate(ranked(), [ROWS[0], long])
    with pytest.raises(InputError, match=r"line 1: option 2 is blank"):
        evaluate(ranked(), [{**ROWS[0], "bad": " "}])
    (tmp_path / "t.toml").write_text(
        'name = "t"\nscorer = "pll"\nprompt = "{option}"\noptions = ["good", "bad"]\n'
    )
    (tmp_path / "s.toml").write_text(
        'name = "s"\n[[entries]]\ntask = "t.toml"\nkind = "zero-shot"\n'
    )
    with pytest.raises(InputError, match="ranks texts by their likelihood, and a suite prompts"):
        load_suite(str(tmp_path / "s.toml"), [])
    head = word_model(words[1], kind=ModernBertForSequenceClassification)
    with pytest.raises(InputError, match="a classification head does not give"):
        run_evaluation(head, words[1], ranked(), data=tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="explains no words"):
        run_evaluation(
            *words, ranked(), data=tmp_path / "rows.jsonl", explain=1, out=tmp_path / "o"
        )
