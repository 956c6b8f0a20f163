"""Choose how a new classifier answers and learns, from its labels and the size of its model."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mlmjax.classification.fitting import usual_rate
from mlmjax.classification.settings import suitable_answer
from mlmjax.errors import InputError
from mlmjax.model.modernbert import abstract_model, parameters
from mlmjax.reporting.markdown import shortened, visible
from mlmjax.storage import CLASSIFIER, CONFIG, read_json
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import Verbalizer
from mlmjax.weights import hub
from mlmjax.weights.pretrained import read_config, read_tokenizer

Way = Literal["words", "letters", "head"]
WAYS: tuple[Way, ...] = ("words", "letters", "head")
MANY_LABELS = 12
"""With more labels than this, their list in every prompt costs more than it helps."""

LABEL = 40
"""Characters of a label that a line shows."""

PART = 1000
"""Texts that are tokenised together."""

UPDATES, FEWEST_EPOCHS, MOST_EPOCHS = 150, 3, 10


class Choice(NamedTuple):
    """Say how a classifier answers and learns; `why` tells a person."""

    way: Way
    learning_rate: float
    epochs: int
    batch_size: int
    why: str

    def updates(self, rows: int) -> int:
        """Return the number of updates of a training on so many rows."""
        return self.epochs * -(-rows // self.batch_size)

    def options(self) -> dict[str, Any]:
        """Return the choice as arguments of `Classifier`."""
        kind = {"head": "classification"} if self.way == "head" else {"answer": self.way}
        return {
            **kind,
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            "train_batch_size": self.batch_size,
        }


def choose(
    source: str,
    labels: Sequence[str],
    rows: int,
    *,
    revision: str | None = None,
    way: Way | None = None,
    learning_rate: float | None = None,
    epochs: int | None = None,
) -> Choice:
    """Return how to fit a model to so many rows; what is given is kept.

    Labels that are one distinct token each answer as words. Others are letters of options, or a
    head where there are many.
    """
    folder = hub.fetch(source, revision=revision)
    values = read_json(folder, CONFIG)
    has_head = values.get("architectures") == ["ModernBertForSequenceClassification"]
    if (folder / CLASSIFIER).exists():
        raise InputError(
            f"{source}: is already a classifier, and {CLASSIFIER} says how it answers; give the "
            "model that it was made from, or fit it on in Python with Classifier(source).fit"
        )
    if has_head and way not in (None, "head"):
        raise InputError(
            f"--answer {way}: {source} has a classification head and no masked-language-model "
            "head; leave --answer out, or give another model"
        )
    if way is None and has_head:
        way, why = "head", "the model has a classification head"
    elif way is None:
        way, why = _way(read_tokenizer(folder), labels)
    else:
        why = "as --answer asks"
    name = "ModernBertFor" + ("SequenceClassification" if has_head else "MaskedLM")
    shapes = parameters(abstract_model(name, read_config(folder, values)))
    size = sum(leaf.size for leaf in shapes.values())
    batch_size = 16 if rows < 1000 else 32
    enough = -(-UPDATES * batch_size // rows)
    return Choice(
        way,
        learning_rate or usual_rate(size),
        epochs or min(MOST_EPOCHS, max(FEWEST_EPOCHS, enough)),
        batch_size,
        why,
    )


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


def text_lengths(source: str, texts: Sequence[str], *, revision: str | None = None) -> np.ndarray:
    """Return the number of tokens of each text, int `[texts]`, without any prompt."""
    tokenizer = read_tokenizer(hub.fetch(source, revision=revision))
    parts = (tokenizer.encode_plain_batch(texts[i : i + PART]) for i in range(0, len(texts), PART))
    return np.array([len(ids) for part in parts for ids in part])
