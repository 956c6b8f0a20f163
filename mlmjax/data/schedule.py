"""Schedule the rows of each update, and the share of tokens that it masks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from mlmjax.config.data import DataConfig
from mlmjax.config.run import DrawnRate, ObjectiveConfig, updates_of
from mlmjax.errors import InputError


@dataclass(frozen=True)
class RowSchedule:
    """Grow the rows per update from `start` to `full` in equal steps until update `warmup`.

    The sizes are the multiples of `start`, because every size needs its own compiled program.

    >>> schedule = RowSchedule(start=2, full=6, warmup=4)
    >>> [schedule.rows(step) for step in range(6)], [schedule.before(step) for step in range(6)]
    ([2, 2, 4, 4, 6, 6], [0, 2, 4, 8, 12, 18])
    """

    start: int
    full: int
    warmup: int = 0

    @cached_property
    def begins(self) -> list[int]:
        """Return the updates at which the batch grows by `start` rows, the first one included."""
        last = self.full // self.start - 1
        return [-(-stage * self.warmup // max(last, 1)) for stage in range(last + 1)]

    def rows(self, step: int) -> int:
        """Count the rows of update `step`, from 0."""
        return self.start * sum(begin <= step for begin in self.begins)

    def before(self, step: int) -> int:
        """Count the rows of all updates before `step`."""
        return self.start * sum(max(0, step - begin) for begin in self.begins)


def row_schedule(data: DataConfig, steps: int) -> RowSchedule:
    """Return the rows per update of a run of `steps` updates.

    With `accumulate`, the micro-batch keeps its size and their number grows. Raises `InputError`
    for sizes that do not divide each other, and for a growth that is longer than the run.
    """
    if data.batch_start is None:
        return RowSchedule(data.batch_size, data.batch_size)
    micro = data.batch_size // data.accumulate
    unit = micro if data.accumulate > 1 else 1
    if data.batch_size % data.batch_start or data.batch_start % unit:
        raise InputError(
            f"data.batch_start: found {data.batch_start}; expected a divisor of batch_size "
            f"{data.batch_size}"
            + (f" and a multiple of the micro-batch of {micro} rows" if unit > 1 else "")
        )
    warmup = updates_of(data.batch_warmup, steps)
    if not 0 < warmup <= steps:
        share = "" if warmup else f" ({data.batch_warmup} of them, rounded)"
        raise InputError(
            f"data.batch_warmup: {warmup} updates of {steps} steps{share}; give 1 to {steps}, or "
            "leave batch_start out"
        )
    return RowSchedule(data.batch_start, data.batch_size, warmup)


def micro_batches(data: DataConfig, rows: int) -> int:
    """Count the micro-batches of an update of `rows` rows; all micro-batches have one size."""
    return max(1, rows * data.accumulate // data.batch_size)


def mask_rate(objective: ObjectiveConfig, steps: int) -> Callable[[int], float | DrawnRate]:
    """Return the share of tokens MLM masks, as a function of the update from 0.

    It is linear from `mlm_rate` at the first update to `mlm_rate_end` at the last, which Ankner et
    al. 2023 (arXiv 2305.15096) found best, or constant without `mlm_rate_end`. A rate that is drawn
    for each example is the same at every update.

    >>> rate = mask_rate(ObjectiveConfig(mlm_rate=0.3, mlm_rate_end=0.1), 5)
    >>> [round(rate(step), 3) for step in range(5)]
    [0.3, 0.25, 0.2, 0.15, 0.1]
    """
    first, last = objective.mlm_rate, objective.mlm_rate_end
    if last is None or isinstance(first, DrawnRate):
        return lambda step: first
    return lambda step: first + (last - first) * min(1.0, step / max(steps - 1, 1))


def target_width(objective: ObjectiveConfig, seq_length: int, examples: int, text: bool) -> int:
    """Return the most targets a row can have in any update.

    They are one for each of the `examples` a row holds at most, and `ceil(rate * seq_length)` at
    the highest rate if anything but ATP can be drawn. With `text`, some rows hold plain text, which
    is always masked at random.

    >>> target_width(ObjectiveConfig(mlm_share=0.1, mlm_rate=0.25), 64, 8, text=False)
    24
    """
    if not text and objective.dummy_mlm_share + objective.mlm_share == 0:
        return examples
    return examples + math.ceil(objective.highest_rate * seq_length)
