"""`mlmjax decide` and `mlmjax serve` as a shell sees them."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import closing, contextmanager

import pytest
from labelled_texts import examples, word_model, word_tokenizer
from processes import ROOT
from servers import REQUEST, Client
from small_models import small_model

from mlmjax import Classifier, Decider
from mlmjax.classification.fitting import LearnedNothingWarning
from mlmjax.cli.main import run
from mlmjax.decisions.answers import answer_json

STATES = ["a text", {"subject": "Ünïcode", "n": [1, None]}, ["x"], "", "word " * 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("decide")
    model = small_model(num_hidden_layers=1, max_position_embeddings=128)
    Decider((model, tokenizer)).save_pretrained(folder / "model")
    (folder / "questions.json").write_text(json.dumps(REQUEST["questions"]))
    (folder / "request.json").write_text(json.dumps(REQUEST))
    lines = [json.dumps(state, ensure_ascii=False) + "\n" for state in STATES]
    (folder / "states.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("questions", ["questions.json", "request.json"])
def test_each_line_is_answered_as_in_python(folder, capsys, questions):
    given = ["--model", str(folder / "model"), "--questions", str(folder / questions)]
    assert run(["decide", *given, str(folder / "states.jsonl")]) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    decider = Decider(folder / "model")
    for state, answers in zip(STATES, found, strict=True):
        direct = decider.decide(state, REQUEST["questions"])
        assert answers == {key: answer_json(one) for key, one in direct.items()}
    assert err.endswith(
        "warning: 3 prompts did not fit, and their states were truncated: question and state "
        "together have at most 128 tokens, all that the model reads\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decide", "--questions", "absent.json"], "absent.json: cannot be read"),
        (["decide", "--questions", "QUESTIONS", "BAD"], "line 2: is not JSON"),
        (["decide", "--questions", "TWICE", "BAD"], "key 'a' occurs twice"),
        (["decide", "--questions", "BAD"], "BAD: is not valid JSON"),
        (["decide"], "Missing option '--questions'"),
        (["serve", "--model", "./absent"], "there is no such folder"),
        (["serve", "--api-key-env", "MLMJAX_NO_KEY"], "the variable is not set"),
        (["serve", "--host", "256.0.0.1"], "cannot listen there"),
    ],
)
def test_bad_input_is_rejected_in_words(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    (folder / "BAD").write_text('"a"\nplain\n')
    (folder / "QUESTIONS").write_text('{"q": {"type": "noul"}}')
    (folder / "TWICE").write_text('{"a": {"type": "noul"}, "a": {"type": "noul"}}')
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert message in next(line for line in err.splitlines() if line.startswith("mlmjax: "))


def test_a_server_without_its_packages_says_how_to_install_them(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlmjax.serving.app", None)
    assert run(["serve"]) == 2
    says = "is not installed; run pip install 'mlmjax[serve]', or pip install '.[serve]' in a clone"
    assert says in capsys.readouterr().err


@contextmanager
def serving(model):
    """A server in a process of its own: the process, its port, and what it said before."""
    command = [sys.executable, "-m", "mlmjax", "serve", "--model", str(model)]
    command += ["--port", "0", "--api-key-env", "MLMJAX_KEY"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"MLMJAX_KEY": "abc"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said, line = [], ""
        while not line.startswith("ready"):
            line = next(process.stderr)
            said.append(line)
        assert [one for one in said if "http://" in one] == [line]
        assert any(one.startswith("loading the model") for one in said)
        yield process, int(line.split("127.0.0.1:")[1].split("/")[0]), "".join(said)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.long
def test_a_server_of_a_classifier_answers_as_the_classifier(tmp_path):
    tokenizer = word_tokenizer(tmp_path)
    texts, labels = examples(40, seed=1)
    classifier = Classifier((word_model(tokenizer), tokenizer), ["sports", "money"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LearnedNothingWarning)
        classifier.fit(texts, labels, epochs=1).save_pretrained(tmp_path / "own")
    asked = {
        "topic": {"type": "choice", "instructions": "?", "criteria": {"money": None, "sports": ""}},
        "new": {"type": "noul", "instructions": "new"},
    }
    with serving(tmp_path / "own") as (process, port, said):
        assert "a choice among sports, money is asked as the classifier was fitted" in said
        client = Client(port, None)
        for text in texts[:4]:
            request = {"model": "jev-latest", "state": text, "questions": asked}
            status, _, found = client.ask(request, Authorization="Bearer abc")
            assert status == 200
            probabilities = classifier.predict_proba([text])[0]
            expected = dict(zip(classifier.classes_, probabilities, strict=True))
            assert found["answers"]["topic"]["probabilities"] == pytest.approx(expected, abs=1e-6)
            assert found["answers"]["new"]["type"] == "noul"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_a_server_ends_on_sigterm_after_it_has_answered(folder):
    """32 requests under way get their answers, and the exit code is 0."""
    with serving(folder / "model") as (process, port, _):
        statuses, begun = [], threading.Barrier(33)

        def ask():
            headers = {"Authorization": "Bearer abc", "Content-Type": "application/json"}
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
                connection.request("POST", "/v1/systemone", json.dumps(REQUEST), headers)
                begun.wait()
                with connection.getresponse() as response:
                    statuses.append(response.status)

        threads = [threading.Thread(target=ask) for _ in range(32)]
        for thread in threads:
            thread.start()
        begun.wait()
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert statuses == [200] * 32
        assert process.wait(timeout=30) == 0
