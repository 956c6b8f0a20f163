"""Load and save Hugging Face folders: classes, names, layouts, dtypes and model cards."""

import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mlmjax.config.run import SPLASH_BLOCKS
from mlmjax.errors import InputError, named_place, suggest_keywords
from mlmjax.model.architecture import ModelConfig, Origin
from mlmjax.model.encoder import Options
from mlmjax.model.modernbert import (
    CLASSES,
    Model,
    ModernBertForMaskedLM,
    ModernBertModel,
    abstract_model,
    merged,
    parameters,
    with_parameters,
)
from mlmjax.parallel.processes import check_not_forked
from mlmjax.storage import (
    CARD,
    CONFIG,
    TOKENIZER_FILES,
    plain_file,
    read_json,
    replace_folder,
)
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.weights import hub
from mlmjax.weights.adapters import attach_adapter, is_adapter, read_base
from mlmjax.weights.cards import (
    files_to_keep,
    read_provenance,
    with_adapter_provenance,
    with_provenance,
)
from mlmjax.weights.tensors.layout import hf_shape, input_axes, write_weights
from mlmjax.weights.tensors.tensor_files import Header, Weights

log = logging.getLogger(__name__)

EMBEDDING = "model.embeddings.tok_embeddings.weight"
DECODER = "decoder.weight"
"""The decoder's matrix: the embedding if it is tied, otherwise a parameter."""
DERIVED = re.compile(r"(.+\.)?rotary_emb\.(\w+_)?inv_freq")
"""Tensors that follow from the configuration, which some older exports hold too."""
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float32"}
"""The dtypes of tensors in files, and those that they have when they are saved again."""
NAMES = 3
"""How many names of either side a mismatch shows at least."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Tensors of a file that are in memory twice at a time.
_COPIES = min(4, os.cpu_count() or 1)


@suggest_keywords
def load_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str = "float32",
    local_files_only: bool = False,
    attention: str = "auto",
    remat: str = "none",
    splash_blocks: tuple[int, int] = SPLASH_BLOCKS,
) -> tuple[Model, Tokenizer]:
    """Load a model and its tokenizer from a folder or a hub id; safetensors only, no code is run.

    `mlmjax-small` is the packaged model. `revision` and `local_files_only` are for hub ids. The
    folder of an adapter, PEFT's or one of `save_adapter`, gives its base with the adapter.

    Parameters are float32; `dtype` ("float32" or "bfloat16") is that of matrix products. For
    `attention`, `remat` and `splash_blocks` see `encoder.Options`. The class follows
    `architectures` in config.json. Without it, a `classifier.weight` means a classifier, a
    `head.dense.weight` a masked language model, and neither an encoder. Raises `InputError` that
    lists every problem of the files at once, before memory for the weights is taken.
    """
    check_not_forked()
    options = Options(dtype=dtype, attention=attention, remat=remat, splash_blocks=splash_blocks)
    folder = hub.fetch(source, revision=revision, local_files_only=local_files_only)
    if not is_adapter(folder):
        return _load_folder(folder, source, options)
    name, revision, _ = read_base(folder)
    hint = f" (it is the base of the adapter {folder})"
    with named_place("base_model_name_or_path", hint):
        base = hub.fetch(name, revision=revision, local_files_only=local_files_only)
        if is_adapter(base):
            raise InputError(f"{name}: is an adapter, too; expected a model")
    model, tokenizer = _load_folder(base, name, options)
    model = attach_adapter(model, folder)
    if (folder / TOKENIZER_FILES[0]).exists():
        tokenizer = read_tokenizer(folder)
        check_tokenizer(folder, model.config, model.config.to_hf(), tokenizer)
    return with_adapter_provenance(model, read_provenance(folder)), tokenizer


def _load_folder(
    folder: Path, source: str | os.PathLike[str], options: Options
) -> tuple[Model, Tokenizer]:
    """Load the model of a folder that was found for `source`."""
    values = read_json(folder, CONFIG)
    # Reading the tokenizer does not hold Python's lock, and takes as long as describing the model.
    with ThreadPoolExecutor(1) as reader, Weights(folder) as weights:
        reading = reader.submit(read_tokenizer, folder)
        abstract = _describe_model(folder, values, weights, options)
        tokenizer = reading.result()
        check_tokenizer(folder, abstract.config, values, tokenizer)
        model = _read_parameters(abstract, weights)
    model = with_provenance(model, read_provenance(folder))
    is_local = hub.packaged_folder(os.fspath(source)) is None and Path(source).is_dir()
    is_hub = folder.parent.name == "snapshots"
    name = str(folder.absolute()) if is_local else os.fspath(source)
    origin = Origin(name, folder.name if is_hub and not is_local else None, str(folder))
    provenance = model.config.provenance._replace(origin=origin)
    model.config = replace(model.config, provenance=provenance)
    return model, tokenizer


def read_model(folder: Path) -> Model:
    """Read the model of a folder without its tokenizer, as `load_pretrained` does."""
    values = read_json(folder, CONFIG)
    with Weights(folder) as weights:
        model = _read_parameters(_describe_model(folder, values, weights, Options()), weights)
    return with_provenance(model, read_provenance(folder))


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a folder; raises `InputError`."""
    for name in TOKENIZER_FILES:
        if os.path.lexists(folder / name):
            plain_file(folder, name)
    return Tokenizer.from_pretrained(folder)


