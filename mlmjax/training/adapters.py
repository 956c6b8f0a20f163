"""Choose the parameters that a training changes; the others stay frozen."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from flax import nnx

from mlmjax.errors import InputError, suggest_name
from mlmjax.model.modernbert import (
    ADAPTER_WEIGHTS,
    Model,
    ModernBertForSequenceClassification,
)
from mlmjax.parallel.sharding import named_leaves

Patterns = Sequence[str] | None


def trained_patterns(model: Model, train: Patterns = None) -> Patterns:
    """Return the patterns of the parameters that a training of this model changes; None: all.

    A model with an adapter trains that. `train` are patterns such as `"*bias"`. The last layer of a
    classification model is always trained, because it may be new.
    """
    patterns = [f"*{ending}" for ending in ADAPTER_WEIGHTS] if model.config.adapter else train
    if patterns is None:
        return None
    if isinstance(model, ModernBertForSequenceClassification):
        patterns = [*patterns, "classifier.*"]
    return tuple(patterns)


def split_trained(params: Any, patterns: Patterns) -> tuple[Any, Any]:
    """Divide parameters into those that patterns name and the frozen ones; all without patterns.

    `joined` puts them together again. Raises `InputError` for a pattern that names nothing.
    """
    if patterns is None:
        return params, None
    names = list(named_leaves(params))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = suggest_name(pattern, names)
            raise InputError(
                f"train: {pattern!r} names no parameter; {hint}expected patterns such as '*bias' "
                "or 'model.layers.3.*'",
                ["the parameters are", *names],
            )

    def is_trained(path: tuple[Any, ...], _: Any) -> bool:
        name = ".".join(map(str, path))
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    trained, frozen = nnx.split_state(params, is_trained, ...)
    return trained, frozen


def joined(trained: Any, frozen: Any) -> Any:
    """Return all parameters, from the two parts of `split_trained`."""
    return trained if frozen is None else nnx.merge_state(trained, frozen)
