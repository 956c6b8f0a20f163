"""Hugging Face folders in and out: classes, names, dtypes. Only here and in `layout`."""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import huggingface_hub
import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import (
    CLASSES,
    Model,
    ModernBertForMaskedLM,
    abstract_model,
    parameters,
)
from mlmjax.parallel.sharding import leaf_path
from mlmjax.storage import (
    CARD,
    CLASSIFIER,
    CONFIG,
    TOKENIZER_FILES,
    TRAINING,
    plain_file,
    read_json,
    replace_folder,
)
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.weights import hub
from mlmjax.weights.tensor_files import INDEX, Header, Weights

# Parameters have the checkpoint's names. torch keeps a kernel as `[out, in]`; here its axes are
# the inputs, then the outputs, and either may be cut into parts (`[hidden, 3, heads, head_dim]`).
# The number is how many leading axes are inputs; None marks what is stored axis by axis as it is.
LAYOUTS: tuple[tuple[str, int | None], ...] = (
    ("tok_embeddings.weight", None),
    ("norm.weight", None),
    ("attn.Wqkv.weight", 1),
    ("attn.Wo.weight", 2),
    ("mlp.Wi.weight", 1),
    ("mlp.Wo.weight", 1),
    ("head.dense.weight", 1),
    ("classifier.weight", 1),
    (".bias", 0),
)


def hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape on disk of a parameter that has `shape` here.

    >>> hf_shape("model.layers.0.attn.Wqkv.weight", (32, 3, 4, 8))
    (96, 32)
    """
    inputs = _inputs(name)
    if inputs is None:
        return shape
    outputs = math.prod(shape[inputs:])
    return (outputs, math.prod(shape[:inputs])) if inputs else (outputs,)


def to_hf_layout(name: str, value: np.ndarray) -> np.ndarray:
    """Return a parameter as it is laid out on disk."""
    shape = hf_shape(name, value.shape)
    if _inputs(name):
        return np.ascontiguousarray(value.reshape(shape[::-1]).T)
    return value.reshape(shape)


def from_hf_layout(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a tensor from disk as the parameter of `shape`: the inverse of `to_hf_layout`."""
    return (value.T if _inputs(name) else value).reshape(shape)


def _inputs(name: str) -> int | None:
    for suffix, inputs in LAYOUTS:
        if name.endswith(suffix):
            return inputs
    raise ValueError(f"parameter {name} has no layout; add one to layout.LAYOUTS")


log = logging.getLogger(__name__)
EMBEDDING = "model.embeddings.tok_embeddings.weight"
DECODER = "decoder.weight"  # the embedding again: never a parameter here


# Derived from the configuration; some older exports hold them all the same.
HARMLESS = re.compile(r"(.+\.)?rotary_emb\.(\w+_)?inv_freq")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHARD_BYTES = 5 * 10**9
COPIES = min(4, os.cpu_count() or 1)  # tensors of a file that are in memory twice at a time
EXPORT_FILES = frozenset(
    {CONFIG, INDEX, CARD, CLASSIFIER, TRAINING}
    | {"generation_config.json", ".gitattributes"}
    | {"*.safetensors"}
    | set(TOKENIZER_FILES + hub.OTHER_TOKENIZER_FILES)
)


