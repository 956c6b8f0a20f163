"""Find the masker and the loss that a run names: those of this package, and code of one's own."""

import importlib
import inspect
import sys
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlmjax.config.run import ObjectiveConfig, is_code
from mlmjax.data.batch import MLM, PADDING_SEGMENT, UNUSED, Batch
from mlmjax.data.masking.maskers import Masker, make_masker
from mlmjax.data.preparing.mask_tables import read_mask_table
from mlmjax.errors import InputError, RunError, first_line
from mlmjax.storage import hash_file
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.loss import Metrics
from mlmjax.training.step import Head, Loss, head_of, target_evaluation


def check_code(objective: ObjectiveConfig, allowed: Collection[str]) -> None:
    """Raise `InputError` for code in a run file that the person who runs it has not named.

    `allowed` are names of modules, such as `my_package.masks`.
    """
    for name in objective.code:
        module = name.partition(":")[0]
        if module not in allowed:
            key = "masking" if name == objective.masking else "loss"
            raise InputError(
                f"objective.{key}: {name} is code, which runs only if you name its module; read "
                f"it, then give --code {module}"
            )


def find_code(name: str) -> Callable[..., Any]:
    """Import `package.module:function`, also from the working directory; return the function.

    Raises `InputError` if there is no such module or function, or if importing it fails.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that nothing there replaces a package
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise InputError(
            f"{name}: cannot be imported ({type(error).__name__}: {first_line(error)}); expected a "
            f"module {module} in the working directory or in an installed package, with a function "
            f"{function}"
        ) from error
    if not callable(found):
        raise InputError(f"{name}: is {type(found).__name__}; expected a function")
    return found


def hash_files(objective: ObjectiveConfig) -> dict[str, str]:
    """Return the SHA-256 of the table of a run, and of the file of each function of one's own."""
    files = {name: Path(inspect.getfile(find_code(name))) for name in objective.code}
    if objective.mask_table is not None:
        files["mask_table"] = Path(objective.mask_table)
    return {name: hash_file(path) for name, path in files.items()}


def masker_of(objective: ObjectiveConfig, tokenizer: Tokenizer) -> Masker:
    """Return the masker of a run, with its table; code of one's own is called with the tokenizer.

    Raises `InputError` as `find_code` and `read_mask_table`.
    """
    name = objective.masking
    if is_code(name):
        return _checked(name, _made(name, tokenizer))
    table = (
        None if objective.mask_table is None else read_mask_table(objective.mask_table, tokenizer)
    )
    return make_masker(name, tokenizer, table)


def head_of_run(head: str, objective: ObjectiveConfig, tokenizer: Tokenizer) -> Head:
    """Return the loss of a run, and its validation; code of one's own is called with the tokenizer.

    The validation of another loss than cross-entropy has all figures of cross-entropy except the
    loss itself.
    """
    if objective.loss == "cross_entropy":
        found = head_of(head, objective.kind)
    else:
        found = _head_of_loss(objective.loss, tokenizer)
    return _with_tokens(found) if objective.masking == "loss" else found


@lru_cache(8)  # so that runs of one process share compiled steps
def _head_of_loss(name: str, tokenizer: Tokenizer) -> Head:
    loss: Loss = _made(name, tokenizer) if is_code(name) else replaced_tokens(tokenizer)

    def evaluate(model: Any, batch: Batch) -> Metrics:
        _, own = loss(model, batch)
        of_loss = {key: own[key] for key in ("loss_sum", "loss_count")}
        return own | target_evaluation(model, batch) | of_loss

    return Head(loss, evaluate)


@lru_cache(8)
def _with_tokens(head: Head) -> Head:
    """Add to a validation the tokens that MLM predicts (others: `UNUSED`), and their weights."""

    def evaluate(model: Any, batch: Batch) -> Metrics:
        is_mlm = (batch.target_ids >= 0) & (batch.target_objective == MLM)
        weights = 1.0 if batch.weights is None else batch.weights
        return head.evaluate(model, batch) | {
            "mlm_ids": jnp.where(is_mlm, batch.target_ids, UNUSED),
            "mlm_weights": jnp.where(is_mlm, weights, 0.0),
        }

    return Head(head.loss, evaluate)


def _made(name: str, tokenizer: Tokenizer) -> Any:
    """Call a function of one's own with the tokenizer; return the function that it makes."""
    found = _guarded(name, find_code(name))(tokenizer)
    if not callable(found):
        raise InputError(
            f"{name}: returned {type(found).__name__} for a tokenizer; expected a function"
        )
    return _guarded(name, found)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Name the function whose code raises an error."""

    def call(*given: Any) -> Any:
        try:
            return function(*given)
        except (InputError, RunError):
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise RunError(f"{name}: raised {what}; --debug shows where") from error

    return call


def _checked(name: str, masker: Masker) -> Masker:
    """Check that a masker returns what `data.masking.maskers` expects."""

    def draw(
        ids: np.ndarray, maskable: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        found = np.asarray(masker(ids.copy(), maskable.copy(), count, rng))
        is_whole = found.ndim == 1 and found.dtype.kind in "iu" and len(found) == count
        if not is_whole or np.isin(np.unique(found), maskable).sum() != count:
            shown = f"{found.tolist()!r:.100}"
            raise InputError(
                f"{name}: returned {shown}; expected {count} different positions of the "
                f"{len(maskable)} in maskable"
            )
        return np.sort(found).astype(np.int32)

    return draw


def replaced_tokens(tokenizer: Tokenizer) -> Loss:
    """Return the loss of finding random tokens (Di Liello et al. 2022, arXiv 2210.13536).

    Every token counts that is not special. The logit of `[MASK]` at its place is that of the
    hypothesis that the token was replaced, so the model needs no other head.
    """
    is_special = np.zeros(tokenizer.vocab_size, bool)
    is_special[list(tokenizer.special_ids)] = True
    mask_id = np.array([tokenizer.mask_id])

    def loss(model: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        hidden = model.encode(batch.input_ids, batch.segment_ids, batch.position_ids)
        logits = model.mlm_logits(hidden, vocabulary_ids=mask_id)[..., 0]
        ids = jnp.asarray(batch.input_ids)
        rows = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
        # A target that is unused has a position outside the row, and is dropped.
        places = jnp.where(batch.target_ids >= 0, batch.target_positions, ids.shape[1])
        originals = ids.at[rows, places].set(batch.target_ids, mode="drop")
        counts = (batch.segment_ids != PADDING_SEGMENT) & ~jnp.asarray(is_special)[originals]
        is_replaced = (originals != ids).astype(jnp.float32)
        losses = optax.sigmoid_binary_cross_entropy(logits, is_replaced)
        metrics = {
            "loss_sum": jnp.sum(jnp.where(counts, losses, 0.0)),
            "loss_count": jnp.sum(counts, dtype=jnp.int32).astype(jnp.float32),
        }
        return metrics["loss_sum"], metrics

    return loss
