"""Pseudo-log-likelihood and filled masks equal brute force in torch, alone and in company."""

import numpy as np
import pytest
from flax import nnx
from noisy_models import build
from tiny_models import torch, torch_model, transformers

from mlmjax import fill_mask, perplexity, pseudo_log_likelihood
from mlmjax.errors import InputError, RunError
from mlmjax.model.modernbert import ModernBertForSequenceClassification
from mlmjax.scoring import likelihood
from mlmjax.scoring.fill_mask import MASKS_AT_ONCE, MaskFiller
from mlmjax.scoring.likelihood import TextScorer
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.words import word_starts
from mlmjax.weights.pretrained import load_pretrained

LONGEST = 96
TEXTS = [
    "An untokenizable (sub)word, 3.14",
    "The goalkeeper's antidisestablishmentarianism!",
    "x",
    "Zürich — 東京都 😀👩‍👩‍👧 naïveté",
    "[MASK] and [SEP] and [unused0] are text   here\n\n\tindented",
    "A  B",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of ModernBERT's vocabulary, written by transformers, with its tokenizer."""
    folder = tmp_path_factory.mktemp("pll") / "model"
    tokens = {"pad": 50283, "cls": 50281, "bos": 50281, "sep": 50282, "eos": 50282}
    sizes = {f"{name}_token_id": token for name, token in tokens.items()}
    model = torch_model(vocab_size=50368, max_position_embeddings=LONGEST, **sizes)
    model.save_pretrained(folder)
    Tokenizer.from_pretrained().save(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(folder):
    return load_pretrained(folder)


@pytest.fixture(scope="module")
def scorers(ours):
    """Share what is compiled."""
    return {method: TextScorer(*ours, method=method) for method in ("original", "word_l2r")}


def brute_force(theirs, tokenizer, text, method):
    """One token after the other, each in a batch of its own."""
    ids = tokenizer.encode_plain(text)
    starts = word_starts(tokenizer)(np.array(ids))
    log_probs = []
    for at, token in enumerate(ids):
        masked = list(ids)
        masked[at] = tokenizer.mask_id
        for later in range(at + 1, len(ids)):
            if method == "original" or starts[later]:
                break
            masked[later] = tokenizer.mask_id
        sequence = torch.tensor([[tokenizer.cls_id, *masked, tokenizer.sep_id]])
        with torch.no_grad():
            logits = theirs(input_ids=sequence).logits[0, at + 1]
        log_probs.append(float(torch.log_softmax(logits.double(), -1)[token]))
    return ids, starts, log_probs


@pytest.mark.parametrize("method", ["original", "word_l2r"])
def test_each_token_as_by_brute_force(scorers, theirs, ours, method):
    scores = scorers[method].score(TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        ids, starts, expected = brute_force(theirs, ours[1], text, method)
        assert [token.id for token in score.tokens] == ids
        assert [token.text for token in score.tokens] == [ours[1].decode([i]) for i in ids]
        found = [token.log_prob for token in score.tokens]
        np.testing.assert_allclose(found, expected, atol=2e-4)
        assert score.total == pytest.approx(sum(found))
        assert score.per_token == pytest.approx(np.mean(found))
        assert score.per_word == pytest.approx(sum(found) / sum(starts))


def test_unmasked_as_by_brute_force(ours, theirs):
    counted = []
    scorer = TextScorer(*ours, method="unmasked")
    scores = scorer.score(TEXTS, progress=counted.append)
    for text, score in zip(TEXTS, scores, strict=True):
        ids = ours[1].encode_plain(text)
        sequence = torch.tensor([ours[1].wrap(ids)])
        with torch.no_grad():
            logits = theirs(input_ids=sequence).logits[0, 1:-1]
        expected = torch.log_softmax(logits.double(), -1)[range(len(ids)), ids]
        np.testing.assert_allclose([one.log_prob for one in score.tokens], expected, atol=2e-4)
    assert sum(counted) == sum(len(score.tokens) for score in scores)
    alone = scorer.score(TEXTS[1:2])[0]
    assert alone.total == pytest.approx(scores[1].total, abs=1e-3)
    losses = [-one.log_prob for score in scores for one in score.tokens]
    assert perplexity(scores) == pytest.approx(np.exp(np.mean(losses)))
    words = sum(one.starts_word for score in scores for one in score.tokens)
    assert perplexity(scores, per="word") == pytest.approx(np.exp(np.sum(losses) / words))
    with pytest.raises(InputError, match="per is 'text'; expected 'token' or 'word'"):
        perplexity(scores, per="text")
    with pytest.raises(InputError, match="scores: the list is empty"):
        perplexity([])


def test_the_methods_differ_only_inside_words(scorers):
    first, second = (scorers[method].score(TEXTS[:2]) for method in ("original", "word_l2r"))
    for one, other in zip(first, second, strict=True):
        change = [
            abs(a.log_prob - b.log_prob) for a, b in zip(one.tokens, other.tokens, strict=True)
        ]
        goes_on = [not token.starts_word for token in one.tokens[1:]] + [False]
        assert [value > 1e-4 for value in change] == goes_on


def test_alone_in_company_and_in_chunks(scorers, monkeypatch):
    scorer = scorers["word_l2r"]
    together = scorer.score(TEXTS)
    alone = [scorer.score([text])[0] for text in TEXTS]
    monkeypatch.setattr(likelihood, "CHUNK_CHARACTERS", 40)
    monkeypatch.setattr(likelihood, "CHUNK_TOKENS", 100)
    counted = []
    chunked = scorer.score(iter(TEXTS), progress=counted.append)
    for other in (alone, chunked):
        for one, two in zip(together, other, strict=True):
            assert [token[:2] for token in one.tokens] == [token[:2] for token in two.tokens]
            np.testing.assert_allclose(
                [token.log_prob for token in one.tokens],
                [token.log_prob for token in two.tokens],
                atol=1e-4,
            )
    assert len(counted) > 1
    assert sum(counted) == sum(len(score.tokens) for score in together)


def test_sequences_of_a_long_text_do_not_exist_all_at_once(ours, monkeypatch):
    scorer = TextScorer(*ours)
    monkeypatch.setattr(likelihood, "CHUNK_TOKENS", 300)
    sizes = []

    def run(sequences, *columns, progress=None):
        sizes.append(sum(map(len, sequences)))
        return np.zeros(len(sequences), np.float32)

    monkeypatch.setattr(scorer.engine, "run", run)
    scorer.score(["goal" + " goal" * (LONGEST - 3)])
    assert sum(sizes) == LONGEST * (LONGEST - 2)
    assert max(sizes) < 300 + LONGEST


MASKED = [
    "Rain in [MASK].",
    "[MASK]",
    "The [MASK] of the\u2003[MASK] won[MASK][MASK]! [SEP] [unused0]",
    "a {text} " + "[MASK] or " * (MASKS_AT_ONCE + 3),
]


@pytest.fixture(scope="module")
def filler(ours):
    return MaskFiller(*ours, top_k=50)


def test_masks_as_by_the_pipeline(folder, ours, filler):
    """Their tokenizer would make special tokens of the text, so theirs reads our texts cleaned."""
    pipeline = transformers.pipeline(
        "fill-mask", model=str(folder), dtype=torch.float32, device="cpu", top_k=70
    )
    texts = [text.replace(" [SEP] [unused0]", "") for text in MASKED]
    special = ours[1].special_ids
    for text, found in zip(texts, filler.fill(texts), strict=True):
        expected = pipeline(text)
        expected = [expected] if text.count("[MASK]") == 1 else expected
        assert len(found) == len(expected) == text.count("[MASK]")
        for mine, their in zip(found, expected, strict=True):
            allowed = {a["token"]: a["score"] for a in their if a["token"] not in special}
            assert len(mine) == 50
            shares = [answer.probability for answer in mine]
            assert shares == sorted(shares, reverse=True)
            # Ties in the last place may be in another order.
            common = [answer for answer in mine if answer.id in allowed]
            assert len(common) >= 45
            np.testing.assert_allclose(
                [answer.probability for answer in common],
                [allowed[answer.id] for answer in common],
                rtol=2e-3,
            )
            assert [answer.token for answer in mine] == [ours[1].decode([a.id]) for a in mine]


def test_special_tokens_answer_nothing_and_keep_their_share(ours):
    model, tokenizer = ours
    changed = nnx.clone(model)
    bias = np.zeros(50368, np.float32)
    bias[[tokenizer.sep_id, tokenizer.anchor_id, 50367]] = 20.0
    changed.decoder.bias[...] = bias
    ((answers,),) = fill_mask(changed, tokenizer, ["Rain in [MASK]."], top_k=20)
    assert not {answer.id for answer in answers} & (tokenizer.special_ids | {50367})
    assert sum(answer.probability for answer in answers) < 1e-3
    count = tokenizer.vocab_size - len(tokenizer.special_ids)
    with pytest.raises(InputError, match=f"top_k is {count + 1}; expected 1 to {count}"):
        fill_mask(model, tokenizer, ["[MASK]"], top_k=count + 1)


def test_masks_alone_in_company_and_in_chunks(filler, monkeypatch):
    together = filler.fill(MASKED)
    assert [len(text) for text in together] == [1, 1, 4, MASKS_AT_ONCE + 3]
    alone = [filler.fill([text])[0] for text in MASKED]
    monkeypatch.setattr(likelihood, "CHUNK_CHARACTERS", 10)
    counted = []
    chunked = filler.fill(iter(MASKED), progress=counted.append)
    assert len(counted) > 1
    assert sum(counted) == sum(map(len, together))
    for other in (alone, chunked):
        for one, two in zip(together, other, strict=True):
            for a, b in zip(one, two, strict=True):
                np.testing.assert_allclose(
                    [x.probability for x in a], [x.probability for x in b], rtol=1e-3
                )
                assert a[0].id == b[0].id


def test_nothing_to_do(scorers, filler):
    assert scorers["original"].score([]) == []
    assert filler.fill(iter(())) == []


def test_a_bad_row_is_named_and_rows_are_counted_over_chunks(scorers, filler, monkeypatch):
    for text, message in (
        (" \n\u3000", "the text is blank"),
        (None, "the text is NoneType"),
        ("a\ud800", "the text: holds half a character"),
        ("goal [MASK] " * LONGEST, r"has \d+ tokens and at most 94 fit"),
    ):
        for act in (scorers["original"].score, filler.fill):
            with pytest.raises(InputError, match=rf"^row 2 \(index 1\): {message}") as caught:
                act(["good [MASK]", text, "good [MASK]", text])
            assert [line[:5] for line in caught.value.details] == ["row 4"]
    monkeypatch.setattr(likelihood, "CHUNK_CHARACTERS", 1)
    with pytest.raises(InputError, match=r"^row 3 \(index 2\): the text is blank"):
        scorers["original"].score(iter(["x", "x", " "]))
    with pytest.raises(InputError, match=r"^row 2 \(index 1\): has no \[MASK\]; write"):
        filler.fill(["x [MASK]", "x [mask]"])


def test_bad_arguments_are_rejected(ours):
    model, tokenizer = ours
    head = build(ModernBertForSequenceClassification, model.config)
    shared = [
        (model, "goal", {}, "texts: found"),
        (model, np.array([["a", "b"]]), {}, "texts: is a table"),
        (model, ["x"], {"batch_size": 0}, "batch_size is 0"),
        (model, ["x"], {"max_length": 97}, "max_length is 97; expected 1 to 96"),
        (head, ["x"], {}, "ModernBertForSequenceClassification has no masked"),
    ]
    scoring = [
        (model, ["x"], {"method": "sum"}, "method is 'sum'; expected one of 'word_l2r', 'orig"),
        (model, ["a b c d e f"], {"max_length": 6}, "row 1 .*: has 6 tokens and at most 4 fit"),
    ]
    filling = [(model, ["[MASK]"], {"top_k": k}, "top_k is") for k in (0, True, 2.0, "5")]
    for function, own in ((pseudo_log_likelihood, scoring), (fill_mask, filling)):
        for scored, texts, options, message in shared + own:
            with pytest.raises(InputError, match=message):
                function(scored, tokenizer, texts, **options)


def test_broken_weights_end_the_run(ours):
    broken = nnx.clone(ours[0])
    broken.decoder.bias[...] = np.full(50368, np.nan, np.float32)
    with pytest.raises(RunError, match="not finite"):
        pseudo_log_likelihood(broken, ours[1], ["x"])
