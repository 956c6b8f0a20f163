"""Masks filled step by step equal masks filled by hand, and draws follow the probabilities."""

import numpy as np
import pytest

from mlmjax import fill_mask, generate
from mlmjax.errors import InputError
from mlmjax.scoring import likelihood
from mlmjax.scoring.engine import Engine
from mlmjax.scoring.fill_mask import ids_with_masks
from mlmjax.scoring.masks.generation import Generator

TEXTS = [
    "the [MASK] bank , a [MASK] price [MASK] .",
    "[MASK]",
    "rain [MASK] old [MASK] [MASK] [MASK] [MASK] - { text } [SEP] new",
    "a " + "[MASK] " * 11,
]


@pytest.fixture(scope="module")
def tokenizer(words):
    return words[1]


@pytest.fixture(scope="module")
def model(words):
    return words[0]


def encode(model, ids, segment_ids):
    return model.encode(ids, segment_ids)


@pytest.fixture(scope="module")
def by_hand(model, tokenizer):
    """Return a function that fills the masks of a text one by one, each after a pass of its own."""
    engine = Engine(model, tokenizer, encode)
    never = [*tokenizer.special_ids, *range(tokenizer.vocab_size, model.config.vocab_size)]

    def fill(text, order):
        ids = tokenizer.wrap(ids_with_masks(tokenizer, text))
        while tokenizer.mask_id in ids:
            slots = [at for at, token in enumerate(ids) if token == tokenizer.mask_id]
            logits = np.array(model.mlm_logits(engine.run([ids])[0]), np.float64)[slots]
            logits[:, never] = -np.inf
            sure = logits.max(axis=1) - np.logaddexp.reduce(logits, axis=1)
            at = sure.argmax() if order == "confidence" else 0
            ids[slots[at]] = int(logits[at].argmax())
        return tokenizer.decode(ids[1:-1])

    return fill


@pytest.mark.parametrize("order", ["left", "confidence"])
def test_one_by_one_as_by_hand(model, tokenizer, by_hand, order):
    found = generate(model, tokenizer, TEXTS, order=order)
    assert [one.text for one in found] == [by_hand(text, order) for text in TEXTS]
    steps = [[token.step for token in one.tokens] for one in found]
    assert [sorted(own) for own in steps] == [list(range(len(own))) for own in steps]
    if order == "left":
        assert steps == [sorted(own) for own in steps]
    else:
        assert steps != [sorted(own) for own in steps]
    for one in found:
        assert all(token.log_prob < 0 for token in one.tokens)
        assert all(token.text in one.text for token in one.tokens)


def test_one_step_fills_all_masks_as_fill_mask_does(model, tokenizer):
    best = fill_mask(model, tokenizer, TEXTS, top_k=1)
    for order in ("confidence", "left", "random"):
        found = generate(model, tokenizer, TEXTS, order=order, steps=1)
        for one, masks in zip(found, best, strict=True):
            assert [token.id for token in one.tokens] == [answers[0].id for answers in masks]


def test_steps_are_even_and_a_text_with_few_masks_is_done_early(model, tokenizer):
    counted = []
    found = generate(
        model, tokenizer, TEXTS, steps=4, order="random", seed=3, progress=counted.append
    )
    steps = [sorted(token.step for token in one.tokens) for one in found]
    assert steps == [[0, 1, 2], [0], [0, 0, 1, 2, 3], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]]
    assert sum(counted) == 20
    orders = {
        tuple(token.step for token in generate(model, tokenizer, TEXTS[3:], **options)[0].tokens)
        for options in ({"order": "random"}, {"order": "random", "seed": 1}, {"order": "left"})
    }
    assert len(orders) == 3


def test_draws_depend_on_seed_and_number_not_on_company(model, tokenizer, monkeypatch):
    generator = Generator(model, tokenizer, temperature=0.7)
    together = generator.generate(TEXTS, seed=5)
    assert together == generator.generate(TEXTS, seed=5)
    assert together != generator.generate(TEXTS, seed=6)
    monkeypatch.setattr(likelihood, "CHUNK_CHARACTERS", 10)
    chunked = generator.generate(iter(TEXTS), seed=5)
    assert [one.text for one in chunked] == [one.text for one in together]
    twice = generator.generate([TEXTS[0], TEXTS[0]], seed=5)
    assert twice[0].text == together[0].text != twice[1].text


