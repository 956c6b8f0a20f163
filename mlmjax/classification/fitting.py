"""Fine-tuning a classifier: which prompts it learns from, and which epoch's weights it keeps."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from flax import nnx
from pydantic import Field, FiniteFloat

from mlmjax.classification.prompter import Asking
from mlmjax.config.tables import StrictTable
from mlmjax.errors import InputError
from mlmjax.model.modernbert import Model
from mlmjax.scoring.scorers import MOST_ROWS, HeadScorer, Scorer
from mlmjax.text.prompts import Prompt
from mlmjax.training.finetune import fine_tune

Judge = Callable[[Model], tuple[float, float]]
"""From a model to its accuracy and its mean loss on texts held out."""


class Recipe(StrictTable):
    """How a classifier is fine-tuned; the defaults are from the middle of the paper's sweep.

    With texts held out, `patience` ends the training after that many epochs in a row that are no
    better, and the best epoch's weights are kept; None makes all epochs and keeps the last.
    """

    epochs: Annotated[int, Field(ge=1)] = 3
    learning_rate: Annotated[FiniteFloat, Field(gt=0)] = 3e-5
    batch_size: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 32
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    seed: Annotated[int, Field(ge=0)] = 0
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    patience: Annotated[int, Field(ge=1)] | None = None


def learn(
    asking: Asking,
    examples: tuple[Sequence[Prompt], Sequence[int]],
    recipe: Recipe,
    *,
    judge: Judge | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[Model, list[dict[str, float]]]:
    """Return the fine-tuned model and an entry per epoch: `epoch, loss`, and what `judge` says.

    `examples` are prompts and the columns of their answers, as `Asking.examples` gives them.
    """
    scorer = asking.scorer
    prompts, columns = examples
    if isinstance(scorer, HeadScorer):
        answers = np.array(columns)
    elif isinstance(scorer, Scorer):
        first_forms = [ids[0] for ids in scorer.verbalizer.ids(scorer.tokenizer)]
        answers = np.array(first_forms)[list(columns)]
    else:
        raise InputError(
            "fit: labels of several tokens cannot be trained on as one answer; fit with "
            "answer='letters', which any labels can have"
        )
    history: list[dict[str, float]] = []
    best: tuple[float, float] | None = None
    kept: Any = None
    since = 0

    def after_epoch(model: Model, loss: float) -> bool:
        nonlocal best, kept, since
        entry: dict[str, float] = {"epoch": len(history) + 1, "loss": loss}
        history.append(entry)
        if judge is None:
            return False
        accuracy, held_out_loss = judge(model)
        entry |= {"validation_accuracy": accuracy, "validation_loss": held_out_loss}
        if recipe.patience is None:
            return False
        since += 1
        if best is None or (accuracy, -held_out_loss) > best:
            best, since = (accuracy, -held_out_loss), 0
            kept = jax.tree.map(np.array, nnx.split(model)[1])
        return since >= recipe.patience

    model = fine_tune(
        scorer.model,
        prompts,
        answers,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        weight_decay=recipe.weight_decay,
        warmup=recipe.warmup,
        seed=recipe.seed,
        pad_id=scorer.tokenizer.pad_id,
        after_epoch=after_epoch,
        progress=progress,
    )
    if kept is not None:
        model = nnx.merge(nnx.split(model)[0], jax.tree.map(jax.numpy.asarray, kept))
    return model, history


def held_out(groups: Sequence[Any], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows into those to train on and those held out, of each group in proportion.

    Of a group of two or more at least one is held out.

    >>> held_out(["a"] * 4 + ["b"] * 4, 0.25, seed=0)
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


def shown_with(gold: int, labels: int, size: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Return the labels that an example shows: all, or of more than fit its own and others drawn.

    >>> shown_with(4, 6, 3, np.random.default_rng(0))
    (3, 4, 5)
    """
    if labels <= size:
        return tuple(range(labels))
    others = np.delete(np.arange(labels), gold)
    return tuple(sorted([gold, *rng.choice(others, size - 1, replace=False).tolist()]))
