"""Fine-tuning in memory: one prompt per row, its answer at the slot or by a classification head."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mlmjax.config import OptimizerConfig, ScheduleConfig, decode
from mlmjax.data.batch import ATP, UNUSED, Batch, LabelBatch
from mlmjax.engine import local_mesh
from mlmjax.errors import RunError
from mlmjax.heads import label_loss
from mlmjax.hf import Model
from mlmjax.modernbert import ModernBertForSequenceClassification
from mlmjax.optim import decay_mask, make_schedule
from mlmjax.prompts import Prompt
from mlmjax.step import TrainState, create_train_state, make_train_step, masked_token_loss


def fine_tune(
    model: Model,
    prompts: Sequence[Prompt],
    answers: np.ndarray,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    weight_decay: float,
    warmup: float,
    seed: int,
    buckets: Sequence[int],
    pad_id: int,
    after_epoch: Callable[[Model, float], bool | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Return a copy of the model, trained to give `answers` to the prompts.

    Answers are token ids at the prompts' slots; of a classification model, whose prompts have no
    slot, they are numbers of labels. Batches are cut over the local devices. AdamW under a linear
    schedule; the order of epoch e is that of `default_rng([seed, e])`. `after_epoch` gets the model
    so far (good until it returns) and the epoch's mean loss, and ends the training by returning
    True. Raises `RunError` when the loss is no longer finite.
    """
    has_head = isinstance(model, ModernBertForSequenceClassification)
    updates = epochs * -(-len(prompts) // batch_size)
    optimizer = decode(
        OptimizerConfig, {"learning_rate": learning_rate, "weight_decay": weight_decay}, "fit"
    )
    schedule = decode(ScheduleConfig, {"name": "linear", "warmup": warmup}, "fit")
    rate = make_schedule(schedule, learning_rate, updates)
    update = _update(optimizer.model_copy(update={"learning_rate": 0.0, "weight_decay": 0.0}))
    mesh = local_mesh(batch_size)
    graphdef, state = create_train_state(model, update, mesh=mesh if mesh.size > 1 else None)
    step = _step(graphdef, update, has_head)
    layout = label_batch if has_head else answer_batch
    done = 0
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        sums = []
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            batch = layout(
                [prompts[i] for i in members],
                answers[members],
                rows=batch_size,
                buckets=buckets,
                pad_id=pad_id,
            )
            rates = {"learning_rate": rate(done), "weight_decay": weight_decay}
            state, metrics = step(_with_rates(state, rates), batch)
            sums.append([metrics[name] for name in ("loss_sum", "loss_count", "update_norm")])
            done += 1
            if progress:
                progress(done, updates)
        loss_sum, count, moved = np.sum(jax.device_get(sums), axis=0)
        # The last update shows in no loss, but in its own size.
        if not np.isfinite(loss_sum + moved):
            raise RunError(
                f"fit: the loss of epoch {epoch + 1} is not finite; give a lower learning_rate"
            )
        if after_epoch and after_epoch(nnx.merge(graphdef, state.params), float(loss_sum / count)):
            break
    return nnx.merge(graphdef, state.params)


@lru_cache(maxsize=8)
def _update(optimizer: OptimizerConfig) -> optax.GradientTransformation:
    """Return the optimizer, its rates in its state: other rates are no other program."""

    def make(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(optimizer.clip),
            optax.adamw(
                learning_rate,
                b1=optimizer.b1,
                b2=optimizer.b2,
                eps=optimizer.eps,
                weight_decay=weight_decay,
                mask=decay_mask,
            ),
        )

    made = optax.inject_hyperparams(make)(learning_rate=0.0, weight_decay=0.0)
    assert isinstance(made, optax.GradientTransformation)
    return made


@lru_cache(maxsize=8)
def _step(graphdef: Any, update: optax.GradientTransformation, has_head: bool) -> Any:
    """Return the training step; runs of like models share what is compiled."""
    return make_train_step(graphdef, update, loss=label_loss if has_head else masked_token_loss)


def _with_rates(state: TrainState, rates: Mapping[str, Any]) -> TrainState:
    values = {name: jnp.asarray(value, jnp.float32) for name, value in rates.items()}
    return state._replace(opt_state=state.opt_state._replace(hyperparams=values))


def answer_batch(
    prompts: Sequence[Prompt],
    answers: Sequence[int] | np.ndarray,
    *,
    rows: int,
    buckets: Sequence[int],
    pad_id: int,
) -> Batch:
    """Lay out one prompt per row, its slot being the one target; rows left over are padding.

    `answers` are token ids; the arrays are as long as the smallest bucket that holds all prompts.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    length = next(bucket for bucket in buckets if bucket >= longest)
    batch = Batch(
        input_ids=np.full((rows, length), pad_id, np.int32),
        segment_ids=np.zeros((rows, length), np.int32),
        position_ids=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        target_positions=np.full((rows, 1), UNUSED, np.int32),
        target_ids=np.full((rows, 1), UNUSED, np.int32),
        target_objective=np.full((rows, 1), UNUSED, np.int32),
    )
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        batch.input_ids[row, : len(prompt.ids)] = prompt.ids
        batch.segment_ids[row, : len(prompt.ids)] = 1
        batch.target_positions[row] = prompt.slot
        batch.target_ids[row] = answer
        batch.target_objective[row] = ATP
    return batch


def label_batch(
    prompts: Sequence[Prompt],
    answers: Sequence[int] | np.ndarray,
    *,
    rows: int,
    buckets: Sequence[int],
    pad_id: int,
) -> LabelBatch:
    """Lay out one prompt per row and the number of its label; rows left over are padding."""
    ids, segment_ids, *_ = answer_batch(prompts, answers, rows=rows, buckets=buckets, pad_id=pad_id)
    labels = np.full(rows, np.nan, np.float32)
    labels[: len(prompts)] = answers
    return LabelBatch(ids, segment_ids, labels)
