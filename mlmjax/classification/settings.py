"""The settings of a classifier, saved with its weights."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mlmjax.classification.context import Shot
from mlmjax.classification.labels import check_known, label_table, seen_labels
from mlmjax.config.data import ShortenSide
from mlmjax.config.run import Head
from mlmjax.config.tables import StrictTable, decode
from mlmjax.errors import InputError
from mlmjax.model.modernbert import (
    Model,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
)
from mlmjax.statistics.calibration import Calibration
from mlmjax.statistics.label_sets import Conformal
from mlmjax.text.checks import (
    check_filled,
    check_list,
    check_share,
    check_text,
    for_each_row,
    is_listing,
)
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import ANCHOR, Tokenizer
from mlmjax.text.verbalizer import OptionNames, Verbalizer, usable_option_names

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
ASKS = (ASK, "Answer: [unused0][MASK]", "Answer:[MASK]")
"""The ends of usual prompts; which one depends on the tokenizer."""


class Settings(StrictTable):
    """The settings that `save_pretrained` writes; `labels` maps names to descriptions.

    `reason` says why `answer` was chosen; None if it was given.
    `ids` says whose ids the prompts have: those of transformers, or (in settings that do not say)
    those of version 0.1, which differ for some tokenizers. `anchor` is the token before the mask
    ("none": no token) if it is not `[unused0]`.
    """

    format: Annotated[int, Field(ge=1, le=1)] = 1
    ids: Literal["0.1", "transformers"] = "0.1"
    anchor: str | None = None
    labels: Mapping[str, str]
    template: str
    shorten: Mapping[str, ShortenSide] = {}
    names: OptionNames = "letters"
    max_length: Annotated[int, Field(gt=0)] | None = None
    head: Head = "mlm"
    answer: Answer | None = None
    reason: str | None = None
    multi_label: bool = False
    ordered: bool = False
    orders: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    shortlist: Annotated[int, Field(ge=2)] | None = None
    shortlist_model: str | None = None
    long_text: LongText = "shorten"
    instruction: str | None = None
    examples: tuple[Shot, ...] = ()
    calibration: Calibration | None = None
    conformal: Conformal | None = None
    abstain_below: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _fits_the_labels(self) -> "Settings":
        for example in self.examples:
            for name in example.labels:
                if name not in self.labels:
                    raise ValueError(f"examples: label {name!r:.60} is not one of the labels")
        columns = 2 if self.multi_label else len(self.labels)
        bias = None if self.calibration is None else self.calibration.bias
        if bias is not None and len(bias) != columns:
            raise ValueError(f"calibration.bias has {len(bias)} numbers; expected {columns}")
        return self

    @property
    def shown(self) -> tuple[str, ...]:
        """Return the text of each label in the prompt: its name, and any description."""
        return tuple(f"{name}: {d}" if d else name for name, d in self.labels.items())


def upgrade(saved: Settings, tokenizer: Tokenizer) -> tuple[Settings, Tokenizer]:
    """Return saved settings as those of today, and the tokenizer that they need.

    Version 0.1 put [CLS] and [SEP] around a prompt and no space before the mask, whatever the
    tokenizer. A classifier that was saved so is prompted so.
    """
    if saved.ids == "transformers":
        return saved, tokenizer
    ends = (tokenizer.cls_id,), (tokenizer.sep_id,)
    if None not in ends[0] + ends[1] and ends != (tokenizer.prefix_ids, tokenizer.suffix_ids):
        tokenizer = tokenizer.with_ends("cls", "sep")
    template = saved.template
    if tokenizer.mask_id not in tokenizer.lstrip_ids:
        template = re.sub(r"\[unused0\]\s+\[MASK\]", "[unused0][MASK]", template)
    return saved.model_copy(update={"ids": "transformers", "template": template}), tokenizer


LEARNED = ("calibration", "conformal", "abstain_below")
"""Settings found from texts; they hold only for the prompts that they were found with."""

PLAIN = (
    *("head", "answer", "multi_label", "ordered", "orders"),
    *("long_text", "max_length", "instruction", "shortlist", "shortlist_model"),
)
"""Settings that are arguments of the constructor as they are."""

ASKED = Settings.model_fields.keys() - {"format", "instruction", "ordered", "reason", *LEARNED}
"""Settings that decide what the model reads; the instruction is part of the template."""


def settle(
    given: Mapping[str, Any],
    saved: Settings | None,
    model: Model,
    tokenizer: Tokenizer,
    *,
    seen: Sequence[Any] | None,
) -> Settings:
    """Combine the constructor's arguments, the saved settings and the defaults, in this order.

    An argument that is None in `given` leaves the choice to the others. Labels may also come from
    the answers `seen` in training, or else from the model's head. Raises `InputError` for settings
    that do not go together.
    """
    has_head = not isinstance(model, ModernBertForMaskedLM)
    has_labels = isinstance(model, ModernBertForSequenceClassification)
    if saved is None:
        values = {name: field.default for name, field in Settings.model_fields.items()}
        values["head"] = "classification" if has_head else "mlm"
    else:
        values = dict(saved)
    values["ids"] = "transformers"
    values |= {name: given[name] for name in PLAIN if given[name] is not None}
    if has_head and values["head"] == "mlm":
        raise InputError(
            f"head is 'mlm', but a {type(model).__name__} has no masked-language-model "
            "head to answer with; leave head out, or give a ModernBertForMaskedLM"
        )
    labels = given["labels"] if given["labels"] is not None else saved.labels if saved else None
    if labels is None and seen is not None:
        labels = seen_labels(seen, values["multi_label"])
    if labels is None and has_labels:
        labels = list(model.config.id2label.values())
    if labels is None:
        raise InputError(
            "the classifier has no labels; give labels (--labels on the command line), or call fit "
            "first"
        )
    values["anchor"] = None
    if values["head"] == "mlm" and tokenizer.anchor != ANCHOR:
        values["anchor"] = tokenizer.anchor_name()
    values["labels"] = label_table(labels)
    values["examples"] = _examples(given["examples"], saved, values)
    values |= _answer(given, saved, values, tokenizer)
    values |= _template(given, saved, values, tokenizer)
    _check_combination(values)
    settings = decode(Settings, values | dict.fromkeys(LEARNED), "classifier")
    learned: dict[str, Any] = {}
    # The order of the labels counts too, and equal tables may differ in it.
    same_labels = saved is not None and list(settings.labels) == list(saved.labels)
    if same_labels and all(getattr(settings, name) == getattr(saved, name) for name in ASKED):
        learned = {name: getattr(saved, name) for name in LEARNED}
    if given["abstain_below"] is not None:
        learned["abstain_below"] = check_share(given["abstain_below"], "abstain_below")
    return settings.model_copy(update=learned)


def suitable_answer(labels: Mapping[str, str], tokenizer: Tokenizer) -> tuple[Answer, str]:
    """Return how labels `{name: description}` are best answered, and why.

    Words are measured to be better than letters (docs/experiments).
    """
    if any(labels.values()):
        return "letters", "only a list of options shows the descriptions of labels"
    try:
        Verbalizer.words(list(labels), tokenizer=tokenizer).ids(tokenizer)
    except InputError:
        return "letters", "not every label is one token of its own"
    return "words", "each label is one token of its own"


def _answer(
    given: Mapping[str, Any],
    saved: Settings | None,
    values: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Return the way to answer and its reason, as given, as saved, or chosen."""
    if given["answer"] is not None:
        return {"answer": given["answer"], "reason": None}
    template = given["template"]
    changed = template is not None or bool(given["multi_label"])
    if saved is not None and (
        saved.reason is None or (saved.labels == values["labels"] and not changed)
    ):
        return {}
    text = template.text if isinstance(template, Template) else template
    if values["head"] == "classification":
        return {"answer": None, "reason": None}
    if values["multi_label"]:
        return {"answer": None, "reason": "several labels may apply, so each is asked yes or no"}
    if text is not None:  # whose options decide, or their absence
        return {"answer": None, "reason": None}
    if values["orders"] != 1:
        return {"answer": "letters", "reason": "only options in a list have orders"}
    if values["shortlist"] is not None:
        return {"answer": "letters", "reason": "only options in a list have a shortlist"}
    answer, reason = suitable_answer(values["labels"], tokenizer)
    return {"answer": answer, "reason": reason}


