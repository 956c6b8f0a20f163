"""A folder with a model of a few words, from which commands start."""

import pytest
from labelled_texts import word_model, word_tokenizer

import mlmjax


@pytest.fixture(scope="session")
def word_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    tokenizer = word_tokenizer(folder.parent / "words", more=["#"])
    mlmjax.save_pretrained(word_model(tokenizer), tokenizer, folder)
    return folder