def to_hf_tensors(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Yield `(name, tensor)` in the layout on disk, float32, one tensor at a time."""
    for name, value in parameters(model).items():
        yield name, to_hf_layout(name, np.asarray(value))


def from_hf_tensors(abstract: Model, read: Callable[[str], np.ndarray]) -> Model:
    """Return the model with every parameter of an abstract one filled from `read(name)`."""
    graphdef, params = nnx.split(abstract)

    # The caller may have set it for this thread alone.
    device = jax.config.jax_default_device  # type: ignore[attr-defined]

    def fill(path: Any, leaf: Any) -> jax.Array:
        name = leaf_path(path)
        with jax.default_device(device):
            value = from_hf_layout(name, read(name), leaf.shape).astype(leaf.dtype, copy=False)
            # A copy: an array that shared numpy's memory could not be donated to a step.
            return jax.device_put(value, may_alias=False)

    described, treedef = jax.tree_util.tree_flatten_with_path(params)
    with ThreadPoolExecutor(COPIES) as threads:  # what copies holds no lock of Python's
        values = list(threads.map(lambda one: fill(*one), described))
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, values))


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str = "float32",
    local_files_only: bool = False,
    attention: str = "auto",
) -> tuple[Model, Tokenizer]:
    """Load a model and its tokenizer from a folder or a hub id; safetensors only, no code is run.

    `mlmjax-small` is the packaged model.

    Parameters are float32; `dtype` ("float32" or "bfloat16") is what is computed in. `revision`
    and `local_files_only` are for hub ids. The class follows `architectures` in config.json; where
    that is missing, a `classifier.weight` makes it a classifier and `head.dense.weight` a masked
    language model. Raises `InputError` that lists every problem of the files at once, before
    memory for the weights is taken.
    """
    folder = hub.fetch(source, revision=revision, local_files_only=local_files_only)
    values = read_json(folder, CONFIG)
    # The tokenizer's library works outside of Python's lock, and takes as long as the description.
    with ThreadPoolExecutor(1) as beside, Weights(folder) as weights:
        reading = beside.submit(load_tokenizer, folder)
        abstract = _abstract_model(folder, values, weights, dtype, attention)
        tokenizer = reading.result()
        check_tokenizer(folder, values, tokenizer)
        return _fill(abstract, weights), tokenizer


def load_model(folder: Path, *, dtype: str = "float32", attention: str = "auto") -> Model:
    """Load the model of a folder alone, as `load_pretrained` does."""
    values = read_json(folder, CONFIG)
    with Weights(folder) as weights:
        return _fill(_abstract_model(folder, values, weights, dtype, attention), weights)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a folder; raises `InputError`."""
    for name in TOKENIZER_FILES:
        if os.path.lexists(folder / name):
            plain_file(folder, name)
    return Tokenizer.from_pretrained(folder)


def check_tokenizer(folder: Path, values: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Raise `InputError` unless the tokenizer's ids are those config.json (`values`) speaks of."""
    problems = []
    size = ModelConfig.from_hf(values).vocab_size
    if tokenizer.vocab_size > size:
        problems.append(f"it has {tokenizer.vocab_size} ids; the model's vocab_size is {size}")
    for role in ("pad", "cls", "sep", "mask"):
        key, found = f"{role}_token_id", getattr(tokenizer, f"{role}_id")
        if values.get(key) not in (None, found):
            problems.append(f"its [{role.upper()}] is {found}; {key} is {values[key]}")
    if problems:
        raise InputError(
            f"{folder}: the tokenizer does not match the model: {problems[0]}; "
            "put the tokenizer the model was trained with beside it",
            problems[1:],
        )


def _abstract_model(
    folder: Path, values: dict[str, Any], weights: Weights, dtype: str, attention: str
) -> Model:
    """Describe the model by its configuration, and hold the headers of the files against it."""
    where = folder / CONFIG
    if "auto_map" in values:
        log.warning("%s: auto_map names code of its own; it is ignored and never run", where)
    try:
        config = ModelConfig.from_hf(values)
    except InputError as error:
        raise InputError(f"{where}: {error.message}", error.details) from error
    name = _class_name(where, config.architectures, weights.headers)
    layers = {match[1] for match in map(_LAYER.match, weights.headers) if match}
    if config.num_hidden_layers > len(layers):  # before a model of any depth is described
        raise InputError(
            f"{where}: num_hidden_layers is {config.num_hidden_layers}; the weights are missing "
            f"for all but {len(layers)} of them"
        )
    model: Any = abstract_model(name, config, dtype=dtype, attention=attention)
    problems = [*weights.problems, *_misfits(model, weights.headers)]
    if problems:
        raise InputError(
            f"{folder}: the weights are not those of the {name} in {CONFIG}: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if problems[1:] else ""),
            problems[1:],
        )
    described = {name: h for name, h in weights.headers.items() if not HARMLESS.fullmatch(name)}
    # A tuple, because what a module holds besides arrays has to be hashable.
    model.source_dtypes = tuple(sorted((name, DTYPES[h.dtype]) for name, h in described.items()))
    return model


def _class_name(where: Path, given: tuple[str, ...] | None, tensors: Mapping[str, Any]) -> str:
    if not given:
        # A bare encoder has neither; it is refused like any other architecture.
        given = (
            "ModernBertForSequenceClassification"
            if "classifier.weight" in tensors
            else "ModernBertForMaskedLM"
            if "head.dense.weight" in tensors
            else "none, and no head among the weights",
        )
    if len(given) == 1 and given[0] in CLASSES:
        return given[0]
    raise InputError(
        f"{where}: architectures is {', '.join(given)[:200]}; expected one of {', '.join(CLASSES)}"
    )


def _misfits(model: Model, headers: Mapping[str, Header]) -> Iterator[str]:
    expected = {name: hf_shape(name, leaf.shape) for name, leaf in parameters(model).items()}
    if isinstance(model, ModernBertForMaskedLM) and (
        DECODER in headers or not model.config.tie_word_embeddings
    ):
        expected[DECODER] = expected[EMBEDDING]
    for name in sorted(expected.keys() - headers.keys()):
        yield f"{name}: is missing"
    for name, (file, dtype, shape, _) in headers.items():
        if HARMLESS.fullmatch(name):
            continue
        if name not in expected:
            yield f"{name}: is unexpected (in {file}, shape {list(shape)})"
            continue
        if shape != expected[name]:
            yield f"{name}: has shape {list(shape)}; expected {list(expected[name])}"
        if dtype not in DTYPES:
            yield f"{name}: has dtype {dtype}; expected one of {', '.join(DTYPES)}"


def _fill(abstract: Model, weights: Weights) -> Model:
    problems = []

    def read(name: str) -> np.ndarray:
        value = weights.read(name).astype(np.float32, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            total = value.sum()  # finite only where all values are, and it needs no memory
        if not np.isfinite(total) and (count := np.count_nonzero(~np.isfinite(value))):
            problems.append(f"{name}: {count} of {value.size} values are NaN or infinite")
        if name == EMBEDDING and DECODER in weights.headers:
            decoder = weights.read(DECODER).astype(np.float32)
            if not np.array_equal(decoder.view(np.uint32), value.view(np.uint32)):
                problems.append(
                    f"{DECODER}: differs from {EMBEDDING}; here the decoder is the embedding"
                )
        return value

    model = from_hf_tensors(abstract, read)
    if problems:
        problems.sort()  # tensors are read by several threads
        raise InputError(
            f"{weights.folder}: the weights cannot be used: {problems[0]}", problems[1:]
        )
    return model


def save_pretrained(
    model: Model,
    tokenizer: Tokenizer | None,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    card: str | None = None,
    more_files: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that transformers loads unchanged: weights, config, tokenizer, model card.

    `dtype` is "float32", "bfloat16" or "source": each tensor in the dtype it was loaded with
    (float32 where the model was not loaded). `card` is the text of README.md and `more_files` are
    further texts by file name. As transformers does, the decoder is left out where it is tied; with
    "source" it is written if the source had it. The folder appears whole or not at all; an older
    export in its place is replaced. Raises `InputError` for another folder or file there and for
    values the dtype cannot hold, `RunError` when writing fails.
    """
    path = Path(path)
    tensors = parameters(model)
    source = dict(getattr(model, "source_dtypes", ())) if dtype == "source" else {}
    if dtype not in ("float32", "bfloat16", "source"):
        raise InputError(f"dtype: found {dtype!r}; expected 'float32', 'bfloat16' or 'source'")
    fixed = "float32" if dtype == "source" else dtype
    if DECODER in source or (EMBEDDING in tensors and not model.config.tie_word_embeddings):
        tensors[DECODER] = tensors[EMBEDDING]
    dtypes = {name: source.get(name, fixed) for name in tensors}
    with replace_folder(path, EXPORT_FILES) as folder:
        values = _config_values(model, set(dtypes.values()))
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        _write_weights(folder, tensors, dtypes)
        if tokenizer is not None:
            tokenizer.save(folder)
        for name, text in {CARD: card or model_card(model), **(more_files or {})}.items():
            (folder / name).write_text(text, encoding="utf-8")


def _config_values(model: Model, dtypes: set[str]) -> dict[str, Any]:
    values = model.config.to_hf() | {"architectures": [type(model).__name__]}
    if len(dtypes) == 1:
        # transformers loads in this dtype; the older key is kept right where the source had it.
        (name,) = dtypes
        values |= {key: name for key in ("dtype", "torch_dtype") if key == "dtype" or key in values}
    return dict(sorted(values.items()))


def _write_weights(folder: Path, tensors: dict[str, Any], dtypes: dict[str, str]) -> None:
    sizes = {name: tensors[name].size * np.dtype(dtypes[name]).itemsize for name in sorted(tensors)}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            layout = EMBEDDING if name == DECODER else name
            with np.errstate(over="ignore"):  # what overflows is refused below, by name
                value = to_hf_layout(layout, np.asarray(tensors[name])).astype(dtypes[name])
            if not np.isfinite(value.astype(np.float32)).all():
                raise InputError(
                    f"{name}: holds values that are NaN, infinite or beyond {dtypes[name]}; "
                    "nothing was written"
                )
            shard[name] = value
        save_file(shard, folder / file, metadata={"format": "pt"})
        # safetensors gives its files to the owner alone, whatever the umask says.
        shutil.copymode(folder / CONFIG, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def model_card(model: Model) -> str:
    """Return the text of a plain model card: what the model is and how it is loaded."""
    text = (resources.files("mlmjax") / "assets" / "model_card.md").read_text(encoding="utf-8")
    masked = isinstance(model, ModernBertForMaskedLM)
    return Template(text).substitute(
        name=type(model).__name__,
        pipeline="fill-mask" if masked else "text-classification",
        auto="AutoModelForMaskedLM" if masked else "AutoModelForSequenceClassification",
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        parameters=f"{sum(leaf.size for leaf in parameters(model).values()):,}",
    )
