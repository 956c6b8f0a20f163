"""The same scores alone, in a batch and in any bucket; few compilations; hostile text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from noisy_models import build
from small_models import noisy, small_config, small_model

from mlmjax.errors import InputError
from mlmjax.model.modernbert import ModernBertForMaskedLM, ModernBertForSequenceClassification
from mlmjax.scoring import scorers
from mlmjax.scoring.engine import bucket_lengths
from mlmjax.scoring.scorers import HeadScorer, Scorer
from mlmjax.text.prompts import Template
from mlmjax.text.verbalizer import Verbalizer

TOPIC = Template(
    "Which topic?\n{text}\n{options}Answer: [unused0] [MASK]", shorten={"text": "tail"}
)
LABELS = ["sports", "world", "business"]
LETTERS = Verbalizer.letters(LABELS)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def scorer(model, tokenizer):
    """Share what is compiled among the tests that need no other options."""
    return Scorer(model, tokenizer, TOPIC, LETTERS)


def texts(count, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    words = ["rain", "goal", "stock", "market", "minister", "the", "of", "won", "—", "Zürich", "8"]
    return [" ".join(rng.choice(words, rng.integers(1, longest))) for _ in range(count)]


def rows(count, **options):
    return [{"text": text, "options": LABELS} for text in texts(count, **options)]


def plain_logits(call, tokenizer, ids):
    """Return the logits of one prompt by the model's own call."""
    padded = np.full((1, 160), tokenizer.pad_id)
    padded[0, : len(ids)] = ids
    return np.asarray(call(padded, np.arange(160)[None] < len(ids))[0], np.float64)


@pytest.fixture(scope="module")
def full_logits(model, tokenizer):
    """Give the logits `[vocab]` of one prompt at its slot."""
    call = jax.jit(model.__call__)

    def logits(template, row):
        ids, slot = template.encode(tokenizer, row, 160)
        return plain_logits(call, tokenizer, ids)[slot]

    return logits


@pytest.mark.parametrize("longest", [1, 31, 32, 33, 64, 100, 512, 8192])
def test_buckets_are_few_ascending_and_end_at_the_longest(longest):
    buckets = bucket_lengths(longest)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == longest
    assert len(buckets) <= 31


@pytest.mark.parametrize(
    ("normalize", "tolerance"),
    [("labels", {"atol": 1e-5}), ("vocabulary", {"atol": 1e-6, "rtol": 1e-4})],
)
def test_labels_have_the_summed_probability_of_their_forms_at_the_slot(
    normalize, tolerance, model, tokenizer, full_logits
):
    verbalizer = Verbalizer({"yes": [" yes", " true"], "no": [" no"], "maybe": [" maybe", " A"]})
    items = [{"text": text} for text in texts(7)]
    template = Template("{text} Answer:", shorten={"text": "tail"})
    found = Scorer(model, tokenizer, template, verbalizer, normalize=normalize).log_probs(items)
    for row, item in zip(found, items, strict=True):
        logits = full_logits(template, item)
        probabilities = np.exp(logits - np.logaddexp.reduce(logits))
        expected = np.array([probabilities[list(ids)].sum() for ids in verbalizer.ids(tokenizer)])
        expected /= expected.sum() if normalize == "labels" else 1
        np.testing.assert_allclose(np.exp(row), expected, **tolerance)


def test_the_same_alone_in_a_batch_and_in_any_bucket(scorer, model, tokenizer):
    items = rows(24)
    together = scorer.log_probs(items)
    alone = Scorer(model, tokenizer, TOPIC, LETTERS, batch_size=1)
    alone = np.concatenate([alone.log_probs([item]) for item in items])
    widest = Scorer(model, tokenizer, TOPIC, LETTERS, batch_size=3)
    widest.engine.buckets = widest.buckets[-1:]
    for other in (alone, widest.log_probs(items)):
        np.testing.assert_allclose(np.exp(other), np.exp(together), atol=1e-5)
    # The comparison means something only if rows differ from one another.
    assert np.ptp(np.exp(together), axis=0).min() > 1e-3


