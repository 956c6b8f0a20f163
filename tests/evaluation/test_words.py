"""The words behind wrong answers: their importance, and a page that no text can break."""

import json
import re

import numpy as np
import pytest
from task_files import task

from mlmjax.cli.main import run
from mlmjax.errors import InputError
from mlmjax.evaluation.evaluate import make_scorer, run_evaluation
from mlmjax.evaluation.questions import read_questions
from mlmjax.evaluation.words import explain_mistakes
from mlmjax.text.prompts import MASKED
from mlmjax.weights.pretrained import save_pretrained

ROWS = [
    {"text": f"a <b>film</b> {i} & more", "plot": "dull", "label": label}
    for i in range(4)
    for label in ("good", "bad")
]
PROMPT = "{plot} {text} {options}[unused0] [MASK]"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "rows.jsonl"


def test_the_surest_mistakes_and_their_words(model, tokenizer, data):
    asked = task(prompt=PROMPT)
    questions, _ = read_questions(asked, data, None)
    scorer = make_scorer(model, tokenizer, asked, questions, batch_size=None)
    log_probs = scorer.log_probs([question.row for question in questions])
    wrong = [i for i, q in enumerate(questions) if log_probs[i].argmax() != q.gold]
    assert len(wrong) == 4  # two rows of each text, with different labels
    found = explain_mistakes(scorer, questions, scorer.labels, log_probs, 3)
    surest = sorted(wrong, key=lambda i: -log_probs[i].max())[:3]
    assert [one.where for one in found] == [f"Row {i + 1}" for i in surest]
    for one, number in zip(found, surest, strict=True):
        assert one.predicted != one.gold
        assert list(one.fields) == ["plot", "text"]
        row, best = questions[number].row, log_probs[number].argmax()
        for name, (text, words) in one.fields.items():
            assert text == row[name]
            word = words[-1]
            hidden = row | {MASKED: {name: [(word.start, word.end)]}}
            change = log_probs[number, best] - scorer.log_probs([hidden])[0, best]
            np.testing.assert_allclose(word.importance, change, atol=1e-5)
    assert explain_mistakes(scorer, questions, scorer.labels, log_probs, 0) == []


def test_the_page_escapes_texts_and_is_linked(model, tokenizer, data, tmp_path):
    out = tmp_path / "out"
    run_evaluation(model, tokenizer, task(prompt=PROMPT), data=data, out=out, explain=2)
    page = (out / "words.html").read_text()
    assert page.count("<h2>") == 2
    assert "<b>" not in page
    shown = re.sub(r"<[^>]+>", "", page)
    assert sum(f"a &lt;b&gt;film&lt;/b&gt; {i} &amp; more" in shown for i in range(4)) in (1, 2)
    assert page.count('<blockquote class="words">') == 4
    assert "[words.html](words.html)" in (out / "report.md").read_text()
    with pytest.raises(InputError, match="explain is 2; expected 0 or more, and out"):
        run_evaluation(model, tokenizer, task(prompt=PROMPT), data=data, explain=2)


def test_the_command_writes_the_page(model, tokenizer, reviews, capsys):
    folder = reviews.parent
    save_pretrained(model, tokenizer, folder / "model")
    command = ["evaluate", "--model", str(folder / "model"), "--task", str(reviews)]
    command += ["--order-rows", "0", "--explain", "1"]
    assert run([*command, "--out", str(folder / "out")]) == 0
    assert (folder / "out" / "words.html").read_text().count("<h2>") == 1
    assert run(command) == 2
    assert "explain is 1" in capsys.readouterr().err
