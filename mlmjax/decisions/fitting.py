"""Read right answers, and fine-tune a model on questions of any kinds at once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlmjax.classification.fitting import Recipe, split_rows
from mlmjax.decisions.asking import Asker
from mlmjax.decisions.questions import Question, read_questions
from mlmjax.decisions.settings import kind_of
from mlmjax.decisions.states import State
from mlmjax.errors import InputError, named_place
from mlmjax.reporting.terminal import Progress
from mlmjax.text.checks import check_list, for_each_row, name_rows
from mlmjax.training.finetune import fine_tune


@dataclass(frozen=True)
class Labelled:
    """Hold questions about states with the numbers of their right answers, row by row."""

    pairs: Sequence[tuple[State, Question]]
    numbers: Sequence[int]
    where: Sequence[str]

    def kinds(self) -> list[str]:
        """Return the kinds of question there are, sorted."""
        return sorted({kind_of(question) for _, question in self.pairs})

    def of_kind(self, kind: str) -> tuple[list[tuple[State, Question]], list[int], list[str]]:
        """Return the pairs of one kind, their right answers and their names."""
        rows = [n for n, (_, question) in enumerate(self.pairs) if kind_of(question) == kind]
        part = self.take(rows)
        return list(part.pairs), list(part.numbers), list(part.where)

    def take(self, rows: Sequence[int]) -> "Labelled":
        """Return some of the rows."""
        return Labelled(
            [self.pairs[n] for n in rows],
            [self.numbers[n] for n in rows],
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
    pairs, numbers, where = [], [], []

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
                numbers.append(asked[key].number(answer))
            pairs.append((shown, asked[key]))
            where.append(f"{name}, {key!r:.60}")

    rows = zip(listed, tables, strict=True)
    for_each_row(read, ((name, (name, *row)) for name, row in name_rows(rows)))
    if not pairs:
        raise InputError("answers: there are none; give at least one right answer")
    return Labelled(pairs, numbers, where)


def learn(
    asker: Asker, labelled: Labelled, recipe: Recipe, progress: Progress | None
) -> list[dict[str, float]]:
    """Fine-tune the asker's model, and return what is known of each epoch.

    A share of the rows of each kind and answer is held out to measure accuracy and loss, and with
    `patience` the weights of the best epoch are kept.
    """
    if recipe.patience is not None and not recipe.validation_share:
        raise InputError(
            f"fit: patience is {recipe.patience}, but no states are held out to measure "
            "improvement; give validation_share, or leave patience out"
        )
    rows, held_out = labelled, None
    if recipe.validation_share:
        groups = [
            f"{kind_of(question)} {number}"
            for (_, question), number in zip(labelled.pairs, labelled.numbers, strict=True)
        ]
        train, out = split_rows(groups, recipe.validation_share, recipe.seed)
        rows, held_out = labelled.take(train), labelled.take(out)
    history: list[dict[str, float]] = []
    best, since, kept = (-1.0, 0.0), 0, None

    def after_epoch(model: Any, loss: float) -> bool:
        nonlocal best, since, kept
        history.append({"epoch": len(history) + 1, "loss": loss})
        if held_out is None or not held_out.pairs:
            return False
        asker.scorer.model = model
        scores = [found for found, _ in asker.ask(held_out.pairs, held_out.where)]
        gold = list(zip(scores, held_out.numbers, strict=True))
        accuracy = float(np.mean([own.argmax() == number for own, number in gold]))
        of_gold = float(np.mean([own[number] for own, number in gold]))
        history[-1] |= {"validation_accuracy": accuracy, "validation_loss": -of_gold}
        if recipe.patience is None:
            return False
        since += 1
        if (accuracy, of_gold) > best:
            best, since = (accuracy, of_gold), 0
            kept = jax.tree.map(np.array, nnx.split(model)[1])
        return since >= recipe.patience

    prompts, targets = asker.examples(rows.pairs, rows.numbers, recipe.seed)
    model = fine_tune(
        asker.scorer.model,
        prompts,
        targets,
        **recipe.model_dump(exclude={"validation_share", "patience"}),
        pad_id=asker.scorer.tokenizer.pad_id,
        after_epoch=after_epoch,
        progress=progress,
    )
    if kept is not None:
        model = nnx.merge(nnx.split(model)[0], jax.device_put(kept))
    asker.scorer.model = model
    return history
