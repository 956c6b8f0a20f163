"""More labels than one prompt holds: rounds over groups of them, and what that says of each."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlmjax.classification.prompter import Asking, Question
from mlmjax.errors import InputError
from mlmjax.text.prompts import option_lines
from mlmjax.text.verbalizer import usable_option_names

TEXT_SHARE = 8
"""One in this many tokens of a prompt is kept for the text when labels are cut into groups."""

Ask = Callable[[Sequence[Question], Sequence[str]], list[np.ndarray]]


def together(asking: Asking, labels: int) -> int:
    """Return how many labels are asked about in one prompt: all of them, where they fit.

    Groups are of equal size, as few as leave an eighth of the prompt for the text and have an
    option name for each label. Raises `InputError` where not even two labels fit.
    """
    template, scorer = asking.scorer.template, asking.scorer
    if asking.own_names or "options" not in template.fields:
        return labels
    names = len(usable_option_names(template.names, scorer.tokenizer, labels))
    lines = [option_lines([text], template.names) for text in asking.shown]
    tokens = np.array([len(ids) + 1 for ids in scorer.tokenizer.encode_plain_batch(lines)])
    empty: dict[str, Any] = dict.fromkeys(template.fields, "") | {"options": []}
    fixed = template.length(scorer.tokenizer, empty)
    room = scorer.max_length - scorer.max_length // TEXT_SHARE - fixed
    for count in range(1, labels):
        size = -(-labels // count)
        # Later rounds mix labels of all groups, so the longest ones have to fit together.
        if size <= names and np.sort(tokens)[-size:].sum() <= room:
            return size
    if labels <= names:
        return labels  # the template says what is too long, and by how much
    longest = int(tokens.argmax())
    raise InputError(
        f"labels: no two of the {labels} labels fit beside a text in {scorer.max_length} tokens; "
        f"the longest has {tokens[longest]} ({asking.shown[longest]!r:.60}); "
        "give shorter descriptions or a larger max_length"
    )


def in_rounds(
    ask: Ask, questions: Sequence[Question], where: Sequence[str], size: int
) -> list[np.ndarray]:
    """Return the log probabilities of each question's choice, at most `size` options in a prompt.

    The options are cut into groups of equal size, and each group is asked. The best of every group,
    as many as fit in one prompt together, go on to the next round, which is done in the same way.
    What the next round gives to those of a group is the group's probability; within the group,
    those that went on keep their share of it and divide it as the next round does, the others keep
    the share that the first round gave them. Sums to 1; with one group it is the plain answer.
    Prompts for n options: n / size, and those of the next round.
    """
    longest = max(len(question.choice) for question in questions)
    if longest <= size:
        return ask(questions, where)
    cuts = [_cut(question.choice, size) for question in questions]
    flat = [
        question._replace(choice=group)
        for question, groups in zip(questions, cuts, strict=True)
        for group in groups
    ]
    names = [name for name, groups in zip(where, cuts, strict=True) for _ in groups]
    first = iter(ask(flat, names))
    rounds = [[next(first) for _ in groups] for groups in cuts]
    kept = [
        [_best(scores, max(1, size // len(groups))) for scores in found]
        for groups, found in zip(cuts, rounds, strict=True)
    ]
    narrowed = [
        question._replace(
            choice=tuple(group[i] for group, best in zip(groups, chosen, strict=True) for i in best)
        )
        for question, groups, chosen in zip(questions, cuts, kept, strict=True)
    ]
    final = in_rounds(ask, narrowed, where, size)
    return [
        _together(found, chosen, last)
        for found, chosen, last in zip(rounds, kept, final, strict=True)
    ]


def _cut(choice: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    parts = np.array_split(np.array(choice), -(-len(choice) // size))
    return [tuple(map(int, part)) for part in parts]


def _best(log_probs: np.ndarray, count: int) -> list[int]:
    """Return the positions of the most probable options, ascending."""
    count = min(count, max(1, len(log_probs) // 2))
    return sorted(np.argsort(-log_probs, kind="stable")[:count].tolist())


def _together(
    rounds: Sequence[np.ndarray], kept: Sequence[Sequence[int]], last: np.ndarray
) -> np.ndarray:
    """Join a round's groups `[options]` and the next round's answer for those that were kept.

    >>> first = [np.log([0.8, 0.2]), np.log([0.5, 0.5])]
    >>> np.exp(_together(first, [[0], [1]], np.log([0.9, 0.1]))).round(3).tolist()
    [0.72, 0.18, 0.05, 0.05]
    """
    joined, start = [], 0
    for scores, best in zip(rounds, kept, strict=True):
        share = last[start : start + len(best)]
        start += len(best)
        result = scores + np.logaddexp.reduce(share)
        result[best] = np.logaddexp.reduce(scores[best]) + share
        joined.append(result)
    return np.concatenate(joined)
