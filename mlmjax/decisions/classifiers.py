"""Ask the question of a saved classifier in the prompt that the classifier was fitted with."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlmjax.classification.context import JOINT
from mlmjax.classification.predictor import Predictor, Source
from mlmjax.classification.prompter import Prompter, over_windows
from mlmjax.decisions.questions import MOST_OPTIONS, Choice, Question, show_text
from mlmjax.decisions.states import Shown, State
from mlmjax.errors import InputError
from mlmjax.model.modernbert import Model
from mlmjax.reporting.markdown import visible
from mlmjax.scoring.engine import Advance
from mlmjax.scoring.scorers import check_finite
from mlmjax.text.checks import for_each_row
from mlmjax.text.prompts import Prompt
from mlmjax.text.tokenizer import Tokenizer


class LaidOut(NamedTuple):
    """The prompts about a state, one for each window, and the tokens of it that they lack."""

    prompts: list[Prompt]
    removed: int


def is_one_prompt(prompter: Prompter) -> bool:
    """Return whether one prompt of a classifier decides among all labels, by a token for each."""
    if prompter.settings.head != "mlm" or len(prompter.names) > MOST_OPTIONS:
        return False
    recipe = prompter.recipe()
    return recipe is not None and len(recipe[1]) == len(prompter.names)


class OwnQuestion:
    """The choice among a classifier's labels, in the prompt that the classifier was fitted with.

    `length` is the number of tokens of a prompt without its text. `prompter` has to be one for
    which `is_one_prompt` is true, and is used by nothing else: its engine becomes exact, so that an
    answer has the same bits whatever else is asked.
    """

    def __init__(self, prompter: Prompter):
        scorer = prompter.scorer
        self.prompter, self.settings = prompter, prompter.settings
        scorer.engine.exact = True
        row = {"options": list(prompter.shown), "examples": "", "text": ""}
        self.length = scorer.template.length(scorer.tokenizer, row)

    def matches(self, question: Question) -> bool:
        """Return whether a question is the classifier's: a choice among exactly its labels.

        The options may have any order, and the classifier's descriptions or none.
        """
        labels = self.settings.labels
        if not isinstance(question, Choice) or set(question.names) != labels.keys():
            return False
        assert isinstance(question.criteria, dict)
        said = {name: show_text(text).strip() for name, text in question.criteria.items()}
        own = {name: text.strip() for name, text in labels.items()}
        return said == own or not any(said.values())

    def check(self, state: State) -> None:
        """Raise `InputError` for a blank state, which the classifier does not take."""
        if not any(part.before.strip() or part.value.strip() for part in state.parts):
            raise InputError(
                "the state is blank, and a choice among the labels of the classifier needs some "
                "text; give some"
            )

    def lay_out(self, states: Sequence[State], where: Sequence[str]) -> list[LaidOut]:
        """Return the prompts about each state; `where` names each in messages.

        Raises `InputError` that lists each blank state.
        """
        for_each_row(self.check, zip(where, states, strict=True))
        prompter, scorer = self.prompter, self.prompter.scorer
        shown = [self._shown(state) for state in states]
        queries = [
            prompter.queries(said.text)[0]._replace(masked=state.masked)
            for state, said in zip(states, shown, strict=True)
        ]
        rows = [[row for _, row in prompter.rows(query)] for query in queries]
        names = [name for name, own in zip(where, rows, strict=True) for _ in own]
        prompts = iter(scorer.prompts([row for own in rows for row in own], where=names))
        found = []
        for state, said, own in zip(states, shown, rows, strict=True):
            laid = LaidOut([next(prompts) for _ in own], said.removed)
            lost = sum(sum(prompt.shortened.values()) for prompt in laid.prompts)
            if lost and not state.is_plain:
                laid = self._fitted(state)
            elif lost:
                laid = laid._replace(removed=said.removed + lost)
            found.append(laid)
        return found

    def score(self, prompts: Sequence[Prompt], progress: Advance | None = None) -> np.ndarray:
        """Return the log probabilities `[prompts, labels]` before calibration."""
        slots = np.array([prompt.slot for prompt in prompts], np.int32)
        counts = np.full(len(prompts), len(self.prompter.names), np.int32)
        ids, engine = [prompt.ids for prompt in prompts], self.prompter.scorer.engine
        found = np.asarray(engine.run(ids, slots, counts, progress=progress))
        check_finite(found)
        return found

    def warm_up(self, length: int) -> None:
        """Compile the program of prompts of this length."""
        self.score([Prompt([self.prompter.scorer.tokenizer.pad_id] * length, 0, {})])

    def pooled(self, scores: Sequence[np.ndarray]) -> np.ndarray:
        """Return the calibrated log probabilities `[labels]`, given those of each window."""
        log_probs = over_windows(np.array(scores), self.settings.long_text)
        calibration = self.settings.calibration
        return log_probs if calibration is None else calibration.apply(log_probs[None])[0]

    def in_order(self, question: Question, log_probs: np.ndarray) -> np.ndarray:
        """Return log probabilities of the labels in the order of a question's options."""
        return log_probs[[self.prompter.names.index(name) for name in question.names]]

    def _shown(self, state: State) -> Shown:
        """Return the text of a state; only as much as a prompt holds if the rest is cut anyway."""
        scorer = self.prompter.scorer
        if self.settings.long_text != "shorten" or self.settings.shorten != {"text": "tail"}:
            return Shown(state.text, 0)
        return state.bounded(scorer.tokenizer, scorer.max_length)

    def _fitted(self, state: State) -> LaidOut:
        """Return the prompt of JSON that is too long: its longest values are shortened."""
        scorer, uses = self.prompter.scorer, self.prompter.scorer.template.uses("text")
        room = (scorer.max_length - self.length) // uses - JOINT
        shown = state.fitted(scorer.tokenizer, max(0, room))
        ((_, row),) = self.prompter.rows(self.prompter.queries(shown.text)[0])
        (prompt,) = scorer.prompts([row])
        return LaidOut([prompt], shown.removed + sum(prompt.shortened.values()))


def load_classifier(source: Source, **options: Any) -> tuple[Model, Tokenizer, OwnQuestion | None]:
    """Load a saved classifier, and its question if a decider can ask it; warns what it asks how.

    `options` are those of `Predictor`. Raises what it raises.
    """
    predictor = Predictor.from_pretrained(source, progress=False, **options)
    prompter = predictor.asking_
    own = OwnQuestion(prompter) if is_one_prompt(prompter) else None
    if own is not None:
        names = visible(", ".join(prompter.names))
        message = (
            f"a choice among {names:.300} is asked as the classifier was fitted; other questions "
            "are asked in the decider's words, for which its accuracy does not hold"
        )
    else:
        message = (
            "is a classifier, which was fitted with its own prompt; a decider asks in other "
            "words, so the accuracy of the classifier does not carry over. Measure it, use "
            "`Classifier` or `mlmjax classify`, or call `fit` again"
        )
    warnings.warn(f"{source}: {message}", stacklevel=4)
    return prompter.scorer.model, prompter.scorer.tokenizer, own
