"""Read and write adapters in the files of PEFT: `adapter_config.json` and a safetensors file."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from mlmjax.config.run import ADAPTED, AdapterConfig
from mlmjax.config.tables import decode
from mlmjax.errors import InputError, suggest_keywords
from mlmjax.model.architecture import Origin
from mlmjax.model.modernbert import (
    ADAPTER_WEIGHTS,
    Model,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    abstract_model,
    parameters,
    with_adapter,
    with_classifier,
    with_parameters,
)
from mlmjax.storage import (
    ADAPTER_BASE,
    CARD,
    expand_home,
    hash_file,
    hash_value,
    plain_file,
    read_json,
    replace_folder,
)
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.weights.cards import files_to_keep
from mlmjax.weights.hub import EXPORT_FILES, push
from mlmjax.weights.tensors.tensor_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    INDEX,
    WEIGHTS,
    Weights,
    weight_map,
)

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model."""

_HEAD = ("classifier.", "head.")
_DTYPES = ("F32", "F16", "BF16")
# Settings of PEFT with which an adapter would compute something else than here.
_OTHER_SETTINGS = (
    *("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias", "use_qalora"),
    *("layer_replication", "target_parameters", "trainable_token_indices", "megatron_config"),
)


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter and no model."""
    has_model = any((folder / name).exists() for name in (WEIGHTS, INDEX))
    return (folder / ADAPTER_CONFIG).exists() and not has_model


@suggest_keywords
def save_adapter(
    model: Model,
    tokenizer: Tokenizer | None,
    path: str | Path,
    *,
    dtype: str = "float32",
    card: str | None = None,
    more_files: Mapping[str, str | bytes] | None = None,
    push_to: str | None = None,
    private: bool = True,
) -> None:
    """Write the adapter of a model as a folder that PEFT loads, with a pointer to its base.

    `mlmjax_adapter.json` holds what PEFT's files have no place for: a hash of the base's weights,
    and the labels of a classification model. The pointer is the hub id with its commit, or the
    folder. `load_pretrained` reads all of it. A classification model's last layer is part of the
    adapter. `dtype` is "float32" or "bfloat16". `card` is the text of README.md, `more_files` are
    further files by their names; without them, what is known about the base is written. `push_to`
    uploads the folder to the hub, see `hub.push`.

    Raises `InputError` for a model without an adapter, one that was not loaded, values that are not
    finite, for the base's folder and for another folder there.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype: found {dtype!r}; expected 'float32' or 'bfloat16'")
    adapter, origin = model.config.adapter, model.config.provenance.origin
    if adapter is None:
        raise InputError("the model has no adapter to save; use save_pretrained")
    if origin is None:
        raise InputError(
            "the model was not loaded from a folder or hub id that an adapter could point to; use "
            "save_pretrained, which saves it merged"
        )
    check_apart(path, Path(origin.folder))
    tensors = _tensors_of(model, dtype)
    values, base = _describe(model, adapter, origin)
    anchor = None if tokenizer is None else tokenizer.named_anchor
    files: dict[str, Any] = {**files_to_keep(model, anchor), **(more_files or {})}
    files |= {CARD: card} if card else {}
    with replace_folder(Path(path), EXPORT_FILES) as folder:
        for file, table in ((ADAPTER_CONFIG, values), (ADAPTER_BASE, base)):
            (folder / file).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
        # safetensors makes files that only the owner can read, whatever the umask says.
        shutil.copymode(folder / ADAPTER_CONFIG, folder / ADAPTER)
        if tokenizer is not None:
            tokenizer.save(folder)
        for name, content in files.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if push_to is not None:
        push(path, push_to, private=private)


def check_apart(path: str | Path, base: Path) -> None:
    """Raise `InputError` if an adapter saved here would replace its base."""
    if expand_home(path).resolve() == base.resolve():
        raise InputError(f"{path}: is the base of the adapter; name another folder for the adapter")


def _tensors_of(model: Model, dtype: str) -> dict[str, np.ndarray]:
    """Return what an adapter's file holds; raises `InputError` for values that are not finite."""
    has_head = isinstance(model, ModernBertForSequenceClassification)
    found = {}
    for name, value in parameters(model).items():
        if name.endswith(ADAPTER_WEIGHTS) or (has_head and name.startswith("classifier.")):
            tensor = _to_disk(name, np.asarray(value)).astype(dtype)
            if not np.isfinite(tensor.astype(np.float32)).all():
                raise InputError(
                    f"{name}: holds values that are NaN or infinite; nothing was written"
                )
            found[PREFIX + name] = tensor
    return found