def test_draws_follow_the_probabilities(model, tokenizer):
    names = ["goal", "bank", "rain"]
    ids = [tokenizer.encode_plain(name)[0] for name in names]
    text, count = "the [MASK] text", 900
    size = tokenizer.vocab_size - len(tokenizer.special_ids)
    ((answers,),) = fill_mask(model, tokenizer, [text], top_k=size)
    shares = {answer.id: answer.probability for answer in answers}
    plain = np.array([shares[i] for i in ids])
    assert np.ptp(plain / plain.sum()) > 0.2
    for temperature in (1.0, 0.5):
        expected = plain ** (1 / temperature)
        expected /= expected.sum()
        options = {"temperature": temperature, "allowed": [[names]] * count}
        found = generate(model, tokenizer, [text] * count, **options)
        drawn = [one.tokens[0].id for one in found]
        for share, token in zip(expected, ids, strict=True):
            assert drawn.count(token) / count == pytest.approx(share, abs=0.05)
        own = dict(zip(ids, np.log(plain / plain.sum()), strict=True))
        assert [one.tokens[0].log_prob for one in found[:9]] == pytest.approx(
            [own[token] for token in drawn[:9]], abs=1e-3
        )


def test_any_token_may_be_drawn_but_special_ones(model, tokenizer):
    text = "[MASK] " * 40
    tokens = [
        token.id
        for one in generate(model, tokenizer, [text] * 5, temperature=100.0, steps=2)
        for token in one.tokens
    ]
    assert len(set(tokens)) > 0.9 * (tokenizer.vocab_size - len(tokenizer.special_ids))
    assert not set(tokens) & tokenizer.special_ids
    assert max(tokens) < tokenizer.vocab_size


def test_only_allowed_tokens_fill_a_mask_and_fixed_text_stays(model, tokenizer):
    allowed = [[["goal", "match"], None, ["-"]], None]
    found = generate(model, tokenizer, TEXTS[:2], allowed=allowed, temperature=5.0)
    tokens = found[0].tokens
    assert tokens[0].text in ("goal", "match")
    assert (tokens[2].text, tokens[2].log_prob) == ("-", 0.0)
    assert found[0].text == f"the {tokens[0].text} bank [UNK] a {tokens[1].text} price - ."
    free = generate(model, tokenizer, TEXTS[:2], temperature=5.0)
    assert free[1] == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "right"}, "order is 'right'; expected one of 'confidence', 'left', 'random'"),
        ({"steps": 0}, "steps is 0; expected 1 or more"),
        ({"steps": True}, "steps is True"),
        ({"temperature": -1}, "temperature is -1; expected a number from 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seed": -1}, "seed is -1; expected 0 to"),
        ({"allowed": [[None]]}, r"allowed has 1 entries and there are more texts"),
        ({"allowed": [[None], None, None]}, "allowed has 3 entries for 2 texts"),
        ({"allowed": [None, [None]]}, r"row 2 \(index 1\): has 2 masks and 1 entries in allowed"),
        ({"allowed": [[[]], None]}, "row 1 .*: an entry of allowed is empty"),
        ({"allowed": [[["goal bank"]], None]}, "'goal bank', which is 2 tokens; expected one"),
        ({"allowed": "cat"}, "allowed: found one str"),
        ({"step": 1}, "step"),
    ],
)
def test_bad_arguments_are_rejected(model, tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        generate(model, tokenizer, ["a [MASK]", "[MASK] [MASK]"], **options)


def test_texts_without_masks_are_named_and_none_are_nothing(model, tokenizer):
    with pytest.raises(InputError, match=r"^row 2 \(index 1\): has no \[MASK\]; write"):
        generate(model, tokenizer, ["a[MASK]", "a"])
    assert generate(model, tokenizer, []) == []