def test_bfloat16_is_close_to_float32(tokenizer):
    config, items = small_config(), rows(12)
    full, half = (
        Scorer(
            build(ModernBertForMaskedLM, config, 0.02, dtype=dtype), tokenizer, TOPIC, LETTERS
        ).log_probs(items)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.dtype == np.float32
    np.testing.assert_allclose(np.exp(half), np.exp(full), atol=0.02)
    assert np.abs(half - full).max() > 0


def test_compilations_are_at_most_the_buckets(model, tokenizer):
    scorer = Scorer(model, tokenizer, TOPIC, LETTERS, max_length=64, batch_size=8)
    other = scorer.engine.jitted._cache_size()
    stream = rows(120, longest=40)
    ends = np.cumsum(np.random.default_rng(3).integers(1, 30, 12))
    for part in np.split(np.array(stream), ends):
        scorer.log_probs(part.tolist())
    assert 1 < scorer.compilations <= len(scorer.buckets) == 3
    compiled = scorer.engine.jitted._cache_size()
    assert compiled - other <= scorer.compilations
    scorer.log_probs(stream[:50])
    assert scorer.engine.jitted._cache_size() == compiled
    # A scorer of a similar model compiles nothing again.
    again = Scorer(noisy(model), tokenizer, TOPIC, LETTERS, max_length=64, batch_size=8)
    again.log_probs(stream[:50])
    assert again.engine.jitted._cache_size() == compiled


def test_padding_is_counted(model, tokenizer):
    scorer = Scorer(model, tokenizer, TOPIC, LETTERS, batch_size=4)
    assert scorer.padding_share == 0.0
    scorer.log_probs([{"text": "goal " * 10, "options": LABELS}])
    ids, _ = TOPIC.encode(tokenizer, {"text": "goal " * 10, "options": LABELS}, 160)
    bucket = min(length for length in scorer.buckets if length >= len(ids))
    assert scorer.padding_share == pytest.approx(1 - len(ids) / (4 * bucket))


@pytest.mark.parametrize("normalize", ["labels", "vocabulary"])
def test_options_of_a_row_bound_its_labels(model, tokenizer, normalize):
    verbalizer = Verbalizer.letters(["A", "B", "C", "D"])
    items = [
        {"text": "rain", "options": ["sun", "snow"]},
        {"text": "rain", "options": ["sun", "snow", "hail", "fog"]},
        {"text": "rain", "options": ("sun", "snow", "hail")},
    ]
    found = Scorer(model, tokenizer, TOPIC, verbalizer, normalize=normalize).log_probs(items)
    assert [np.isfinite(row).sum() for row in found] == [2, 4, 3]
    assert np.isneginf(found[0, 2:]).all()
    sums = np.exp(found).sum(axis=1)
    assert (sums < 1).all() if normalize == "vocabulary" else np.allclose(sums, 1, atol=1e-6)


def test_prompts_may_leave_out_the_options(model, tokenizer):
    found = Scorer(model, tokenizer, Template("{text}"), LETTERS).log_probs(
        [{"text": "goal", "options": ["x", "y"]}, {"text": "goal", "options": None}]
    )
    assert [np.isfinite(row).sum() for row in found] == [2, 3]


def test_any_iterable_is_read_in_chunks(scorer, monkeypatch):
    assert scorer.log_probs([]).shape == (0, 3)
    items = rows(25)
    whole, done = scorer.log_probs(items), []
    monkeypatch.setattr(scorers, "CHUNK_ROWS", 10)
    in_chunks = scorer.log_probs(iter(items), progress=done.append)
    np.testing.assert_allclose(np.exp(in_chunks), np.exp(whole), atol=1e-5)
    assert done == [10, 10, 5]  # rows since the last call
    with pytest.raises(InputError, match=r"row 24 \(index 23\)"):
        scorer.log_probs([*items[:23], {"text": " ", "options": LABELS}])


def test_long_texts_are_shortened_and_counted(scorer, model, tokenizer):
    items = [{"text": "goal " * n, "options": LABELS} for n in (2, 1000, 8, 5000)]
    before = scorer.shortened
    found = scorer.log_probs(items)
    assert scorer.shortened - before == 2
    assert scorer.buckets[-1] == model.config.max_position_embeddings
    np.testing.assert_allclose(np.exp(found[1]), np.exp(found[3]), atol=1e-6)
    shorter = Scorer(model, tokenizer, TOPIC, LETTERS, max_length=48)
    shorter.log_probs(items)
    assert shorter.shortened == 2


@pytest.mark.parametrize("text", ["[unused0] [MASK]\n- A: no", "{text} {{}} %s", " " * 300 + "x"])
def test_hostile_text_keeps_the_slot(scorer, tokenizer, full_logits, text):
    """`test_hostile_api` has hundreds of texts; here the logits are those at the slot."""
    for row in ({"text": text, "options": LABELS}, {"text": "goal", "options": [text[-50:], "b"]}):
        forms = [ids[0] for ids in LETTERS.ids(tokenizer)][: len(row["options"])]
        chosen = full_logits(TOPIC, row)[forms]
        found = scorer.log_probs([row])
        expected = np.exp(chosen - np.logaddexp.reduce(chosen))
        np.testing.assert_allclose(np.exp(found[0][: len(expected)]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"options": LABELS}, "has no field 'text'"),
        ({"text": "  \n", "options": LABELS}, "field 'text' is blank"),
        ({"text": "goal", "options": ["a", " "]}, "option 2 is blank"),
        ({"text": "goal", "options": ["a", "b", "c", "d"]}, "has 4 options; .* 3 labels"),
        ({"text": "goal", "options": ["w " * 900, "b"]}, "the prompt has .* tokens"),
        ("goal", "is 'goal' \\(str\\)"),
    ],
)
def test_a_bad_row_is_named(scorer, row, message):
    good = {"text": "goal", "options": LABELS}
    with pytest.raises(InputError, match=rf"^row 2 \(index 1\): {message}") as caught:
        scorer.log_probs([good, row, good, row])
    assert [line[:5] for line in caught.value.details] == ["row 4"]
    with pytest.raises(InputError, match=rf"^line 9: {message}"):
        scorer.log_probs([row], where=["line 9"])


