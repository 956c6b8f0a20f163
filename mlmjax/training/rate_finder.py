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

MARGIN = 10.0
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
    """Return the update before which the loss was lowest, before any loss that is not finite.

    Each loss counts as the mean of itself and its neighbours, because single batches differ.

    >>> best_update([1.0, 0.9, 0.2, 0.8, 0.5, 0.4, 0.5, 2.0, float("nan"), 0.1])
    5
    """
    finite = np.isfinite(losses)
    count = len(losses) if finite.all() else int(np.argmin(finite))
    if not count:
        return 0
    around = np.pad(np.array(losses[:count]), 1, mode="edge")
    return int(np.argmin(around[:-2] + around[1:-1] + around[2:]))
