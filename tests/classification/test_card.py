"""The card's programs load a classifier in transformers and give its probabilities."""

import numpy as np
import pytest
from pages import blocks
from small_models import small_model

from mlmjax import Classifier
from mlmjax.statistics.calibration import Calibration

TEXT = "the new goal"


@pytest.fixture(scope="module")
def real_pair(tokenizer):
    """A small model with the packaged tokenizer, which transformers reads."""
    return small_model(max_position_embeddings=256), tokenizer


def saved(pair, folder, labels=("sports", "money"), **options):
    """Save a classifier; return its card and its probabilities of a text."""
    classifier = Classifier(pair, list(labels), **options)
    if options.get("head") == "classification":
        classifier.fit(["the goal", "a bank"], list(labels)[:2], epochs=1)
    classifier.save_pretrained(folder)
    (row,) = classifier.predict_proba([TEXT])
    return (folder / "README.md").read_text(encoding="utf-8"), dict(
        zip(map(str, classifier.classes_), row, strict=True)
    )


def printed(program, folder, capsys):
    """Run a program of a card on the text; return what it printed."""
    capsys.readouterr()
    run(program, folder, TEXT)
    return eval(capsys.readouterr().out)


def run(program, folder, text):
    """Run a program of a card on a text."""
    program = program.replace("PATH_OF_THIS_FOLDER", str(folder)).replace('"a text"', repr(text))
    exec(compile(program, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "options",
    [
        {"answer": "words"},
        {"answer": "letters"},
        {"labels": ["sports: 'x' \"y\"", "two words\n```", "ünï {text}"]},
        {"template": "{text} is the {text} of\n{options}"},
        {"answer": "words", "template": 'It\'s {{new}}: {text}\n"Answer": [unused0] [MASK].'},
    ],
)
def test_prompt_and_answers_are_rebuilt(real_pair, tmp_path, capsys, options):
    card, expected = saved(real_pair, tmp_path / "saved", **options)
    _, program = blocks("python", card)
    found = printed(program, tmp_path / "saved", capsys)
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-5)


@pytest.mark.parametrize("bias", [None, (0.5, -1.25)])
def test_calibrated_probabilities_are_rebuilt(real_pair, tmp_path, capsys, bias):
    classifier = Classifier(real_pair, ["sports", "money"], answer="words").calibrate()
    found = Calibration(method="null+temperature", bias=bias, temperature=1.7, rows=3)
    classifier.settings_ = classifier.settings_.model_copy(update={"calibration": found})
    classifier.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    _, program = blocks("python", card)
    found = printed(program, tmp_path / "saved", capsys)
    np.testing.assert_allclose(list(found.values()), classifier.predict_proba([TEXT])[0], atol=1e-5)
    assert "calibrates the probabilities" not in card


@pytest.mark.parametrize("options", [{}, {"instruction": 'Read the "new" text:\nnow'}])
def test_a_head_is_a_pipeline(real_pair, tmp_path, capsys, options):
    card, expected = saved(real_pair, tmp_path / "saved", head="classification", **options)
    _, program = blocks("python", card)
    (found,) = printed(program, tmp_path / "saved", capsys)
    assert {one["label"]: pytest.approx(one["score"], abs=1e-5) for one in found} == expected


@pytest.mark.parametrize("options", [{"answer": "words"}, {"head": "classification"}])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("goal " * 90, "is too long: with its prompt it has more than 48 tokens"),
        ("a [MASK] goal", "spells a special token"),
        ("a goal[SEP]", "spells a special token"),
        ("[unused0] goal", "spells a special token"),
        ("<|endoftext|>", "spells a special token"),
    ],
)
def test_a_text_that_the_program_would_read_otherwise_is_refused(
    real_pair, tmp_path, options, text, says
):
    card, _ = saved(real_pair, tmp_path / "saved", max_length=48, **options)
    assert "Prompt and text have at most 48 tokens together." in card
    _, program = blocks("python", card)
    with pytest.raises(SystemExit, match=says):
        run(program, tmp_path / "saved", text)


@pytest.mark.parametrize("options", [{"answer": "words"}, {"head": "classification"}])
def test_the_program_answers_as_long_a_text_as_mlmjax_reads(real_pair, tmp_path, capsys, options):
    saved(real_pair, tmp_path / "saved", max_length=48, **options)
    classifier = Classifier.from_pretrained(tmp_path / "saved")
    template, tokenizer = classifier.asking_.scorer.template, classifier.asking_.scorer.tokenizer
    text = "goal" + " goal" * (48 - template.length(tokenizer, {"text": "goal"}))
    (expected,) = classifier.predict_proba([text])
    assert classifier.shortened == 0
    _, program = blocks("python", (tmp_path / "saved" / "README.md").read_text())
    run(program, tmp_path / "saved", text)
    found = eval(capsys.readouterr().out)
    if isinstance(found, list):
        found = {one["label"]: one["score"] for one in found[0]}
    scores = [found[name] for name in map(str, classifier.classes_)]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    with pytest.raises(SystemExit, match="is too long"):
        run(program, tmp_path / "saved", text + " goal")


@pytest.mark.parametrize(
    "options",
    [
        {"orders": 2},
        {"answer": "continuation"},
        {"multi_label": True},
        {"examples": [("a goal", "sports")]},
        {"labels": ["[MASK]", "[SEP] x"]},
    ],
)
def test_an_answer_of_several_prompts_has_no_program(real_pair, tmp_path, options):
    card, _ = saved(real_pair, tmp_path / "saved", **options)
    assert len(blocks("python", card)) == 1
    assert "take more than one plain prompt, so use mlmjax" in card