def test_bad_arguments_are_rejected(scorer, model, tokenizer):
    with pytest.raises(InputError, match="rows: found one str"):
        scorer.log_probs("goal")
    two_tokens = Verbalizer.words(["entailment", "neutral"])
    head = small_model(ModernBertForSequenceClassification)
    other = small_model(vocab_size=50300)
    for scored, verbalizer, options, message in (
        (model, LETTERS, {"normalize": "none"}, "normalize is 'none'"),
        (model, LETTERS, {"batch_size": 0}, "batch_size is 0"),
        (model, two_tokens, {}, "2 tokens"),
        (head, LETTERS, {}, "ModernBertForSequenceClassification has no"),
        (other, LETTERS, {}, "50368 ids, the model 50300 rows"),
    ):
        with pytest.raises(InputError, match=message):
            Scorer(scored, tokenizer, TOPIC, verbalizer, **options)


def test_a_model_changed_in_place_is_scored_again(tokenizer):
    model = small_model(scale=0.02)
    scorer = Scorer(model, tokenizer, TOPIC, LETTERS)
    before = scorer.log_probs(rows(2))
    nnx.update(model, nnx.state(noisy(model)))
    assert np.abs(scorer.log_probs(rows(2)) - before).max() > 1e-3


def test_a_classification_head_gives_its_labels(tokenizer):
    names = dict(enumerate(LABELS))
    model = small_model(ModernBertForSequenceClassification, num_labels=3, id2label=names)
    template = Template("{text}", shorten={"text": "tail"}, slot=False)
    scorer = HeadScorer(model, tokenizer, template)
    items = [{"text": text} for text in texts(9)]
    found = scorer.log_probs(items)
    assert scorer.labels == tuple(LABELS)
    call = jax.jit(model.__call__)
    for row, item in zip(found, items, strict=True):
        logits = plain_logits(call, tokenizer, template.render(tokenizer, item, 160).ids)
        np.testing.assert_allclose(row, jax.nn.log_softmax(logits), atol=1e-4)


def test_heads_of_another_kind_are_rejected(model, tokenizer):
    template = Template("{text}", slot=False)
    with pytest.raises(InputError, match="ModernBertForMaskedLM has no classification head"):
        HeadScorer(model, tokenizer, template)
    for changes in ({"num_labels": 1}, {"problem_type": "multi_label_classification"}):
        head = small_model(ModernBertForSequenceClassification, **changes)
        with pytest.raises(InputError, match="expected one class of two or more"):
            HeadScorer(head, tokenizer, template)
