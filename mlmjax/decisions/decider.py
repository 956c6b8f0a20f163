"""Answer typed questions about texts: zero-shot, calibrated or fine-tuned."""

import itertools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlmjax.classification.fitting import start_of
from mlmjax.classification.predictor import Source
from mlmjax.classification.settings import LongText
from mlmjax.config.tables import StrictTable, decode
from mlmjax.decisions.answers import ChoiceAnswer, ScoreAnswer, YesNoAnswer, make_answer
from mlmjax.decisions.asking import Asker, Usage, Way
from mlmjax.decisions.classifiers import OwnQuestion
from mlmjax.decisions.fitting import DeciderRecipe, Labelled, learn, read_labelled
from mlmjax.decisions.questions import Question, read_question, read_questions
from mlmjax.decisions.settings import DeciderSettings, kind_of, load, settle
from mlmjax.decisions.states import State, as_state
from mlmjax.errors import InputError, suggest_keywords
from mlmjax.reporting.terminal import Progress, progress_bar
from mlmjax.scoring.masks.importance import Word
from mlmjax.statistics import label_sets
from mlmjax.statistics.calibration import (
    Calibration,
    abstention_threshold,
    log_softmax,
    temperature_calibration,
)
from mlmjax.storage import CLASSIFIER, DECIDER, TRAINING
from mlmjax.text.checks import check_list, check_share, for_each_row
from mlmjax.text.tokenizer import ANCHOR
from mlmjax.text.words import word_spans
from mlmjax.weights.adapters import save_adapter
from mlmjax.weights.cards import add_run, model_card
from mlmjax.weights.pretrained import save_pretrained

AnyAnswer = ChoiceAnswer | YesNoAnswer | ScoreAnswer
CHUNK_PROMPTS = 4096
"""About this many prompts are laid out together; states are read as they are needed."""