def check_tokenizer(
    folder: Path, config: ModelConfig, values: Mapping[str, Any], tokenizer: Tokenizer
) -> None:
    """Raise `InputError` unless the tokenizer has the ids that config.json (`values`) names.

    The ids of [CLS] and [SEP] change no computation. Other ones in config.json are a warning, and
    those of the tokenizer count. A `pad_token_id` of null or -1 is none.
    """
    problems, keys = [], []
    size = config.vocab_size
    if tokenizer.vocab_size > size:
        problems.append(f"it has {tokenizer.vocab_size} ids; the model's vocab_size is {size}")
    for role in ("pad", "cls", "sep", "mask"):
        key, found = f"{role}_token_id", getattr(tokenizer, f"{role}_id")
        no_id = (None, -1) if role == "pad" else (None,)
        if found is None or values.get(key) in (*no_id, found):
            continue
        line = f"its [{role.upper()}] is {found}; {key} is {values[key]}"
        if role in ("cls", "sep"):
            log.warning("%s: %s in %s; the id of the tokenizer is used", folder, line, CONFIG)
        else:
            problems.append(line)
            keys.append(key)
    if tokenizer.cls_id is not None and not tokenizer.outer:
        log.warning(
            "%s: puts no tokens around a text, and so does transformers; mlmjax 0.1 put [CLS] and "
            "[SEP]; if the model was trained with them, give this file a post_processor",
            folder / TOKENIZER_FILES[0],
        )
    if problems:
        own = f", or if this is it, correct {' and '.join(keys)} in {CONFIG}" if keys else ""
        raise InputError(
            f"{folder}: the tokenizer does not match the model: {problems[0]}; "
            f"put the tokenizer that the model was trained with into this folder{own}",
            problems[1:],
        )


def read_config(folder: Path, values: Mapping[str, Any]) -> ModelConfig:
    """Parse what `config.json` of a folder holds; raises `InputError` that names the file."""
    with named_place(str(folder / CONFIG)):
        return ModelConfig.from_hf(values)


def _describe_model(
    folder: Path, values: Mapping[str, Any], weights: Weights, options: Options
) -> Any:
    """Describe the model by its configuration, and check the headers of the files against it."""
    where = folder / CONFIG
    if "auto_map" in values:
        log.warning("%s: auto_map names code, which is ignored and never run", where)
    config = read_config(folder, values)
    name = _class_name(where, config.architectures, weights.headers)
    layers = {match[1] for match in map(_LAYER.match, weights.headers) if match}
    if config.num_hidden_layers > len(layers):  # before a model of any depth is described
        raise InputError(
            f"{where}: num_hidden_layers is {config.num_hidden_layers}; the weights are missing "
            f"for all but {len(layers)} of them",
            _missing_layers(config.num_hidden_layers, layers, weights.headers),
        )
    dtypes = {
        name: DTYPES[header.dtype]
        for name, header in sorted(weights.headers.items())
        if header.dtype in DTYPES and not DERIVED.fullmatch(name)
    }
    if doubles := [name for name, header in weights.headers.items() if header.dtype == "F64"]:
        log.warning(
            "%s: float64 values are read as float32, in %d of %d tensors, such as %s",
            *(folder, len(doubles), len(weights.headers), doubles[0]),
        )
    model = abstract_model(name, replace(config, source_dtypes=dtypes), options)
    problems = [*weights.problems, *_misfits(model, weights.headers)]
    if problems:
        raise InputError(
            f"{folder}: the weights are not those of the {name} in {CONFIG}: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
            + _misfit_advice(weights.headers),
            problems[1:],
        )
    return model


