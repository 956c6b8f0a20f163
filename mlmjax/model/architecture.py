"""The shape of a ModernBERT model, read from and written to both dialects of `config.json`.

Source: transformers 5.23, `ModernBertConfig`, which has the same defaults and precedences.
"""

import logging
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import ConfigDict, Field, Strict, ValidationError, create_model

from mlmjax.config.columns import as_written, is_missing
from mlmjax.config.run import AdapterConfig
from mlmjax.errors import InputError, suggest_keywords, suggest_name

log = logging.getLogger(__name__)

MODEL_TYPE = "modernbert"
GLOBAL: Literal["full_attention"] = "full_attention"
LOCAL: Literal["sliding_attention"] = "sliding_attention"
LayerType = Literal["full_attention", "sliding_attention"]
Activation = Literal[
    "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh",
    "gelu_python_tanh", "quick_gelu", "hardswish", "leaky_relu", "linear", "mish", "relu",
    "relu2", "relu6", "sigmoid", "silu", "swish", "tanh",
]  # fmt: skip
ACTIVATIONS = get_args(Activation)
Problem = Literal["regression", "single_label_classification", "multi_label_classification"]
_PROBLEMS = get_args(Problem)

# Bounds are wide enough for any ModernBERT that exists, and so narrow that no product of two asks
# for absurd memory before the tensors are read.
Size = Annotated[int, Field(ge=1, le=2**20)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Theta = Annotated[float, Field(ge=1e-3, le=1e15)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# The ids of other special tokens change no computation, so any number will do, as in transformers.
NotedId = Annotated[int, Field(ge=-(2**63), lt=2**63)]

_THETAS = {GLOBAL: "global_rope_theta", LOCAL: "local_rope_theta"}
_DEFAULT_EVERY_N = 3
_DEFAULT_LABELS = 2
# Fields that need more than a check of their type.
_RESOLVED = (
    *("rope_parameters", "global_attn_every_n_layers", "id2label", "label2id"),
    *("extra", "source_dtypes", "provenance", "adapter"),
)
_EXPECTED = {
    "eos_token_id": "a token id, a list of them, or null",
    "layer_types": f"a list of {GLOBAL!r} and {LOCAL!r}",
    "architectures": "a list of class names",
}
# Keys that describe another model, which this architecture cannot express.
_UNSUPPORTED = ("rope_scaling", "per_layer_config", "quantization_config")


class Origin(NamedTuple):
    """Name the model that was loaded: a hub id with its commit, or a folder."""

    name: str
    revision: str | None
    folder: str


class Provenance(NamedTuple):
    """Say where weights come from: files of the folder they were read from, and a fingerprint.

    `files` are the card, the training manifest and the licence, by their names. `norms` is a hash
    of norms and biases, which any training of a whole model changes; None if nothing was read.
    `kind` is the class and the size of the vocabulary. `origin` is the model that an adapter can
    point to.
    """

    files: Mapping[str, bytes] = {}  # not a proxy, which cannot be pickled
    norms: int | None = None
    kind: tuple[str, int] | None = None
    origin: Origin | None = None


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a ModernBERT model, by the field names of the Hugging Face `config.json`.

    Either dialect may be given: flat (`global_rope_theta`, `local_rope_theta`,
    `global_attn_every_n_layers`) or nested (`rope_parameters`, `layer_types`). The nested one wins
    over the flat one. After construction `layer_types` is a full tuple, both thetas are floats,
    `global_attn_every_n_layers` is None if `layer_types` does not follow such a pattern,
    `rope_parameters` keeps only what the thetas do not say, and `num_labels` is the length of
    `id2label`.

    `id2label` decides what the labels are. A `label2id` that says something else is replaced, with
    a warning.

    Three fields say what only the files said, and do not take part in equality: `extra` holds the
    other keys of `config.json`, `source_dtypes` the dtype of each tensor by its name, `provenance`
    where the weights come from. Nor does `adapter`, the matrices beside the weights, which
    `config.json` does not hold.

    Raises one `InputError` that lists every value of a wrong type, out of bounds, or that this
    architecture cannot express.
    """

    vocab_size: Annotated[int, Field(ge=1, le=2**22)] = 50368
    hidden_size: Annotated[int, Field(ge=2, le=2**15)] = 768
    intermediate_size: Annotated[int, Field(ge=1, le=2**18)] = 1152
    num_hidden_layers: Annotated[int, Field(ge=1, le=512)] = 22
    num_attention_heads: Annotated[int, Field(ge=1, le=2**10)] = 12
    hidden_activation: Activation = "gelu"
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**24)] = 8192
    initializer_range: Annotated[float, Field(ge=0.0, le=1e3)] = 0.02
    initializer_cutoff_factor: Annotated[float, Field(ge=1e-3, le=1e3)] = 2.0
    norm_eps: Annotated[float, Field(ge=1e-30, le=1.0)] = 1e-5
    norm_bias: bool = False
    pad_token_id: TokenId | None = 50283
    bos_token_id: NotedId | None = 50281
    eos_token_id: NotedId | list[NotedId] | None = 50282
    cls_token_id: NotedId | None = 50281
    sep_token_id: NotedId | None = 50282
    attention_bias: bool = False
    attention_dropout: Probability = 0.0
    local_attention: Annotated[int, Field(ge=0, le=2**25)] = 128
    embedding_dropout: Probability = 0.0
    mlp_bias: bool = False
    mlp_dropout: Probability = 0.0
    decoder_bias: bool = True
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_dropout: Probability = 0.0
    classifier_bias: bool = False
    classifier_activation: Activation = "gelu"
    layer_types: Annotated[tuple[LayerType, ...], Strict(False)] = None  # type: ignore[assignment]
    global_attn_every_n_layers: int | None = _DEFAULT_EVERY_N
    global_rope_theta: Theta = 160_000.0
    local_rope_theta: Theta = 10_000.0
    rope_parameters: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = True
    num_labels: Size = None  # type: ignore[assignment]
    id2label: Mapping[int, str] = None  # type: ignore[assignment]
    label2id: Mapping[str, int] = None  # type: ignore[assignment]
    problem_type: Problem | None = None
    architectures: Annotated[tuple[str, ...], Strict(False)] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    source_dtypes: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    provenance: Provenance = field(default=Provenance(), compare=False, repr=False)
    adapter: AdapterConfig | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        problems = list(self._resolve_rope())
        wrong = self._check_fields()
        problems += wrong.values()
        problems += self._check_sizes(wrong)
        problems += self._resolve_layers(wrong)
        problems += self._resolve_labels(wrong)
        problems += [
            _problem(name, self.extra[name], "null: not supported here")
            for name in _UNSUPPORTED
            if not _is_neutral(name, self.extra.get(name))
        ]
        if not problems and self.extra.get("head_dim") not in (None, self.head_dim):
            expected = f"hidden_size / num_attention_heads = {self.head_dim}"
            problems.append(_problem("head_dim", self.extra["head_dim"], expected))
        _raise_any(problems)

    def __hash__(self) -> int:
        return hash((self.vocab_size, self.hidden_size, self.intermediate_size, self.layer_types))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def window(self) -> int:
        """How far a local layer sees on each side: token i sees j if |i - j| <= window."""
        return self.local_attention // 2

    def rope_theta(self, layer_type: str) -> float:
        """Return the RoPE base of the layers of one type."""
        return self.global_rope_theta if layer_type == GLOBAL else self.local_rope_theta

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], *, strict: bool = False) -> "ModelConfig":
        """Read the keys of a `config.json` in either dialect; unknown keys go to `extra`.

        With `strict`, for values that a person wrote, an unknown key is an error that names the
        nearest known key. Raises `InputError`.

        >>> ModelConfig.from_hf({"local_rope_theta": 500, "torch_dtype": "float16"}).extra
        {'torch_dtype': 'float16'}
        """
        if not isinstance(values, Mapping):
            raise InputError(f"model configuration: found {type(values)}; expected an object")
        values = dict(values)
        if not strict:
            _forget_unknown_problem(values)
            _forget_no_padding(values)
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            found = f"found {model_type!r}, which is another architecture"
            raise InputError(f"model_type: {found}; only {MODEL_TYPE!r} can be loaded")
        # transformers sets this property last, so it overrides local_attention.
        if "sliding_window" in values:
            half = values.pop("sliding_window")
            values["local_attention"] = half * 2 if type(half) is int else half
        known = sorted(f.name for f in fields(cls) if f.compare)
        extra = {key: values.pop(key) for key in list(values) if key not in known}
        _raise_any(
            f"{key}: unknown key; "
            + (suggest_name(str(key), known).strip() or f"known: {', '.join(known)}")
            for key in (extra if strict else ())
        )
        return cls(**values, extra=extra)

    def to_hf(self) -> dict[str, Any]:
        """Return the keys of a `config.json` in both dialects, or in the nested one only.

        The flat dialect can express the model if the global layers are the multiples of some n.
        Values are JSON-ready.
        """
        rope = dict(self.rope_parameters or {})
        for kind in (GLOBAL, LOCAL):
            own = {"rope_type": "default", **(rope.get(kind) or {})}
            rope[kind] = {**own, "rope_theta": self.rope_theta(kind)}
        values = {
            **self.extra,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.compare},
            "model_type": MODEL_TYPE,
            "rope_parameters": rope,
            "id2label": {str(index): label for index, label in self.id2label.items()},
            "label2id": dict(self.label2id),
        }
        dropped = {name for name in ("problem_type", "architectures") if values[name] is None}
        dropped.add("num_labels")
        if self.id2label == _default_labels(_DEFAULT_LABELS):
            dropped |= {"id2label", "label2id"}
        if self.global_attn_every_n_layers is None:
            dropped |= {"global_attn_every_n_layers", *_THETAS.values()}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in sorted(values.items())
            if name not in dropped
        }

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _resolve_rope(self) -> Iterator[str]:
        nested = self.rope_parameters
        if nested is None:
            return
        if not isinstance(nested, Mapping) or not nested.keys() <= _THETAS.keys():
            yield _problem("rope_parameters", nested, f"one object for each of {GLOBAL}, {LOCAL}")
            return
        rest: dict[str, Any] = {}
        for name, entry in nested.items():
            if isinstance(entry, Mapping):
                kind = entry.get("rope_type", entry.get("type", "default"))
                if kind != "default":
                    yield _problem(f"rope_parameters.{name}.rope_type", kind, "'default'")
                if "rope_theta" in entry:
                    self._set(_THETAS[name], entry["rope_theta"])
                kept = {k: v for k, v in entry.items() if k not in ("rope_theta", "rope_type")}
                rest |= {name: kept} if kept else {}
            elif entry is not None:
                yield _problem(f"rope_parameters.{name}", entry, "an object or null")
        self._set("rope_parameters", rest or None)

    def _check_fields(self) -> dict[str, str]:
        """Check each field by its annotation; return what is wrong, by the name of the field."""
        try:
            checked = _Fields(**vars(self))
        except ValidationError as error:
            wrong: dict[str, str] = {}
            for details in error.errors(include_url=False):
                name = str(details["loc"][0])
                expected = details["msg"].removeprefix("Input should be ")
                if expected.startswith(("greater", "less")):
                    expected = f"a number {expected}"
                expected = _EXPECTED.get(name, expected)
                wrong.setdefault(name, _problem(name, details["input"], expected))
            return wrong
        for name, value in checked:
            self._set(name, value)
        return {}

    def _check_sizes(self, wrong: Collection[str]) -> Iterator[str]:
        pad, size = self.pad_token_id, self.vocab_size
        if "pad_token_id" not in wrong and pad is not None and type(size) is int and pad >= size:
            yield _problem("pad_token_id", pad, f"a token id below vocab_size {size}, or null")
        if "hidden_size" in wrong or "num_attention_heads" in wrong:
            return
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            expected = f"a multiple of num_attention_heads {heads}"
            yield _problem("hidden_size", self.hidden_size, expected)
        elif self.head_dim % 2:
            expected = f"an even head_dim over {heads} heads, as RoPE needs"
            yield _problem("hidden_size", self.hidden_size, expected)

    def _resolve_layers(self, wrong: Collection[str]) -> Iterator[str]:
        layers, given = self.num_hidden_layers, self.layer_types
        every = self.global_attn_every_n_layers
        if "num_hidden_layers" in wrong:
            return
        if given is None:
            if type(every) is int and 1 <= every <= 2**20:
                self._set("layer_types", _every_nth(every, layers))
            else:
                expected = f"a whole number from 1 to {2**20}"
                yield _problem("global_attn_every_n_layers", every, expected)
            return
        if isinstance(given, list | tuple) and len(given) != layers:
            expected = f"one for each of num_hidden_layers {layers}"
            yield _problem("layer_types", f"{len(given)} entries", expected)
        candidates = (every, _DEFAULT_EVERY_N, *range(1, layers + 1))
        numbers = (n for n in candidates if type(n) is int and n > 0)
        matching = (n for n in numbers if _every_nth(n, layers) == self.layer_types)
        self._set("global_attn_every_n_layers", next(matching, None))

    def _resolve_labels(self, wrong: Collection[str]) -> Iterator[str]:
        number, names = self.num_labels, self.id2label
        if "num_labels" in wrong:
            return
        if names is None:
            names = _default_labels(number or _DEFAULT_LABELS)
        labels = _labels(names)
        if labels is None:
            yield _problem("id2label", names, 'an object {"0": name, "1": name, ...} without gaps')
            return
        if number is not None and number != len(labels):
            expected = f"{len(labels)}, the entries of id2label (give one of the two)"
            yield _problem("num_labels", number, expected)
        if self.problem_type == "single_label_classification" and len(labels) == 1:
            yield _problem("problem_type", self.problem_type, "two labels or more with it")
        self._set("num_labels", len(labels))
        self._set("id2label", labels)
        self._set("label2id", _numbers(labels, self.label2id))


# What pydantic checks: each annotation, with None where that is the default.
_FIELDS: dict[str, Any] = {
    name: (kind | None if getattr(ModelConfig, name, ...) is None else kind, ...)
    for name, kind in ModelConfig.__annotations__.items()
    if name not in _RESOLVED
}
_Fields = create_model("_Fields", __config__=ConfigDict(strict=True), **_FIELDS)


def _raise_any(problems: Iterable[str]) -> None:
    first, *others = (*problems, "")
    if first:
        raise InputError(f"model configuration: {first}", others[:-1])


def _problem(name: str, found: Any, expected: str) -> str:
    try:
        shown = reprlib.repr(found)
    except ValueError:  # an integer of thousands of digits has no repr
        shown = "a huge number"
    return f"{name}: found {shown}; expected {expected}"


def _every_nth(n: int, layers: int) -> tuple[str, ...]:
    return tuple(LOCAL if i % n else GLOBAL for i in range(layers))


def _default_labels(number: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(number)}


def _is_neutral(name: str, value: Any) -> bool:
    """Tell whether the value of an unsupported key changes no computation."""
    if name == "rope_scaling" and isinstance(value, Mapping):
        return value.keys() <= {"rope_type", "type"} and {*map(str, value.values())} <= {"default"}
    return value is None or value == {}


def _labels(names: Any) -> dict[int, str] | None:
    """Return labels by number; None if the numbers have gaps or a name is a list or an object.

    Published files write a number as text ("0", "00"), and a label as a number, a truth value or
    null, which names nothing.
    """
    if not isinstance(names, Mapping) or not names:
        return None
    found: dict[int, Any] = {}
    for key, name in names.items():
        number = _number(key)
        if type(number) is not int or not isinstance(name, str | int | float | None):
            return None
        found[number] = f"LABEL_{number}" if is_missing(name) else as_written(name)
    is_whole = len(found) == len(names) and set(found) == set(range(len(found)))
    return {index: found[index] for index in sorted(found)} if is_whole else None


def _numbers(labels: Mapping[int, str], given: Any) -> dict[str, int]:
    """Return the number of each label; warn where the given `label2id` says something else."""
    numbers = {label: index for index, label in labels.items()}
    said = given.items() if isinstance(given, Mapping) else [(given, "no object")] if given else []
    wrong = [
        (label, index)
        for label, index in said
        if (number := numbers.get(as_written(label))) is None or _number(index) != number
    ]
    if wrong:
        label, index = wrong[0]
        log.warning(
            "label2id: %s is %s, which does not follow from id2label; id2label decides",
            reprlib.repr(label),
            reprlib.repr(index),
        )
    return numbers


def _forget_unknown_problem(values: dict[str, Any]) -> None:
    """Leave out a `problem_type` of somebody's own, which changes no computation of a model."""
    found = values.get("problem_type")
    if isinstance(found, str) and found not in _PROBLEMS:
        log.warning("problem_type: %s is none of %s; left out", repr(found), ", ".join(_PROBLEMS))
        del values["problem_type"]


def _forget_no_padding(values: dict[str, Any]) -> None:
    """Read a `pad_token_id` of -1 as null, as the library that wrote it meant."""
    if values.get("pad_token_id") == -1:
        log.warning("pad_token_id: -1 is the id of no token; read as null (none)")
        values["pad_token_id"] = None


def _number(index: Any) -> Any:
    """Return digits in a text as a number, and anything else unchanged."""
    index = index.strip() if isinstance(index, str) else index
    is_digits = isinstance(index, str) and index.isdecimal() and len(index) < 9
    return int(index) if is_digits else index
