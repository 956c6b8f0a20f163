"""Read right answers, and fine-tune a model on questions of any kinds at once."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlmjax.classification.fitting import (
    MEASURED_PROMPTS,
    SHARED,
    LearnedNothingWarning,
    Recipe,
    split_rows,
    trained_size,
    usual_rate,
)
from mlmjax.data.batch import UNUSED, Answers, Options
from mlmjax.decisions.asking import Asker
from mlmjax.decisions.questions import CHOICE, Question, read_questions, read_target
from mlmjax.decisions.settings import kind_of
from mlmjax.decisions.states import State
from mlmjax.errors import InputError, named_place
from mlmjax.reporting.terminal import Progress
from mlmjax.text.checks import check_list, for_each_row, name_rows
from mlmjax.text.prompts import Prompt
from mlmjax.training.finetune import BestEpoch, Epoch, fine_tune
from mlmjax.training.loss import LossKind
from mlmjax.training.rate_finder import find_rate


class DeciderRecipe(Recipe):
    """Hold the numbers of the fine-tuning of a decider.

    `normalize` says over what the probabilities of the loss sum to 1: all tokens, or the options of
    the question. With `ordered` the loss is the ranked probability score, which needs ordered
    levels.
    """

    normalize: Literal["vocabulary", "labels"] = "vocabulary"
    ordered: bool = False

    @property
    def kind(self) -> LossKind:
        """Return the loss that `fine_tune` takes."""
        return "ranked" if self.ordered else self.normalize


@dataclass(frozen=True)
class Labelled:
    """Hold questions about states with their right answers as distributions, row by row."""

    pairs: Sequence[tuple[State, Question]]
    targets: Sequence[np.ndarray]
    where: Sequence[str]

    @property
    def numbers(self) -> list[int]:
        """Return the most probable answer of each row."""
        return [int(target.argmax()) for target in self.targets]

    def kinds(self) -> list[str]:
        """Return the kinds of question there are, sorted."""
        return sorted({kind_of(question) for _, question in self.pairs})

    def of_kind(self, kind: str) -> "Labelled":
        """Return the rows of one kind."""
        return self.take([n for n, (_, q) in enumerate(self.pairs) if kind_of(q) == kind])

    def right(self) -> np.ndarray:
        """Return the number of each row's right answer; raise `InputError` for a distribution."""
        for target, name in zip(self.targets, self.where, strict=True):
            if target.max() < 1:
                raise InputError(
                    f"{name}: the answer is a distribution; expected one right answer, because "
                    "distributions are for fit and calibrate"
                )
        return np.array(self.numbers)

    def take(self, rows: Sequence[int]) -> "Labelled":
        """Return some of the rows."""
        return Labelled(
            [self.pairs[n] for n in rows],
            [self.targets[n] for n in rows],
            [self.where[n] for n in rows],
        )


def read_labelled(
    states: Iterable[Any], questions: Mapping[str, Any], answers: Iterable[Any]
) -> Labelled:
    """Return states and questions with right answers; an absent answer or None is left out.

    Raises `InputError` that names each row with a bad state or answer, and if there is no answer.
    """
    asked = read_questions(questions)
    listed = list(check_list(states, "states", "states"))
    tables = list(check_list(answers, "answers", "tables from ids to answers"))
    if len(listed) != len(tables):
        raise InputError(
            f"there are {len(listed)} states and {len(tables)} answers; give a table of answers "
            "for each state"
        )
    pairs, targets, where = [], [], []

    def read(row: tuple[str, Any, Any]) -> None:
        name, state, table = row
        shown = State(state)
        if not isinstance(table, Mapping):
            raise InputError(f"its answers are {table!r:.60}; expected a table from ids to answers")
        for key, answer in table.items():
            if key not in asked:
                raise InputError(
                    f"has an answer to {key!r:.60}, which is not among the questions: "
                    f"{', '.join(map(repr, asked)):.200}"
                )
            if answer is None:
                continue
            with named_place(f"{key!r:.60}"):
                targets.append(np.array(read_target(asked[key], answer)))
            pairs.append((shown, asked[key]))
            where.append(f"{name}, {key!r:.60}")

    rows = zip(listed, tables, strict=True)
    for_each_row(read, ((name, (name, *row)) for name, row in name_rows(rows)))
    if not pairs:
        raise InputError("answers: there are none; give at least one right answer")
    return Labelled(pairs, targets, where)


