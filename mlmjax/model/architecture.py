"""The shape of a ModernBERT model, read from and written to both dialects of `config.json`.

Source: transformers 5.23, `ModernBertConfig`, whose defaults and precedences these are.
"""

import difflib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard

from mlmjax.errors import InputError

MODEL_TYPE = "modernbert"
GLOBAL = "full_attention"
LOCAL = "sliding_attention"
ACTIVATIONS = (
    *("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"),
    *("gelu_python_tanh", "quick_gelu", "hardswish", "leaky_relu", "linear", "mish", "relu"),
    *("relu2", "relu6", "sigmoid", "silu", "swish", "tanh"),
)
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")

_DEFAULT_THETAS = {GLOBAL: 160_000.0, LOCAL: 10_000.0}
_FLAT_THETA_KEYS = {GLOBAL: "global_rope_theta", LOCAL: "local_rope_theta"}
_DEFAULT_EVERY_N = 3
_DEFAULT_LABELS = 2

# Inclusive bounds: wide enough for any ModernBERT that exists, narrow enough that no product of
# two of them asks for absurd memory before the tensors have been looked at.
_INTEGERS = {
    "vocab_size": (1, 2**22),
    "hidden_size": (2, 2**15),
    "intermediate_size": (1, 2**18),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 2**10),
    "max_position_embeddings": (1, 2**24),
    "local_attention": (0, 2**25),
}
_EVERY_N = _LABELS = (1, 2**20)
_PROBABILITY = (0.0, 1.0)
_FLOATS = {
    "initializer_range": (0.0, 1e3),
    "initializer_cutoff_factor": (1e-3, 1e3),
    "norm_eps": (1e-30, 1.0),
    "attention_dropout": _PROBABILITY,
    "embedding_dropout": _PROBABILITY,
    "mlp_dropout": _PROBABILITY,
    "classifier_dropout": _PROBABILITY,
    "global_rope_theta": (1e-3, 1e15),
    "local_rope_theta": (1e-3, 1e15),
}
_BOOLEANS = (
    "norm_bias",
    "attention_bias",
    "mlp_bias",
    "decoder_bias",
    "classifier_bias",
    "tie_word_embeddings",
)
_CHOICES = {
    "hidden_activation": ACTIVATIONS,
    "classifier_activation": ACTIVATIONS,
    "classifier_pooling": ("cls", "mean"),
    "problem_type": PROBLEM_TYPES,
}
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
# Keys that would make another model of it, and that nothing here can express.
_REFUSED = ("rope_scaling", "per_layer_config", "quantization_config")


