"""An Orbax checkpoint of a model alone."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import CLASSES, Model, abstract_model
from mlmjax.parallel.sharding import leaf_path
from mlmjax.storage import CONFIG, TOKENIZER_FILES, check_name, read_json, replace_folder
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.weights import hub, pretrained
from mlmjax.weights.checkpoints import RECORD, STATE, _restored, check_same, describe, fingerprints
from mlmjax.weights.pretrained import to_hf_layout

PARAMS, MODEL_RECORD = "params", "checkpoint.json"
MODEL_FORMAT = "mlmjax-model-1"
MODEL_FILES = frozenset(
    {CONFIG, MODEL_RECORD, PARAMS} | set(TOKENIZER_FILES + hub.OTHER_TOKENIZER_FILES)
)
# Orbax tells of every step it takes, and prints tracebacks of errors that it raises as well.
logging.getLogger("absl").addFilter(lambda line: f"{os.sep}orbax{os.sep}" not in line.pathname)


def save_model(path: str | os.PathLike[str], model: Model, tokenizer: Tokenizer | None) -> None:
    """Write a model alone: config.json, tokenizer files, `params/` (Orbax), checkpoint.json.

    The dtypes of the files it was loaded from are kept, so that it can go back bit by bit. The
    folder appears whole or not at all. Raises `InputError` and `RunError` as `hf.save_pretrained`.
    """
    check_name(Path(path))
    params = nnx.state(model, nnx.Param)
    values = model.config.to_hf() | {"architectures": [type(model).__name__]}
    record = {
        "format": MODEL_FORMAT,
        "source_dtypes": dict(getattr(model, "source_dtypes", ())),
        "arrays": describe(params),
        "fingerprints": fingerprints(params),
    }
    with replace_folder(Path(path), MODEL_FILES) as folder:
        for name, table in ((CONFIG, values), (MODEL_RECORD, record)):
            (folder / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / PARAMS).absolute(), params)


def load_model(
    path: str | os.PathLike[str], *, dtype: str = "float32", attention: str = "auto"
) -> tuple[Model, Tokenizer | None]:
    """Read what `save_model` wrote; the tokenizer is None where none was saved.

    Raises `InputError` for a damaged folder, and for one whose arrays are not those of its
    config.json.
    """
    folder = Path(path).expanduser().absolute()
    record = _model_record(folder)
    config = ModelConfig.from_hf(read_json(folder, CONFIG))
    names = config.architectures or ()
    if len(names) != 1 or names[0] not in CLASSES:
        raise InputError(f"{folder / CONFIG}: architectures is {names}; expected a class")
    model: Any = abstract_model(names[0], config, dtype=dtype, attention=attention)
    graphdef, params = nnx.split(model)
    check_same(folder, record["arrays"], describe(params))
    model = nnx.merge(graphdef, _restored(folder / PARAMS, params, record["fingerprints"]))
    if record["source_dtypes"]:
        model.source_dtypes = tuple(sorted(record["source_dtypes"].items()))
    has_tokenizer = (folder / TOKENIZER_FILES[0]).exists()
    return model, pretrained.load_tokenizer(folder) if has_tokenizer else None


def is_model(folder: Path) -> bool:
    """Tell whether a folder is one that `save_model` wrote."""
    return (folder / MODEL_RECORD).is_file()


def saved_tensors(folder: Path) -> dict[str, np.ndarray] | None:
    """Return the parameters of a model's or a run's checkpoint as tensors of a Hugging Face folder.

    `folder` is what `save_model` wrote, one step of `Checkpoints`, or a folder of such steps or a
    run with one (the newest step then); None for anything else. The dtypes are those of the files
    the model was loaded from, where they are known. Raises `InputError` for damaged files.
    """
    folder = folder.expanduser().absolute()
    if is_model(folder):
        record = _model_record(folder)
        tensors = _named(_restored(folder / PARAMS, None, record["fingerprints"]))
        dtypes = record["source_dtypes"]
        if pretrained.DECODER in dtypes:
            tensors[pretrained.DECODER] = tensors[pretrained.EMBEDDING]
        return {name: x.astype(dtypes.get(name, x.dtype)) for name, x in tensors.items()}
    for place in (folder, folder / "checkpoints"):
        steps = [int(entry.name) for entry in place.glob("*") if entry.name.isdecimal()]
        if steps and not (place / STATE).is_dir():
            folder = place / str(max(steps))
            break
    if not (folder / STATE).is_dir():
        return None
    record = read_json(folder / RECORD, "metadata")
    state = _restored(folder / STATE, None, record.get("fingerprints"))
    if not isinstance(state, Mapping) or "params" not in state:
        raise InputError(f"{folder}: holds a state without params; give a training run's folder")
    return _named(state["params"])


def _named(params: Any) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = ((leaf_path(path), np.asarray(leaf)) for path, leaf in leaves)
    return {name: to_hf_layout(name, value) for name, value in named}


def _model_record(folder: Path) -> dict[str, Any]:
    record = read_json(folder, MODEL_RECORD)
    tables = [record.get(key) for key in ("source_dtypes", "arrays", "fingerprints")]
    known = set(pretrained.DTYPES.values())
    if record.get("format") != MODEL_FORMAT or not all(isinstance(t, dict) for t in tables):
        raise InputError(f"{folder / MODEL_RECORD}: is not a record of format {MODEL_FORMAT}")
    if not known.issuperset(map(str, record["source_dtypes"].values())):
        raise InputError(f"{folder / MODEL_RECORD}: expected dtypes {', '.join(sorted(known))}")
    return record
