"""Convert a model between a Hugging Face folder and an Orbax checkpoint, and compare models."""

import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mlmjax.errors import InputError, install_advice
from mlmjax.model.modernbert import Model, ModernBertModel, parameters
from mlmjax.storage import (
    CLASSIFIER,
    CONFIG,
    DECIDER,
    TOKENIZER_FILES,
    expand_home,
    plain_file,
    read_json,
)
from mlmjax.weights import hub, pretrained
from mlmjax.weights.adapters import is_adapter
from mlmjax.weights.model_checkpoint import (
    MODEL_RECORD,
    is_model,
    load_model,
    save_model,
    saved_tensors,
)
from mlmjax.weights.tensors.tensor_files import Weights

Tensors = dict[str, Callable[[], np.ndarray]]
"""How to read each tensor of a folder, by its Hugging Face name."""
TOLERANCE = 1e-3
"""The largest difference of logits, as a share of the largest logit, between equal models."""


class Difference(NamedTuple):
    """How two models differ: a line for each difference, the largest one, tensors compared."""

    lines: list[str]
    largest: str
    tensors: int


def to_jax(source: str, target: Path) -> int:
    """Write a Hugging Face folder (or hub id) as an Orbax checkpoint.

    Returns the number of its parameters. Raises `InputError` and `RunError` as `load_pretrained`
    and `save_model`.
    """
    folder = hub.fetch(source)
    if is_model(folder):
        raise InputError(f"{folder}: is an Orbax checkpoint already; give a Hugging Face folder")
    if is_adapter(folder):
        raise InputError(
            f"{folder}: is an adapter, which has no weights of its own; save it with its base as a "
            "model first: mlmjax.save_pretrained(*mlmjax.load_pretrained(FOLDER), NEW_FOLDER)"
        )
    model = pretrained.read_model(folder)
    save_model(target, model, _tokenizer(folder, model), more_files=_settings(folder))
    return len(parameters(model))


def to_hf(source: Path, target: Path) -> int:
    """Write an Orbax checkpoint as a Hugging Face folder, each tensor in its old dtype.

    Returns the number of its parameters. Raises as `load_model` and `save_pretrained`.
    """
    if not is_model(source):
        raise InputError(
            f"{source}: is no checkpoint that to-jax wrote (it has no {MODEL_RECORD}); "
            "a training run exports its model itself, to export/"
        )
    model, _ = load_model(source)
    tokenizer, more = _tokenizer(source, model), _settings(source)
    pretrained.save_pretrained(model, tokenizer, target, dtype="source", more_files=more)
    return len(parameters(model))


def check(first: str | Path, second: str | Path) -> Difference:
    """Compare two models of either kind, tensor by tensor.

    Either is a folder, the packaged model or a hub id. Raises `InputError` as `hub.fetch`.
    """
    folders = [hub.fetch(one) for one in (first, second)]
    with ExitStack() as stack:
        a, b = (_open_tensors(folder, stack) for folder in folders)
        tensors = len(a)
        for mine, other in ((a, b), (b, a)):
            # A tied decoder may be stored or left out; either way it is the embedding.
            if pretrained.DECODER in other and pretrained.EMBEDDING in mine:
                mine.setdefault(pretrained.DECODER, mine[pretrained.EMBEDDING])
        return Difference(*_compare(a, b), tensors)


def check_torch(first: str | Path, second: str | Path | None = None) -> Difference:
    """Compare the logits of a model here with those of transformers, on fixed random tokens.

    An encoder has none, and is compared by its last hidden states.

    `first` runs here and `second` (default: the same) there. Either is a Hugging Face folder, a hub
    id or what `to_jax` wrote. Raises `InputError` where torch or transformers is not installed.
    """
    torch, transformers = _oracles()
    with _hf_folder(first) as folder:
        model = pretrained.read_model(folder)
    with _hf_folder(first if second is None else second) as folder:
        auto = getattr(transformers, type(model).__name__)
        theirs = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids, mask = _random_tokens(model)
    kind = type(model)
    call = kind.encode if kind is ModernBertModel else kind.__call__
    found = np.asarray(jax.jit(call)(model, ids, mask))
    with torch.no_grad():
        out = theirs.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask))
    outputs = out.last_hidden_state if kind is ModernBertModel else out.logits
    expected = outputs.float().numpy()
    if found.shape != expected.shape:
        lines = [f"logits: shape {list(found.shape)} here, {list(expected.shape)} in transformers"]
        return Difference(lines, "largest difference of logits inf", 1)
    if found.ndim == 3:  # what stands at padding has no meaning
        found, expected = found[mask == 1], expected[mask == 1]
    gap, scale = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    largest = f"largest difference of logits {gap:g}, of logits up to {scale:g}"
    is_same = gap <= TOLERANCE * max(scale, 1.0)  # a NaN is not
    return Difference([] if is_same else ["logits: differ"], largest, 1)


