"""Write and read an Orbax checkpoint of one model, without a run."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mlmjax.errors import InputError
from mlmjax.model.encoder import Options
from mlmjax.model.modernbert import CLASSES, Model, abstract_model, merged
from mlmjax.storage import (
    CARD,
    CLASSIFIER,
    CONFIG,
    DECIDER,
    PROVENANCE,
    TOKENIZER_FILES,
    check_name,
    expand_home,
    read_json,
    replace_folder,
)
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.weights import hub, pretrained
from mlmjax.weights.cards import files_to_keep, read_provenance, with_provenance
from mlmjax.weights.checkpoints import (
    RECORD,
    STATE,
    check_same,
    describe,
    fingerprints,
    reason_of,
    verify,
)
from mlmjax.weights.tensors import layout

PARAMS, MODEL_RECORD = "params", "checkpoint.json"
MODEL_FORMAT = "mlmjax-model-1"
MODEL_FILES = frozenset(
    {CONFIG, MODEL_RECORD, PARAMS, CLASSIFIER, DECIDER, *PROVENANCE}
    | set(TOKENIZER_FILES + hub.OTHER_TOKENIZER_FILES)
)


def save_model(
    path: str | os.PathLike[str],
    model: Model,
    tokenizer: Tokenizer | None,
    *,
    more_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a folder of config.json, tokenizer files, `params/` (Orbax) and checkpoint.json.

    The last one keeps the dtypes of the files the model was loaded from, so that it can be exported
    bit by bit. Card, licence and training manifest of these files are written too, and `more_files`
    by their names. The folder appears whole or not at all. Raises `InputError` and `RunError` as
    `save_pretrained`.
    """
    check_name(Path(path))
    given, model = model, merged(model)
    params = nnx.state(model, nnx.Param)
    values = model.config.to_hf() | {"architectures": [type(model).__name__]}
    record = {
        "format": MODEL_FORMAT,
        "source_dtypes": dict(model.config.source_dtypes),
        "arrays": describe(params),
        "fingerprints": fingerprints(params),
    }
    files = files_to_keep(given, written=model) | dict(more_files or {})
    if CARD not in model.config.provenance.files:
        del files[CARD]  # a new one explains a Hugging Face folder
    with replace_folder(Path(path), MODEL_FILES) as folder:
        for name, table in ((CONFIG, values), (MODEL_RECORD, record)):
            (folder / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / PARAMS).absolute(), params)


def load_model(
    path: str | os.PathLike[str], *, dtype: str = "float32", attention: str = "auto"
) -> tuple[Model, Tokenizer | None]:
    """Read what `save_model` wrote; the tokenizer is None if none was saved.

    Raises `InputError` for a damaged folder, and for arrays that do not fit its config.json.
    """
    folder = expand_home(path).absolute()
    record = _read_record(folder)
    config = pretrained.read_config(folder, read_json(folder, CONFIG))
    names = config.architectures or ()
    if len(names) != 1 or names[0] not in CLASSES:
        raise InputError(f"{folder / CONFIG}: architectures is {names}; expected a class")
    config = replace(config, source_dtypes=record["source_dtypes"])
    model = abstract_model(names[0], config, Options(dtype=dtype, attention=attention))
    graphdef, params = nnx.split(model)
    check_same(folder, record["arrays"], describe(params))
    model = nnx.merge(graphdef, _restore(folder / PARAMS, params, record["fingerprints"]))
    with_provenance(model, read_provenance(folder))
    has_tokenizer = (folder / TOKENIZER_FILES[0]).exists()
    return model, pretrained.read_tokenizer(folder) if has_tokenizer else None


def is_model(folder: Path) -> bool:
    """Tell whether a folder is one that `save_model` wrote."""
    return (folder / MODEL_RECORD).is_file()


def saved_tensors(folder: Path) -> dict[str, np.ndarray] | None:
    """Return the parameters of a checkpoint as tensors of a Hugging Face folder.

    `folder` is what `save_model` wrote, one step of `Checkpoints`, or a folder of steps or a run
    (then the newest step counts); None for anything else. The dtypes are those of the files the
    model was loaded from, if they are known. Raises `InputError` for damaged files.
    """
    folder = expand_home(folder).absolute()
    if is_model(folder):
        record = _read_record(folder)
        tensors = layout.to_hf_tensors(_restore(folder / PARAMS, None, record["fingerprints"]))
        dtypes = record["source_dtypes"]
        if pretrained.DECODER in dtypes:
            tensors.setdefault(pretrained.DECODER, tensors[pretrained.EMBEDDING])
        return {name: x.astype(dtypes.get(name, x.dtype)) for name, x in tensors.items()}
    for parent in (folder, folder / "checkpoints"):
        steps = [int(entry.name) for entry in parent.glob("*") if entry.name.isdecimal()]
        if steps and not (parent / STATE).is_dir():
            folder = parent / str(max(steps))
            break
    if not (folder / STATE).is_dir():
        return None
    record = read_json(folder / RECORD, "metadata")
    state = _restore(folder / STATE, None, record.get("fingerprints"))
    if not isinstance(state, Mapping) or "params" not in state:
        raise InputError(f"{folder}: holds a state without params; give a training run's folder")
    return layout.to_hf_tensors(state["params"])


def _read_record(folder: Path) -> dict[str, Any]:
    record = read_json(folder, MODEL_RECORD)
    tables = [record.get(key) for key in ("source_dtypes", "arrays", "fingerprints")]
    known = set(pretrained.DTYPES.values())
    if record.get("format") != MODEL_FORMAT or not all(isinstance(t, dict) for t in tables):
        raise InputError(f"{folder / MODEL_RECORD}: is not a record of format {MODEL_FORMAT}")
    if not known.issuperset(map(str, record["source_dtypes"].values())):
        raise InputError(f"{folder / MODEL_RECORD}: expected dtypes {', '.join(sorted(known))}")
    return record


def _restore(folder: Path, abstract: Any, expected: Mapping[str, int] | None) -> Any:
    """Return the arrays of a folder, all on one device; None restores whatever tree is there."""
    check_name(folder)
    advice = "make the checkpoint again with to-jax"
    if folder.name == STATE:
        advice = "it is the state of a training run; give the export folder of the run instead"
    device = SingleDeviceSharding(jax.devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            if abstract is None:
                tree = checkpointer.metadata(folder).item_metadata
                abstract = getattr(tree, "tree", tree)
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract
            )
            restored = checkpointer.restore(folder, shapes)
        if expected is not None:
            verify(restored, expected)
        return restored
    except Exception as error:
        raise InputError(f"{folder}: is damaged ({reason_of(error)}); {advice}") from error
