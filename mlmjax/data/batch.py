"""The two shapes of training data: one example, and one batch of packed rows."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

UNUSED = -100
"""What stands in `target_positions`, `target_ids` and `target_objective` where no target is."""

PADDING_SEGMENT = 0

ATP, DUMMY_MLM, MLM = 0, 1, 2
"""Codes of `Batch.target_objective`."""

OBJECTIVES = ("atp", "dummy", "mlm")
"""Names of the objectives, in the order of their codes."""


@dataclass(slots=True, eq=False)
class Example:
    """One tokenised prompt with its answer in place, or one window of plain text.

    `ids` uint32 `[tokens]`, `[CLS] ... [SEP]`; `answer_position` is where the answer stands (-1:
    nothing to answer); `task` numbers the task names of the manifest; `index` numbers the examples
    of a split and seeds the masking; `label` is what a classification head learns: the number of
    the class, or the value of a regression (NaN: none).
    """

    ids: np.ndarray
    answer_position: int
    task: int
    index: int
    label: float = math.nan

    def __len__(self) -> int:
        """Count the tokens, because that is the length packing goes by."""
        return self.ids.shape[0]


class Batch(NamedTuple):
    """What one update reads: packed rows, and the positions the loss counts.

    `input_ids`, `segment_ids`, `position_ids`: int32 `[batch, seq]`; segments count from 1 in each
    row and 0 is padding; positions start at 0 in each example. `target_positions`, `target_ids`,
    `target_objective`: int32 `[batch, targets]`, filled from the left in order of position, and
    `UNUSED` (-100) in all three where a row has no more targets.
    """

    input_ids: Any
    segment_ids: Any
    position_ids: Any
    target_positions: Any
    target_ids: Any
    target_objective: Any


class LabelBatch(NamedTuple):
    """What one update of the classification head reads: texts and their labels.

    `input_ids`, `segment_ids`: int32 `[batch, seq]`, 0 is padding; `labels`: float32, the number of
    the class or the value to predict, NaN for none: `[batch]` where each row is one text (segment
    1), `[batch, segments]` where segments 1, 2, ... of a row are texts.
    """

    input_ids: Any
    segment_ids: Any
    labels: Any
