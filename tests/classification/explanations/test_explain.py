"""The importance of words is that of masking them by hand, and finds the words that decide."""

import numpy as np
import pytest
from labelled_texts import FAST, SHORT, WORDS, examples

from mlmjax import explain
from mlmjax.classification.classifier import Classifier
from mlmjax.errors import InputError
from mlmjax.scoring.masks.importance import coloured

NAMES = ["sports", "money"]
DECIDING = {word for words in WORDS.values() for word in words}


@pytest.fixture(scope="module")
def fitted(pair):
    return Classifier(pair, NAMES, template=SHORT).fit(*examples(96), mask_share=0.15, **FAST)


def test_the_word_that_decides_is_the_most_important_one(fitted):
    texts, labels = examples(40, seed=3)
    found = explain(fitted, texts)
    assert [one.label for one in found] == list(fitted.predict(texts))
    assert np.mean([one.label == label for one, label in zip(found, labels, strict=True)]) > 0.9
    np.testing.assert_allclose(
        [one.probability for one in found], fitted.predict_proba(texts).max(axis=1), atol=1e-5
    )
    top = [one.top(1)[0].text.strip() for one in found]
    assert np.mean([word in DECIDING for word in top]) > 0.9
    for one in found:
        assert "".join(word.text for word in one.words) == one.text


def test_importance_is_that_of_masking_by_hand(noisy_pair):
    classifier = Classifier(noisy_pair, NAMES, template=SHORT)
    text = "a new goal the bank"
    (found,) = explain(classifier, [text], label="money")
    scorer = classifier.asking_.scorer
    row = {"text": text, "options": NAMES, "examples": ""}
    (prompt,) = scorer.prompts([row])
    whole = scorer.log_probs([row])[0, 1]
    assert found.probability == pytest.approx(np.exp(whole), abs=1e-5)
    assert [word.text.strip() for word in found.words] == text.split()
    for at, word in enumerate(found.words):
        ids = list(prompt.ids)
        ids[1 + at] = scorer.tokenizer.mask_id
        changed = scorer._score([row], [prompt._replace(ids=ids)], None)[0, 1]
        assert word.importance == pytest.approx(whole - changed, abs=1e-5)
    assert len({round(word.importance, 4) for word in found.words}) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"orders": "all"},
        {"answer": "words", "template": "{text} [unused0] [MASK]"},
        {"answer": "continuation"},
        {"multi_label": True, "template": "{text} {label} {options} [unused0] [MASK]"},
        {"long_text": "mean", "max_length": 24},
    ],
)
def test_every_way_to_answer_can_be_explained(noisy_pair, options):
    classifier = Classifier(noisy_pair, NAMES, **{"template": SHORT, **options})
    text = "the new goal a old bank text rain cloud the new match"
    if "answer" in options and "words" not in options["answer"]:
        classifier.set_params(template="{text} [unused0] [MASK]")
    (found,) = explain(classifier, [text])
    probabilities = classifier.predict_proba([text])[0]
    assert found.label == NAMES[probabilities.argmax()]
    assert found.probability == pytest.approx(probabilities.max(), abs=1e-5)
    assert sum(abs(word.importance) > 1e-4 for word in found.words) > 9


def test_words_that_are_truncated_have_no_effect(noisy_pair):
    text = "goal " * 30
    classifier = Classifier(noisy_pair, NAMES, template=SHORT, max_length=24)
    (found,) = explain(classifier, [text])
    effects = [word.importance != 0 for word in found.words]
    assert 3 < sum(effects) < 20
    assert effects == sorted(effects, reverse=True)


def test_masks_of_a_fit_are_drawn_per_word(pair):
    prompter = Classifier.from_pretrained(pair, NAMES, template=SHORT).asking_
    texts, truth = examples(80)[0], [0, 1] * 40
    drawn = prompter.examples(range(80), texts, truth, 0, mask_share=0.4)
    plain = prompter.examples(range(80), texts, truth, 0)
    mask = prompter.scorer.tokenizer.mask_id
    counts = [one.ids.count(mask) - 1 for one in drawn.prompts]
    assert np.mean(counts) == pytest.approx(0.4 * 5, abs=0.3)
    assert [one.slot for one in drawn.prompts] == [one.slot for one in plain.prompts]
    for one, other in zip(drawn.prompts, plain.prompts, strict=True):
        changed = {at for at, (a, b) in enumerate(zip(one.ids, other.ids, strict=True)) if a != b}
        assert changed <= {1, 2, 3, 4, 5}
    assert drawn.prompts == prompter.examples(range(80), texts, truth, 0, 0.4).prompts


def test_bad_arguments_are_rejected(fitted):
    with pytest.raises(InputError, match=r"label 'sport' is not one of the labels; .*'sports'"):
        explain(fitted, ["a"], label="sport")
    with pytest.raises(InputError, match=r"row 2 \(index 1\): field 'text' is blank"):
        explain(fitted, ["a", " "])
    with pytest.raises(InputError, match="mask_share"):
        fitted.fit(["goal", "bank"], NAMES, mask_share=1.0)
    assert explain(fitted, []) == []


def test_coloured_text_is_escaped_and_complete(fitted):
    text = "the <goal> & bank"
    (found,) = explain(fitted, [text])
    html = coloured(text, found.words)
    assert "<goal" not in html
    assert html.count("<mark") == html.count("</mark>") == len(found.words)
    assert html.striptags() == text
    assert "--much:75%" in html