def _missing_layers(number: int, found: Collection[str], headers: Collection[str]) -> list[str]:
    """Return lines with some names that are missing, and some that are there."""
    first = next(i for i in range(number) if str(i) not in found)
    parts = ("attn.Wo", "attn.Wqkv", "mlp.Wi")
    others = sorted(name for name in headers if not name.startswith("model.layers."))
    return [
        *(f"model.layers.{first}.{part}.weight: is missing" for part in parts),
        *(
            f"{name}: is in the files"
            for name in dict.fromkeys([*others, *sorted(headers)][:NAMES])
        ),
    ]


def _misfit_advice(headers: Collection[str]) -> str:
    """Say what to do about weights that have an encoder and no head; "" for others."""
    if EMBEDDING not in headers or any(not name.startswith("model.") for name in headers):
        return ""
    return (
        "; these are the weights of an encoder (ModernBertModel), which has no head: give a model "
        "with one, or let transformers draw one: AutoModelForMaskedLM.from_pretrained(FOLDER)"
        ".save_pretrained(NEW_FOLDER), and train it"
    )


def _class_name(where: Path, given: tuple[str, ...] | None, tensors: Mapping[str, Any]) -> str:
    if not given:
        given = (
            "ModernBertForSequenceClassification"
            if "classifier.weight" in tensors
            else "ModernBertForMaskedLM"
            if "head.dense.weight" in tensors
            else "ModernBertModel",
        )
    if given == (ModernBertModel.__name__,) and "head.dense.weight" in tensors:
        raise InputError(
            f"{where}: architectures is ModernBertModel, but the weights have a head; name the "
            "class of the weights, such as ModernBertForMaskedLM"
        )
    if len(given) == 1 and given[0] in CLASSES:
        return given[0]
    raise InputError(
        f"{where}: architectures is {', '.join(given)[:200]}; expected one of {', '.join(CLASSES)}"
        + _misfit_advice(tensors)
    )


def _misfits(model: Model, headers: Mapping[str, Header]) -> Iterator[str]:
    expected = {name: hf_shape(name, leaf.shape) for name, leaf in parameters(model).items()}
    if isinstance(model, ModernBertForMaskedLM) and DECODER in headers:
        expected[DECODER] = expected[EMBEDDING]
    missing = sorted(expected.keys() - headers.keys())
    unexpected = [name for name in headers if name not in expected and not DERIVED.fullmatch(name)]
    # Both sides are shown before either fills the lines that an error has.
    for some, others in (
        (missing[:NAMES], unexpected[:NAMES]),
        (missing[NAMES:], unexpected[NAMES:]),
    ):
        yield from (f"{name}: is missing" for name in some)
        for name in others:
            file, _, shape, _ = headers[name]
            yield f"{name}: is unexpected (in {file}, shape {list(shape)})"
    for name, (_, dtype, shape, _) in headers.items():
        if name not in expected:
            continue
        if shape != expected[name]:
            yield f"{name}: has shape {list(shape)}; expected {list(expected[name])}"
        if dtype not in DTYPES:
            yield f"{name}: has dtype {dtype}; expected one of {', '.join(DTYPES)}"


