"""Pseudo-log-likelihoods equal those of minicons, an implementation of others."""

import numpy as np
import pytest
from tiny_models import torch, torch_model, transformers

from mlmjax import load_pretrained
from mlmjax.scoring.likelihood import TextScorer
from mlmjax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.minicons
TEXTS = [
    "An untokenizable subword, 3.14",
    "The goalkeeper was antidisestablishmentarian.",
    "The cats on the mat sit.",
]
METHODS = {"word_l2r": "within_word_l2r", "original": "original"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of ModernBERT's vocabulary, written by transformers, with its tokenizer."""
    folder = tmp_path_factory.mktemp("minicons") / "model"
    tokens = {"pad": 50283, "cls": 50281, "bos": 50281, "sep": 50282, "eos": 50282}
    sizes = {f"{name}_token_id": token for name, token in tokens.items()}
    model = torch_model(vocab_size=50368, max_position_embeddings=64, **sizes)
    model.save_pretrained(folder)
    Tokenizer.from_pretrained().save(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_each_token_as_by_minicons(folder, method, monkeypatch):
    from minicons.scorer import MaskedLMScorer

    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # minicons calls it by its name in transformers 4.
    monkeypatch.setattr(
        type(tokenizer), "batch_encode_plus", type(tokenizer).__call__, raising=False
    )
    theirs = MaskedLMScorer(model, "cpu", tokenizer=tokenizer)
    ours = TextScorer(*load_pretrained(folder), method=method).score(TEXTS)
    for text, score in zip(TEXTS, ours, strict=True):
        (expected,) = theirs.token_score([text], PLL_metric=METHODS[method])
        found = [token.log_prob for token in score.tokens]
        np.testing.assert_allclose(found, [value for _, value in expected], atol=1e-4)