def learn(
    asker: Asker, labelled: Labelled, recipe: DeciderRecipe, progress: Progress | None
) -> list[dict[str, float]]:
    """Fine-tune the asker's model, and return what is known of each epoch.

    A share of the rows of each kind and answer is held out to measure accuracy and loss, and with
    `patience` the weights of the best epoch are kept. Warns with `LearnedNothingWarning` if the
    answers end no better than the frequencies of each question's answers.
    """
    if recipe.patience is not None and not recipe.validation_share:
        raise InputError(
            f"fit: patience is {recipe.patience}, but no states are held out to measure "
            "improvement; give validation_share, or leave patience out"
        )
    if recipe.restarts:
        raise InputError("fit: a decider has no restarts; leave them out, or give another seed")
    if recipe.ordered and any(question.type == CHOICE for _, question in labelled.pairs):
        raise InputError(
            "fit: ordered is for levels, and there is a choice among the questions; leave ordered "
            "out, or fit the choices on their own"
        )
    rows, held_out = labelled, None
    if recipe.validation_share:
        groups = [
            f"{kind_of(question)} {number}"
            for (_, question), number in zip(labelled.pairs, labelled.numbers, strict=True)
        ]
        train, out = split_rows(groups, recipe.validation_share, recipe.seed)
        rows, held_out = labelled.take(train), labelled.take(out)
        if not held_out.pairs:
            raise InputError(
                f"fit: validation_share is {recipe.validation_share:g}, but no answer is there "
                "twice to hold one out; give more rows, or leave validation_share out"
            )
    history: list[dict[str, float]] = []
    best = BestEpoch(recipe.patience)

    def after_epoch(model: Any, epoch: Epoch) -> bool:
        history.append({"epoch": len(history) + 1, "loss": epoch.loss, "accuracy": epoch.accuracy})
        if held_out is None:
            return False
        asker.scorer.model = model
        accuracy, losses = _measured(asker, held_out)
        loss = float(losses.mean())
        history[-1] |= {"validation_accuracy": accuracy, "validation_loss": loss}
        return best.is_over(model, accuracy, loss)

    prompts, tokens, shares = asker.examples(rows.pairs, rows.targets, recipe.seed)
    targets = _answers(tokens, shares, spread=recipe.kind != "vocabulary")
    trained = _trained(asker, prompts, targets, recipe, after_epoch, progress)
    asker.scorer.model = best.restored(trained)
    _warn(asker, rows, recipe.seed)
    return history


def _trained(
    asker: Asker,
    prompts: Sequence[Prompt],
    targets: Answers,
    recipe: DeciderRecipe,
    after_epoch: Callable[[Any, Epoch], bool],
    progress: Progress | None,
) -> Any:
    model, pad_id = asker.scorer.model, asker.scorer.tokenizer.pad_id
    rate = recipe.learning_rate
    usual = usual_rate(trained_size(model, recipe))
    own = recipe.model_dump(include=SHARED) | {"kind": recipe.kind}
    if rate == "auto":
        rate = find_rate(model, prompts, targets, around=usual, pad_id=pad_id, **own)
    return fine_tune(
        model,
        prompts,
        targets,
        learning_rate=usual if rate is None else rate,
        warmup=recipe.warmup,
        ema=recipe.ema,
        pad_id=pad_id,
        after_epoch=after_epoch,
        progress=progress,
        **own,
    )


def _answers(
    tokens: Sequence[np.ndarray], shares: Sequence[np.ndarray], *, spread: bool
) -> Answers:
    """Return what prompts learn: a token each, or distributions over tokens if any is one.

    With `spread` all are distributions.
    """
    best = np.array([own[share.argmax()] for own, share in zip(tokens, shares, strict=True)])
    if not spread and all(share.max() == 1 for share in shares):
        return Answers(best)
    shape = len(tokens), max(map(len, tokens))
    ids, probs = np.full(shape, UNUSED, np.int32), np.zeros(shape, np.float32)
    for at, (own, share) in enumerate(zip(tokens, shares, strict=True)):
        ids[at, : len(own)] = own
        probs[at, : len(own)] = share
    return Answers(best, None, Options(ids, probs))


def _measured(asker: Asker, rows: Labelled) -> tuple[float, np.ndarray]:
    """Return the accuracy on labelled rows, and the cross-entropy of each."""
    scores = [found for found, _ in asker.ask(rows.pairs, rows.where)]
    hits = [own.argmax() == number for own, number in zip(scores, rows.numbers, strict=True)]
    losses = [-(own * target).sum() for own, target in zip(scores, rows.targets, strict=True)]
    return float(np.mean(hits)), np.array(losses, np.float64)


def _usual(rows: Labelled) -> np.ndarray:
    """Return the loss of each row for always giving the mean answer to its question."""
    sums: dict[int, np.ndarray] = {}
    for (_, question), target in zip(rows.pairs, rows.targets, strict=True):
        sums[id(question)] = sums.get(id(question), 0) + target
    losses = []
    for (_, question), target in zip(rows.pairs, rows.targets, strict=True):
        mean = sums[id(question)] / sums[id(question)].sum()
        losses.append(-(target * np.log(np.where(target > 0, mean, 1))).sum())
    return np.array(losses)


def _warn(asker: Asker, rows: Labelled, seed: int) -> None:
    """Warn if the answers to training rows are no better than the frequencies of the answers."""
    usual = _usual(rows)
    chosen = np.random.default_rng([seed, 2]).permutation(len(usual))[:MEASURED_PROMPTS]
    _, losses = _measured(asker, rows.take(chosen.tolist()))
    gains = usual[chosen] - losses
    spread = 2 * float(gains.std()) / len(gains) ** 0.5
    if usual.max() > 0 and gains.mean() <= spread:
        warnings.warn(
            f"the fit may have learned nothing: the loss on {len(gains)} training answers is "
            f"{losses.mean():.3f}, and {usual[chosen].mean():.3f} for always giving the "
            "frequencies of each question's answers. What usually helps: answer='words' if options "
            "are one token, another learning_rate, more epochs",
            LearnedNothingWarning,
            stacklevel=4,
        )
