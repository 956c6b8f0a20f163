"""One model of a few words for all tests of this folder, so that programs are shared."""

import pytest
from labelled_texts import word_model, word_tokenizer
from small_models import noisy


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """Return a model with noise on every weight, and its tokenizer of a few words."""
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("words"))
    return noisy(word_model(tokenizer)), tokenizer
