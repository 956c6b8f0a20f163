"""Labelled texts that one word decides, and how to learn them fast."""

import numpy as np

FAST = {"epochs": 12, "learning_rate": 1e-2, "batch_size": 16}


WORDS = {"sports": ["goal", "match", "team"], "money": ["stock", "bank", "price"]}


def examples(count, seed=0):
    """Give texts whose label follows from one word among others."""
    rng = np.random.default_rng(seed)
    labels = [list(WORDS)[i % 2] for i in range(count)]
    texts = [
        " ".join(rng.permutation(["the", "a", "new", "old", rng.choice(WORDS[label])]))
        for label in labels
    ]
    return texts, labels
