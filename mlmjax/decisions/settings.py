"""The settings of a decider, saved with its weights, and what else a decider starts from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from mlmjax.classification.predictor import Source
from mlmjax.classification.prompter import Prompter
from mlmjax.classification.settings import LongText
from mlmjax.config.tables import StrictTable, decode
from mlmjax.decisions.asking import Way
from mlmjax.decisions.classifiers import OwnQuestion, load_classifier
from mlmjax.decisions.questions import MOST_LEVELS, MOST_OPTIONS, TYPES, Question
from mlmjax.errors import InputError
from mlmjax.statistics.calibration import Calibration
from mlmjax.statistics.label_sets import Conformal
from mlmjax.storage import CLASSIFIER, DECIDER, TRAINING, plain_file, read_json
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.weights import hub
from mlmjax.weights.pretrained import load_pretrained

Share = Annotated[float, Field(ge=0, le=1)]


class DeciderSettings(StrictTable):
    """How questions are asked, and what was learned about the probabilities of their answers.

    `calibrations` and `conformals` are by type and number of options, such as `choice/3`. `anchor`
    is the token before the mask ("none": no token) if it is not `[unused0]`.
    """

    format: Annotated[int, Field(ge=1, le=1)] = 1
    answer: Way = "letters"
    orders: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    long_text: LongText = "shorten"
    max_length: Annotated[int, Field(gt=0)] | None = None
    anchor: str | None = None
    abstain_below: Share | None = None
    calibrations: Mapping[str, Calibration] = {}
    conformals: Mapping[str, Conformal] = {}

    @model_validator(mode="after")
    def _known_kinds(self) -> "DeciderSettings":
        for name in (*self.calibrations, *self.conformals):
            kind, _, count = name.partition("/")
            most = MOST_LEVELS if kind == "score" else 2 if kind == "noul" else MOST_OPTIONS
            if kind not in TYPES or not count.isdecimal() or not 2 <= int(count) <= most:
                raise ValueError(f"{name!r} is not a type of question with a number of options")
        return self


ASKED = ("answer", "orders", "long_text", "max_length")
"""Settings that decide what the model reads; calibrations hold only for them."""


def kind_of(question: Question) -> str:
    """Return the type of a question and the number of its options.

    >>> from mlmjax.decisions.questions import YesNo
    >>> kind_of(YesNo("Is it urgent?"))
    'noul/2'
    """
    return f"{question.type}/{len(question.names)}"


def settle(given: Mapping[str, Any], saved: DeciderSettings | None) -> dict[str, Any]:
    """Return the values of settings: those given, then those saved, then the defaults."""
    values = dict(saved or DeciderSettings())
    chosen = {name: value for name, value in given.items() if value is not None}
    if any(values[name] != chosen[name] for name in ASKED if name in chosen):
        values |= {"calibrations": {}, "conformals": {}}
    return values | chosen


def like_classifier(prompter: Prompter) -> DeciderSettings:
    """Return settings that prompt as a classifier does, which answers by words or letters."""
    own = prompter.settings
    values = {name: getattr(own, name) for name in ("orders", "long_text", "max_length")}
    return decode(DeciderSettings, values | {"answer": prompter.answer}, "classifier")


class Loaded(NamedTuple):
    """Hold a model with what is saved beside it: settings, training manifest, and a classifier's
    own question.
    """

    model: Any
    tokenizer: Tokenizer
    name: str
    settings: DeciderSettings | None = None
    manifest: bytes | None = None
    own: OwnQuestion | None = None

    def with_anchor(self, name: str | None) -> "Loaded":
        """Return it with the anchor of this name, or else the saved one.

        Calibrations are left out if it is another one than theirs. Raises `InputError` if it is
        another one than that of a classifier, whose question is asked with its own.
        """
        tokenizer, settings = self.tokenizer, self.settings
        if settings is not None and settings.anchor is not None:
            tokenizer = tokenizer.with_anchor(settings.anchor)
        chosen = tokenizer if name is None else tokenizer.with_anchor(name)
        if chosen is tokenizer or settings is None:
            return self._replace(tokenizer=chosen)
        if chosen.anchor_name() != tokenizer.anchor_name():
            if self.own is not None:
                raise InputError(
                    f"anchor is {name!r:.60}, but a decider of a classifier uses its anchor, "
                    f"{tokenizer.anchor_name()}; leave anchor out"
                )
            settings = settings.model_copy(update={"calibrations": {}, "conformals": {}})
        return self._replace(tokenizer=chosen, settings=settings)


def load(
    source: Source, *, revision: str | None, local_files_only: bool, dtype: str, **asked: Any
) -> Loaded:
    """Load the source of a decider; raises `InputError` for anything else than `Decider` takes.

    `asked` are more options of the `Predictor` of a saved classifier.
    """
    if isinstance(source, tuple) and len(source) == 2:
        return Loaded(*source, "mlmjax")
    if not isinstance(source, str | Path):
        raise InputError(
            f"source is {source!r:.60}; expected a folder, a hub id, or a pair (model, tokenizer)"
        )
    where: Any = {"revision": revision, "local_files_only": local_files_only}
    folder = hub.fetch(source, **where)
    settings, manifest = None, None
    if (folder / DECIDER).exists():
        settings = decode(DeciderSettings, read_json(folder, DECIDER), str(folder / DECIDER))
    if (folder / TRAINING).exists():
        manifest = plain_file(folder, TRAINING).read_bytes()
    name = Path(source).resolve().name if Path(source).is_dir() else str(source)
    if not (folder / CLASSIFIER).exists():
        loaded = load_pretrained(source, dtype=dtype, **where)
        return Loaded(*loaded, name, settings, manifest)
    model, tokenizer, own = load_classifier(source, dtype=dtype, **asked, **where)
    if settings is None and own is not None:
        settings = like_classifier(own.prompter)
    return Loaded(model, tokenizer, name, settings, manifest, own)
