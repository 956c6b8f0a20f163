"""Turn a text into prompts, and their scores into one answer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from mlmjax.classification.context import JOINT, Shot, Shots, window_spans
from mlmjax.classification.rounds import Shortlist, group_size, in_rounds, over_all
from mlmjax.classification.settings import LongText, Settings
from mlmjax.data.batch import UNUSED, Answers, Options
from mlmjax.errors import InputError
from mlmjax.model.modernbert import Model
from mlmjax.scoring.continuation import ContinuationScorer
from mlmjax.scoring.scorers import HeadScorer, RowScorer, Scorer
from mlmjax.statistics import option_orders
from mlmjax.text.checks import check_list, check_texts
from mlmjax.text.prompts import MASKED, Prompt, Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.truncation import Span, spans_from
from mlmjax.text.verbalizer import Verbalizer, option_names, surface, usable_option_names
from mlmjax.text.words import word_spans

YES_NO = ("yes", "no")
OPTIONAL = ("examples",)
"""Fields of a prompt that may be blank."""

PROBE = "a text"
"""A text to compare prompts with."""

CHUNK_PROMPTS = 4096
"""About this many prompts are laid out together; texts are read as they are needed."""


class Query(NamedTuple):
    """A text, the numbers of its options, and the label it is about or None.

    `fields` holds what the prompt says of that label, `masked` the spans of the text that are
    masked.
    """

    text: str
    choice: tuple[int, ...]
    label: str | None = None
    fields: Mapping[str, str] = {}
    masked: Sequence[Span] = ()

    def moved(self, shift: int) -> "Query":
        """Return the query with its options in another cyclic order."""
        return self._replace(choice=tuple(option_orders.shifted(self.choice, shift)))


class Examples(NamedTuple):
    """Hold prompts to train on, and for each the right column and how labels and columns go.

    `places` maps the number of an option to its column, `shares` has the distribution over the
    labels or None, `texts` the number of the text.
    """

    prompts: list[Prompt]
    columns: list[int]
    places: list[dict[int, int]]
    shares: list[list[float] | None]
    texts: list[int]


class Prompter:
    """Prompt a model with texts in the way that a classifier's settings say.

    A text becomes one query, or one for each label where several may apply. A query becomes a
    prompt for each order of its options and each window of its text. `shown` holds the options'
    texts in the prompt, and `names` what few-shot examples call them. With `own_names` the answers
    are the scorer's labels; otherwise they are the options' letters or numbers, which depend on
    their order.
    """

    def __init__(
        self, settings: Settings, model: Model, tokenizer: Tokenizer, batch_size: int | None = None
    ):
        template = make_template(settings)
        answer = "head" if settings.head == "classification" else settings.answer
        if answer is None:
            # Unless the prompt lists the options, a model cannot know what B means.
            answer = "letters" if "options" in template.fields else "words"
        self.settings = settings
        self.names = YES_NO if settings.multi_label else tuple(settings.labels)
        self.shown = YES_NO if settings.multi_label else settings.shown
        options = {"batch_size": batch_size, "max_length": settings.max_length}
        self.scorer = make_scorer(answer, self.names, (model, tokenizer, template), options)
        self.answer, self.own_names = answer, answer != "letters"
        if self.own_names and settings.orders != 1:
            raise InputError(
                f"orders is {settings.orders!r}, but these answers are not letters of options, "
                "so they have no order to change; leave orders out"
            )
        if settings.shortlist is not None and (self.own_names or settings.multi_label):
            raise InputError(
                f"shortlist is {settings.shortlist}, but a prompt here does not list the labels; "
                "give answer='letters', or leave shortlist out"
            )
        self.shifts = None if settings.orders == "all" else settings.orders
        self.shots = Shots(settings.examples, tokenizer) if settings.examples else None

    def recipe(self) -> tuple[list[str], dict[str, str]] | None:
        """Return how any library prompts the model: the texts around a text, and the answers.

        The answers are `{label: form at the slot}`. None if one prompt does not decide, or if text
        of labels or template is a special token, which other libraries would parse.
        """
        settings, scorer = self.settings, self.scorer
        is_plain = not (settings.multi_label or settings.examples) and settings.orders == 1
        if not is_plain or settings.answer == "continuation" or self.size < len(self.names):
            return None  # A shortlist makes the size smaller, too.
        row = {"options": list(self.shown), "examples": "", "text": PROBE}
        parts = scorer.template.around("text", row, scorer.tokenizer)
        read = scorer.tokenizer.backend.encode(PROBE.join(parts)).ids
        if read != scorer.template.render(scorer.tokenizer, row, scorer.max_length).ids:
            return None
        forms = [surface(name, scorer.tokenizer) for name in scorer.labels]
        return parts, dict(zip(self.names, forms, strict=False))

    @cached_property
    def size(self) -> int:
        """Return the number of options in one prompt; more are scored in rounds."""
        template, scorer = self.scorer.template, self.scorer
        if self.settings.multi_label or self.own_names or "options" not in template.fields:
            return len(self.names)
        most = self.settings.shortlist
        return group_size(template, scorer.tokenizer, self.shown, scorer.max_length, most=most)

    @cached_property
    def shortlist(self) -> Shortlist | None:
        """Return what finds the nearest labels; None if all labels are asked."""
        count, source = self.settings.shortlist, self.settings.shortlist_model
        if count is None or count >= len(self.names):
            return None
        batch_size = self.scorer.engine.batch_size
        tokenizer = self.scorer.tokenizer
        return Shortlist(self.shown, count, tokenizer, source=source, batch_size=batch_size)

    def stream(self, texts: Iterable[str], part: int = CHUNK_PROMPTS) -> Iterator[np.ndarray]:
        """Yield the log probabilities of at most `part` texts at a time, as `log_probs` does."""
        labels = len(self.settings.labels)
        each = (labels if self.settings.multi_label else 1) * (self.shifts or labels)
        size = min(part, max(16, CHUNK_PROMPTS // each))
        first, pending = 0, iter(check_list(texts, "texts"))
        while chunk := list(islice(pending, size)):
            yield self.log_probs(chunk, first)
            first += len(chunk)

    def log_probs(
        self,
        texts: Sequence[str],
        first: int = 0,
        *,
        masked: Sequence[Sequence[Span]] | None = None,
    ) -> np.ndarray:
        """Return log probabilities before calibration, `[texts, labels]`.

        With several labels per text they are those of yes and no, `[texts * labels, 2]`. `first` is
        the index of the first text in messages. `masked` has the spans of each text that are
        masked, in characters.
        """
        queries, where = self._queries_of(texts, first, masked)

        def ask(numbers: Sequence[int], choices: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
            asked = [queries[n]._replace(choice=c) for n, c in zip(numbers, choices, strict=True)]
            return self.ask(asked, [where[number] for number in numbers])

        if self.shortlist is None:
            return np.array(in_rounds(ask, [query.choice for query in queries], self.size))
        choices = self.shortlist.nearest(self.scorer.model, [query.text for query in queries])
        found = zip(in_rounds(ask, choices, self.size), choices, strict=True)
        return np.array([over_all(scores, choice, len(self.names)) for scores, choice in found])

    def log_probs_by_name(self, texts: Sequence[str]) -> np.ndarray:
        """Return log probabilities under cyclic orders, `[queries, orders, option names]`.

        There are up to 8 orders. Raises `InputError` unless every prompt holds all options, named
        by letters or numbers, in the order given.
        """
        count = len(self.names)
        if self.own_names or self.shifts != 1 or self.size < count:
            raise InputError(
                "method 'order' needs options named by letters, all of them in one prompt and "
                "in one order; use another method"
            )
        queries, where = self._queries_of(texts, 0)
        orders = option_orders.shifts(count, min(count, 8))
        moved = [[query.moved(shift) for query in queries] for shift in orders]
        return np.array([self.ask(own, where) for own in moved]).transpose(1, 0, 2)

    def queries(self, text: str) -> list[Query]:
        """Return the queries about a text: one, or with several labels one each."""
        settings = self.settings
        if settings.multi_label:
            shown = zip(settings.labels, settings.shown, strict=True)
            return [Query(text, (0, 1), name, {"label": said}) for name, said in shown]
        if settings.head == "classification":  # whose labels may be in another order
            return [Query(text, tuple(self.scorer.labels.index(name) for name in self.names))]
        return [Query(text, tuple(range(len(self.names))))]

    def _queries_of(
        self, texts: Sequence[str], first: int, masked: Sequence[Sequence[Span]] | None = None
    ) -> tuple[list[Query], list[str]]:
        """Check texts, and return their queries with the name of each in messages."""
        names = check_texts(texts, first)
        queries, where = [], []
        for text, name, spans in zip(texts, names, masked or [()] * len(texts), strict=True):
            own = [query._replace(masked=spans) for query in self.queries(text)]
            queries += own
            where += [name] * len(own)
        return queries, where

    def ask(self, queries: Sequence[Query], where: Sequence[str]) -> list[np.ndarray]:
        """Return the log probabilities of each query's options, in the order of its choice.

        `where` names each query in messages.
        """
        rows = [self.rows(query) for query in queries]
        names = [name for name, own in zip(where, rows, strict=True) for _ in own]
        scores = iter(self.scorer.log_probs([row for own in rows for _, row in own], where=names))
        return [
            self._pooled(query, [(shift, next(scores)) for shift, _ in own])
            for query, own in zip(queries, rows, strict=True)
        ]

    def rows(self, query: Query) -> list[tuple[int, dict[str, Any]]]:
        """Return the prompts of a query as `(shift, row)`, the windows of one order together."""
        shifts = [0] if self.own_names else option_orders.shifts(len(query.choice), self.shifts)
        rows = []
        for shift in shifts:
            order = option_orders.shifted(query.choice, shift)
            row = {**query.fields, "options": [self.shown[i] for i in order]}
            windows, examples = self._fitted(query, row, order)
            for start, stop in windows:
                own: dict[str, Any] = {"text": query.text[start:stop], "examples": examples}
                if query.masked:
                    own[MASKED] = {"text": spans_from(query.masked, start)}
                rows.append((shift, row | own))
        return rows

    def examples(
        self,
        numbers: Sequence[int],
        texts: Sequence[str],
        truth: Sequence[Any],
        seed: int,
        mask_share: float = 0.0,
    ) -> "Examples":
        """Return prompts to train on, with the right answers to each.

        `numbers` are the texts to use. Each query is shown in one of its orders, drawn at random:
        in turns they could follow the order of the labels, and the answer would always be the same
        letter. Of more labels than one prompt holds, a query shows its own and others drawn at
        random. Every window of a text is an example. Each word of a text is masked with probability
        `mask_share`.
        """
        names = check_texts(texts)
        found = Examples([], [], [], [], [])
        rows, where = [], []
        drawn = 0
        for number in numbers:
            queries = self.queries(texts[number])
            if mask_share:
                masked = self._draw_words(texts[number], mask_share, [seed, number, 1])
                queries = [query._replace(masked=masked) for query in queries]
            if self.settings.multi_label:
                answers = [YES_NO.index("yes" if applies else "no") for applies in truth[number]]
            else:
                answers = [queries[0].choice[self._best(truth[number], names[number])]]
                rng = np.random.default_rng([seed, number])
                choice = draw_options(queries[0].choice, answers[0], self.size, rng)
                queries = [queries[0]._replace(choice=choice)]
            shares = truth[number] if isinstance(truth[number], list) else None
            for query, answer in zip(queries, answers, strict=True):
                prompts = self.rows(query)
                shifts = sorted({shift for shift, _ in prompts})
                chosen = shifts[np.random.default_rng([seed, drawn]).integers(len(shifts))]
                order = option_orders.shifted(query.choice, chosen)
                own = [row for shift, row in prompts if shift == chosen]
                rows += own
                where += [names[number]] * len(own)
                columns = query.choice if self.own_names else range(len(order))
                numbered = query.choice if self.own_names else order
                found.columns.extend([answer if self.own_names else order.index(answer)] * len(own))
                found.places.extend([dict(zip(numbered, columns, strict=True))] * len(own))
                found.shares.extend([shares] * len(own))
                found.texts.extend([number] * len(own))
                drawn += 1
        found.prompts.extend(self.scorer.prompts(rows, where=where))
        return found

    def _draw_words(self, text: str, share: float, seed: Sequence[int]) -> list[Span]:
        """Return the spans of words drawn with a probability, not of all words."""
        spans = word_spans(self.scorer.tokenizer, text)
        is_drawn = np.random.default_rng(seed).random(len(spans)) < share
        if is_drawn.all():
            return []  # no text would be left to learn from
        return [span for span, drawn in zip(spans, is_drawn, strict=True) if drawn]

    def answers(
        self, examples: "Examples", *, spread: bool, smoothing: float, weights: np.ndarray | None
    ) -> Answers:
        """Return what examples are trained to answer.

        They are distributions over the options, in the order of the labels, if any label is one or
        if `spread`. `smoothing` is the share of the probability that all options divide equally.
        `weights` are those of the texts.
        """
        own = None if weights is None else weights.astype(np.float32)[examples.texts]
        answers = Answers(self.scorer.targets(examples.columns), own)
        if not (spread or smoothing or any(one is not None for one in examples.shares)):
            return answers
        order = self.queries("x")[0].choice  # the number of each label among the scorer's
        labels = {number: place for place, number in enumerate(order)}
        shape = len(examples.prompts), len(self.names)
        ids, probs = np.full(shape, UNUSED, np.int32), np.zeros(shape, np.float32)
        for row, (column, places) in enumerate(zip(examples.columns, examples.places, strict=True)):
            shown = [labels[number] for number in places]
            ids[row, shown] = self.scorer.targets(list(places.values()))
            shares = examples.shares[row]
            if shares is None:
                shares = [0.0] * len(order)
                gold = next(number for number, place in places.items() if place == column)
                shares[labels[gold]] = 1.0
            probs[row, shown] = np.array(shares)[shown] * (1 - smoothing) + smoothing / len(shown)
        return answers._replace(options=Options(ids, probs))

    def _best(self, truth: Any, where: str) -> int:
        """Return the number of the right or most probable label of a text."""
        if not isinstance(truth, list):
            return int(truth)
        if self.size < len(self.names):
            raise InputError(
                f"{where}: has a distribution over {len(self.names)} labels, of which a prompt "
                f"holds {self.size}; give one label, fewer labels or a larger max_length"
            )
        return int(np.argmax(truth))

    def _fitted(
        self, query: Query, row: Mapping[str, Any], order: Sequence[int]
    ) -> tuple[list[Span], str]:
        """Return the windows of a query's text, and the few-shot examples that fit."""
        long_text, template = self.settings.long_text, self.scorer.template
        whole = [(0, len(query.text))]
        if long_text == "shorten" and self.shots is None:
            return whole, ""
        tokenizer, uses = self.scorer.tokenizer, template.uses("text")
        fixed = template.length(tokenizer, {**row, "text": "", "examples": ""})
        room = self.scorer.max_length - fixed - JOINT * uses
        if long_text == "shorten" or room < uses:
            windows = whole
        else:
            windows = window_spans(tokenizer, query.text, room // uses)
        if self.shots is None or len(windows) > 1:
            return windows, ""
        left = room - uses * len(tokenizer.encode_plain(query.text))
        left //= max(1, template.uses("examples"))
        return windows, self.shots.fill(left, lambda shot: self._answer_of(shot, query, order))

    def _answer_of(self, shot: Shot, query: Query, order: Sequence[int]) -> str | None:
        """Return a few-shot example's answer, or None if it is not an option."""
        wanted = shot.labels[0] if shot.labels else None
        if query.label is not None:
            wanted = YES_NO[query.label not in shot.labels]
        names = [self.names[i] for i in order]
        if wanted not in names:
            return None
        if self.own_names:
            return wanted
        template, tokenizer = self.scorer.template, self.scorer.tokenizer
        return option_names(len(names), template.names, tokenizer)[names.index(wanted)]

    def _pooled(self, query: Query, scores: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
        """Pool a query's `(shift, scores)`: first over windows, then over orders."""
        rule, count = self.settings.long_text, len(query.choice)
        if self.own_names:  # and so there is one order
            return over_windows(np.array([one for _, one in scores]), rule)[list(query.choice)]
        return over_orders([(shift, one[:count]) for shift, one in scores], rule)


def over_orders(scores: Sequence[tuple[int, np.ndarray]], rule: LongText) -> np.ndarray:
    """Pool the log probabilities `[options]` of a question under shifts of its options.

    Those of one shift are of the windows of its text and are pooled first.
    """
    answers = []
    for shift in dict.fromkeys(shift for shift, _ in scores):
        windows = np.array([one for of, one in scores if of == shift])
        pooled = over_windows(windows, rule)
        answers.append(option_orders.unshifted(pooled, shift, len(pooled)))
    return option_orders.pooled(np.array(answers)) if len(answers) > 1 else answers[0]


def over_windows(log_probs: np.ndarray, rule: LongText) -> np.ndarray:
    """Pool the log probabilities of a text's windows, `[windows, labels]` to `[labels]`."""
    if len(log_probs) == 1:
        return log_probs[0]
    if rule == "mean":
        return option_orders.pooled(log_probs)
    best = log_probs.max(axis=0)
    return best - np.logaddexp.reduce(best)


def draw_options(
    choice: tuple[int, ...], gold: int, size: int, rng: np.random.Generator
) -> tuple[int, ...]:
    """Return the options that an example shows: all, or its own and others.

    >>> draw_options((0, 1, 2, 3, 4, 5), 4, 3, np.random.default_rng(0))
    (3, 4, 5)
    """
    if len(choice) <= size:
        return choice
    others = np.delete(np.array(choice), choice.index(gold))
    return tuple(sorted([gold, *rng.choice(others, size - 1, replace=False).tolist()]))


def make_template(settings: Settings) -> Template:
    """Return the template; raises `InputError` if its fields do not suit the settings."""
    slot = settings.head == "mlm"
    anchor = settings.anchor if slot else None
    template = Template(settings.template, slot=slot, names=settings.names, anchor=anchor)
    needed = {"text", "label"} if settings.multi_label else {"text"}
    allowed = needed if settings.head == "classification" else needed | {"options", "examples"}
    fields = set(template.fields)
    if not needed <= fields <= allowed:
        raise InputError(
            f"template: its fields are {', '.join(template.fields) or 'none'}; expected "
            f"{_braced(needed)}, and may have {_braced(allowed - needed)}"
        )
    if settings.examples and "examples" not in fields:
        raise InputError("template: has no {examples} for the examples given; add it")
    return replace(template, shorten=settings.shorten)


def _braced(names: Iterable[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in sorted(names)) or "no others"


def make_scorer(
    answer: str,
    names: Sequence[str],
    parts: tuple[Model, Tokenizer, Template],
    options: Mapping[str, Any],
) -> RowScorer:
    """Return the scorer of a way to answer; raises `InputError` for unsuitable labels."""
    if answer == "head":
        head = HeadScorer(*parts, **options)
        head.check_labels(names, "the classifier")
        return head
    if answer == "continuation":
        return ContinuationScorer(*parts, names, **options, optional=OPTIONAL)
    if answer == "letters":
        _, tokenizer, template = parts
        names = usable_option_names(template.names, tokenizer, len(names))
        if len(names) < 2:
            raise InputError(
                f"labels: the tokenizer has no two option names of one token ({template.names}); "
                "give answer='words' or another tokenizer"
            )
    words = Verbalizer.words(names, tokenizer=parts[1])
    return Scorer(*parts, words, **options, optional=OPTIONAL)
