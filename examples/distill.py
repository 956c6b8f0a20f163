"""Distil a teacher into a student: the student learns the teacher's probabilities.

    python examples/distill.py --data reviews.csv --model answerdotai/ModernBERT-base

The teacher here is a scikit-learn pipeline. Anything with `predict_proba` can be one, such as a
larger `Classifier`.
"""

import argparse
from pathlib import Path

import numpy as np
from common import HERE, read_labelled, run
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from mlmjax import Classifier


def cross_entropy(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean cross-entropy; for a student it is least where it equals its teacher."""
    return float(-(targets * np.log(np.maximum(probabilities, 1e-9))).sum(axis=1).mean())


def main() -> None:
    """Fit the teacher, let the student learn from it, and compare both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE / "reviews.csv", help="text, label")
    parser.add_argument("--model", default="mlmjax-small", help="the student's folder or Hub id")
    parser.add_argument("--out", type=Path, default=Path("student"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    rows = read_labelled(arguments.data)
    texts = [row["text"] for row in rows]

    teacher = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10))
    teacher.fit(texts, [row["label"] for row in rows])
    # The student needs no labels: texts that nobody has labelled could be more of them.
    targets = teacher.predict_proba(texts)

    student = Classifier(arguments.model, list(teacher.classes_), progress=False)
    before = cross_entropy(targets, student.predict_proba(texts))
    # The columns of `targets` are in the order of the student's labels.
    student.fit(
        texts,
        targets,
        normalize="labels",
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
    )
    probabilities = student.predict_proba(texts)
    after, least = cross_entropy(targets, probabilities), cross_entropy(targets, targets)
    print(f"cross-entropy: {before:.3f} before, {after:.3f} after, {least:.3f} at least")
    agreement = np.mean(probabilities.argmax(axis=1) == targets.argmax(axis=1))
    student.save_pretrained(arguments.out)
    print(f"{arguments.out}: answers {agreement:.0%} of the texts as its teacher does")


if __name__ == "__main__":
    run(main)
