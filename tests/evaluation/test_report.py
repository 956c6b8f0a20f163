"""How far an evaluation can be trusted: calibration, order of the options, and the page."""

import json
import re

import numpy as np
import pytest
from pages import read_markdown
from pictures import read_picture
from task_files import ROWS, read_lines, task

from mlmjax.cli.main import run
from mlmjax.data.contamination import Contamination
from mlmjax.errors import InputError
from mlmjax.evaluation.evaluate import run_evaluation
from mlmjax.scoring.scorers import Scorer
from mlmjax.statistics.option_orders import order_sensitivity, sensitivity, shifted
from mlmjax.statistics.reliability import calibration
from mlmjax.text.prompts import Template
from mlmjax.text.verbalizer import Verbalizer
from mlmjax.weights.pretrained import save_pretrained

OPTIONS = {"labels": None, "options": "choices"}


def choices(rows):
    return [
        {"text": f"q{i}", "choices": [f"o{i}{j}" for j in range(3 + i % 3)], "label": i % 3}
        for i in range(rows)
    ]


def test_calibration_is_that_of_the_predictions(answer, no_report):
    results, predictions = answer(ROWS)
    scores = np.log([list(line["probabilities"].values()) for line in predictions])
    gold = [["bad", "good"].index(line["gold"]) for line in predictions]
    assert results["calibration"] == pytest.approx(calibration(scores, gold))
    over_vocabulary, _ = answer(ROWS, normalize="vocabulary")
    assert over_vocabulary["calibration"] == pytest.approx(results["calibration"], rel=1e-4)


def test_order_sensitivity_is_that_of_scoring_by_hand(model, tokenizer, answer, no_report):
    rows = choices(9)
    results, _ = answer(rows, **OPTIONS)
    scorer = Scorer(model, tokenizer, Template(task().prompt), Verbalizer.letters(list("ABCDE")))
    places = [
        (i, shift, shifted(range(len(row["choices"])), shift))
        for i, row in enumerate(rows)
        for shift in range(min(4, len(row["choices"])))
    ]
    moved = [
        {"text": rows[i]["text"], "options": [rows[i]["choices"][j] for j in order]}
        for i, _, order in places
    ]
    scores = np.full((9, 4, 5), -np.inf)
    for (i, shift, order), found in zip(places, scorer.log_probs(moved), strict=True):
        scores[i, shift, order] = found[: len(order)]
    expected = sensitivity(scores, [row["label"] for row in rows])
    assert results["order_sensitivity"] == expected
    assert expected["changed"] > 0
    assert [one["rows"] for one in expected["accuracy_by_shift"]] == [9, 9, 9, 6]


def test_orders_are_measured_where_there_are_any(model, tokenizer, answer, tmp_path, no_report):
    spelled = {"prompt": "{text} - A: bad\n- B: good\n[unused0] [MASK]"}
    for changes in ({"verbalizer": "words"}, spelled):
        assert answer(ROWS, **changes)[0]["order_sensitivity"] is None
    data = tmp_path / "rows.jsonl"
    off, on = (
        run_evaluation(model, tokenizer, task(), data=data, **options)
        for options in ({"order_rows": 0}, {})
    )
    assert off["order_sensitivity"] is None
    assert on["order_sensitivity"]["rows"] == 5
    assert on["order_sensitivity"]["shifts"] == 2
    same = on.keys() - {"seconds", "order_sensitivity"}
    assert {key: on[key] for key in same} == {key: off[key] for key in same}
    with pytest.raises(InputError, match="order_rows is -1"):
        run_evaluation(model, tokenizer, task(), data=data, order_rows=-1)


