"""Questions about texts: every one becomes the prompts that are asked, their scores one answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlmjax.classification.context import JOINT, Shot, Shots, windows_of
from mlmjax.classification.settings import LongText, Settings
from mlmjax.errors import InputError
from mlmjax.model.modernbert import Model
from mlmjax.scoring.continuation import ContinuationScorer
from mlmjax.scoring.engine import Progress
from mlmjax.scoring.scorers import HeadScorer, RowScorer, Scorer
from mlmjax.statistics import option_orders
from mlmjax.text.prompts import Prompt, Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import Verbalizer, all_option_names, usable_option_names

YES_NO = ("yes", "no")


class Question(NamedTuple):
    """A text, the numbers of the options it chooses among, and the label it is asked about if any.

    `label` is that label's name, and `fields` what the prompt says of it.
    """

    text: str
    choice: tuple[int, ...]
    fields: Mapping[str, str] = {}
    label: str | None = None


@dataclass(frozen=True)
class Asking:
    """How questions are asked: the scorer, what options say, their orders, windows and examples.

    `shown[i]` is the text of option i in the prompt, `names[i]` what few-shot examples call it.
    With `own_names` the answers are the scorer's labels whatever their order in the prompt, else
    the letters (or numbers) of the options. `shifts` is how many cyclic orders of the options are
    asked, None all of them. Of a text that is too long `long_text` says whether it is shortened, or
    asked in windows whose probabilities are averaged ("mean"), or of which each option's highest
    counts ("max"; rows sum to 1 again).
    """

    scorer: RowScorer
    shown: tuple[str, ...]
    names: tuple[str, ...]
    own_names: bool = False
    shifts: int | None = 1
    long_text: LongText = "shorten"
    shots: Shots | None = None

    def ask(
        self, questions: Sequence[Question], where: Sequence[str], progress: Progress | None = None
    ) -> list[np.ndarray]:
        """Return the log probabilities of each question's choice.

        They are in the order of the choice, whatever order was asked. `where` names each question
        in messages; `progress` is called with prompts done since its last call.
        """
        asked = [self.rows(question) for question in questions]
        names = [name for name, rows in zip(where, asked, strict=True) for _ in rows]
        flat = [row for rows in asked for _, row in rows]
        scores = self.scorer.log_probs(flat, where=names, progress=progress)
        answers, start = [], 0
        for question, rows in zip(questions, asked, strict=True):
            answers.append(self._pooled(question, rows, scores[start : start + len(rows)]))
            start += len(rows)
        return answers

    def rows(self, question: Question) -> list[tuple[int, dict[str, Any]]]:
        """Return the prompts of a question as `(shift, row)`, windows of one order together."""
        count = len(question.choice)
        shifts = [0] if self.own_names else option_orders.shifts(count, self.shifts)
        found = []
        for shift in shifts:
            order = option_orders.shifted(question.choice, shift)
            row = {**question.fields, "options": [self.shown[i] for i in order]}
            pieces, examples = self._fitted(question, row, order)
            found += [(shift, row | {"text": piece, "examples": examples}) for piece in pieces]
        return found

    def examples(
        self,
        questions: Sequence[Question],
        answers: Sequence[int],
        where: Sequence[str],
        *,
        seed: int = 0,
    ) -> tuple[list[Prompt], list[int]]:
        """Return prompts to train on and the column of each one's answer.

        `answers` are option numbers. Each question is shown in one of its orders, drawn by
        `[seed, its number]`: in turns they could agree with the order of the labels, and the answer
        would always be the same letter. Every window of a text is an example.
        """
        rows, columns, names = [], [], []
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            asked = self.rows(question)
            shifts = sorted({shift for shift, _ in asked})
            drawn = shifts[np.random.default_rng([seed, number]).integers(len(shifts))]
            for shift, row in asked:
                if shift == drawn:
                    rows.append(row)
                    names.append(where[number])
                    order = option_orders.shifted(question.choice, shift)
                    columns.append(answer if self.own_names else order.index(answer))
        return self.scorer.prompts(rows, where=names), columns

    def _fitted(
        self, question: Question, row: Mapping[str, Any], order: Sequence[int]
    ) -> tuple[list[str], str]:
        """Cut the text into windows, and give the few-shot examples that fit beside it."""
        scorer = self.scorer
        if self.long_text == "shorten" and self.shots is None:
            return [question.text], ""
        fixed = scorer.template.length(scorer.tokenizer, {**row, "text": "", "examples": ""})
        uses = scorer.template.uses("text")
        room = scorer.max_length - fixed - JOINT * uses
        if self.long_text == "shorten" or room < uses:
            pieces = [question.text]
        else:
            pieces = windows_of(scorer.tokenizer, question.text, room // uses)
        if self.shots is None or len(pieces) > 1:
            return pieces, ""
        left = room - uses * len(scorer.tokenizer.encode_plain(question.text))
        left //= max(1, scorer.template.uses("examples"))
        return pieces, self.shots.fill(left, lambda shot: self._answer_of(shot, question, order))

    def _answer_of(self, shot: Shot, question: Question, order: Sequence[int]) -> str | None:
        """Return what a few-shot example is answered by, None where it is none of the options."""
        wanted = shot.labels[0] if shot.labels else None
        if question.label is not None:
            wanted = YES_NO[question.label not in shot.labels]
        names = [self.names[i] for i in order]
        if wanted not in names:
            return None
        if self.own_names:
            return wanted
        kind = self.scorer.template.names
        return all_option_names(kind)[names.index(wanted)]

    def _pooled(
        self, question: Question, rows: Sequence[tuple[int, Any]], scores: np.ndarray
    ) -> np.ndarray:
        """Put the scores of a question's prompts together: first windows, then orders."""
        count = len(question.choice)
        by_shift: dict[int, list[np.ndarray]] = {}
        for (shift, _), score in zip(rows, scores, strict=True):
            by_shift.setdefault(shift, []).append(score[:count] if not self.own_names else score)
        answers = []
        for shift, windows in by_shift.items():
            pooled = _over_windows(np.array(windows), self.long_text)
            answers.append(
                pooled[list(question.choice)]
                if self.own_names
                else option_orders.unshifted(pooled, shift, count)
            )
        return option_orders.pooled(np.array(answers)) if len(answers) > 1 else answers[0]