def _describe(
    model: Model, adapter: AdapterConfig, origin: Origin
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of `adapter_config.json` and of `mlmjax_adapter.json`."""
    has_head = isinstance(model, ModernBertForSequenceClassification)
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if has_head else None,
        "base_model_name_or_path": origin.name,
        "revision": origin.revision,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(adapter.targets),
        "modules_to_save": ["classifier"] if has_head else None,
        "bias": "none",
    }
    base: dict[str, Any] = {"format": 1, "base_sha256": hash_weights(Path(origin.folder))}
    if has_head:
        base |= {"labels": list(model.config.id2label.values())}
        base |= {"problem_type": model.config.problem_type}
    return values, base


def read_base(folder: Path) -> Origin:
    """Return the base that an adapter points to, without its folder; raises `InputError`."""
    values = read_json(folder, ADAPTER_CONFIG)
    name, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(name, str) or not name.strip():
        raise InputError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {name!r:.60}; expected the "
            "folder or hub id of the model that the adapter changes"
        )
    return Origin(name, revision if isinstance(revision, str) and revision else None, "")


def attach_adapter(model: Model, folder: Path) -> Model:
    """Return a base with the adapter of a folder, as PEFT would load it.

    Raises `InputError` for settings that mean another computation, for tensors that do not fit, and
    for a base with other weights than the adapter was trained on.
    """
    about = read_json(folder, ADAPTER_BASE) if (folder / ADAPTER_BASE).exists() else {}
    origin = model.config.provenance.origin
    expected = about.get("base_sha256")
    if origin and expected is not None and hash_weights(Path(origin.folder)) != expected:
        raise InputError(
            f"{folder}: its base {origin.name} has other weights than those that the adapter was "
            "trained on; give the right one as base_model_name_or_path in "
            f"{folder / ADAPTER_CONFIG}"
        )
    with Weights(folder, ADAPTER) as weights:
        problems = [
            f"{name}: has dtype {header.dtype}; expected one of {', '.join(_DTYPES)}"
            for name, header in weights.headers.items()
            if header.dtype not in _DTYPES
        ]
        tensors = {name: np.array(weights.read(name), np.float32) for name in weights.headers}
        problems += weights.problems
    problems += [f"{name}: does not begin with {PREFIX}" for name in _foreign(tensors)]
    tensors = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    adapter = _read_settings(folder / ADAPTER_CONFIG, tensors)
    model = _with_labels(folder, model, tensors, about)
    shapes = _expected_shapes(model, adapter, tensors)
    problems += _misfits(tensors, shapes)
    if problems:
        what = f"an adapter of {origin.name}" if origin else "an adapter of this model"
        raise InputError(f"{folder / ADAPTER}: is not {what}: {problems[0]}", problems[1:])
    # Inputs come first here and last in the file.
    read = {name: tensors[name].T.reshape(shape) for name, shape in shapes.items()}
    head = {name: value for name, value in read.items() if name.startswith(_HEAD)}
    abstract = abstract_model(type(model).__name__, model.config, model.options)
    values = {name: jnp.asarray(value) for name, value in read.items()}
    model = with_parameters(abstract, {**parameters(model), **{n: values[n] for n in head}})
    return with_adapter(model, adapter, values)


def _foreign(tensors: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in tensors if not name.startswith(PREFIX))


def _read_settings(where: Path, tensors: Mapping[str, Any]) -> AdapterConfig:
    """Read `adapter_config.json`; the targets are those that the file has matrices for."""
    values = read_json(where.parent, where.name)
    wrong = [f"{key}: {values[key]!r:.60}" for key in _OTHER_SETTINGS if values.get(key)]
    if values.get("peft_type") != "LORA":
        wrong.append(f"peft_type: {values.get('peft_type')!r:.60}; expected 'LORA'")
    if values.get("bias", "none") != "none":
        wrong.append(f"bias: {values['bias']!r:.60}; expected 'none'")
    if wrong:
        raise InputError(f"{where}: has settings that are not supported: {wrong[0]}", wrong[1:])
    down = ADAPTER_WEIGHTS[0]
    found = [name for name in ADAPTED if any(key.endswith(f".{name}{down}") for key in tensors)]
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if values.get("use_rslora") and isinstance(rank, int) and isinstance(alpha, int | float):
        alpha = alpha * math.sqrt(max(rank, 0))  # then alpha / sqrt(rank) is the scale
    table = {"rank": rank, "alpha": float(alpha) if type(alpha) is int else alpha, "targets": found}
    return decode(AdapterConfig, table, str(where))


def _with_labels(
    folder: Path, model: Model, tensors: Mapping[str, Any], about: Mapping[str, Any]
) -> Model:
    """Return the base as the classification model that an adapter with a last layer is of."""
    last = tensors.get("classifier.weight")
    if last is None or not isinstance(model, ModernBertForMaskedLM):
        return model
    labels = about.get("labels") or [f"LABEL_{number}" for number in range(len(last))]
    if len(labels) != len(last) or not all(isinstance(label, str) for label in labels):
        raise InputError(
            f"{folder / ADAPTER_BASE}: has {len(labels)} labels; expected {len(last)}, one for "
            "each row of classifier.weight"
        )
    model = with_classifier(model, labels, seed=0)
    if "problem_type" in about:
        model.config = replace(model.config, problem_type=about["problem_type"])
    return model


def _expected_shapes(
    model: Model, adapter: AdapterConfig, tensors: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes here of what an adapter of a model holds, head parameters if it has any."""
    config = replace(model.config, adapter=adapter)
    whole = parameters(abstract_model(type(model).__name__, config, model.options))
    return {
        name: leaf.shape
        for name, leaf in whole.items()
        if name.endswith(ADAPTER_WEIGHTS) or (name.startswith(_HEAD) and name in tensors)
    }


def _misfits(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    for name in sorted(tensors.keys() | shapes.keys()):
        if name not in tensors:
            yield f"{name}: is missing; every layer needs its matrices"
        elif name not in shapes:
            yield f"{name}: is unexpected (shape {list(tensors[name].shape)})"
        elif tensors[name].shape != (expected := _disk_shape(name, shapes[name])):
            yield f"{name}: has shape {list(tensors[name].shape)}; expected {list(expected)}"
        elif not np.isfinite(tensors[name]).all():
            yield f"{name}: holds values that are NaN or infinite"


def _disk_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in PEFT's file: outputs, then inputs, each with their parts together."""
    if len(shape) == 1:
        return shape
    inputs = len(shape) - 1 if name.endswith(ADAPTER_WEIGHTS[0]) else 1
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def _to_disk(name: str, value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value.reshape(_disk_shape(name, value.shape)[::-1]).T)


def hash_weights(folder: Path) -> str:
    """Return one hash of the safetensors files of a model's folder."""
    files = sorted(set((weight_map(folder) or {}).values())) or [WEIGHTS]
    return hash_value([hash_file(plain_file(folder, name)) for name in files])
