"""Turn questions about states into prompts, and their scores into distributions."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from mlmjax.classification.context import JOINT, window_spans
from mlmjax.classification.prompter import over_orders
from mlmjax.classification.rounds import group_size, in_rounds
from mlmjax.classification.settings import LongText, ask_for
from mlmjax.decisions.classifiers import OwnQuestion
from mlmjax.decisions.questions import MOST_OPTIONS, YES_NO, Question, show_text
from mlmjax.decisions.states import Shown, State
from mlmjax.errors import InputError, named_place
from mlmjax.model.modernbert import Model
from mlmjax.reporting.terminal import Progress
from mlmjax.scoring.engine import Advance
from mlmjax.scoring.options import TOKENS, OptionScorer
from mlmjax.statistics import option_orders
from mlmjax.text.prompts import MASKED, Prompt, Template, option_lines
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.truncation import spans_from
from mlmjax.text.verbalizer import surface, usable_option_names

Way = Literal["letters", "words"]
PROMPT = (
    "You will be given a text and a question about it. Read the text carefully and select the "
    "right answer.\nTEXT:\n{text}\nQUESTION:\n{question}\n{choices}"
    "ANSWER:\n"
)
CHOICES = "CHOICES:\n"
LEAST_ROOM = 16
"""Tokens that a question leaves for the state at least."""
NO_INSTRUCTIONS = {YES_NO: "Does yes or no apply to the text?"}
USUAL = "Which of the choices fits the text best?"
"""The question of a prompt whose instructions are blank."""


class Layout(NamedTuple):
    """How a question is worded: its text, its options, and their tokens if these are words.

    `size` options fit in one prompt, and `length` tokens are all of it but the state.
    """

    question: str
    shown: tuple[str, ...]
    tokens: tuple[int, ...] | None
    size: int
    is_described: bool = True
    length: int = 0


def make_template(tokenizer: Tokenizer) -> Template:
    """Return the prompt of all questions, for a tokenizer."""
    prompt = PROMPT + ask_for(tokenizer)
    return Template(prompt, shorten={"text": "tail"}, anchor=tokenizer.anchor_name())


class Wording:
    """Word questions for prompts of at most `max_length` tokens.

    With `answer="words"`, options that are one token each are answered by themselves; all others by
    their letters. Raises `InputError` for a tokenizer without letters.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, max_length: int, answer: Way):
        self.template, self.tokenizer, self.max_length = template, tokenizer, max_length
        self.answer = answer
        names = usable_option_names("letters", tokenizer, MOST_OPTIONS)
        if len(names) < 2:
            raise InputError("the tokenizer has no two letters of one token; use another tokenizer")
        self.letters = [
            ids[0] for ids in tokenizer.encode_plain_batch([surface(n, tokenizer) for n in names])
        ]
        self._layouts = lru_cache(maxsize=512)(self._lay_out)

    def layout(self, question: Question) -> Layout:
        """Return how a question is worded; raise `InputError` if it does not fit in a prompt."""
        text = show_text(question.instructions)
        if not text.strip():
            text = NO_INSTRUCTIONS.get(question.type, USUAL)
        return self._layouts(text, question.shown, question.words)

    def fields(self, layout: Layout, order: Sequence[int]) -> dict[str, Any]:
        """Return the fields of a prompt about a question, and the tokens of its options."""
        shown = [layout.shown[i] for i in order]
        if layout.tokens is None:
            choices = f"{CHOICES}{option_lines(shown, tokenizer=self.tokenizer)}"
            tokens = self.letters[: len(shown)]
        else:
            # Words say what they mean, so only descriptions need a list.
            lines = "".join(f"- {text}\n" for text in shown)
            choices = f"{CHOICES}{lines}" if layout.is_described else ""
            tokens = [layout.tokens[i] for i in order]
        return {"question": layout.question, "choices": choices, TOKENS: tokens}

    def _lay_out(self, text: str, shown: tuple[str, ...], words: tuple[str, ...]) -> Layout:
        template, tokenizer, most = self.template, self.tokenizer, self.max_length
        tokens = self._word_tokens(words) if self.answer == "words" else None
        if tokens is None:
            size = group_size(template, tokenizer, shown, most, {"question": text})
            layout = Layout(text, shown, None, min(size, len(self.letters)))
        else:
            layout = Layout(text, shown, tokens, len(shown), shown != words)
        length = template.length(tokenizer, self.fields(layout, range(len(shown))))
        # Groups of options leave room by themselves.
        if layout.size == len(shown) and length + LEAST_ROOM > most:
            raise InputError(
                f"the prompt has {length + LEAST_ROOM} tokens without the state and at most "
                f"{most} fit; give shorter instructions or criteria"
            )
        return layout._replace(length=length)

    def _word_tokens(self, words: tuple[str, ...]) -> tuple[int, ...] | None:
        """Return the token of each word; None unless each is one token of its own."""
        tokenizer = self.tokenizer
        if not all(word.strip() for word in words):
            return None
        encoded = tokenizer.encode_plain_batch([surface(word, tokenizer) for word in words])
        tokens = [ids[0] for ids in encoded if len(ids) == 1]
        is_usable = len(set(tokens)) == len(words) and not tokenizer.special_ids & set(tokens)
        return tuple(tokens) if is_usable else None


