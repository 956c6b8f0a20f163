"""Two deciders for all tests: one of the packaged tokenizer, one of a few words."""

import pytest
from labelled_texts import word_model, word_tokenizer
from small_models import noisy, small_model

from mlmjax import Decider


@pytest.fixture(scope="session")
def decider(tokenizer):
    """A model of random weights with room for 160 tokens, so that many options need rounds."""
    return Decider((small_model(), tokenizer))


@pytest.fixture(scope="session")
def word_pair(tmp_path_factory):
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("words"))
    return word_model(tokenizer), tokenizer


@pytest.fixture
def word_decider(word_pair):
    """A model that knows few words and learns fast; noise makes its answers differ."""
    return Decider((noisy(word_pair[0], 0.05), word_pair[1]))
