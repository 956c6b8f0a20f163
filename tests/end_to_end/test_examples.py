"""The examples run unchanged, and do what they say."""

import csv
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_models import small_model

from mlmjax import Classifier, load_pretrained, save_pretrained
from mlmjax.model.modernbert import parameters
from mlmjax.weights.pretrained import EMBEDDING

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "common.py")


@pytest.fixture(scope="module", params=["small", pytest.param("packaged", marks=pytest.mark.long)])
def model(request, tmp_path_factory, tokenizer):
    """Options that name a model of random weights, or none for the packaged model."""
    if request.param == "packaged":
        return ()
    folder = tmp_path_factory.mktemp("model") / "small"
    save_pretrained(small_model(scale=0.02, num_hidden_layers=1), tokenizer, folder)
    return ("--model", folder)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script in an empty folder, as `python SCRIPT ARGUMENTS` does; return its lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def probabilities(line):
    return [float(number) for number in re.findall(r"\d\.\d{4}", line)]


def test_a_script_runs_from_anywhere(tmp_path):
    """By its path, without the package installed."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "score.py", "--options", "good,bad,mixed", "Fine."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    assert line.endswith(": Fine.")
    np.testing.assert_allclose(sum(probabilities(line)), 1, atol=2e-4)


def test_the_objective_is_learned_and_its_export_scores(run, tmp_path, model):
    rate = ("--learning-rate", 1e-2) if model else ()
    lines = run("own_objective.py", "--steps", 40, *model, *rate)
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in lines[:-1]]
    assert losses[-1] < 0.6 * losses[0]
    assert lines[-1] == "own-objective: answers 100% of what it was trained on"
    prompt = "REVIEW: {text}\nCHOICES:\n{options}ANSWER:"
    answers = run(
        *("score.py", "--model", tmp_path / "own-objective", "--prompt", prompt),
        *("--options", "negative,positive", "The music alone is worth the ticket."),
    )
    negative, positive = probabilities(answers[0])
    assert positive > 0.7
    np.testing.assert_allclose(negative + positive, 1, atol=2e-4)


def test_a_run_file_names_masking_and_loss(run, tmp_path, model):
    start = f"init_from={model[1]}" if model else "init_from=mlmjax-small"
    lines = run("own_masking.py", "steps=6", start, "mesh.data=1")
    first, last = map(float, re.findall(r"\d+\.\d{3}", lines[-1]))
    assert last < first
    card = (tmp_path / "own-masking" / "run" / "export" / "README.md").read_text()
    assert "own_masking:long_tokens, own_masking:smoothed" in card


def test_a_student_learns_the_probabilities_of_its_teacher(run, tmp_path, model):
    rate = ("--learning-rate", 1e-2) if model else ()
    lines = run("distill.py", *model, *rate, "--epochs", 40)
    before, after, least = map(float, re.findall(r"\d\.\d{3}", lines[0]))
    assert least < after < least + 0.5 * (before - least)
    assert lines[1] == "student: answers 100% of the texts as its teacher does"
    student = Classifier.from_pretrained(tmp_path / "student")
    sure = student.predict_proba(["Warm, funny and beautifully played."])
    assert sure.argmax() == list(student.classes_).index("positive")


def test_the_export_is_the_same_model(run, model):
    lines = run("export.py", *model, "--dtype", "source")
    assert lines[-1] == "largest difference of a logit: 0"
    assert any(line.startswith("my-model/model.safetensors: ") for line in lines)


def test_pretraining_continues_with_the_new_words(run, tmp_path, model):
    lines = run(
        "continue_pretraining.py", *model, "steps=2", "data.validation_rows=0", "mesh.data=1"
    )
    assert lines[0] == "continued/start: 6 new words, which were 17 tokens"
    assert lines[-1].endswith("['a', ' case', ' of', ' angioplasty']")
    start, _ = load_pretrained(tmp_path / "continued" / "start")
    trained, tokenizer = load_pretrained(tmp_path / "continued" / "run" / "export")
    (token,) = tokenizer.encode_plain("angioplasty")
    before, after = (np.asarray(parameters(one)[EMBEDDING]) for one in (start, trained))
    assert before.shape == after.shape == (50432, start.config.hidden_size)
    assert not np.allclose(before[token], after[token])


def test_copies_differ_from_their_texts_in_the_masked_words(run, tmp_path, model):
    lines = run("augment.py", *model, "--copies", 1)
    with (tmp_path / "augmented.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    texts, copies = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert lines[-1] == f"augmented.csv: {len(texts)} texts and {len(texts)} filled copies"
    for text, copy in zip(texts, copies, strict=True):
        assert copy["label"] == text["label"]
        assert "[MASK]" not in copy["text"]
        kept = [word for word in text["text"].split() if word in copy["text"]]
        assert len(kept) >= 0.6 * len(text["text"].split())
    assert sum(copy["text"] != text["text"] for text, copy in zip(texts, copies, strict=True)) > 3


def test_a_probe_reads_function_words_from_every_layer(run, model):
    counts, majority, *layers = run("probe.py", *model)
    train, test = map(int, re.findall(r"\d+", counts))
    assert train > test > 100
    figures = [list(map(float, re.findall(r"-?\d\.\d{3}", line))) for line in layers]
    assert len(figures) >= 2
    for task, control, selectivity in figures:
        assert selectivity == pytest.approx(task - control, abs=2e-3)
        assert 0.3 < control <= 1
    assert figures[0][0] > float(majority[-5:])


@pytest.mark.parametrize(
    ("script", "option", "text", "message"),
    [
        ("continue_pretraining.py", "--words", "the\n", "new word 'the': is one token already"),
        ("continue_pretraining.py", "--words", None, "cannot be read"),
        ("distill.py", "--data", "text\na\n", "expected a CSV with text and label"),
        ("own_objective.py", "--data", "text,lable\na,b\n", "expected a CSV with text and label"),
        ("probe.py", "--data", "{}", "expected JSON lines, each with a text"),
        ("score.py", "--prompt", "{text", "template: single '{'"),
        ("export.py", "--model", "", "bad/config.json: is missing"),
    ],
)
def test_bad_input_ends_in_one_line(run, tmp_path, capsys, script, option, text, message):
    if option == "--model":
        (tmp_path / "bad").mkdir()
    elif text is not None:
        (tmp_path / "bad").write_text(text)
    with pytest.raises(SystemExit) as caught:
        run(script, option, text if option == "--prompt" else tmp_path / "bad")
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_every_script_is_named_in_the_readme():
    text = (EXAMPLES / "README.md").read_text()
    assert [name for name in SCRIPTS if f"({name})" not in text] == []
    assert len(SCRIPTS) == 8
