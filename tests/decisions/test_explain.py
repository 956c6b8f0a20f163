"""The words behind the answers of a decider."""

import numpy as np
import pytest
from labelled_texts import word_model, word_tokenizer
from small_models import noisy

from mlmjax import Classifier, Decider, explain
from mlmjax.decisions.states import State
from mlmjax.errors import InputError

QUESTION = {"type": "choice", "instructions": "Who?", "criteria": {"a": "x", "b": None}}
LEVELS = {"type": "score", "instructions": "Urgent?", "criteria": ["no", "so", "yes"]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("words"))
    return noisy(word_model(tokenizer)), tokenizer


@pytest.mark.parametrize(
    "options", [{}, {"orders": "all"}, {"long_text": "mean", "max_length": 96}]
)
@pytest.mark.parametrize("question", [QUESTION, LEVELS])
def test_importance_is_the_change_of_the_answer(pair, options, question):
    decider = Decider(pair, **options)
    text = "the new goal " * (20 if "max_length" in options else 2)
    words = decider.explain(text, question)
    assert "".join(word.text for word in words) == text
    state = State(text)
    for number in (1, 4):
        word = words[number]
        masked = state.masking((word.start, word.end))
        before, after = (
            [*one["q"].probabilities]
            if question is LEVELS
            else list(one["q"].probabilities.values())
            for one in (decider.decide(which, {"q": question}) for which in (state, masked))
        )
        best = int(np.argmax(before))
        assert word.importance == pytest.approx(np.log(before[best] / after[best]), abs=1e-4)
    assert sum(abs(word.importance) > 1e-5 for word in words) > 3
    assert all(word.importance == 0 for word in words if not word.text.strip())


def test_a_classifiers_own_question_is_explained_in_its_prompt(pair, tmp_path):
    classifier = Classifier(pair, ["sports", "money"], template="{text} {options} [unused0] [MASK]")
    classifier.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match="is asked as the classifier was fitted"):
        decider = Decider(tmp_path / "saved")
    question = {"type": "choice", "instructions": "?", "criteria": {"sports": None, "money": None}}
    text = "the goal of a bank"
    (found,) = explain(classifier, [text])
    words = [word for word in decider.explain(text, question) if word.text.strip()]
    np.testing.assert_allclose(
        [word.importance for word in words], [word.importance for word in found.words], atol=1e-5
    )


def test_json_is_explained_if_it_fits(pair):
    decider = Decider(pair, max_length=96)
    state = {"a": "the goal", "b": "new rain"}
    words = decider.explain(state, QUESTION)
    assert "".join(word.text for word in words) == State(state).text
    assert sum(word.importance != 0 for word in words) > 3
    with pytest.raises(InputError, match="is JSON that does not fit in a prompt whole"):
        decider.explain({"a": "goal " * 99}, QUESTION)
