"""Find a learning rate by a short training whose rate rises."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlmjax.model.modernbert import Model
from mlmjax.text.prompts import Prompt
from mlmjax.training.finetune import Epoch, fine_tune

SHARE = 0.25
"""The share of the updates of a fit that are spent on finding its rate."""

LEAST_UPDATES = 20
RANGE = 30.0
"""The rates go from the usual one divided by this to the usual one times this."""

SMOOTHING = 0.8
MARGIN = 4.0
"""A rate this many times below the one with the lowest loss is safe for a whole training."""


def find_rate(
    model: Model,
    prompts: Sequence[Prompt],
    answers: Any,
    *,
    around: float,
    epochs: int,
    batch_size: int,
    **options: Any,
) -> float:
    """Return a learning rate for a fit of the model, found on its own examples.

    The rate rises exponentially over `SHARE` of the updates of the fit, or `LEAST_UPDATES` of them
    (range test, Smith 2015, arXiv 1506.01186). The result is the rate at which the smoothed loss
    was lowest, divided by `MARGIN`. The model is not changed. `options` are those of `fine_tune`.
    """
    each = -(-len(prompts) // batch_size)
    updates = max(LEAST_UPDATES, round(SHARE * epochs * each))
    rates = (around * RANGE ** np.linspace(-1, 1, updates)).tolist()
    losses: list[float] = []

    def collect(_: Model, epoch: Epoch) -> bool:
        losses.extend(epoch.losses)
        return not np.isfinite(losses).all()

    fine_tune(
        model,
        prompts,
        answers,
        epochs=-(-updates // each),
        learning_rate=around,
        batch_size=batch_size,
        warmup=0.0,
        rates=rates,
        after_epoch=collect,
        **options,
    )
    return rates[best_update(losses)] / MARGIN


def best_update(losses: Sequence[float]) -> int:
    """Return the update before which the smoothed loss was lowest, before any that is not finite.

    >>> best_update([1.0, 0.9, 0.5, 0.4, 0.5, 2.0, float("nan"), 0.1])
    4
    """
    mean, weight, smoothed = 0.0, 0.0, []
    for loss in losses:
        if not np.isfinite(loss):
            break
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(mean / weight)
    return int(np.argmin(smoothed)) if smoothed else 0
