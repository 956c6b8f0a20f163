"""A program answers as its classifier does, in a process without this package."""

import json
import subprocess
import sys

import numpy as np
import pytest
from labelled_texts import examples, word_model, word_tokenizer

import mlmjax
from mlmjax.cli.main import run
from mlmjax.errors import InputError
from mlmjax.model.modernbert import ModernBertForSequenceClassification

LABELS = ["sports", "money"]
WITHOUT_PACKAGE = """
import json, sys
sys.modules["mlmjax"] = sys.modules["flax"] = None  # importing either fails
sys.path.insert(0, sys.argv[1])
from run import Program
program = Program()
print(json.dumps(program.log_probs(json.loads(sys.argv[2])).tolist()))
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("words"))
    return word_model(tokenizer), tokenizer


@pytest.fixture(scope="module")
def classifier(parts):
    return mlmjax.Classifier.from_pretrained(parts, LABELS, answer="letters", progress=False)


def run_alone(folder, texts):
    code = [sys.executable, "-c", WITHOUT_PACKAGE, str(folder), json.dumps(texts)]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout))


def test_a_process_without_the_package_gives_the_same_answers(classifier, tmp_path):
    texts = [*examples(9)[0], "a [MASK] [SEP] goal", "the old " * 30]
    classifier.calibrate(texts)
    mlmjax.export_program(classifier, tmp_path / "out", lengths=[96, 160], batch_size=4)
    expected = classifier.predict_proba(texts)
    found = run_alone(tmp_path / "out", texts)
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-5, atol=1e-6)
    assert np.ptp(expected[:, 0]) > 1e-3


def test_a_head_is_exported_too_and_the_script_prints_answers(parts, tmp_path):
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}, "num_labels": 2}
    model = word_model(parts[1], kind=ModernBertForSequenceClassification, **labels)
    classifier = mlmjax.Classifier.from_pretrained((model, parts[1]), progress=False)
    classifier.save_pretrained(tmp_path / "saved")
    (tmp_path / "texts.txt").write_text("rain\nthe new bank\n")
    out = tmp_path / "out"
    command = ["export-program", str(tmp_path / "saved"), "--out", str(out), "--length", "32"]
    assert run(command) == 0
    script = [sys.executable, str(out / "run.py"), str(tmp_path / "texts.txt")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    answers = [json.loads(line) for line in printed.splitlines()]
    expected = classifier.predict_proba(["rain", "the new bank"])
    found = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert [answer["label"] for answer in answers] == list(classifier.predict(["rain", "bank"]))


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"multi_label": True}, {}, "needs more than one plain prompt"),
        ({"orders": 2, "answer": "letters"}, {}, "needs more than one plain prompt"),
        ({"long_text": "mean"}, {}, "long_text is 'mean'"),
        ({}, {"lengths": [8]}, "expected one or more, from"),
        ({}, {"lengths": [161]}, "to 160 tokens"),
        ({}, {"lengths": []}, "expected one or more"),
        ({}, {"lengths": [64], "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_a_program_cannot_do_is_an_error(parts, tmp_path, options, settings, message):
    classifier = mlmjax.Classifier.from_pretrained(parts, LABELS, progress=False, **options)
    with pytest.raises(InputError, match=message):
        mlmjax.export_program(classifier, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_the_runner_rejects_what_it_cannot_answer(classifier, tmp_path, monkeypatch):
    mlmjax.export_program(classifier, tmp_path / "out", lengths=[64], batch_size=1)
    from mlmjax.classification.programs.runner import Program

    program = Program(tmp_path / "out")
    for text, message in ((" ", "text 2 is blank"), ("goal " * 60, "the longest program reads 64")):
        with pytest.raises(ValueError, match=message):
            program.log_probs(["rain", text])