def _oracles() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise InputError(
            f"--against-torch: {error.name} is not installed; the comparison runs the model in "
            f"transformers; {install_advice('oracle')}"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


@contextmanager
def _hf_folder(source: str | Path) -> Iterator[Path]:
    """Yield a Hugging Face folder of a model of either kind, or of a hub id."""
    if not is_model(expand_home(source)):
        yield hub.fetch(source)
        return
    with tempfile.TemporaryDirectory() as parent:
        to_hf(expand_home(source), Path(parent) / "model")
        yield Path(parent) / "model"


def _random_tokens(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and a mask: two rows longer than the local window, the second one shorter."""
    config, rng = model.config, np.random.default_rng(0)
    width = min(config.max_position_embeddings, 2 * config.local_attention + 16)
    ids = rng.integers(0, config.vocab_size, (2, width)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, width - width // 4 :] = 0
    return ids, mask


def _open_tensors(folder: Path, stack: ExitStack) -> Tensors:
    if (saved := saved_tensors(folder)) is not None:
        return {name: partial(saved.__getitem__, name) for name in saved}
    weights = stack.enter_context(Weights(folder))
    if weights.problems:
        raise InputError(f"{folder}: {weights.problems[0]}", weights.problems[1:])
    names = (name for name in weights.headers if not pretrained.DERIVED.fullmatch(name))
    return {name: partial(weights.read, name) for name in names}


def _compare(first: Tensors, second: Tensors) -> tuple[list[str], str]:
    """Return one line per tensor that differs, and a line on the largest difference."""
    lines, largest, where = list(_one_sided(first, second)), 0.0, ""
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name](), second[name]()
        if a.shape != b.shape:
            lines.append(f"{name}: shape {list(a.shape)} in A, {list(b.shape)} in B")
            continue
        if a.dtype == b.dtype and a.tobytes() == b.tobytes():
            continue
        difference, index = _largest_difference(a, b)
        dtypes = "" if a.dtype == b.dtype else f" ({a.dtype} in A, {b.dtype} in B)"
        lines.append(f"{name}: differs by up to {difference:g}{dtypes}")
        if difference > largest:
            place = ", ".join(map(str, index))
            largest, where = difference, f" at {name}[{place}]: {a[index]} in A, {b[index]} in B"
    return lines, f"largest difference {largest:g}{where}"


def _one_sided(first: Collection[str], second: Collection[str]) -> Iterator[str]:
    """Yield a line for each name that only one side has, first some of each side."""
    sides = [("A", sorted({*first} - {*second})), ("B", sorted({*second} - {*first}))]
    for part in (slice(pretrained.NAMES), slice(pretrained.NAMES, None)):
        for side, names in sides:
            yield from (f"{name}: only in {side}" for name in names[part])


def _largest_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """Return the largest |a - b| and its index; a NaN on one side only counts as infinite."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    gap = np.where(np.isnan(gap), np.inf, gap)
    if not gap.size:
        return 0.0, ()
    index = np.unravel_index(int(gap.argmax()), gap.shape)
    return float(gap[index]), tuple(int(i) for i in index)


def _tokenizer(folder: Path, model: Model) -> Any:
    if not os.path.lexists(folder / TOKENIZER_FILES[0]):
        return None
    tokenizer = pretrained.read_tokenizer(folder)
    pretrained.check_tokenizer(folder, model.config, read_json(folder, CONFIG), tokenizer)
    return tokenizer


def _settings(folder: Path) -> dict[str, bytes]:
    """Return the settings of a classifier or decider, which are part of it, by their files."""
    names = (CLASSIFIER, DECIDER)
    found = [name for name in names if os.path.lexists(folder / name)]
    return {name: plain_file(folder, name).read_bytes() for name in found}
