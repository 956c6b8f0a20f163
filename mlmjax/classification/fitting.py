"""Fine-tune a classifier, again if it learns nothing, and keep the best weights."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from pydantic import Field, field_validator, model_validator

from mlmjax.classification.prompter import Prompter
from mlmjax.classification.settings import suitable_answer
from mlmjax.config.data import Name, PositiveFloat
from mlmjax.config.run import AdapterConfig
from mlmjax.config.tables import StrictTable
from mlmjax.data.batch import Answers
from mlmjax.model.modernbert import Model, merged, with_adapter
from mlmjax.reporting.terminal import Progress
from mlmjax.scoring.engine import MOST_ROWS
from mlmjax.statistics.learning import (
    NOT_SHOWN,
    Attempt,
    FitSummary,
    Measured,
    find_problems,
    measure,
)
from mlmjax.text.prompts import Prompt
from mlmjax.training.adapters import split_trained, trained_patterns
from mlmjax.training.finetune import BestEpoch, Epoch, fine_tune
from mlmjax.training.loss import LossKind
from mlmjax.training.rate_finder import find_rate

MEASURED_PROMPTS = 256
"""About this many prompts about training texts measure what a fit has learned."""

SHARED = {"epochs", "batch_size", "weight_decay", "seed", "accumulate", "layer_decay", "train"}
"""What `fine_tune` and `find_rate` take from a recipe."""

TRAINED = SHARED | {"learning_rate", "warmup", "ema"}
"""What `fine_tune` takes from a recipe."""

SHORT_WARMUP, LONGEST_WARMUP = 0.05, 0.5
"""Shares of the updates: what restarts double at least, and where doubling ends."""

LARGE = 100_000_000
"""Parameters from which on a model needs a low learning rate."""


class LearnedNothingWarning(UserWarning):
    """Warn that a fit ended no better than an answer that reads no text."""


class Recipe(StrictTable):
    """Hold the numbers of a fine-tuning; defaults are from the middle of the paper's sweep.

    `accumulate`, `layer_decay` and `ema` are those of run files (`config.run`).
    With held-out texts, `patience` ends the training after that many epochs in a row without
    improvement, and the best epoch's weights are kept. None runs all epochs and keeps the last.
    `restarts` is the number of further trainings, each with another seed and a longer warm-up, that
    are tried as long as none has learned anything. `adapter` trains an adapter and freezes the
    model, `train` only the parameters that its patterns name.
    """

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 3
    learning_rate: PositiveFloat | Literal["auto"] | None = None
    batch_size: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 32
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    accumulate: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 1
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    patience: Annotated[int, Field(ge=1)] | None = None
    restarts: Annotated[int, Field(ge=0, le=100)] = 0
    adapter: AdapterConfig | None = None
    train: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None

    @field_validator("adapter", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if self.adapter is not None and self.train is not None:
            raise ValueError("adapter trains its own parameters; leave out either it or train")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate is {self.accumulate}, and a batch has only {self.batch_size} prompts "
                "to divide; make it smaller"
            )
        return self


class FitRecipe(Recipe):
    """Hold the numbers of the fine-tuning of a classifier.

    `label_smoothing` is the share of the probability that all labels divide equally. `normalize`
    says over what the probabilities of the loss sum to 1. `mask_share` is the probability with
    which a word of a text is masked.
    """

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mask_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    normalize: Literal["vocabulary", "labels"] = "vocabulary"


class Texts(NamedTuple):
    """Texts to measure a fit on, and the right distribution and weight of each row of scores."""

    texts: Sequence[str]
    targets: np.ndarray
    weights: np.ndarray | None = None


class FitData(NamedTuple):
    """What a fit learns from and is measured on.

    `prompts` and `answers` are those of `Prompter`, and `kind` is their loss. `training` is a
    sample of the training texts, `held_out` are texts that are not trained on. `frequencies` are
    those of `label_frequencies`.
    """

    prompts: Sequence[Prompt]
    answers: Answers
    kind: LossKind
    training: Texts
    held_out: Texts | None
    frequencies: np.ndarray


def learn(
    prompter: Prompter, data: FitData, recipe: Recipe, *, progress: Progress | None
) -> FitSummary:
    """Fine-tune the prompter's model, and return what is known of it.

    With `restarts` it trains again until one attempt has learned something. The weights kept are
    those of the attempt that is best on held-out texts. Warns with `LearnedNothingWarning` if none
    has learned.
    """
    scorer, start = prompter.scorer, prompter.scorer.model
    attempts: list[Attempt] = []
    kept, best = 0, start
    for own in _attempts(recipe, _rate(prompter, data, recipe)):
        scorer.model = start
        attempts.append(_attempt(prompter, data, own, progress))
        if len(attempts) == 1 or _key(attempts[-1]) > _key(attempts[kept]):
            kept, best = len(attempts) - 1, scorer.model
        if not attempts[-1].problems:
            break
    scorer.model = best
    warning = _warning(prompter, recipe, attempts, kept)
    if warning is not None:
        warnings.warn(warning, LearnedNothingWarning, stacklevel=3)
    return FitSummary(kept=kept, attempts=tuple(attempts), warning=warning)


def usual_rate(parameters: int) -> float:
    """Return the learning rate that suits so many parameters that are trained.

    Small models learn at 1e-3 (docs/experiments). From `LARGE` on it is the middle of the sweep of
    the paper (arXiv 2502.03793).
    """
    return 1e-3 if parameters < LARGE else 3e-5


def start_of(model: Model, recipe: Recipe) -> Model:
    """Return the model that a recipe trains: with its adapter, or all of it without any."""
    if recipe.adapter is None:
        return merged(model)
    return with_adapter(model, recipe.adapter, seed=recipe.seed)


def trained_size(model: Model, recipe: Recipe) -> int:
    """Return the number of parameters that a recipe changes."""
    trained, _ = split_trained(nnx.state(model, nnx.Param), trained_patterns(model, recipe.train))
    return sum(leaf.size for leaf in jax.tree.leaves(trained))


def _rate(prompter: Prompter, data: FitData, recipe: Recipe) -> float:
    """Return the learning rate of a recipe, found by a short training if it is "auto"."""
    rate, usual = recipe.learning_rate, usual_rate(trained_size(prompter.scorer.model, recipe))
    if rate is None:
        return usual
    if rate != "auto":
        return rate
    return find_rate(
        prompter.scorer.model,
        data.prompts,
        data.answers,
        kind=data.kind,
        around=usual,
        pad_id=prompter.scorer.tokenizer.pad_id,
        **recipe.model_dump(include=SHARED),
    )


def _attempts(recipe: Recipe, rate: float) -> Iterator[Recipe]:
    """Yield the recipe of each attempt; every restart doubles the warm-up."""
    for number in range(1 + recipe.restarts):
        changes: dict[str, Any] = {"learning_rate": rate}
        if number:
            changes["seed"] = int(np.random.default_rng([recipe.seed, number]).integers(2**31))
            warmup = max(recipe.warmup, SHORT_WARMUP) * 2**number
            changes["warmup"] = max(recipe.warmup, min(warmup, LONGEST_WARMUP))
        yield recipe.model_copy(update=changes)


def _key(attempt: Attempt) -> tuple[bool, float, float]:
    """Return what makes an attempt better than another."""
    measured = attempt.validation or attempt.training
    return not attempt.problems, measured.accuracy, -measured.loss


def _attempt(
    prompter: Prompter, data: FitData, recipe: Recipe, progress: Progress | None
) -> Attempt:
    """Train once, and measure what was learned."""
    history = _train(prompter, data, recipe, progress)
    training = _measured(prompter, data.training, data.frequencies)
    held_out = data.held_out
    validation = None if held_out is None else _measured(prompter, held_out, data.frequencies)
    problems = find_problems(history, training, validation, prompter.names)
    return Attempt(
        seed=recipe.seed,
        learning_rate=float(recipe.learning_rate or 0.0),
        warmup=recipe.warmup,
        history=tuple(history),
        training=training,
        validation=validation,
        problems=tuple(problems),
    )


def _measured(prompter: Prompter, given: Texts, frequencies: np.ndarray) -> Measured:
    scores = np.concatenate(list(prompter.stream(given.texts)))
    usual = np.tile(frequencies, (len(scores) // len(frequencies), 1))
    return measure(scores, given.targets, usual, given.weights)


def _train(
    prompter: Prompter, data: FitData, recipe: Recipe, progress: Progress | None
) -> list[dict[str, float]]:
    """Fine-tune the prompter's model, and return what is known of each epoch.

    An epoch's entry has `epoch`, `n` texts, `loss` and `accuracy` in training, the standard error
    of that loss and, as `baseline_loss`, the loss of always giving the label frequencies. With
    held-out texts it has `validation_accuracy`, `validation_loss` and `validation_majority`.
    """
    scorer = prompter.scorer
    history: list[dict[str, float]] = []
    best, baseline = BestEpoch(recipe.patience), _entropy(data)

    def after_epoch(model: Model, epoch: Epoch) -> bool:
        figures = {"loss": epoch.loss, "baseline_loss": baseline, "accuracy": epoch.accuracy}
        history.append({"epoch": len(history) + 1, "n": len(data.prompts), **figures})
        if np.isfinite(epoch.error):
            history[-1]["loss_error"] = epoch.error
        if data.held_out is None:
            return False
        scorer.model = model
        found = _measured(prompter, data.held_out, data.frequencies)
        history[-1] |= {
            "validation_accuracy": found.accuracy,
            "validation_loss": found.loss,
            "validation_majority": found.majority,
        }
        return best.is_over(model, found.accuracy, found.loss)

    model = fine_tune(
        scorer.model,
        data.prompts,
        data.answers,
        **recipe.model_dump(include=TRAINED),
        kind=data.kind,
        pad_id=scorer.tokenizer.pad_id,
        after_epoch=after_epoch,
        progress=progress,
    )
    scorer.model = best.restored(model)
    return history


def _entropy(data: FitData) -> float:
    """Return the loss on the training texts of always giving the label frequencies."""
    shares = data.frequencies
    return float(-(shares * np.log(shares)).sum(axis=1).mean())


def _warning(
    prompter: Prompter, recipe: Recipe, attempts: Sequence[Attempt], kept: int
) -> str | None:
    """Return a line that says what was seen and what usually helps; None if all is well."""
    attempt, settings = attempts[kept], prompter.settings
    seen = found_problems(attempts, kept)
    if seen is None:
        return None
    rate = attempt.learning_rate
    helps = [f"learning_rate={rate / 3:.1g} or {rate * 3:.1g} in place of {rate:g}"]
    names = dict.fromkeys(settings.labels, "")
    if (
        settings.head == "mlm"
        and not (prompter.own_names or settings.multi_label)
        and suitable_answer(names, prompter.scorer.tokenizer)[0] == "words"
    ):
        helps.insert(0, "answer='words'")
    helps.append(f"epochs={3 * recipe.epochs}")
    if not recipe.restarts:
        helps.append("restarts=3 with validation_share=0.2")
    return f"{seen}. What usually helps: {', '.join(helps)}"


def found_problems(
    attempts: Sequence[Attempt], kept: int, *, is_tested: bool = False
) -> str | None:
    """Say what shows that the kept attempt may have learned nothing; None if all is well.

    With `is_tested`, a test on other texts says whether it answers them.
    """
    problems = attempts[kept].problems
    if is_tested:
        problems = tuple(problem for problem in problems if NOT_SHOWN not in problem)
    if not problems:
        return None
    tried = f" in any of {len(attempts)} attempts" if len(attempts) > 1 else ""
    return f"the fit may have learned nothing{tried}: {'; '.join(problems)}"


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
