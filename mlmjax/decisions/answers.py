"""Hold answers: distributions over options, with the figures of the protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlmjax.decisions.questions import CHOICE, SCORE, YES_NO, Question, Score, YesNo
from mlmjax.scoring.masks.importance import Word
from mlmjax.statistics.calibration import log_softmax


@dataclass(frozen=True)
class Answer:
    """What all answers hold.

    `confidence` is 0 for equal probabilities and 1 for certainty. `abstains` says that the best
    probability is below the decider's limit. `tokens` were read for the answer, `shortened` tokens
    of the state were too many for the prompt. `words` is what `Decider.explain` returns, if it was
    asked for.
    """

    confidence: float
    abstains: bool
    tokens: int
    shortened: int
    words: tuple[Word, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class ChoiceAnswer(Answer):
    """The most probable option, and the probability of each by its name."""

    choice: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class YesNoAnswer(Answer):
    """The probability of yes."""

    probability: float


@dataclass(frozen=True)
class ScoreAnswer(Answer):
    """The expected level, the most probable one, and the probability of each from low to high.

    `legend` holds the texts of the levels as they were given.
    """

    score: float
    level: int
    probabilities: list[float]
    legend: list[Any]


def make_answer(
    question: Question, log_probs: np.ndarray, *, limit: float, tokens: int, shortened: int
) -> ChoiceAnswer | YesNoAnswer | ScoreAnswer:
    """Return the answer of log probabilities `[options]`; below `limit` it abstains."""
    probs = np.exp(log_softmax(log_probs.astype(np.float64))).tolist()
    values: dict[str, Any] = {
        "abstains": max(probs) < limit,
        "tokens": tokens,
        "shortened": shortened,
    }
    best = probs.index(max(probs))
    if isinstance(question, YesNo):
        return YesNoAnswer(choice_confidence(probs), probability=probs[0], **values)
    if isinstance(question, Score):
        return ScoreAnswer(
            score_confidence(probs),
            score=sum(level * p for level, p in enumerate(probs)),
            level=best,
            probabilities=probs,
            legend=list(question.criteria),
            **values,
        )
    names = question.names
    return ChoiceAnswer(
        choice_confidence(probs),
        choice=names[best],
        probabilities=dict(zip(names, probs, strict=True)),
        **values,
    )


def choice_confidence(probs: Sequence[float]) -> float:
    """Return how far the largest probability is from equal ones, 0 to 1.

    >>> choice_confidence([0.5, 0.5]), choice_confidence([1.0, 0.0])
    (0.0, 1.0)
    """
    equal = 1 / len(probs)
    return min(1.0, max(0.0, (max(probs) - equal) / (1 - equal)))


def score_confidence(probs: Sequence[float]) -> float:
    """Return 1 less the mean distance from the best level, as a share of that of equal levels.

    >>> score_confidence([0.0, 1.0, 0.0]), score_confidence([0.5, 0.0, 0.5])
    (1.0, 0.0)
    """
    count, best = len(probs), list(probs).index(max(probs))
    spread = sum(p * abs(level - best) for level, p in enumerate(probs))
    usual = sum(abs(level - (count - 1) / 2) for level in range(count)) / count
    return min(1.0, max(0.0, 1 - spread / usual))


def answer_json(answer: ChoiceAnswer | YesNoAnswer | ScoreAnswer) -> dict[str, Any]:
    """Return an answer in the form of the protocol; fields of our own begin with `x_`."""
    more: dict[str, Any] = {}
    if answer.shortened:
        more["x_shortened"] = answer.shortened
    if answer.abstains:
        more["x_abstains"] = True
    if answer.words:
        more["x_words"] = [
            {"text": word.text, "importance": word.importance} for word in answer.words
        ]
    if isinstance(answer, YesNoAnswer):
        return {
            "type": YES_NO,
            "noul": answer.probability,
            "x_confidence": answer.confidence,
            **more,
        }
    if isinstance(answer, ChoiceAnswer):
        shown: dict[str, Any] = {"choice": answer.choice, "probabilities": answer.probabilities}
        return {"type": CHOICE, **shown, "confidence": answer.confidence, **more}
    return {
        "type": SCORE,
        "score": answer.score,
        "legend": {str(level): text for level, text in enumerate(answer.legend)},
        "probabilities": {str(level): p for level, p in enumerate(answer.probabilities)},
        "confidence": answer.confidence,
        **more,
    }