def ask_for(tokenizer: Tokenizer) -> str:
    """Return the end of a usual prompt: no space before a mask that does not include it.

    In training a mask stood in place of a token that begins with that space.
    """
    if tokenizer.mask_id in tokenizer.lstrip_ids:
        return ASK
    return ASKS[2 if tokenizer.anchor is None else 1]


def default_template(values: Mapping[str, Any], ask: str = ASK) -> str:
    """Return the prompt of settings that were given none of their own; `ask` is its end."""
    instruction, shots = values["instruction"], bool(values["examples"])
    if values["head"] == "classification":
        return "{text}" if instruction is None else f"{_literal(instruction)}\n{{text}}"
    examples = "{examples}" if shots else ""
    if values["multi_label"]:
        usual = LABEL_INSTRUCTION
        middle = f"LABEL:\n{{label}}\n{examples}TEXT:\n{{text}}\nCHOICES:\n{{options}}\nANSWER:\n"
    elif values["answer"] in ("words", "continuation"):
        usual, middle = NAME_INSTRUCTION, f"{examples}TEXT:\n{{text}}\n"
    elif shots:  # The options come first, because the examples' answers refer to them.
        usual = INSTRUCTION
        middle = f"CHOICES:\n{{options}}\n{examples}TEXT:\n{{text}}\nANSWER:\n"
    else:
        usual, middle = INSTRUCTION, "TEXT:\n{text}\nCHOICES:\n{options}\nANSWER:\n"
    return f"{_literal(instruction or usual)}\n{middle}{ask}"