class Item(NamedTuple):
    """One question about one state, with the numbers of the options to choose from.

    `shifts` are the cyclic orders that are asked; empty: those of the asker.
    """

    state: State
    layout: Layout
    choice: tuple[int, ...]
    shifts: tuple[int, ...] = ()


class Usage:
    """Count the tokens that a question's prompts read, and those of its state that they did not."""

    def __init__(self) -> None:
        self.tokens = self.shortened = 0


class Asker:
    """Ask a model questions about states, each in prompts of its own.

    An answer is the same to the last bit whatever else is asked in the same call. With
    `answer="words"`, options that are one token each are answered by themselves; all others by
    their letters. `orders` and `long_text` are those of `Classifier`. A question that `own` matches
    is asked in the prompt of its classifier.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        answer: Way = "letters",
        orders: int | Literal["all"] = 1,
        long_text: LongText = "shorten",
        batch_size: int | None = None,
        max_length: int | None = None,
        own: OwnQuestion | None = None,
    ):
        self.own = own
        self.long_text = long_text
        self.shifts = None if orders == "all" else orders
        template = make_template(tokenizer)
        self.scorer = OptionScorer(
            model,
            tokenizer,
            template,
            MOST_OPTIONS,
            batch_size=batch_size,
            max_length=max_length,
            optional=("text", "choices"),
        )
        self.wording = Wording(template, tokenizer, self.scorer.max_length, answer)

    def shown(self, state: State) -> Shown:
        """Return as much of a state as any prompt can hold."""
        return state.bounded(self.scorer.tokenizer, self.scorer.max_length)

    def cost(self, state: State, question: Question) -> int:
        """Return about the number of tokens that the prompts of a question read."""
        text = state.text if self.long_text != "shorten" else self.shown(state).text
        if self.own is not None and self.own.matches(question):
            self.own.check(state)
            return self.own.length + state.tokens(self.scorer.tokenizer, text)
        layout, scorer = self.wording.layout(question), self.scorer
        read = layout.length + -(-len(layout.shown) // layout.size) * state.tokens(
            scorer.tokenizer, text
        )
        count = len(layout.shown) if self.shifts is None else min(self.shifts, len(layout.shown))
        return read * (1 if layout.tokens is not None else count)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compile the program of each bucket."""
        engine, pad = self.scorer.engine, self.scorer.tokenizer.pad_id
        slots, tokens = np.zeros(1, np.int32), np.zeros((1, MOST_OPTIONS), np.int32)
        for done, length in enumerate(engine.buckets, start=1):
            engine.run([[pad] * length], slots, tokens, np.ones(1, np.int32))
            if self.own is not None:
                self.own.warm_up(length)
            if progress:
                progress(done, len(engine.buckets))

    def ask(
        self,
        pairs: Sequence[tuple[State, Question]],
        where: Sequence[str],
        progress: Advance | None = None,
    ) -> list[tuple[np.ndarray, Usage]]:
        """Return the log probabilities of each question's answers, and what they took.

        All prompts are one batch, except those of questions whose options need several rounds, and
        those of a classifier's own question. `where` names each pair in messages.
        """
        own = self.own
        if own is None:
            return self._ask(pairs, where, progress)
        matched = [own.matches(question) for _, question in pairs]
        found: dict[int, tuple[np.ndarray, Usage]] = {}
        for is_own, ask in ((True, self._ask_own), (False, self._ask)):
            rows = [n for n, one in enumerate(matched) if one == is_own]
            if rows:
                answers = ask([pairs[n] for n in rows], [where[n] for n in rows], progress)
                found |= dict(zip(rows, answers, strict=True))
        return [found[n] for n in range(len(pairs))]

    def _ask_own(
        self,
        pairs: Sequence[tuple[State, Question]],
        where: Sequence[str],
        progress: Advance | None,
    ) -> list[tuple[np.ndarray, Usage]]:
        """Ask the classifier's own question; a state with several such questions is read once."""
        own = self.own
        assert own is not None
        states = {id(state): (state, at) for (state, _), at in zip(pairs, where, strict=True)}
        laid_out = own.lay_out(*zip(*states.values(), strict=True))
        prompts = [prompt for laid in laid_out for prompt in laid.prompts]
        scores = iter(own.score(prompts, progress))
        found = {}
        for key, laid in zip(states, laid_out, strict=True):
            usage = Usage()
            usage.tokens = sum(len(prompt.ids) for prompt in laid.prompts)
            usage.shortened = laid.removed
            self.scorer.shortened += bool(laid.removed)
            found[key] = own.pooled([next(scores) for _ in laid.prompts]), usage
        answers = [(question, *found[id(state)]) for state, question in pairs]
        return [(own.in_order(question, scores), usage) for question, scores, usage in answers]

    def _ask(
        self,
        pairs: Sequence[tuple[State, Question]],
        where: Sequence[str],
        progress: Advance | None,
    ) -> list[tuple[np.ndarray, Usage]]:
        """Ask questions in the decider's prompt."""
        layouts = []
        for (_, question), name in zip(pairs, where, strict=True):
            with named_place(name):
                layouts.append(self.wording.layout(question))
        usages = [Usage() for _ in pairs]
        found: dict[int, np.ndarray] = {}
        items = [
            Item(state, layout, tuple(range(len(layout.shown))))
            for (state, _), layout in zip(pairs, layouts, strict=True)
        ]
        plain = [n for n, item in enumerate(items) if len(item.choice) <= item.layout.size]
        scores = self._score(
            [items[n] for n in plain],
            [usages[n] for n in plain],
            [where[n] for n in plain],
            progress,
        )
        found |= dict(zip(plain, scores, strict=True))
        for n, item in enumerate(items):
            if n not in found:
                # On its own, because its rounds must not depend on those of other questions.
                found[n] = self._in_rounds(item, usages[n], where[n])
                if progress:
                    progress(1)
        return [(found[n], usages[n]) for n in range(len(items))]

    def examples(
        self,
        pairs: Sequence[tuple[State, Question]],
        targets: Sequence[np.ndarray],
        seed: int,
    ) -> tuple[list[Prompt], list[np.ndarray], list[np.ndarray]]:
        """Return prompts to train on, the tokens of their options, and the right distributions.

        Each question is shown in one of its `orders`, drawn at random; tokens keep the given order.
        Of more options than one prompt holds, it shows the most probable ones and others drawn at
        random. `targets` are the right answers as distributions.
        """
        rows, states, tokens, shares = [], [], [], []
        for at, ((state, question), target) in enumerate(zip(pairs, targets, strict=True)):
            layout = self.wording.layout(question)
            rng = np.random.default_rng([seed, at])
            choice = np.arange(len(target))
            if len(choice) > layout.size:
                order = np.lexsort((rng.permutation(len(choice)), -target))
                choice = np.sort(order[: layout.size])
            if layout.tokens is None:
                shifts = option_orders.shifts(len(choice), self.shifts)
                choice = np.roll(choice, -shifts[rng.integers(len(shifts))])
            rows.append(self._row(Item(state, layout, ()), choice.tolist()))
            states.append(state)
            given = np.argsort(choice)
            tokens.append(np.array(rows[-1][TOKENS], np.int32)[given])
            shares.append(target[choice][given] / target[choice].sum())
        names = [f"row {at + 1} (index {at})" for at in range(len(rows))]
        prompts, _ = self._prompts(rows, states, names)
        return prompts, tokens, shares

    def in_orders(
        self, states: Sequence[State], question: Question, where: Sequence[str], count: int
    ) -> np.ndarray | None:
        """Return log probabilities `[states, orders, options]` under cyclic orders of the options.

        There are at most `count` orders, the given one first. None where an answer has no one
        order: words, several `orders`, a classifier's own question, and options in rounds.
        """
        layout = self.wording.layout(question)
        options = len(layout.shown)
        is_own = self.own is not None and self.own.matches(question)
        if layout.tokens is not None or self.shifts != 1 or is_own or options > layout.size:
            return None
        choice, shifts = tuple(range(options)), option_orders.shifts(options, count)
        items = [Item(state, layout, choice, (shift,)) for state in states for shift in shifts]
        names = [name for name in where for _ in shifts]
        scores = self._score(items, [Usage() for _ in items], names)
        return np.array(scores).reshape(len(states), len(shifts), options)

    def _in_rounds(self, item: Item, usage: Usage, where: str) -> np.ndarray:
        def ask(numbers: Sequence[int], choices: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
            items = [item._replace(choice=choice) for choice in choices]
            return self._score(items, [usage] * len(items), [where] * len(items))

        return in_rounds(ask, [item.choice], item.layout.size)[0]

    def _score(
        self,
        items: Sequence[Item],
        usages: Sequence[Usage],
        where: Sequence[str],
        progress: Advance | None = None,
    ) -> list[np.ndarray]:
        """Return the log probabilities of each item's options, in the order of its choice."""
        if not items:
            return []
        asked = [self._rows(item) for item in items]
        rows = [row for own in asked for _, row in own]
        states = [item.state for item, own in zip(items, asked, strict=True) for _ in own]
        names = [name for name, own in zip(where, asked, strict=True) for _ in own]
        prompts, removed = self._prompts(rows, states, names)
        scores = iter(
            zip(self.scorer.score(rows, prompts, progress), prompts, removed, strict=True)
        )
        results = []
        for own, usage in zip(asked, usages, strict=True):
            answers = []
            for shift, _ in own:
                log_probs, prompt, lost = next(scores)
                usage.tokens += len(prompt.ids)
                usage.shortened = max(usage.shortened, lost)
                answers.append((shift, log_probs))
            results.append(over_orders(answers, self.long_text))
        return results

    def _rows(self, item: Item) -> list[tuple[int, dict[str, Any]]]:
        """Return the prompts of an item as `(shift, row)`, the windows of one order together."""
        shifts: Sequence[int] = item.shifts or [0]
        if item.layout.tokens is None and not item.shifts:
            shifts = option_orders.shifts(len(item.choice), self.shifts)
        rows = []
        for shift in shifts:
            row = self._row(item, option_orders.shifted(item.choice, shift))
            for start, text in self._windows(item.state, row):
                own: dict[str, Any] = {"text": text}
                if item.state.masked:
                    own[MASKED] = {"text": spans_from(item.state.masked, start)}
                rows.append((shift, row | own))
        return rows

    def _row(self, item: Item, order: Sequence[int]) -> dict[str, Any]:
        return {"text": self.shown(item.state).text, **self.wording.fields(item.layout, order)}

    def _windows(self, state: State, row: dict[str, Any]) -> list[tuple[int, str]]:
        """Return where each window of a state starts, and its text."""
        if self.long_text == "shorten":
            return [(0, row["text"])]
        text, tokenizer = state.text, self.scorer.tokenizer
        fixed = self.scorer.template.length(tokenizer, {**row, "text": ""})
        room = self.scorer.max_length - fixed - JOINT
        if room <= 0:
            return [(0, text)]
        spans = window_spans(tokenizer, text, room)
        return [(start, text[start:stop]) for start, stop in spans]

    def _prompts(
        self, rows: Sequence[dict[str, Any]], states: Sequence[State], where: Sequence[str]
    ) -> tuple[list[Prompt], list[int]]:
        """Return the prompts of rows, and the tokens of each one's state that it lacks.

        Where a state of keys and values does not fit, its long values are shortened.
        """
        scorer, tokenizer = self.scorer, self.scorer.tokenizer
        removed = [
            self.shown(state).removed if self.long_text == "shorten" else 0 for state in states
        ]
        prompts = scorer.template.render_batch(tokenizer, rows, scorer.max_length, where)
        for at, prompt in enumerate(prompts):
            if not prompt.shortened:
                continue
            removed[at] += sum(prompt.shortened.values())
            if not states[at].is_plain and self.long_text == "shorten":
                room = scorer.max_length - scorer.template.length(
                    tokenizer, {**rows[at], "text": ""}
                )
                shown = states[at].fitted(tokenizer, room - JOINT)
                row = {**rows[at], "text": shown.text}
                prompts[at] = scorer.template.render(tokenizer, row, scorer.max_length)
                removed[at] = shown.removed + sum(prompts[at].shortened.values())
        scorer.shortened += sum(map(bool, removed))
        return prompts, removed
