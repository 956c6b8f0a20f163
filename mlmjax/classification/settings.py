"""What a classifier is, beside its weights: labels, prompt, how it asks, and its calibration."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mlmjax.classification.labels import described, seen_labels
from mlmjax.config.data import ShortenSide
from mlmjax.config.run import Head
from mlmjax.config.tables import StrictTable, decode
from mlmjax.errors import InputError
from mlmjax.model.modernbert import Model, ModernBertForSequenceClassification
from mlmjax.scoring.scorers import HeadScorer
from mlmjax.statistics.calibration import Calibration
from mlmjax.statistics.label_sets import Conformal
from mlmjax.text.checks import check_list, check_share, check_text
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import OptionNames, usable_option_names

LongText = Literal["shorten", "mean", "max"]
Answer = Literal["letters", "words", "continuation"]
INSTRUCTION = (
    "You will be given a text as well as a list of labels. "
    "Read the text carefully and select the right label from the list."
)
LABEL_INSTRUCTION = (
    "You will be given a text and a label. Read the text carefully and say whether the label "
    "applies to it."
)
NAME_INSTRUCTION = "You will be given a text. Read it carefully and name its label."
ASK = "Answer: [unused0] [MASK]"


class Example(StrictTable):
    """A few-shot example: its text and labels."""

    text: str
    labels: tuple[str, ...]


class Settings(StrictTable):
    """What `save_pretrained` writes beside the model; `labels` maps each name to a description."""

    format: Annotated[int, Field(ge=1, le=1)] = 1
    labels: Mapping[str, str]
    template: str
    shorten: Mapping[str, ShortenSide] = {}
    names: OptionNames = "letters"
    max_length: Annotated[int, Field(gt=0)] | None = None
    head: Head = "mlm"
    answer: Answer | None = None
    multi_label: bool = False
    orders: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    long_text: LongText = "shorten"
    instruction: str | None = None
    examples: tuple[Example, ...] = ()
    calibration: Calibration | None = None
    conformal: Conformal | None = None
    abstain_below: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _fits_the_labels(self) -> "Settings":
        for example in self.examples:
            for name in example.labels:
                if name not in self.labels:
                    raise ValueError(f"examples: label {name!r:.60} is none of the labels")
        columns = 2 if self.multi_label else len(self.labels)
        bias = None if self.calibration is None else self.calibration.bias
        if bias is not None and len(bias) != columns:
            raise ValueError(f"calibration.bias has {len(bias)} numbers; expected {columns}")
        return self

    @property
    def shown(self) -> tuple[str, ...]:
        """What the prompt says of each label: its name, and its description if it has one."""
        return tuple(f"{name}: {d}" if d else name for name, d in self.labels.items())


def default_template(
    *, head: Head, answer: Answer | None, multi_label: bool, instruction: str | None, shots: bool
) -> str:
    """Return the prompt of a classifier that was given none of its own."""
    if head == "classification":
        return "{text}" if instruction is None else f"{_literal(instruction)}\n{{text}}"
    examples = "{examples}" if shots else ""
    if multi_label:
        first = _literal(instruction or LABEL_INSTRUCTION)
        middle = f"LABEL:\n{{label}}\n{examples}TEXT:\n{{text}}\nCHOICES:\n{{options}}\nANSWER:\n"
    elif answer in ("words", "continuation"):
        first, middle = _literal(instruction or NAME_INSTRUCTION), f"{examples}TEXT:\n{{text}}\n"
    elif shots:  # what the examples' answers mean has to be known before they are read
        first = _literal(instruction or INSTRUCTION)
        middle = f"CHOICES:\n{{options}}\n{examples}TEXT:\n{{text}}\nANSWER:\n"
    else:
        first = _literal(instruction or INSTRUCTION)
        middle = "TEXT:\n{text}\nCHOICES:\n{options}\nANSWER:\n"
    return f"{first}\n{middle}{ASK}"


def _literal(text: str) -> str:
    """Return a text as a template has to have it to mean itself, braces and all."""
    check_text(text, "instruction")
    return text.replace("{", "{{").replace("}", "}}")


def settle(
    given: Mapping[str, Any],
    saved: Settings | None,
    model: Model,
    tokenizer: Tokenizer,
    seen: Sequence[Any] | None,
) -> Settings:
    """Put together what the constructor was given, what was saved, and what is usual.

    `given` are the constructor's arguments, None where the saved ones count; labels come last from
    the model's head or the ones `seen` in training. Raises `InputError` for what does not fit.
    """
    has_head = isinstance(model, ModernBertForSequenceClassification)

    def value(name: str, usual: Any) -> Any:
        if given[name] is not None:
            return given[name]
        return usual if saved is None else getattr(saved, name)

    head = value("head", "classification" if has_head else "mlm")
    if has_head and head == "mlm":
        raise InputError(
            "head is 'mlm', but a ModernBertForSequenceClassification has no masked-language-model "
            "head to answer with; leave head out, or give a ModernBertForMaskedLM"
        )
    several = value("multi_label", False)
    labels = given["labels"] if given["labels"] is not None else saved.labels if saved else None
    if labels is None and seen is not None:
        labels = seen_labels(seen, several)
    if labels is None and has_head:
        labels = HeadScorer.labels_of(model)
    if labels is None:
        raise InputError("the classifier has no labels; give labels, or call fit first")
    table = described(labels)
    same_labels = saved is not None and saved.labels.keys() == table.keys()
    # Examples are about labels; of others they say nothing.
    examples: Any = saved.examples if saved is not None and same_labels else ()
    if given["examples"] is not None:
        pairs = check_list(given["examples"], "examples")
        examples = [_example(pair, i, table, several) for i, pair in enumerate(pairs)]
    answer, instruction = value("answer", None), value("instruction", None)
    usual = default_template(
        head=head,
        answer=answer,
        multi_label=several,
        instruction=instruction,
        shots=bool(examples),
    )
    own: str | None = None
    shorten: Mapping[str, Any] = {"text": "tail"}
    names: OptionNames = "letters"
    if isinstance(given["template"], Template):
        template = given["template"]
        own, shorten, names = template.text, template.shorten, template.names
    elif given["template"] is not None:
        own = given["template"]
    elif saved is not None and saved.template != _usual_of(saved):
        own, shorten, names = saved.template, saved.shorten, saved.names
    elif saved is not None:
        shorten = saved.shorten
    if own is not None and given["instruction"] is not None:
        raise InputError(
            "instruction: there is a template as well, given or saved; write the instruction into "
            "it, and give that as template"
        )

    def enough(kind: OptionNames) -> bool:
        return len(usable_option_names(kind, tokenizer, len(table))) == len(table)

    if not several and not enough(names) and enough("numbers"):
        names = "numbers"
    if several and (answer not in (None, "letters") or head == "classification"):
        raise InputError(
            "multi_label asks yes or no about every label, by letters at the slot; leave out "
            "answer and head"
        )
    if head == "classification" and (examples or answer is not None):
        raise InputError(
            "a classification head reads the text alone; leave out examples and answer"
        )
    settings = decode(
        Settings,
        {
            "labels": table,
            "template": usual if own is None else own,
            "shorten": dict(shorten),
            "names": names,
            "max_length": value("max_length", None),
            "head": head,
            "answer": answer,
            "multi_label": several,
            "orders": value("orders", 1),
            "long_text": value("long_text", "shorten"),
            "instruction": instruction,
            "examples": tuple(examples),
        },
        "classifier",
    )
    learned: dict[str, Any] = {}
    # What was learned of probabilities holds for the questions it was learned with.
    # Of labels also the order counts, which tables that are equal need not have.
    as_saved = saved is not None and list(settings.labels) == list(saved.labels)
    if as_saved and all(getattr(settings, name) == getattr(saved, name) for name in _ASKED):
        learned = {name: getattr(saved, name) for name in _LEARNED}
    if given["abstain_below"] is not None:
        learned["abstain_below"] = check_share(given["abstain_below"], "abstain_below")
    return settings.model_copy(update=learned)


_LEARNED = ("calibration", "conformal", "abstain_below")
_ASKED = (
    *("labels", "template", "shorten", "names", "max_length", "head", "answer", "multi_label"),
    *("orders", "long_text", "examples"),
)


def _usual_of(saved: Settings) -> str:
    return default_template(
        head=saved.head,
        answer=saved.answer,
        multi_label=saved.multi_label,
        instruction=saved.instruction,
        shots=bool(saved.examples),
    )


def _example(pair: Any, number: int, labels: Mapping[str, str], several: bool) -> dict[str, Any]:
    where = f"examples: example {number + 1}"
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise InputError(f"{where} is {pair!r:.60}; expected a pair of a text and its label")
    text, given = pair
    check_text(text, f"{where}: text")
    names = tuple(given) if several and not isinstance(given, str) else (given,)
    for name in names:
        check_text(name, f"{where}: label")
        if name not in labels:
            raise InputError(f"{where}: label {name!r:.60} is none of {', '.join(labels):.200}")
    if not text.strip():
        raise InputError(f"{where}: its text is blank; give it some text or leave it out")
    return {"text": str(text), "labels": names}