class _Problems(list[str]):
    """Everything wrong with a configuration, collected to be told at once."""

    def add(self, name: str, found: Any, expected: str) -> None:
        try:
            shown = reprlib.repr(found)
        except ValueError:  # an integer of thousands of digits has no repr
            shown = "a huge number"
        self.append(f"{name}: found {shown}; expected {expected}")

    def check_integer(self, name: str, found: Any, bounds: tuple[int, int]) -> None:
        if not _in_bounds(found, bounds):
            self.add(name, found, f"a whole number from {bounds[0]} to {bounds[1]}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a ModernBERT model, by the field names of the Hugging Face `config.json`.

    Either dialect may be given: flat (`global_rope_theta`, `local_rope_theta`,
    `global_attn_every_n_layers`) or nested (`rope_parameters`, `layer_types`); where both are,
    the nested one wins. After construction `layer_types` is a full tuple, both thetas are floats,
    `global_attn_every_n_layers` is None when `layer_types` follows no such pattern,
    `rope_parameters` keeps only what the thetas do not say, and `num_labels` is the length of
    `id2label`. `extra` holds the keys of the source that mean nothing here.

    Raises `InputError` that lists every value that is of the wrong type, out of bounds, or not
    expressible by this architecture.
    """

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    pad_token_id: int | None = 50283
    bos_token_id: int | None = 50281
    eos_token_id: int | list[int] | None = 50282
    cls_token_id: int | None = 50281
    sep_token_id: int | None = 50282
    attention_bias: bool = False
    attention_dropout: float = 0.0
    local_attention: int = 128
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0
    decoder_bias: bool = True
    classifier_pooling: str = "cls"
    classifier_dropout: float = 0.0
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    layer_types: tuple[str, ...] = None  # type: ignore[assignment]
    global_attn_every_n_layers: int | None = _DEFAULT_EVERY_N
    global_rope_theta: float = _DEFAULT_THETAS[GLOBAL]
    local_rope_theta: float = _DEFAULT_THETAS[LOCAL]
    rope_parameters: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = True
    num_labels: int = None  # type: ignore[assignment]
    id2label: Mapping[int, str] = None  # type: ignore[assignment]
    label2id: Mapping[str, int] = None  # type: ignore[assignment]
    problem_type: str | None = None
    architectures: tuple[str, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = _Problems()
        self._resolve_rope(problems)
        self._check_values(problems)
        self._resolve_layers(problems)
        self._resolve_labels(problems)
        self._check_extra(problems)
        if problems:
            raise InputError(f"model configuration: {problems[0]}", problems[1:])

    def __hash__(self) -> int:
        return hash((self.vocab_size, self.hidden_size, self.intermediate_size, self.layer_types))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def window(self) -> int:
        """How far a local layer sees to each side: token i sees j when |i - j| <= window."""
        return self.local_attention // 2

    def rope_theta(self, layer_type: str) -> float:
        """RoPE base of the layers of one type."""
        return self.global_rope_theta if layer_type == GLOBAL else self.local_rope_theta

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], *, strict: bool = False) -> "ModelConfig":
        """Read the keys of a `config.json` in either dialect; unknown keys go to `extra`.

        With `strict` an unknown key is refused, and the nearest known one is named: for values
        that a person wrote. Raises `InputError`.

        >>> ModelConfig.from_hf({"local_rope_theta": 500, "torch_dtype": "float16"}).extra
        {'torch_dtype': 'float16'}
        """
        if not isinstance(values, Mapping):
            raise InputError(f"model configuration: found {type(values)}; expected an object")
        values = dict(values)
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            found = f"found {model_type!r}, which is another architecture"
            raise InputError(f"model_type: {found}; only {MODEL_TYPE!r} can be loaded")
        # transformers sets this property last, so it overrides local_attention.
        if "sliding_window" in values:
            half = values.pop("sliding_window")
            values["local_attention"] = half * 2 if _is_integer(half) else half
        known = {f.name for f in fields(cls)} - {"extra"}
        unknown = [str(key) for key in values if key not in known]
        if strict and unknown:
            problems = [_unknown_key(key, known) for key in unknown]
            raise InputError(f"model configuration: {problems[0]}", problems[1:])
        extra = {key: value for key, value in values.items() if key not in known}
        return cls(**{key: values[key] for key in values if key in known}, extra=extra)

    def to_hf(self) -> dict[str, Any]:
        """Return the keys of a `config.json`: both dialects, or the nested one where only it can.

        The flat dialect can express the model when layer i is global exactly if i is a multiple
        of some n. Values are JSON-ready.
        """
        nested = {
            layer_type: {
                "rope_type": "default",
                **dict((self.rope_parameters or {}).get(layer_type) or {}),
                "rope_theta": self.rope_theta(layer_type),
            }
            for layer_type in (GLOBAL, LOCAL)
        }
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        values |= {
            "model_type": MODEL_TYPE,
            "layer_types": list(self.layer_types),
            "rope_parameters": {**(self.rope_parameters or {}), **nested},
            "id2label": {str(index): label for index, label in self.id2label.items()},
            "label2id": dict(self.label2id),
        }
        del values["num_labels"]
        if self.id2label == _default_labels(_DEFAULT_LABELS):
            del values["id2label"], values["label2id"]
        if self.architectures is not None:
            values["architectures"] = list(self.architectures)
        for name in ("problem_type", "architectures"):
            if values[name] is None:
                del values[name]
        if self.global_attn_every_n_layers is None:
            for name in ("global_attn_every_n_layers", *_FLAT_THETA_KEYS.values()):
                del values[name]
        return dict(sorted({**self.extra, **values}.items()))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _resolve_rope(self, problems: _Problems) -> None:
        nested = self.rope_parameters
        if nested is None:
            return
        if not isinstance(nested, Mapping):
            problems.add("rope_parameters", nested, f"an object of {GLOBAL}, {LOCAL}")
            return
        rest: dict[str, Any] = {}
        for name, entry in nested.items():
            if name not in _FLAT_THETA_KEYS:
                expected = f"one object for each of {GLOBAL} and {LOCAL}"
                problems.add("rope_parameters", f"key {name}", expected)
            elif isinstance(entry, Mapping):
                kind = entry.get("rope_type", entry.get("type", "default"))
                if kind != "default":
                    problems.add(f"rope_parameters.{name}.rope_type", kind, "'default'")
                if "rope_theta" in entry:
                    self._set(_FLAT_THETA_KEYS[name], entry["rope_theta"])
                kept = {k: v for k, v in entry.items() if k not in ("rope_theta", "rope_type")}
                rest |= {name: kept} if kept else {}
            elif entry is not None:
                problems.add(f"rope_parameters.{name}", entry, "an object or null")
        self._set("rope_parameters", rest or None)

    def _check_values(self, problems: _Problems) -> None:
        for name, bounds in _INTEGERS.items():
            problems.check_integer(name, getattr(self, name), bounds)
        for name, (least, most) in _FLOATS.items():
            number = getattr(self, name)
            if (isinstance(number, float) or _is_integer(number)) and least <= number <= most:
                self._set(name, float(number))
            else:
                problems.add(name, number, f"a number from {least:g} to {most:g}")
        for name in _BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                problems.add(name, getattr(self, name), "true or false")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not any(value is choice or value == choice for choice in choices):
                problems.add(name, value, f"one of {', '.join(map(str, choices))}")
        self._check_token_ids(problems)
        self._check_heads(problems)

    def _check_token_ids(self, problems: _Problems) -> None:
        for name in _TOKEN_IDS:
            value = getattr(self, name)
            several = (
                value if name == "eos_token_id" and isinstance(value, list | tuple) else [value]
            )
            if not all(token is None or _in_bounds(token, (0, 2**31 - 1)) for token in several):
                problems.add(name, value, "a token id (0 or more) or null")
        pad, size = self.pad_token_id, self.vocab_size
        if _is_integer(pad) and _is_integer(size) and pad >= size:
            expected = f"a token id below vocab_size {size}, or null"
            problems.add("pad_token_id", pad, expected)

    def _check_heads(self, problems: _Problems) -> None:
        names = ("hidden_size", "num_attention_heads")
        if not all(_in_bounds(getattr(self, name), _INTEGERS[name]) for name in names):
            return
        if self.hidden_size % self.num_attention_heads:
            expected = f"a multiple of num_attention_heads {self.num_attention_heads}"
            problems.add("hidden_size", self.hidden_size, expected)
        elif self.head_dim % 2:
            expected = f"an even head_dim over {self.num_attention_heads} heads, as RoPE needs"
            problems.add("hidden_size", self.hidden_size, expected)

    def _resolve_layers(self, problems: _Problems) -> None:
        layers, given = self.num_hidden_layers, self.layer_types
        every = self.global_attn_every_n_layers
        if not _in_bounds(layers, _INTEGERS["num_hidden_layers"]):
            return
        if given is None:
            problems.check_integer("global_attn_every_n_layers", every, _EVERY_N)
            if _in_bounds(every, _EVERY_N):
                self._set("layer_types", _every_nth(every, layers))
            return
        if not isinstance(given, list | tuple):
            problems.add("layer_types", given, f"a list of {GLOBAL!r} and {LOCAL!r}")
            return
        unknown = [kind for kind in given if kind not in (GLOBAL, LOCAL)]
        if unknown:
            problems.add("layer_types", unknown[0], f"{GLOBAL!r} or {LOCAL!r}")
        if len(given) != layers:
            expected = f"one for each of num_hidden_layers {layers}"
            problems.add("layer_types", f"{len(given)} entries", expected)
        self._set("layer_types", tuple(given))
        candidates = [every] if _in_bounds(every, _EVERY_N) else []
        candidates += [_DEFAULT_EVERY_N, *range(1, layers + 1)]
        matching = (n for n in candidates if _every_nth(n, layers) == self.layer_types)
        self._set("global_attn_every_n_layers", next(matching, None))

    def _resolve_labels(self, problems: _Problems) -> None:
        number, names, ids = self.num_labels, self.id2label, self.label2id
        if number is not None and not _in_bounds(number, _LABELS):
            problems.check_integer("num_labels", number, _LABELS)
            return
        if names is None:
            names = _default_labels(_DEFAULT_LABELS if number is None else number)
            ids = None
        labels = _labels(names)
        if labels is None:
            expected = 'an object {"0": name, "1": name, ...} without gaps'
            problems.add("id2label", names, expected)
            return
        if number is not None and number != len(labels):
            expected = f"{len(labels)}, the entries of id2label (give one of the two)"
            problems.add("num_labels", number, expected)
        if ids is None:
            ids = {label: index for index, label in labels.items()}
        if not isinstance(ids, Mapping) or not all(_is_integer(index) for index in ids.values()):
            problems.add("label2id", ids, "an object {name: number}")
            return
        if self.problem_type == "single_label_classification" and len(labels) == 1:
            problems.add("problem_type", self.problem_type, "two labels or more with it")
        self._set("num_labels", len(labels))
        self._set("id2label", labels)
        self._set("label2id", dict(ids))

    def _check_extra(self, problems: _Problems) -> None:
        for name in _REFUSED:
            if self.extra.get(name) is not None:
                problems.add(name, self.extra[name], "null: not supported here")
        head_dim = self.extra.get("head_dim")
        if not problems and head_dim not in (None, self.head_dim):
            expected = f"hidden_size / num_attention_heads = {self.head_dim}"
            problems.add("head_dim", head_dim, expected)
        names = self.architectures
        if names is None:
            return
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            self._set("architectures", tuple(names))
        else:
            problems.add("architectures", names, "a list of class names")


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _in_bounds(value: Any, bounds: tuple[int, int]) -> TypeGuard[int]:
    return _is_integer(value) and bounds[0] <= value <= bounds[1]


def _unknown_key(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return f"{key}: unknown key; {hint}"


def _every_nth(n: int, layers: int) -> tuple[str, ...]:
    return tuple(LOCAL if i % n else GLOBAL for i in range(layers))


def _default_labels(number: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(number)}


def _labels(names: Any) -> dict[int, str] | None:
    """Labels by number, or None when the numbers are not 0, 1, 2, ... or a name is no string."""
    found = (
        {str(index): name for index, name in names.items()} if isinstance(names, Mapping) else {}
    )
    labels: dict[int, Any] = {index: found.get(str(index)) for index in range(len(found))}
    return labels if labels and all(isinstance(n, str) for n in labels.values()) else None
