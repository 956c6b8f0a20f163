"""Define the shapes of training data: one example, and one batch of packed rows."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

UNUSED = -100
"""Fills `target_positions`, `target_ids` and `target_objective` where there is no target."""

PADDING_SEGMENT = 0

ATP, DUMMY_MLM, MLM = 0, 1, 2
"""Codes of `Batch.target_objective`."""

OBJECTIVES = ("atp", "dummy", "mlm")
"""Names of the objectives, in the order of their codes."""


@dataclass(slots=True, eq=False)
class Example:
    """Hold one tokenised prompt with its answer in place, or one window of plain text.

    `ids` are uint32 `[tokens]`, outer tokens included. `answer_position` is the place of the answer
    (-1: none). `task` numbers the task names of the manifest. `index` numbers the examples of a
    split and seeds the masking. `label` is what a classification head learns: the number of the
    class, or the value of a regression (NaN: none). `weight` is that of the example in the loss.
    `shares` are the probabilities of the labels of its source; none for a hard label.
    """

    ids: np.ndarray
    answer_position: int
    task: int
    index: int
    label: float = math.nan
    weight: float = 1.0
    shares: tuple[float, ...] = ()

    def __len__(self) -> int:
        return self.ids.shape[0]


class Options(NamedTuple):
    """Hold what each target is distributed over: tokens of options and their probabilities.

    `ids`: int32 `[batch, targets, options]`, and `UNUSED` where a target has no more options.
    `probs`: float32, same shape; those of a target sum to 1, and others are 0.
    """

    ids: Any
    probs: Any


class Answers(NamedTuple):
    """Hold what prompts are trained to answer: `ids` `[prompts]`, tokens or numbers of classes.

    `weights`, float32 `[prompts]`, weigh them (None: all weigh 1). `options` are those of `Batch`
    without its axis of rows, `[prompts, options]`.
    """

    ids: np.ndarray
    weights: np.ndarray | None = None
    options: Options | None = None

    def take(self, members: np.ndarray) -> "Answers":
        """Return the answers of some prompts."""
        options = self.options and Options(*(part[members] for part in self.options))
        weights = None if self.weights is None else self.weights[members]
        return Answers(self.ids[members], weights, options)


class Batch(NamedTuple):
    """Hold what one update reads: packed rows, and the positions that count in the loss.

    `input_ids`, `segment_ids`, `position_ids`: int32 `[batch, seq]`. Segments count from 1 in each
    row, and 0 is padding; positions start at 0 in each example. `target_positions`, `target_ids`,
    `target_objective`: int32 `[batch, targets]`, filled from the left in order of position, and
    `UNUSED` (-100) where a row has no more targets.

    `weights`, float32 `[batch, targets]`, weigh the targets (None: all weigh 1). With `options`
    each target is a distribution, and `target_ids` hold its most probable token.
    """

    input_ids: Any
    segment_ids: Any
    position_ids: Any
    target_positions: Any
    target_ids: Any
    target_objective: Any
    weights: Any = None
    options: Options | None = None


class LabelBatch(NamedTuple):
    """Hold what one update of the classification head reads: texts and their labels.

    `input_ids`, `segment_ids`: int32 `[batch, seq]`, 0 is padding. `labels`: float32, the number of
    the class or the value to predict, NaN for none: `[batch]` if each row is one text (segment 1),
    `[batch, segments]` if segments 1, 2, ... of a row are texts. `weights`, float32 of the same
    shape, weigh the texts. `probs`, float32 of that shape and one more axis for the classes, are
    distributions, of which `labels` are the most probable classes.
    """

    input_ids: Any
    segment_ids: Any
    labels: Any
    weights: Any = None
    probs: Any = None
