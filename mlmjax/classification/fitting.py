"""Fine-tune a classifier, and keep the weights of its best epoch."""

from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
from flax import nnx
from pydantic import Field, FiniteFloat

from mlmjax.classification.prompter import Prompter
from mlmjax.config.tables import StrictTable
from mlmjax.model.modernbert import Model
from mlmjax.reporting.terminal import Progress
from mlmjax.scoring.engine import MOST_ROWS
from mlmjax.text.prompts import Prompt
from mlmjax.training.finetune import fine_tune


class Recipe(StrictTable):
    """Hold the numbers of a fine-tuning; defaults are from the middle of the paper's sweep.

    With held-out texts, `patience` ends the training after that many epochs in a row without
    improvement, and the best epoch's weights are kept. None runs all epochs and keeps the last.
    """

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 3
    learning_rate: Annotated[FiniteFloat, Field(gt=0)] = 3e-5
    batch_size: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 32
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    patience: Annotated[int, Field(ge=1)] | None = None


def learn(
    prompter: Prompter,
    examples: tuple[Sequence[Prompt], Sequence[int]],
    recipe: Recipe,
    *,
    held_out: tuple[Sequence[str], np.ndarray] | None,
    progress: Progress | None,
) -> list[dict[str, float]]:
    """Fine-tune the prompter's model, and return what is known of each epoch.

    `examples` are prompts and the columns of their answers, from `Prompter.examples`; `held_out`
    are texts that are not trained on, and the right column of each row of their scores. An epoch's
    entry has `epoch` and `loss`, with held-out texts `validation_accuracy` and `validation_loss`.
    """
    scorer = prompter.scorer
    history: list[dict[str, float]] = []
    best, since = (-1.0, 0.0), 0
    kept: Any = None

    def after_epoch(model: Model, loss: float) -> bool:
        nonlocal best, kept, since
        history.append({"epoch": len(history) + 1, "loss": loss})
        if held_out is None:
            return False
        scorer.model = model
        texts, right = held_out
        scores = np.concatenate(list(prompter.stream(texts)))
        accuracy = float((scores.argmax(axis=1) == right).mean())
        of_gold = float(scores[np.arange(len(right)), right].mean())
        history[-1] |= {"validation_accuracy": accuracy, "validation_loss": -of_gold}
        if recipe.patience is None:
            return False
        since += 1
        if (accuracy, of_gold) > best:
            best, since = (accuracy, of_gold), 0
            kept = jax.tree.map(np.array, nnx.split(model)[1])
        return since >= recipe.patience

    prompts, columns = examples
    model = fine_tune(
        scorer.model,
        prompts,
        scorer.targets(columns),
        **recipe.model_dump(exclude={"validation_share", "patience"}),
        pad_id=scorer.tokenizer.pad_id,
        after_epoch=after_epoch,
        progress=progress,
    )
    if kept is not None:
        model = nnx.merge(nnx.split(model)[0], jax.device_put(kept))
    scorer.model = model
    return history


def split_rows(groups: Sequence[Any], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows into training and held-out ones, a share of each group.

    Of a group of two or more at least one is held out.

    >>> split_rows(["a"] * 4 + ["b"] * 4, 0.25, seed=0)
    ([0, 1, 2, 4, 6, 7], [3, 5])
    """
    rng = np.random.default_rng([seed, 1])
    train, out = [], []
    for group in sorted(set(groups)):
        rows = np.array([i for i, one in enumerate(groups) if one == group])
        rows = rows[rng.permutation(len(rows))]
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        out += rows[:count].tolist()
        train += rows[count:].tolist()
    return sorted(train), sorted(out)
