"""What a model is measured against: TF-IDF with logistic regression."""

from collections.abc import Mapping, Sequence

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

Rows = Sequence[Mapping[str, str]]


def tfidf_regression(train: Rows, test: Rows) -> list[str]:
    """Fit TF-IDF and logistic regression on `text` and `label`; return the labels of `test`."""
    words = make_pipeline(
        TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
    )
    words.fit([row["text"] for row in train], [row["label"] for row in train])
    return [str(label) for label in words.predict([row["text"] for row in test])]
