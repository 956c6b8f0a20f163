"""Shortlists: only the labels nearest to a text are asked, with the answer of those alone."""

import numpy as np
import pytest
from labelled_texts import FAST, OTHERS, WORDS, word_model, word_tokenizer

import mlmjax
from mlmjax.classification.classifier import Classifier
from mlmjax.errors import InputError
from mlmjax.scoring.vectors.embedding import Embedder

LABELS = [*OTHERS[4:8], *WORDS["sports"], *WORDS["money"]]
TEXTS = ["goal goal the goal", "the old bank of rain", "a team"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("words"))
    return word_model(tokenizer), tokenizer


def make(pair, **options):
    return Classifier.from_pretrained(pair, LABELS, progress=False, **{"shortlist": 4, **options})


def nearest(embedder, texts):
    """The labels with the largest cosine."""
    labels, found = embedder.embed(LABELS), embedder.embed(texts)
    cosines = found @ labels.T / np.linalg.norm(labels, axis=1)
    return [sorted(row) for row in np.argsort(-cosines, axis=1)[:, :4].tolist()]


def check_is_answer_among(pair, found, near):
    others = 1e-6 / (len(LABELS) - 4)
    for text, row, own in zip(TEXTS, found, near, strict=True):
        alone = Classifier.from_pretrained(
            pair, [LABELS[i] for i in own], answer="letters", progress=False
        )
        expected = np.full(len(LABELS), others)
        expected[own] = alone.predict_proba([text])[0] * (1 - 1e-6)
        np.testing.assert_allclose(row, expected, rtol=1e-4)


def test_the_answer_is_that_among_the_nearest_labels(pair):
    classifier = make(pair)
    found = classifier.predict_proba(TEXTS)
    assert classifier.answer_ == "letters"
    assert classifier.prompts == len(TEXTS)
    near = nearest(Embedder(*pair), TEXTS)
    assert LABELS.index("goal") in near[0]
    check_is_answer_among(pair, found, near)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)


def test_another_model_may_choose_and_all_is_saved(pair, tmp_path):
    other = Embedder(word_model(pair[1], hidden_size=16), pair[1], pooling="cls")
    other.save_pretrained(tmp_path / "embedder")
    classifier = make(pair, shortlist_model=str(tmp_path / "embedder"))
    near = nearest(other, TEXTS)
    assert near != nearest(Embedder(*pair), TEXTS)
    found = classifier.predict_proba(TEXTS)
    check_is_answer_among(pair, found, near)
    classifier.save_pretrained(tmp_path / "saved")
    again = Classifier.from_pretrained(tmp_path / "saved", progress=False)
    np.testing.assert_array_equal(again.predict_proba(TEXTS), found)


def test_a_fitted_model_chooses_anew(pair, tmp_path):
    classifier = make(pair, answer="letters")
    classifier.predict_proba(TEXTS)
    classifier.fit(["the goal", "a bank"] * 8, ["goal", "bank"] * 8, **FAST | {"epochs": 1})
    found = classifier.predict_proba(TEXTS)
    fitted = classifier.asking_.scorer.model, pair[1]
    check_is_answer_among(fitted, found, nearest(Embedder(*fitted), TEXTS))


def test_all_labels_are_asked_if_the_list_is_long_enough(pair):
    plain = make(pair, shortlist=None, answer="letters")
    found = make(pair, shortlist=len(LABELS)).predict_proba(TEXTS)
    np.testing.assert_array_equal(found, plain.predict_proba(TEXTS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortlist": 1}, "shortlist"),
        ({"answer": "words"}, "shortlist is 4, but a prompt here does not list the labels"),
        ({"multi_label": True}, "does not list the labels"),
    ],
)
def test_a_shortlist_needs_options(pair, options, message):
    with pytest.raises(InputError, match=message):
        make(pair, **options)


def test_a_program_cannot_choose(pair, tmp_path):
    with pytest.raises(InputError, match="needs more than one plain prompt"):
        mlmjax.export_program(make(pair), tmp_path / "out")
