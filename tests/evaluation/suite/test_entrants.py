"""Fine-tuning of both heads on one task, and the choice of a setting."""

import jax
import numpy as np
import pytest
from flax import nnx
from suite_files import REVIEWS, SWEEP, questions, right, small_pair

from mlmjax.config.suite import HEADS
from mlmjax.evaluation.questions import Question
from mlmjax.evaluation.suite import entrants
from mlmjax.evaluation.suite.entrants import (
    DivergedError,
    Setting,
    answer_fine_tuned,
    read_texts,
    tfidf_linear,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return small_pair(tmp_path_factory.mktemp("words"))


def weights(model):
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_learns_by_its_seed_and_leaves_the_model_as_it_was(pair, head):
    asked, before = questions(20, 2), weights(pair[0])
    asked.append(Question(9, "long", {**asked[0].row, "text": "fine " * 90}, 1, ""))

    def answer(rows):
        setting, train = Setting(8, 2e-2), questions(96, 1)
        return answer_fine_tuned(*pair, REVIEWS, head, train, rows, setting, SWEEP, seed=1)

    answers = answer(asked)
    assert right(answers.log_probs, asked) > 0.9
    assert len(answers.losses) == 8
    assert answers.losses[-1] < 0.5 * answers.losses[0]
    assert answers.shortened == 1
    assert all(map(np.array_equal, before, weights(pair[0])))
    again = answer([*asked[:3], asked[-1]])
    np.testing.assert_allclose(again.log_probs[:3], answers.log_probs[:3], atol=1e-5)
    assert again.losses == answers.losses


def test_a_training_that_diverges_says_so(pair):
    rows, setting = questions(16, 1), Setting(3, 1e30)
    with pytest.raises(DivergedError, match="not finite"):
        answer_fine_tuned(*pair, REVIEWS, "mlm", rows, rows, setting, SWEEP, seed=0)


def test_heads_and_baselines_read_the_fields_alone(tokenizer):
    task = REVIEWS.model_copy(
        update={"prompt": "Read {{this}}.\n{title}\n{text}\n{options}A: [unused0] [MASK]"}
    )
    row = {"title": "On [MASK]", "text": "a {b}", "options": ["bad", "good"]}
    template = task.for_head().head_template()
    assert template.fields == ("title", "text")
    assert template.shorten == {"text": "tail"}
    (text,) = read_texts(task, [Question(0, "", row, 0, "")])
    assert text == "On [MASK]\na {b}"
    ids, slot = template.encode(tokenizer, row, 64)
    assert ids[1:-1] == tokenizer.encode_plain(text)
    assert slot == -1


@pytest.mark.parametrize(("count", "method"), [(4, "logistic regression"), (40, "linear SVM")])
def test_tfidf_takes_a_faster_model_for_many_labels(monkeypatch, count, method):
    """Every label has words of its own next to those that all have."""
    monkeypatch.setattr(entrants, "MANY_PRODUCTS", 10**5)
    rng, done = np.random.default_rng(0), []
    labels = [f"label {i % count}" for i in range(8 * count)]
    own = [f"{label.replace(' ', '')}x{rng.integers(2)}" for label in labels]
    common = [" ".join(f"w{n}" for n in rng.integers(400, size=20)) for _ in labels]
    texts = [f"{a} {b} {a}" for a, b in zip(own, common, strict=True)]
    half = len(texts) // 2
    name, found = tfidf_linear(
        texts[:half], labels[:half], texts[half:], lambda *given: done.append(given)
    )
    assert name == f"TF-IDF + {method}"
    assert np.mean(np.array(found) == labels[half:]) > 0.75
    assert done == ([(n + 1, count) for n in range(count)] if method == "linear SVM" else [])
