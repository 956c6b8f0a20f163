"""Conditionals of two masks equal those of filling one mask after the other by hand."""

import numpy as np
import pytest

from mlmjax import pair_log_probs
from mlmjax.errors import InputError
from mlmjax.scoring.fill_mask import MaskFiller

FIRST, SECOND = ["goal", "bank", "rain"], ["old", "new"]


@pytest.fixture(scope="module")
def by_hand(words):
    """Return a function from a text and names to the names' log probabilities at each mask."""
    filler = MaskFiller(*words, top_k=words[1].vocab_size - len(words[1].special_ids))

    def score(text, names):
        (masks,) = filler.fill([text])
        shares = [{answer.token: answer.probability for answer in mask} for mask in masks]
        pairs = zip(shares, names, strict=True)
        return [np.log([share[name] for name in own]) for share, own in pairs]

    return score


def test_every_conditional_as_by_hand(words, by_hand):
    texts = ["the [MASK] is a [MASK] text", "[MASK] [MASK]"]
    found = pair_log_probs(*words, texts, first=FIRST, second=SECOND)
    for text, one in zip(texts, found, strict=True):
        first, second = by_hand(text, [FIRST, SECOND])
        np.testing.assert_allclose(one.first, first, atol=1e-4)
        np.testing.assert_allclose(one.second, second, atol=1e-4)
        for b, name in enumerate(SECOND):
            before, after = text.rsplit("[MASK]", 1)
            (own,) = by_hand(before + name + after, [FIRST])
            np.testing.assert_allclose(one.first_given_second[:, b], own, atol=1e-4)
        for a, name in enumerate(FIRST):
            (own,) = by_hand(text.replace("[MASK]", name, 1), [SECOND])
            np.testing.assert_allclose(one.second_given_first[a], own, atol=1e-4)
        odds = one.first[1] + one.second_given_first[1, 0]
        odds -= one.second[0] + one.first_given_second[1, 0]
        assert one.log_odds.shape == (3, 2)
        assert one.log_odds[1, 0] == pytest.approx(odds)
        assert np.abs(one.log_odds).max() > 1e-3


def test_bad_input_is_named(words):
    options = {"first": FIRST, "second": SECOND}
    with pytest.raises(InputError, match=r"row 2 \(index 1\): has 1 masks; expected two"):
        pair_log_probs(*words, ["[MASK] [MASK]", "a [MASK]"], **options)
    for changes, message in (
        ({"first": ["the goal"]}, "first: 'the goal' is 2 tokens; expected one"),
        ({"second": []}, "second: the list is empty"),
        ({"second": "old"}, "second: found one str"),
    ):
        with pytest.raises(InputError, match=message):
            pair_log_probs(*words, ["[MASK] [MASK]"], **{**options, **changes})
    assert pair_log_probs(*words, [], **options) == []
