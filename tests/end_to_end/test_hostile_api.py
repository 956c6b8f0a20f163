"""Hostile texts and label lists through the Python API: scored as if alone, or rejected by row."""

import numpy as np
import pytest
from hostile import api
from small_models import small_model

from mlmjax import Classifier, Scorer, Template, Verbalizer
from mlmjax.errors import InputError
from mlmjax.scoring import engine
from mlmjax.scoring.fill_mask import MaskFiller
from mlmjax.scoring.likelihood import TextScorer

LENGTH = 96
TEXTS = api.texts()
REFUSED = api.refused()
LISTS = api.option_lists(4)
TOPIC = Template("{text}\n{options}Answer: [unused0] [MASK]", shorten={"text": "tail"})
SHORT = Template("{text}\n{options}Answer:", shorten={"text": "tail"})
LETTERS = Verbalizer.letters(["a", "b", "c", "d"])


@pytest.fixture(autouse=True)
def two_buckets(monkeypatch):
    """Compile two programs of each kind instead of five."""
    monkeypatch.setattr(engine, "bucket_lengths", lambda longest: (32, longest))


@pytest.fixture(scope="module")
def model():
    return small_model(max_position_embeddings=LENGTH, num_hidden_layers=1)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    """The number of tokens of each text."""
    return [len(ids) for ids in tokenizer.encode_plain_batch(TEXTS)]


def test_there_are_enough():
    assert len(TEXTS) + len(REFUSED) + len(LISTS) + len(api.LABELS_REFUSED) > 600
    assert len(set(TEXTS)) > 500


def test_every_row_is_scored_as_if_alone(model, tokenizer):
    fitting = []
    scorer = Scorer(model, tokenizer, TOPIC, LETTERS)
    for i, text in enumerate(TEXTS):
        row = {"text": text, "options": LISTS[i % len(LISTS)]}
        try:
            (prompt,) = scorer.prompts([row])
        except InputError:  # its options alone are more than the model reads
            with pytest.raises(InputError, match="there is no room"):
                scorer.prompts([row])
            continue
        assert prompt.ids.count(tokenizer.mask_id) == 1
        assert prompt.ids[-3:-1] == [tokenizer.anchor_id, tokenizer.mask_id]
        assert prompt.slot == len(prompt.ids) - 2
        assert tokenizer.special_ids.isdisjoint(prompt.ids[1 : prompt.slot - 1])
        fitting.append(row)
    assert len(fitting) > 480
    found = scorer.log_probs(fitting)
    for row, values in zip(fitting, np.exp(found.astype(np.float64)), strict=True):
        assert np.count_nonzero(values) == len(row["options"])
        assert values.sum() == pytest.approx(1, abs=1e-5)
    alone = Scorer(model, tokenizer, TOPIC, LETTERS, batch_size=1)
    alone = np.concatenate([alone.log_probs([row]) for row in fitting[::8]])
    np.testing.assert_allclose(np.exp(alone), np.exp(found[::8]), atol=1e-5)


def test_every_text_is_classified_as_if_alone(model, tokenizer):
    options = {"template": SHORT, "batch_size": 8}
    for labels in api.LABELS.values():
        classifier = Classifier.from_pretrained((model, tokenizer), labels, **options)
        assert list(classifier.classes_) == list(labels)
        texts = TEXTS[::3] if labels is api.LABELS["odd"] else TEXTS[:60:7]
        found = classifier.predict_proba(texts)
        assert found.shape == (len(texts), len(labels))
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
        for i in range(0, len(texts), 8):
            alone = classifier.predict_proba([texts[i]])
            np.testing.assert_allclose(alone[0], found[i], atol=1e-5)


def test_every_text_that_fits_has_its_likelihood(model, tokenizer, tokens):
    scorer = TextScorer(model, tokenizer)
    short = [(text, n) for text, n in zip(TEXTS, tokens, strict=True) if n <= 24]
    assert len(short) > 250
    found = scorer.score([text for text, _ in short])
    for (_, count), score in zip(short, found, strict=True):
        assert len(score.tokens) == count
        assert -np.inf < score.total < 0
        assert not tokenizer.special_ids & {token.id for token in score.tokens}
    alone = TextScorer(model, tokenizer, batch_size=1)
    for i in range(0, len(short), 16):
        (score,) = alone.score([short[i][0]])
        assert [token[:2] for token in score.tokens] == [token[:2] for token in found[i].tokens]
        values = [[token.log_prob for token in one.tokens] for one in (score, found[i])]
        np.testing.assert_allclose(*values, atol=1e-4)
    for text, n in zip(TEXTS, tokens, strict=True):
        if n > LENGTH - 2:
            with pytest.raises(InputError, match=rf"^row 2 .*: has {n} tokens and at most 94 fit"):
                scorer.score(["goal", text])


def test_every_mask_is_filled(model, tokenizer, tokens):
    filler = MaskFiller(model, tokenizer, top_k=3, batch_size=32)
    texts = [f"{text} [MASK]" for text, n in zip(TEXTS, tokens, strict=True) if n <= 60]
    assert len(texts) > 400
    found = filler.fill(texts)
    for text, masks in zip(texts, found, strict=True):
        assert len(masks) == text.count("[MASK]")
        for answers in masks:
            shares = [answer.probability for answer in answers]
            assert shares == sorted(shares, reverse=True)
            assert len(shares) == 3
            assert 0 < sum(shares) < 1
            assert not tokenizer.special_ids & {answer.id for answer in answers}
    single = MaskFiller(model, tokenizer, top_k=3, batch_size=1)
    for i in range(0, len(texts), 16):
        (alone,) = single.fill([texts[i]])
        values = [
            [answer.probability for answers in masks for answer in answers]
            for masks in (alone, found[i])
        ]
        np.testing.assert_allclose(*values, rtol=1e-3)


def test_blank_texts_and_other_values_are_rejected_by_row(model, tokenizer):
    scorer = Scorer(model, tokenizer, TOPIC, LETTERS)
    for act in (
        lambda texts: scorer.log_probs([{"text": text, "options": ["a"]} for text in texts]),
        lambda texts: scorer.log_probs([{"text": "goal", "options": [text]} for text in texts]),
        Classifier((model, tokenizer), ["a", "b"], template="{text}{options}").predict_proba,
        TextScorer(model, tokenizer).score,
        MaskFiller(model, tokenizer).fill,
    ):
        with pytest.raises(InputError) as caught:
            act(REFUSED)
        lines = [caught.value.message, *caught.value.details]
        names = [f"row {i + 1} (index {i})" for i in range(len(REFUSED))]
        assert [line.split(":")[0] for line in lines] == names
        assert all(line.isprintable() and len(line) < 400 for line in lines)


@pytest.mark.parametrize("name", api.LABELS_REFUSED)
def test_wrong_label_lists_are_rejected(model, tokenizer, name):
    with pytest.raises(InputError) as caught:
        Classifier((model, tokenizer), api.LABELS_REFUSED[name], template=SHORT).predict(["goal"])
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600
