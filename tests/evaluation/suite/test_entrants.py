"""Fine-tuning of both heads on one task, and the choice of a setting."""

import jax
import numpy as np
import pytest
from flax import nnx
from suite_files import REVIEWS, SWEEP, questions, right, small_pair

from mlmjax.config.suite import HEADS
from mlmjax.evaluation.questions import Question
from mlmjax.evaluation.suite.entrants import DivergedError, Setting, answer_fine_tuned, read_texts


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