def test_rows_scored_again_are_a_sample_that_is_always_the_same():
    rows = [{"text": str(i), "options": list("abcdefg")} for i in range(500)]
    scores = np.random.default_rng(0).normal(size=(500, 7))
    asked = []

    def ask(some):
        asked.append([(row["text"], row["options"]) for row in some])
        return scores[[int(row["text"]) for row in some]]

    gold = np.zeros(500, int)
    found = order_sensitivity(ask, rows, scores, gold, order_rows=40)
    assert found == order_sensitivity(ask, rows, scores, gold, order_rows=40)
    assert asked[0] == asked[1]
    order_sensitivity(ask, rows, scores, gold, order_rows=40, seed=1)
    assert asked[2] != asked[0]
    texts = [text for text, _ in asked[0]]
    assert len(texts) == 3 * 40
    assert len(set(texts)) == 40
    assert min(map(int, texts)) < 100 < 400 < max(map(int, texts))  # of all rows, not the first
    assert [options[0] for _, options in asked[0][:3]] == ["b", "d", "f"]
    assert (found["rows"], found["changed"]) == (40, 1.0)  # it always answers the same letter
    few = order_sensitivity(ask, rows[:30], scores[:30], gold[:30], order_rows=40)
    assert few["rows"] == 30


def test_the_page_shows_everything_and_no_text_can_break_it(model, tokenizer, tmp_path):
    rows = [{**row, "kind": f"<b>|`{i % 2}"} for i, row in enumerate(choices(8))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = "```\n# <i>not</i> a heading\n{text} {options}[unused0] [MASK]"
    asked = task(
        name="a|b", description="[x](y)\n# z", prompt=prompt, group="kind", metric="mcc", **OPTIONS
    )
    known = Contamination("found", ["trained on `rm`|<s>"], ["remark"])
    out = tmp_path / "out"
    results = run_evaluation(model, tokenizer, asked, data=data, out=out, known=known)
    assert {path.name for path in out.iterdir()} == {
        "results.json", "predictions.jsonl", "report.md", "reliability.svg"
    }  # fmt: skip
    assert "probability of the answer" in read_picture((out / "reliability.svg").read_text())
    text = (out / "report.md").read_text()
    blocks, lines = read_markdown(text)
    assert blocks == [prompt]
    outside = "\n".join(lines)
    bare = re.sub(r"`[^`\n]*`", "", outside)  # nothing is read as Markdown in a code span
    for harmful in ("<b>", "<s>", "<i>", "[x](y)", "\n# z", "`rm`"):
        assert harmful not in bare
    for line in lines:
        if line.startswith("|"):
            assert line.count("|") in (3, 4, 5)
    _, *headings = re.findall(r"^#+ (.*)", outside, flags=re.MULTILINE)
    expected = ["The task", "Calibration", "Order of the options", "Groups", "Contamination"]
    assert headings == expected
    found = results["order_sensitivity"]
    for shown in (
        f"**MCC {results['mcc']:.4f}**",
        f"{results['calibration']['ece']:.4f}",
        f"{results['calibration']['nll']:.4f}",
        f"**{found['changed']:.2%}**",
        "**found**",
        "remark",
    ):
        assert shown in outside
    assert "None" not in text
    assert "nan" not in outside.lower().split()


def test_a_page_of_few_rows_and_no_order(answer, tmp_path):
    answer(ROWS[:1], verbalizer="words")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Groups" not in text
    assert "Not measured" in text
    assert "**unknown**" in text


def test_the_command_takes_a_number_of_rows(model, tokenizer, reviews, capsys, no_report):
    tmp_path = reviews.parent
    save_pretrained(model, tokenizer, tmp_path / "model")
    base = ["evaluate", "--json", "--model", str(tmp_path / "model"), "--task", str(reviews)]
    for number in (0, 3):
        out = tmp_path / f"out{number}"
        assert run([*base, "--order-rows", str(number), "--out", str(out)]) == 0
        found = json.loads(capsys.readouterr().out)["order_sensitivity"]
        assert found is None if not number else found["rows"] == 3
        assert len(read_lines(out / "predictions.jsonl")) == 5
    assert run([*base, "--order-rows", "-1"]) == 2
    capsys.readouterr()
    assert run(["compare", str(tmp_path / "out0"), str(tmp_path / "out3")]) == 0
    assert "No difference in accuracy" in capsys.readouterr().out
