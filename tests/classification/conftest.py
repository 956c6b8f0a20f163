"""One model of a few words for all tests of the classifier, so that programs are shared."""

import pytest
from labelled_texts import word_model, word_tokenizer
from small_models import noisy


@pytest.fixture(scope="session")
def word_pair(tmp_path_factory):
    """A model and tokenizer that know the words of `labelled_texts`."""
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("words"))
    return word_model(tokenizer), tokenizer


@pytest.fixture(scope="session")
def pair(word_pair):
    return word_pair


@pytest.fixture(scope="session")
def noisy_pair(word_pair):
    """The same with more noise on every weight, whose answers differ from text to text."""
    return noisy(word_pair[0]), word_pair[1]