@suggest_keywords
class Decider:
    """Answer typed questions about states, each by one forward pass.

    `source` is a folder, a hub id, `mlmjax-small`, a saved classifier or decider, or a pair
    (model, tokenizer). `answer` is "letters" or "words": options that are one token each are then
    answered by themselves. `orders`, `long_text` and `max_length` are those of `Classifier`.
    `abstain_below` marks answers whose best probability is lower. Options left out are those of a
    saved decider or classifier. `anchor` names the token before the mask, or "none" for no token. A
    choice among exactly the labels of a saved classifier is asked in
    the classifier's own prompt, whatever its instructions. Raises `InputError` for a source that
    cannot be loaded or has no masked-language-model head.
    """

    def __init__(
        self,
        source: Source,
        *,
        answer: Way | None = None,
        orders: int | Literal["all"] | None = None,
        long_text: LongText | None = None,
        abstain_below: float | None = None,
        max_length: int | None = None,
        anchor: str | None = None,
        dtype: str = "float32",
        batch_size: int | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        progress: bool | None = None,
    ):
        loaded = load(
            source,
            revision=revision,
            local_files_only=local_files_only,
            dtype=dtype,
            long_text=long_text,
            max_length=max_length,
            batch_size=batch_size,
        ).with_anchor(anchor)
        self.name, self._manifest = loaded.name, loaded.manifest
        before_mask = loaded.tokenizer.anchor_name()
        given = {
            "anchor": None if before_mask == ANCHOR else before_mask,
            "answer": answer,
            "orders": orders,
            "long_text": long_text,
            "abstain_below": abstain_below,
            "max_length": max_length,
        }
        self.settings = decode(DeciderSettings, settle(given, loaded.settings), "decider")
        self.history_: list[dict[str, float]] = []
        self._batch_size, self._progress = batch_size, progress
        self._asker = self._make_asker(loaded.model, loaded.tokenizer, loaded.own)

    @classmethod
    def from_pretrained(cls, source: Source, **options: Any) -> "Decider":
        """Load a decider that `save_pretrained` wrote, or any model."""
        return cls(source, **options)

    @property
    def calibrations(self) -> Mapping[str, Calibration]:
        """Return what `calibrate` found, by type and number of options, such as `choice/3`."""
        return self.settings.calibrations

    @property
    def model(self) -> Any:
        """Return the model that answers."""
        return self._asker.scorer.model

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer of its prompts."""
        return self._asker.scorer.tokenizer

    @property
    def buckets(self) -> tuple[int, ...]:
        """Return the lengths that prompts are padded to, each of which is one program."""
        return self._asker.scorer.buckets

    @property
    def shortened(self) -> int:
        """Return the number of prompts so far whose state was too long and was shortened."""
        return self._asker.scorer.shortened

    def decide(self, state: Any, questions: Mapping[str, Any]) -> dict[str, AnyAnswer]:
        """Return the answers to questions about a state, by the ids of the questions.

        The state is a text, a table or a list. Questions are `Choice`, `YesNo` and `Score`, or
        their JSON objects. An answer is the same whatever else is asked, in whatever order and
        under whatever id. Raises `InputError` for questions that do not fit in a prompt.
        """
        return self.decide_all([(state, questions)])[0]

    def decide_many(
        self, states: Iterable[Any], questions: Mapping[str, Any]
    ) -> Iterator[dict[str, AnyAnswer]]:
        """Yield the answers to the same questions about each state, in order.

        States are read and answered in large batches. Raises `InputError` that names each bad one.
        """
        asked = read_questions(questions)
        size = max(1, CHUNK_PROMPTS // len(asked))
        pending, first = iter(check_list(states, "states", "states")), 0
        while chunk := list(itertools.islice(pending, size)):
            yield from self.decide_all([(state, asked) for state in chunk], first=first)
            first += len(chunk)

    def decide_all(
        self, requests: Sequence[tuple[Any, Mapping[str, Any]]], *, first: int = 0
    ) -> list[dict[str, AnyAnswer]]:
        """Return the answers of several states, each with questions of its own, in one batch.

        `first` is the index of the first request in messages.
        """
        asked = [read_questions(questions) for _, questions in requests]
        alone = len(requests) == 1 and not first
        names = [f"row {at + 1} (index {at})" for at in range(first, first + len(requests))]
        if alone:
            states = [as_state(requests[0][0])]
        else:
            states = for_each_row(lambda one: as_state(one[0]), zip(names, requests, strict=True))
        pairs, where = [], []
        for state, table, name in zip(states, asked, names, strict=True):
            pairs += [(state, question) for question in table.values()]
            where += [f"question {key!r:.60}" if alone else f"{name}, {key!r:.60}" for key in table]
        found = iter(self._ask(pairs, where))
        return [{key: self._answer(one, *next(found)) for key, one in own.items()} for own in asked]

    def explain(self, state: Any, question: Any) -> tuple[Word, ...]:
        """Return how important each word of a state is for the most probable answer.

        The importance of a word is the log probability of that answer, less that with the word
        masked. The texts of the words together are `State(state).text`; white space has importance
        0. A state of n words takes n + 1 predictions. Raises `InputError` for JSON that a prompt
        must shorten.
        """
        shown, asked = as_state(state), read_question(question)
        words = [
            Word(shown.text[a:b], a, b, 0.0) for a, b in word_spans(self.tokenizer, shown.text)
        ]
        masked = [at for at, word in enumerate(words) if word.text.strip()]
        states = [shown, *(shown.masking((words[at].start, words[at].end)) for at in masked)]
        scores = self._ask([(one, asked) for one in states], ["the question"] * len(states))
        if scores[0][1].shortened and not shown.is_plain:
            raise InputError(
                "the state is JSON that does not fit in a prompt whole, so its words cannot be "
                "masked; give less of it, or its text"
            )
        found = log_softmax(
            np.array([self._calibrated(asked, one) for one, _ in scores], np.float64)
        )
        best = int(found[0].argmax())
        for at, value in zip(masked, found[1:, best].tolist(), strict=True):
            words[at] = words[at]._replace(importance=float(found[0, best]) - value)
        return tuple(words)

    def in_orders(self, states: Sequence[Any], question: Any, orders: int) -> np.ndarray | None:
        """Return log probabilities `[states, orders, options]` of a question under other orders.

        The orders of its options are cyclic and evenly spaced, the given one first, and columns
        keep the given order. There are as many as the question has options if `orders` is more.
        None where answers have no one order: by words, with several `orders`, a classifier's own
        question, and more options than one prompt holds.
        """
        shown = [as_state(state) for state in check_list(states, "states", "states")]
        asked = read_question(question)
        names = [f"row {at + 1} (index {at})" for at in range(len(shown))]
        scores = self._asker.in_orders(shown, asked, names, orders)
        if scores is None:
            return None
        return np.array([[self._calibrated(asked, one) for one in row] for row in scores])

    def cost(self, state: State, question: Question) -> int:
        """Return about the number of tokens that a question reads; what is worked out is kept.

        Raises `InputError` for a question that leaves no room for a state.
        """
        return self._asker.cost(state, question)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compile the program of each bucket, so that no request waits for it."""
        self._asker.warm_up(progress)

    def calibrate(
        self, states: Iterable[Any], questions: Mapping[str, Any], answers: Iterable[Any]
    ) -> "Decider":
        """Find a temperature for each type and number of options; returns the decider.

        Use states that were not trained on. `answers` has a table for each state, from ids to right
        answers or distributions; an absent one or None is left out. A new temperature replaces that
        of its kind, and drops its label sets. A kind without one keeps its probabilities, with a
        warning: all of its answers are right, or no better than guessing.
        """
        labelled = read_labelled(states, questions, answers)
        found: dict[str, Calibration] = {}
        for kind in labelled.kinds():
            part = labelled.of_kind(kind)
            scores = self._scores(part, calibrated=False)
            try:
                found[kind] = temperature_calibration(scores, np.array(part.targets))
            except InputError as error:
                warnings.warn(f"{kind} is not calibrated: {error.message}", stacklevel=2)
        conformals = {k: v for k, v in self.settings.conformals.items() if k not in found}
        self._learn(calibrations={**self.calibrations, **found}, conformals=conformals)
        return self

    def conform(
        self,
        states: Iterable[Any],
        questions: Mapping[str, Any],
        answers: Iterable[Any],
        *,
        method: label_sets.Method = "lac",
    ) -> "Decider":
        """Learn sets of answers from states that neither `fit` nor `calibrate` has seen.

        They are by type and number of options, and `decide_sets` returns them. Returns the decider.
        """
        labelled = read_labelled(states, questions, answers)
        labelled.right()  # a distribution raises an error before anything is scored
        found = {}
        for kind in labelled.kinds():
            part = labelled.of_kind(kind)
            found[kind] = label_sets.fit(self._scores(part), part.right(), method=method)
        self._learn(conformals={**self.settings.conformals, **found})
        return self

    def abstain(
        self,
        states: Iterable[Any],
        questions: Mapping[str, Any],
        answers: Iterable[Any],
        *,
        accuracy: float,
        least: int = 10,
    ) -> "Decider":
        """Abstain from answers less probable than a limit found on right answers.

        The limit (`settings.abstain_below`) is the lowest with which a share `accuracy` of the
        other answers is right, and at least `least` are given. Returns the decider. Raises
        `InputError` if there is no such limit.
        """
        if check_share(accuracy, "accuracy") == 0 or least < 1:
            raise InputError(f"accuracy is {accuracy}, least {least}; expected more than 0")
        labelled = read_labelled(states, questions, answers)
        labelled.right()  # a distribution raises an error before anything is scored
        sure, right = [], []
        for kind in labelled.kinds():
            part = labelled.of_kind(kind)
            scores = self._scores(part)
            sure += np.exp(log_softmax(scores.astype(np.float64)).max(axis=1)).tolist()
            right += (scores.argmax(axis=1) == part.right()).tolist()
        limit = abstention_threshold(
            np.array(sure), np.array(right), accuracy=accuracy, least=least
        )
        self._learn(abstain_below=limit)
        return self

    def decide_sets(
        self, state: Any, questions: Mapping[str, Any], *, coverage: float = 0.9
    ) -> dict[str, list[str]]:
        """Return the answers to each question that `conform` cannot rule out, by their names.

        A share of at least `coverage` of the sets holds the right answer. Names are those of the
        options, `true` and `false`, or numbers of levels. A classifier's own question has the sets
        of the classifier, unless `conform` or `calibrate` was called for its kind. Raises
        `InputError` without sets.
        """
        asked, found = read_questions(questions), {}
        scores = self._ask([(State(state), one) for one in asked.values()], list(asked))
        for (key, question), (log_probs, _) in zip(asked.items(), scores, strict=True):
            sets = self._conformal(question)
            if sets is None:
                raise InputError(
                    f"question {key!r:.60}: there are no sets for {kind_of(question)}; call "
                    "conform with questions of this type and number of options"
                )
            row = sets.sets(self._calibrated(question, log_probs)[None], coverage)[0]
            found[key] = [name for name, is_in in zip(question.names, row, strict=True) if is_in]
        return found

    def fit(
        self,
        states: Iterable[Any],
        questions: Mapping[str, Any],
        answers: Iterable[Any],
        *,
        progress: Progress | None = None,
        **recipe: Any,
    ) -> "Decider":
        """Fine-tune one model on the right answers to all questions; returns the decider.

        `answers` has a table for each state, from ids to right answers: the name of an option, a
        bool, the number of a level or its text, or a distribution `{name: p}` or `[p, ...]`. An
        absent one or None is left out. All questions are then asked in the decider's prompt, also
        that of a classifier. `recipe` are `epochs`, `learning_rate`, `batch_size`, `weight_decay`,
        `warmup`, `seed`, `accumulate`, `layer_decay`, `ema`, `validation_share`, `patience`,
        `adapter`, `train`, `normalize` and `ordered` of `Classifier`; `ordered` is a loss for
        levels, and rejects choices. `history_` then has the loss of each epoch, and with held-out
        states accuracy and loss on them. Calibrations are dropped.

        Warns with `LearnedNothingWarning` if the answers end no better than their frequencies.
        Raises `InputError` for wrong answers, `RunError` if the loss is no longer finite.
        """
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in recipe.items()}
        chosen = decode(DeciderRecipe, plain, "fit")
        labelled = read_labelled(states, questions, answers)
        manifest = self._manifest
        if manifest is not None:
            manifest = add_run(manifest, "the states given to Decider.fit")
        asker = self._make_asker(start_of(self.model, chosen), self.tokenizer)
        with progress_bar("fine-tuning", self._progress, "testing") as show:
            self.history_ = learn(asker, labelled, chosen, progress or show)
        self._asker, self._manifest = asker, manifest
        self._learn(calibrations={}, conformals={})
        return self

    def save_pretrained(
        self,
        path: str | Path,
        *,
        dtype: str = "float32",
        merge: bool = False,
        push_to: str | None = None,
        private: bool = True,
    ) -> None:
        """Write the model as a Hugging Face folder, with the settings of the decider.

        `Decider.from_pretrained(path)` restores all of it. The settings of a classifier whose
        question is asked as it was fitted are written, too. A model with an adapter is saved as the
        adapter with a pointer to its base; with `merge` as a whole model. `push_to`
        ("organisation/name") uploads the folder to the hub, too. Raises what
        `mlmjax.save_pretrained` and `mlmjax.save_adapter` raise.
        """
        files: dict[str, str | bytes] = {DECIDER: _as_json(self.settings)}
        if (own := self._asker.own) is not None:
            files[CLASSIFIER] = _as_json(own.settings)
        if self._manifest is not None:
            files[TRAINING] = self._manifest
        card = model_card(
            self.model,
            template="decider_card.md",
            library="mlmjax",
            pipeline="text-classification",
            settings=self.settings,
        )
        is_adapter = self.model.config.adapter is not None and not merge
        save = save_adapter if is_adapter else save_pretrained
        options: Any = {"dtype": dtype, "push_to": push_to, "private": private}
        save(self.model, self.tokenizer, path, card=card, more_files=files, **options)

    def _make_asker(self, model: Any, tokenizer: Any, own: OwnQuestion | None = None) -> Asker:
        settings = self.settings
        return Asker(
            model,
            tokenizer,
            answer=settings.answer,
            orders=settings.orders,
            long_text=settings.long_text,
            batch_size=self._batch_size,
            max_length=settings.max_length,
            own=own,
        )

    def _ask(
        self, pairs: Sequence[tuple[State, Question]], where: Sequence[str]
    ) -> list[tuple[np.ndarray, Usage]]:
        with progress_bar("questions", self._progress) as show:
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                if show:
                    show(min(done, len(pairs)), len(pairs))

            return self._asker.ask(pairs, where, advance)

    def _answer(self, question: Question, log_probs: np.ndarray, usage: Usage) -> AnyAnswer:
        limit, own = self.settings.abstain_below, self._asker.own
        if limit is None and own is not None and own.matches(question):
            limit = own.settings.abstain_below
        return make_answer(
            question,
            self._calibrated(question, log_probs),
            limit=limit or 0.0,
            tokens=usage.tokens,
            shortened=usage.shortened,
        )

    def _conformal(self, question: Question) -> label_sets.Conformal | None:
        kind, own = kind_of(question), self._asker.own
        found = self.settings.conformals.get(kind)
        if found is None and kind not in self.calibrations and own and own.matches(question):
            return own.settings.conformal
        return found

    def _calibrated(self, question: Question, log_probs: np.ndarray) -> np.ndarray:
        found = self.settings.calibrations.get(kind_of(question))
        return log_probs if found is None else found.apply(log_probs[None])[0]

    def _scores(self, rows: Labelled, *, calibrated: bool = True) -> np.ndarray:
        """Return the log probabilities `[rows, options]` of rows of one kind."""
        scores = [log_probs for log_probs, _ in self._ask(rows.pairs, rows.where)]
        if calibrated:
            scores = [self._calibrated(q, s) for (_, q), s in zip(rows.pairs, scores, strict=True)]
        return np.array(scores)

    def _learn(self, **values: Any) -> None:
        self.settings = self.settings.model_copy(update=values)


def _as_json(settings: StrictTable) -> str:
    values = settings.model_dump(mode="json", exclude_none=True)
    return json.dumps(values, ensure_ascii=False, indent=2) + "\n"