def _read_parameters(abstract: Any, weights: Weights) -> Model:
    """Return a model with the parameters of the files; raises `InputError` for bad values."""
    problems = []
    described = parameters(abstract)

    def read(name: str) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            value = weights.read(name).astype(np.float32, copy=False)
            total = value.sum()  # needs no memory, and is finite only if all values are
        if not np.isfinite(total) and (count := np.count_nonzero(~np.isfinite(value))):
            problems.append(f"{name}: {count} of {value.size} values are NaN or infinite")
        if name == EMBEDDING and DECODER in weights.headers and DECODER not in described:
            decoder = weights.read(DECODER).astype(np.float32)
            if not np.array_equal(decoder.view(np.uint32), value.view(np.uint32)):
                problems.append(
                    f"{DECODER}: differs from {EMBEDDING}, though {CONFIG} ties them; if the model "
                    "was trained with a decoder of its own, set tie_word_embeddings to false there"
                )
        return value

    # Threads do not inherit a default device that the caller set for this thread only.
    device = jax.config.jax_default_device  # type: ignore[attr-defined]

    def put(name: str, leaf: Any) -> jax.Array:
        with jax.default_device(device):
            value = read(name).T if input_axes(name) else read(name)
            value = value.reshape(leaf.shape).astype(leaf.dtype, copy=False)
            # A copy, because an array that shares numpy's memory cannot be donated to a step.
            return jax.device_put(value, may_alias=False)

    with ThreadPoolExecutor(_COPIES) as threads:  # copying does not hold Python's lock
        values = list(threads.map(put, described.keys(), described.values()))
    if problems:
        problems.sort()  # threads report in any order
        raise InputError(
            f"{weights.folder}: the weights cannot be used: {problems[0]}", problems[1:]
        )
    return with_parameters(abstract, dict(zip(described, values, strict=True)))


@suggest_keywords
def save_pretrained(
    model: Model,
    tokenizer: Tokenizer | None,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    card: str | None = None,
    more_files: Mapping[str, str | bytes] | None = None,
    push_to: str | None = None,
    private: bool = True,
) -> None:
    """Write a folder that transformers loads unchanged: weights, config, tokenizer, model card.

    An adapter is added to the weights; `save_adapter` saves it alone.
    `dtype` is "float32", "bfloat16" or "source": each tensor in the dtype it was loaded with, and
    float32 for others. Card, licence and training manifest are those of the folder that the model
    was loaded from (`cards.files_to_keep`). `card` is another text of README.md, and `more_files`
    are further or other files by their names. Like transformers, it leaves out a tied decoder; with
    "source" the decoder is written if the source had it. The folder appears whole or not at all,
    and replaces an older export. Raises `InputError` for another folder or file there and for
    values the dtype cannot hold, `RunError` if writing fails. `push_to` uploads the folder to the
    hub, see `hub.push`.
    """
    path = Path(path)
    if dtype not in ("float32", "bfloat16", "source"):
        raise InputError(f"dtype: found {dtype!r}; expected 'float32', 'bfloat16' or 'source'")
    given, model = model, merged(model)
    tensors, config = parameters(model), model.config
    source = config.source_dtypes if dtype == "source" else {}
    is_masked = isinstance(model, ModernBertForMaskedLM)
    if is_masked and DECODER in source:
        tensors.setdefault(DECODER, tensors[EMBEDDING])
    other = "float32" if dtype == "source" else dtype
    dtypes = {name: source.get(name, other) for name in tensors}
    if type(model) is ModernBertModel:  # whose names in transformers have no prefix
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
        dtypes = {name.removeprefix("model."): value for name, value in dtypes.items()}
    anchor = None if tokenizer is None else tokenizer.named_anchor
    files: dict[str, Any] = {**files_to_keep(given, anchor, written=model), **(more_files or {})}
    files |= {CARD: card} if card else {}
    with replace_folder(path, hub.EXPORT_FILES) as folder:
        values = config.to_hf() | {"architectures": [type(model).__name__]}
        if len(names := set(dtypes.values())) == 1:
            # transformers loads in this dtype; the older key is updated if the source had it.
            values |= dict.fromkeys({"dtype"} | ({"torch_dtype"} & values.keys()), names.pop())
        text = json.dumps(dict(sorted(values.items())), indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
        write_weights(folder, tensors, dtypes)
        if tokenizer is not None:
            tokenizer.save(folder)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if push_to is not None:
        hub.push(path, push_to, private=private)
