"""Cleanings of texts: what is left, and that scikit-learn leaves the same."""

import pyarrow.parquet as pq
import pytest

from mlmjax.config.task import newsgroup


@pytest.mark.data
@pytest.mark.parametrize("split", ["train", "test"])
def test_posts_are_cleaned_as_scikit_learn_cleans_them(test_data, split):
    from sklearn.datasets import _twenty_newsgroups as oracle

    path = test_data / "eval" / f"20newsgroups_bydate_{split}.parquet"
    for post in pq.read_table(path, columns=["text"])["text"].to_pylist():
        kept = oracle.strip_newsgroup_header(post)
        kept = oracle.strip_newsgroup_quoting(oracle.strip_newsgroup_footer(kept))
        assert newsgroup(post) == kept


HEADER = "From: a@b.c\nSubject: Re: cars\nReferences: <1@x>\n\t<2@y>\n\n"


@pytest.mark.parametrize(
    ("post", "left"),
    [
        (HEADER + "In article <1@x> Joe writes:\n> Which?\nThe red.\n-- \nA. B.\n", "The red."),
        (HEADER + "One.\n\nTwo.\n", "One."),
        (HEADER + "---\nAll of it.", "---\nAll of it."),
        (HEADER + "> Which?\n| quoted", ""),
        ("One.\n\nTwo, he said: no header.\n", "One.\n\nTwo, he said: no header.\n"),
        ("Note: this is the text.\n\nNot a header.", "Note: this is the text.\n\nNot a header."),
        ("", ""),
    ],
)
def test_what_is_left_of_a_post(post, left):
    assert newsgroup(post) == left