def _literal(text: str) -> str:
    """Escape the braces of a text, so that a template shows them."""
    check_text(text, "instruction")
    return text.replace("{", "{{").replace("}", "}}")


def _examples(given: Any, saved: Settings | None, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the few-shot examples; the saved ones only if they are about the same labels."""
    labels, multi_label = values["labels"], values["multi_label"]
    if given is not None:
        pairs = enumerate(check_list(given, "examples"), 1)
        named = ((f"examples: example {number}", pair) for number, pair in pairs)
        return tuple(for_each_row(lambda pair: _example(pair, labels, multi_label), named))
    return saved.examples if saved is not None and saved.labels.keys() == labels.keys() else ()


def _example(pair: Any, labels: Mapping[str, str], multi_label: bool) -> dict[str, Any]:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise InputError(f"is {pair!r:.60}; expected a pair of a text and its label")
    text, given = pair
    check_filled(text, "text")
    if multi_label and not isinstance(given, str) and not is_listing(given):
        raise InputError(
            f"its labels are {given!r:.60} ({type(given).__name__}); expected a list of names"
        )
    names = tuple(given) if multi_label and not isinstance(given, str) else (given,)
    for name in names:
        check_text(name, "label")
        check_known(name, labels)
    return {"text": str(text), "labels": names}


def _template(
    given: Mapping[str, Any],
    saved: Settings | None,
    values: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Return the prompt's text, the fields it may shorten, and the names of its options."""
    ask = ask_for(tokenizer)
    usual = default_template(values, ask)
    own: str | None = None
    shorten: Mapping[str, Any] = {"text": "tail"}
    names: OptionNames = "letters"
    template = given["template"]
    if isinstance(template, Template):
        own, shorten, names = template.text, template.shorten, template.names
    elif template is not None:
        own = template
    elif saved is not None:
        shorten = saved.shorten
        if saved.template not in {default_template(dict(saved), end) for end in ASKS}:
            own, names = saved.template, saved.names
    if own is not None and given["instruction"] is not None:
        raise InputError(
            "instruction: there is a template too, given or saved; write the instruction into it "
            "and give that as template"
        )
    count = len(values["labels"])

    def suffices(kind: OptionNames) -> bool:
        return len(usable_option_names(kind, tokenizer, count)) == count

    if not values["multi_label"] and not suffices(names) and suffices("numbers"):
        names = "numbers"
    return {"template": usual if own is None else own, "shorten": dict(shorten), "names": names}


def _check_combination(values: Mapping[str, Any]) -> None:
    """Raise `InputError` for ways to answer that exclude each other."""
    answer, has_head = values["answer"], values["head"] == "classification"
    if values["multi_label"] and (answer not in (None, "letters") or has_head):
        raise InputError(
            "multi_label asks yes or no about every label, by letters at the slot; leave out "
            "answer and head"
        )
    if values["multi_label"] and values["ordered"]:
        raise InputError("ordered is for one level per text; leave it or multi_label out")
    if has_head and (values["examples"] or answer is not None):
        raise InputError("a classification head reads only the text; leave out examples and answer")
