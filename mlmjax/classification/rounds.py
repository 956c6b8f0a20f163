"""Score more labels than one prompt holds: groups compete in rounds, or the nearest are asked."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlmjax.errors import InputError
from mlmjax.model.modernbert import Model
from mlmjax.scoring.vectors.embedding import Embedder
from mlmjax.text.prompts import Template, option_lines
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import usable_option_names

TEXT_SHARE = 8
"""One in this many tokens of a prompt is kept for the text when labels are split into groups."""

OTHERS = 1e-6
"""The probability that the labels off a shortlist share, so that none gets 0."""

Ask = Callable[[Sequence[int], Sequence[tuple[int, ...]]], list[np.ndarray]]
"""From the numbers of queries and the options of each to the options' log probabilities."""


def group_size(
    template: Template,
    tokenizer: Tokenizer,
    shown: Sequence[str],
    max_length: int,
    fields: Mapping[str, str] | None = None,
    most: int | None = None,
) -> int:
    """Return the number of options in one prompt: all of them, or the longest `most`, if they fit.

    Otherwise they form groups of equal size, as few as leave an eighth of the prompt for the text
    and have an option name for each label. `fields` are the texts of the prompt that do not depend
    on the options. Raises `InputError` if not even two labels fit.
    """
    lines = [option_lines([text], template.names, tokenizer) for text in shown]
    tokens = np.array([len(ids) + 1 for ids in tokenizer.encode_plain_batch(lines)])
    labels = min(len(shown), most or len(shown))
    names = len(usable_option_names(template.names, tokenizer, labels))
    empty: dict[str, Any] = (
        dict.fromkeys(template.fields, "") | {"options": []} | dict(fields or {})
    )
    room = max_length - max_length // TEXT_SHARE - template.length(tokenizer, empty)
    for count in range(1, labels):
        size = -(-labels // count)
        # Later rounds mix labels of all groups, so the longest ones have to fit together.
        if size <= names and np.sort(tokens)[-size:].sum() <= room:
            return size
    if labels <= names:
        return labels  # The template's error says what is too long, and by how much.
    longest = int(tokens.argmax())
    raise InputError(
        f"labels: no two of the {labels} labels fit in {max_length} tokens next to a text; "
        f"the longest has {tokens[longest]} ({shown[longest]!r:.60}); "
        "give shorter descriptions or a larger max_length"
    )


def in_rounds(ask: Ask, choices: Sequence[tuple[int, ...]], size: int) -> list[np.ndarray]:
    """Return the log probabilities of each query's options, at most `size` options in a prompt.

    The options are split into groups of equal size. The best of every group, as many as fit in one
    prompt together, enter the next round. The sum that the next round gives to a group's
    options is the group's probability. Within the group, the options that went on divide their
    share as the next round does; the others keep the share of the first round. The result sums to
    1. With one group it is the plain answer.
    """
    if max(map(len, choices)) <= size:
        return ask(range(len(choices)), choices)
    cuts = [_cut(choice, size) for choice in choices]
    numbers = [number for number, groups in enumerate(cuts) for _ in groups]
    scores = iter(ask(numbers, [group for groups in cuts for group in groups]))
    rounds = [[next(scores) for _ in groups] for groups in cuts]
    kept = [[_best(found, max(1, size // len(groups))) for found in groups] for groups in rounds]
    narrowed = [
        tuple(group[i] for group, best in zip(groups, chosen, strict=True) for i in best)
        for groups, chosen in zip(cuts, kept, strict=True)
    ]
    final = in_rounds(ask, narrowed, size)
    return [_join(*parts) for parts in zip(rounds, kept, final, strict=True)]


class Shortlist:
    """Find the labels whose vectors have the largest cosine with the vector of a text.

    `shown` are the texts of the labels. A vector is the mean over the tokens, by the model that
    answers, or by the embedding model of `source` in the way that its folder says.
    """

    def __init__(
        self,
        shown: Sequence[str],
        count: int,
        tokenizer: Tokenizer,
        *,
        source: str | None,
        batch_size: int | None,
    ):
        self.shown, self.count, self.tokenizer = list(shown), count, tokenizer
        self.options: dict[str, Any] = {"truncate": True, "batch_size": batch_size}
        self.own = None if source is None else Embedder.from_pretrained(source, **self.options)
        self._known: tuple[Model, Embedder, np.ndarray] | None = None

    def nearest(self, model: Model, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the numbers of the nearest labels of each text, ascending."""
        if self._known is None or (self.own is None and self._known[0] is not model):
            embedder = self.own or Embedder(model, self.tokenizer, **self.options)
            vectors = embedder.embed(self.shown)
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            self._known = model, embedder, vectors
        _, embedder, vectors = self._known
        near = embedder.embed(texts) @ vectors.T
        best = np.argsort(-near, axis=1, kind="stable")[:, : self.count]
        return [tuple(sorted(row.tolist())) for row in best]


def over_all(log_probs: np.ndarray, choice: Sequence[int], labels: int) -> np.ndarray:
    """Return the log probabilities of all labels, given those of a shortlist.

    >>> np.exp(over_all(np.log([0.5, 0.5]), [0, 2], 4)).round(7).tolist()
    [0.4999995, 5e-07, 0.4999995, 5e-07]
    """
    result = np.full(labels, np.log(OTHERS / (labels - len(choice))))
    result[list(choice)] = log_probs + np.log1p(-OTHERS)
    return result


def _cut(choice: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    parts = np.array_split(np.array(choice), -(-len(choice) // size))
    return [tuple(map(int, part)) for part in parts]


def _best(log_probs: np.ndarray, count: int) -> list[int]:
    """Return the positions of the most probable options, ascending."""
    count = min(count, max(1, len(log_probs) // 2))
    return sorted(np.argsort(-log_probs, kind="stable")[:count].tolist())


def _join(
    rounds: Sequence[np.ndarray], kept: Sequence[Sequence[int]], last: np.ndarray
) -> np.ndarray:
    """Join a round's groups `[options]` with the next round's answer for the options kept.

    >>> first = [np.log([0.8, 0.2]), np.log([0.5, 0.5])]
    >>> np.exp(_join(first, [[0], [1]], np.log([0.9, 0.1]))).round(3).tolist()
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
