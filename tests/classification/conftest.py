"""One model of a few words for all tests of the classifier, so that programs are shared."""

import pytest
from labelled_texts import word_model, word_tokenizer
from small_models import noisy


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A model and tokenizer that know the words of `labelled_texts`."""
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("words"))
    return word_model(tokenizer), tokenizer


@pytest.fixture(scope="session")
def noisy_pair(pair):
    """The same with more noise on every weight, whose answers differ from text to text."""
    return noisy(pair[0]), pair[1]
