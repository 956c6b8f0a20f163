"""Choose how a new classifier answers and learns, and measure the prompts that it will read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from mlmjax.classification.fitting import Recipe, start_of, trained_size, usual_rate
from mlmjax.classification.predictor import Predictor
from mlmjax.classification.prompter import make_template
from mlmjax.classification.rounds import group_size
from mlmjax.classification.settings import settle, suitable_answer
from mlmjax.config.tables import decode
from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import (
    Model,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    abstract_model,
    labelled_config,
    parameters,
)
from mlmjax.reporting.markdown import shortened, visible
from mlmjax.storage import CLASSIFIER, CONFIG, read_json
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import Verbalizer
from mlmjax.weights import hub
from mlmjax.weights.adapters import is_adapter, read_base
from mlmjax.weights.pretrained import read_config, read_tokenizer

Way = Literal["words", "letters", "head"]
ASKED = "as --answer asks"
WAYS: tuple[Way, ...] = ("words", "letters", "head")
MANY_LABELS = 12
"""With more labels than this, their list in every prompt costs more than it helps."""

LABEL = 40
"""Characters of a label that a line shows."""

PART = 1000
"""Texts that are tokenised together."""

UPDATES, FEWEST_EPOCHS, MOST_EPOCHS = 150, 3, 10
RESTART_SHARE = 0.2
"""The share of the training rows by which restarts choose."""


class Choice(NamedTuple):
    """Say how a classifier answers and learns; `why` tells a person.

    `recipe` are further arguments of `Classifier`, and `trained` is the share of the parameters
    that learn. `words_suit` says if each label is one token of its own, so that words may answer.
    """

    way: Way
    learning_rate: float | Literal["auto"]
    epochs: int
    batch_size: int
    why: str
    recipe: Mapping[str, Any]
    trained: float
    words_suit: bool

    @property
    def reason(self) -> str | None:
        """Return why this way to answer was chosen; None if --answer gave it."""
        return None if self.why == ASKED else self.why

    def updates(self, rows: int) -> int:
        """Return the number of updates of a training on so many rows."""
        return self.epochs * -(-rows // self.batch_size)

    def other_options(self, rate: float) -> Iterator[str]:
        """Yield the options to try after a fit at this learning rate that learned nothing."""
        if self.words_suit and self.way != "words":
            yield "--answer words"
        yield f"--learning-rate {rate / 3:.1g} or {rate * 3:.1g}"
        yield f"--epochs {3 * self.epochs}"
        if not self.recipe["restarts"]:
            yield "--restarts 3"

    def first_options(self) -> dict[str, str]:
        """Return the options of `other_options` to try first, with their values."""
        if self.words_suit and self.way != "words":
            return {"--answer": "words"}
        restarts = {} if self.recipe["restarts"] else {"--restarts": "3"}
        return {"--epochs": str(3 * self.epochs), **restarts}

    def options(self) -> dict[str, Any]:
        """Return the choice as arguments of `Classifier`."""
        kind = {"head": "classification"} if self.way == "head" else {"answer": self.way}
        return {
            **kind,
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            "train_batch_size": self.batch_size,
            **self.recipe,
        }


def choose(
    source: str,
    labels: Sequence[str],
    rows: int,
    *,
    revision: str | None = None,
    way: Way | None = None,
    learning_rate: float | Literal["auto"] | None = None,
    epochs: int | None = None,
    adapter: Mapping[str, Any] | None = None,
    train: Sequence[str] = (),
    restarts: int = 0,
) -> Choice:
    """Return how to fit a model to so many rows; what is given is kept.

    `adapter`, `train` and `restarts` are those of `Classifier`; restarts hold `RESTART_SHARE` of
    the rows out.

    Labels that are one distinct token each answer as words. Others are letters of options, or a
    head where there are many.
    """
    folder = hub.fetch(source, revision=revision)
    is_classifier = (folder / CLASSIFIER).exists()
    if is_adapter(folder) and not is_classifier:
        raise InputError(
            f"{source}: is an adapter; give its base ({read_base(folder).name}), or fit it on in "
            "Python with Classifier(source).fit"
        )
    if is_classifier:
        raise InputError(
            f"{source}: is already a classifier, and {CLASSIFIER} says how it answers; give the "
            "model that it was made from, or fit it on in Python with Classifier(source).fit"
        )
    values = read_json(folder, CONFIG)
    has_head = values.get("architectures") == ["ModernBertForSequenceClassification"]
    if has_head and way not in (None, "head"):
        raise InputError(
            f"--answer {way}: {source} has a classification head and no masked-language-model "
            "head; leave --answer out, or give another model"
        )
    suits: tuple[Way, str] = "head", "the model has a classification head"
    if not has_head:
        suits = _way(read_tokenizer(folder), labels)
    way, why = suits if way is None else (way, ASKED)
    recipe: dict[str, Any] = {"adapter": adapter, "train": tuple(train) or None}
    config = read_config(folder, values)
    own = decode(Recipe, recipe | {"restarts": restarts}, "fit")
    size, trained = _sizes(labelled_config(config, labels) if way == "head" else config, own)
    batch_size = 16 if rows < 1000 else 32
    enough = -(-UPDATES * batch_size // rows)
    held_out = {"restarts": restarts, "validation_share": RESTART_SHARE if restarts else 0.0}
    return Choice(
        way,
        learning_rate or usual_rate(trained),
        epochs or min(MOST_EPOCHS, max(FEWEST_EPOCHS, enough)),
        batch_size,
        why,
        recipe | held_out,
        trained / size,
        suits[0] == "words",
    )


def _sizes(config: ModelConfig, recipe: Recipe) -> tuple[int, int]:
    """Return the number of parameters of a model, and of those that a recipe trains."""
    model = start_of(_shapes(config), recipe)
    whole = sum(leaf.size for leaf in parameters(model).values())
    return whole, trained_size(model, recipe)


def _shapes(config: ModelConfig) -> Model:
    """Return the model that a configuration describes, without numbers."""
    has_head = config.architectures == (ModernBertForSequenceClassification.__name__,)
    kind = ModernBertForSequenceClassification if has_head else ModernBertForMaskedLM
    return cast(Model, abstract_model(kind.__name__, config))


def _way(tokenizer: Tokenizer, labels: Sequence[str]) -> tuple[Way, str]:
    answer, reason = suitable_answer(dict.fromkeys(labels, ""), tokenizer)
    if answer == "words":
        return "words", reason
    long = Verbalizer.words(labels, tokenizer=tokenizer).unusable(tokenizer)
    shown = f"'{shortened(visible(long[0]), LABEL)}'"
    why = f"the label {shown} is not one token of its own"
    if len(long) > 1:
        why = f"{len(long)} of {len(labels)} labels are not one token of their own, such as {shown}"
    if len(labels) > MANY_LABELS:
        return "head", f"{why}, and there are more than {MANY_LABELS} labels"
    return "letters", f"{why}; small models learn letters less well than words"


class PromptLengths(NamedTuple):
    """Hold the tokens of prompts, int `[texts]`; `own` of each are beside the text.

    `limit` is the most that a prompt may have, and `longest` the most that the model reads.
    """

    prompts: np.ndarray
    own: int
    limit: int
    longest: int

    def over(self, limit: int) -> int:
        """Return the number of prompts of more than `limit` tokens, whose texts are shortened.

        >>> PromptLengths(np.array([9, 12, 20]), own=7, limit=12, longest=64).over(12)
        1
        """
        return int((self.prompts > limit).sum())


def prompt_lengths(predictor: Predictor, texts: Sequence[str]) -> PromptLengths:
    """Measure the prompts of texts for a model that is no classifier yet, without its weights.

    The predictor has a folder or hub id, and labels of which one applies. Raises `InputError` for
    a folder or settings that cannot be used.
    """
    assert not isinstance(predictor.source, tuple)
    folder = hub.fetch(predictor.source, revision=predictor.revision)
    config = read_config(folder, read_json(folder, CONFIG))
    tokenizer = read_tokenizer(folder)
    if predictor.anchor is not None:
        tokenizer = tokenizer.with_anchor(predictor.anchor)
    settings = settle(vars(predictor), None, _shapes(config), tokenizer, seen=None)
    template = make_template(settings)
    limit = settings.max_length or config.max_position_embeddings
    shown = settings.shown
    if "options" in template.fields:  # of many labels, a prompt lists as many as fit
        shown = shown[: group_size(template, tokenizer, shown, limit)]
    rows = [{"options": shown, "text": text} for text in ("", *texts)]
    parts = (template.lengths(tokenizer, rows[i : i + PART]) for i in range(0, len(rows), PART))
    own, *prompts = [length for part in parts for length in part]
    return PromptLengths(np.array(prompts), own, limit, config.max_position_embeddings)
