"""Explain answers: mask each word of a text in turn, and see how the answer changes.

Sources: Zeiler and Fergus 2014, occlusion (arXiv 1311.2901); Li et al. 2016, erasure of words
(arXiv 1612.08220). A masked word is nothing unusual to a masked language model.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from mlmjax.classification.predictor import Predictor
from mlmjax.classification.prompter import CHUNK_PROMPTS
from mlmjax.errors import InputError, suggest_keywords, suggest_name
from mlmjax.reporting.terminal import Progress
from mlmjax.scoring.masks.importance import Word, words_of
from mlmjax.text.checks import check_list, check_texts, split_by_size
from mlmjax.text.truncation import Span


class Explanation(NamedTuple):
    """The importance of each word of a text for a label, and the probability of that label."""

    text: str
    label: str
    probability: float
    words: tuple[Word, ...]

    def top(self, count: int = 5) -> list[Word]:
        """Return the words that support the label most, the most important one first."""
        ranked = sorted(self.words, key=lambda word: -word.importance)
        return [word for word in ranked[:count] if word.importance > 0]


@suggest_keywords
def explain(
    classifier: Predictor,
    texts: Iterable[str],
    *,
    label: str | None = None,
    progress: Progress | None = None,
) -> list[Explanation]:
    """Return the importance of each word of each text, for one label or the most probable one.

    The importance of a word is the log probability of the label (natural logarithm, calibrated)
    less that with the tokens of the word masked. A word above 0 supports the label. Words that are
    truncated have no effect. A text takes as many predictions as it has words, and one more.

    `progress` is called with the number of texts done and their total. Raises `InputError` that
    lists each row that is blank or not text, and for an unknown label.
    """
    listed = list(check_list(texts, "texts"))
    check_texts(listed)
    prompter = classifier._load()
    names = [str(name) for name in classifier.classes_]
    if label is not None and label not in names:
        raise InputError(
            f"label {label!r:.60} is not one of the labels; {suggest_name(label, names)}expected "
            f"one of {', '.join(map(repr, names)):.400}"
        )
    results: list[Explanation] = []
    spans = [words_of(prompter.scorer.tokenizer, text) for text in listed]
    pairs = zip(listed, spans, strict=True)
    for chunk in split_by_size(pairs, lambda pair: 1 + len(pair[1]), CHUNK_PROMPTS):
        asked = [text for text, own in chunk for _ in range(1 + len(own))]
        masked: list[Sequence[Span]] = []
        for _, own in chunk:
            masked += [(), *([span] for span in own)]
        log_probs = iter(_log_probs(classifier, asked, masked))
        for text, own in chunk:
            found = np.array([*islice(log_probs, 1 + len(own))], np.float64)
            column = int(found[0].argmax()) if label is None else names.index(label)
            change = found[0, column] - found[1:, column]
            words = [
                Word(text[start:end], start, end, float(value))
                for (start, end), value in zip(own, change, strict=True)
            ]
            share = float(np.exp(found[0, column]))
            results.append(Explanation(text, names[column], share, tuple(words)))
        if progress:
            progress(len(results), len(listed))
    return results


def _log_probs(
    classifier: Predictor, texts: Sequence[str], masked: Sequence[Sequence[Span]]
) -> np.ndarray:
    """Return the calibrated log probabilities of texts with masked spans, `[texts, labels]`."""
    parts = []
    for first in range(0, len(texts), CHUNK_PROMPTS):
        chosen = slice(first, first + CHUNK_PROMPTS)
        raw = classifier._load().log_probs(texts[chosen], masked=masked[chosen])
        parts.append(classifier._calibrated(raw))
    log_probs = np.concatenate(parts)
    if classifier.settings_.multi_label:
        log_probs = log_probs[:, 0].reshape(len(texts), -1)
    return log_probs