def _over_windows(log_probs: np.ndarray, rule: LongText) -> np.ndarray:
    """[windows, labels] -> [labels]."""
    if len(log_probs) == 1:
        return log_probs[0]
    if rule == "mean":
        return option_orders.pooled(log_probs)
    best = log_probs.max(axis=0)
    return best - np.logaddexp.reduce(best)


OPTIONAL = ("examples",)
"""Fields of a prompt that may be blank."""


def make_template(settings: Settings) -> Template:
    """Return the template; raises `InputError` where its fields are not those of the question."""
    template = Template(
        settings.template,
        shorten=dict(settings.shorten),
        slot=settings.head == "mlm",
        names=settings.names,
    )
    needed = {"text", "label"} if settings.multi_label else {"text"}
    allowed = needed if settings.head == "classification" else needed | {"options", "examples"}
    fields = set(template.fields)
    if not needed <= fields <= allowed:
        raise InputError(
            f"template: its fields are {', '.join(template.fields) or 'none'}; expected "
            f"{_braced(needed)}" + (f", and may have {_braced(allowed - needed)}")
        )
    if settings.examples and "examples" not in fields:
        raise InputError("template: has no {examples}, where the examples given would stand")
    return template


def _braced(names: Iterable[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in sorted(names)) or "no others"


def make_asking(
    settings: Settings, model: Model, tokenizer: Tokenizer, *, batch_size: int | None
) -> Asking:
    """Return how a classifier of these settings asks; raises `InputError` where it cannot."""
    template = make_template(settings)
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": settings.max_length}
    names, answer = tuple(settings.labels), settings.answer
    if answer is None:
        # Without the options before its eyes a model cannot know what B stands for.
        answer = "letters" if "options" in template.fields else "words"
    own_names = settings.head == "classification" or answer != "letters"
    if settings.multi_label:
        names = YES_NO
    scorer: RowScorer
    if settings.head == "classification":
        scorer = HeadScorer(model, tokenizer, template, **options)
        if set(scorer.labels) != set(names):
            raise InputError(
                f"labels: the classification head has {_few(scorer.labels)}; found {_few(names)}; "
                "give the same labels, or none"
            )
    elif answer == "continuation":
        scorer = ContinuationScorer(model, tokenizer, template, names, **options, optional=OPTIONAL)
    elif answer == "words":
        scorer = Scorer(
            model, tokenizer, template, Verbalizer.words(names), **options, optional=OPTIONAL
        )
    else:
        columns = usable_option_names(settings.names, tokenizer, len(names))
        if len(columns) < 2:
            raise InputError(
                f"labels: the tokenizer has no two option names of one token ({settings.names}); "
                "give answer='words' or another tokenizer"
            )
        verbalizer = Verbalizer({name: (f" {name}",) for name in columns})
        scorer = Scorer(model, tokenizer, template, verbalizer, **options, optional=OPTIONAL)
    if own_names and settings.orders != 1:
        raise InputError(
            f"orders is {settings.orders!r}, but the answers here are no letters of options, "
            "so that there is no order to change; leave orders out"
        )
    shots = [Shot(example.text, example.labels) for example in settings.examples]
    return Asking(
        scorer,
        shown=YES_NO if settings.multi_label else settings.shown,
        names=names,
        own_names=own_names,
        shifts=None if settings.orders == "all" else settings.orders,
        long_text=settings.long_text,
        shots=Shots(shots, tokenizer) if shots else None,
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))[:200]
