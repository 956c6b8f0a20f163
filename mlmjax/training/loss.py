"""Compute cross-entropy as a pair (sum, count); the head runs on the targets only."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mlmjax.data.batch import OBJECTIVES, UNUSED, Batch, LabelBatch, Options
from mlmjax.parallel.sharding import batch_shards, constrain, mesh_sizes, platform

# Targets whose logits exist at one time on each device. A CPU reuses the buffers of a small chunk,
# but allocates those of a large one again each time, which is 1.5 times slower. An accelerator
# needs few, large products; 1024 x 50368 float32 logits are 206 MB.
CHUNK = {"cpu": 128}
CHUNK_ACCELERATOR = 1024
Metrics = dict[str, jax.Array]
Logits = Callable[..., jax.Array]
LossKind = Literal["vocabulary", "labels", "ranked"]
"""What the loss of a target with options is; see `target_losses`."""


def summarize(loss_sum: jax.Array, losses: jax.Array, correct: jax.Array, batch: Batch) -> Metrics:
    """Return the metrics of what `target_losses` returned, float32; without targets all are 0.

    They are `loss_sum`, `loss_count` and, for each of `atp`, `dummy`, `mlm`, `_loss_sum`, `_count`
    and `_correct`. Every target counts as much as its weight.
    """
    is_target, weights = batch.target_ids >= 0, batch.weights
    metrics = {"loss_sum": loss_sum, "loss_count": _count(is_target, weights)}
    for number, name in enumerate(OBJECTIVES):
        mine = is_target & (batch.target_objective == number)
        metrics[f"{name}_loss_sum"] = jnp.sum(jnp.where(mine, losses, 0.0))
        metrics[f"{name}_count"] = _count(mine, weights)
        metrics[f"{name}_correct"] = _count(mine & correct, weights)
    return metrics


class Targets(NamedTuple):
    """The targets of each group of rows, moved to the front: `[groups, length]` each."""

    ids: jax.Array
    weights: jax.Array | None
    options: Options | None


def target_losses(
    model: Any, hidden: jax.Array, batch: Batch, kind: LossKind = "vocabulary"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the loss sum, and for each target its loss times weight and whether it was predicted.

    `hidden` is `[batch, seq, hidden]` from `model.encode`; `model.mlm_logits` maps its last axis to
    the vocabulary. Shapes: `[]`, `[batch, targets]` float32 (0 for unused targets),
    `[batch, targets]` bool. Gradients flow only through the sum.

    The targets of the rows on one device are moved to the front, so the head runs over chunks of
    real targets, not over the width that a row could need. No target is dropped.

    `kind` is the loss of targets with options. "vocabulary" is cross-entropy under the softmax over
    the vocabulary, and "labels" under that over the options. "ranked" is the ranked probability
    score of ordered options: the squares of the differences of the cumulative probabilities, summed
    and divided by their number less one (Epstein 1969). A distribution that has all probability at
    one option has the loss and gradient of that token as a target.
    """
    groups = batch_shards(mesh_sizes())
    rows, seq, size = hidden.shape
    width = batch.target_ids.shape[1]
    length = rows // groups * width
    chunk = min(CHUNK.get(platform(), CHUNK_ACCELERATOR), length)

    row = jnp.arange(rows, dtype=jnp.int32).reshape(groups, rows // groups, 1) % (rows // groups)
    places = row * seq + batch.target_positions.reshape(groups, rows // groups, width)
    is_target = batch.target_ids.reshape(groups, length) >= 0
    # The number of each target in its group; counting compiles far faster than sorting.
    rank = jnp.cumsum(is_target, axis=1, dtype=jnp.int32) - 1
    full = length + -length % chunk
    slot = jnp.where(is_target, rank, full)
    group = jnp.arange(groups, dtype=jnp.int32)[:, None]

    def to_front(values: Any, unused: float) -> Any:
        if values is None:
            return None
        values = jnp.asarray(values)
        rest = values.shape[2:]
        empty = jnp.full((groups, full, *rest), unused, values.dtype)
        return empty.at[group, slot].set(values.reshape(groups, length, *rest), mode="drop")

    options = batch.options
    targets = Targets(
        to_front(batch.target_ids, UNUSED),
        to_front(batch.weights, 0.0),
        options and Options(to_front(options.ids, UNUSED), to_front(options.probs, 0.0)),
    )
    flat = constrain(hidden.reshape(groups, -1, size), "batch", None, None)
    gathered = jnp.take_along_axis(
        flat, to_front(places.reshape(rows, width), 0)[:, :, None], axis=1
    )

    example = jax.ShapeDtypeStruct((groups, chunk, size), gathered.dtype)
    logits_of, consts = jax.closure_convert(model.mlm_logits, example)
    loss_sum, losses, correct = _sum_over_chunks(logits_of, chunk, kind, consts, gathered, targets)

    def to_place(values: jax.Array) -> jax.Array:
        own = jnp.take_along_axis(values, jnp.maximum(rank, 0), axis=1)
        return (is_target.astype(values.dtype) * own).reshape(rows, width)

    losses, correct = to_place(losses), to_place(correct)
    return loss_sum, jax.lax.stop_gradient(losses), correct


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sum_over_chunks(
    logits_of: Logits,
    chunk: int,
    kind: LossKind,
    consts: Sequence[jax.Array],
    hidden: jax.Array,
    targets: Targets,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the loss of each target, chunk by chunk; `hidden` is `[groups, length, hidden]`."""

    def body(index: jax.Array, carry: Any) -> Any:
        h, target = _chunk_at(index, chunk, (hidden, targets))
        loss, correct, _ = _cross_entropy(logits_of(h, *consts), target, kind)
        return _put(carry, (loss, correct), index, chunk)

    ids = targets.ids
    losses, correct = jax.lax.fori_loop(0, _used_chunks(ids, chunk), body, _empty(ids))
    return jnp.sum(losses), losses, correct


def _forward(
    logits_of: Logits,
    chunk: int,
    kind: LossKind,
    consts: Sequence[jax.Array],
    hidden: jax.Array,
    targets: Targets,
) -> tuple[Any, Any]:
    # The logits of a chunk give the sum's gradient up to one factor. So both products of the
    # backward pass are computed here, and the logits only once.
    def body(index: jax.Array, carry: Any) -> Any:
        values, grad_consts, grad_hidden = carry
        h, target = _chunk_at(index, chunk, (hidden, targets))
        logits, pull_back = jax.vjp(logits_of, h, *consts)
        loss, correct, grad_logits = _cross_entropy(logits, target, kind)
        grad_h, *grads = pull_back(grad_logits.astype(logits.dtype))
        return (
            _put(values, (loss, correct), index, chunk),
            [total + grad for total, grad in zip(grad_consts, grads, strict=True)],
            jax.lax.dynamic_update_slice_in_dim(grad_hidden, grad_h, index * chunk, axis=1),
        )

    ids = targets.ids
    start = (_empty(ids), [jnp.zeros_like(c) for c in consts], jnp.zeros_like(hidden))
    (losses, correct), grad_consts, grad_hidden = jax.lax.fori_loop(
        0, _used_chunks(ids, chunk), body, start
    )
    return (jnp.sum(losses), losses, correct), (grad_consts, grad_hidden)


def _backward(
    logits_of: Logits, chunk: int, kind: LossKind, residuals: Any, cotangents: Any
) -> Any:
    scale = cotangents[0]
    grad_consts, grad_hidden = jax.tree.map(lambda g: g * scale.astype(g.dtype), residuals)
    return grad_consts, grad_hidden, None


_sum_over_chunks.defvjp(_forward, _backward)


def _cross_entropy(
    logits: jax.Array, targets: Targets, kind: LossKind
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the loss, whether the target is the prediction, and the gradient of the logits.

    `logits` is `[groups, chunk, vocab]`, `targets` are `[groups, chunk]`; a negative target is
    unused, and its results are 0. Everything is float32. Of equal logits the smallest id is
    predicted; with options and a loss over them, it is predicted among them.
    """
    logits = constrain(logits.astype(jnp.float32), "batch", None, "tensor")
    target, weights, options = targets
    used = target >= 0
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    at_target = vocabulary == target[:, :, None]
    chosen = jnp.sum(jnp.where(at_target, logits, 0.0), axis=2)
    ahead = (logits > chosen[:, :, None]) | (
        (logits == chosen[:, :, None]) & (vocabulary < target[:, :, None])
    )
    is_best = ~jnp.any(ahead, axis=2)
    if options is None or kind == "vocabulary":
        largest = jnp.max(logits, axis=2)
        normalizer = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[:, :, None]), axis=2))
        gradient = jnp.exp(logits - normalizer[:, :, None])
    if options is None:
        loss, gradient = normalizer - chosen, gradient - at_target.astype(jnp.float32)
    else:
        picked = jnp.take_along_axis(logits, jnp.maximum(options.ids, 0), axis=2)
        if kind == "vocabulary":
            loss = normalizer - jnp.sum(options.probs * picked, axis=2)
            change = -options.probs
        else:
            loss, change = _over_options(picked, options, kind)
            gradient = jnp.zeros_like(logits)
            rivals = (options.ids >= 0) & (picked > chosen[:, :, None])
            is_best = ~jnp.any(rivals, axis=2)
        gradient = _add_at(gradient, options.ids, change)
    loss = jnp.where(used, loss, 0.0)
    correct = used & jnp.isfinite(loss) & is_best
    gradient = jnp.where(used[:, :, None], gradient, 0.0)
    if weights is not None:
        loss, gradient = loss * weights, gradient * weights[:, :, None]
    return loss, correct, gradient


def _over_options(
    picked: jax.Array, options: Options, kind: LossKind
) -> tuple[jax.Array, jax.Array]:
    """Return a loss over options and its gradient; `picked` are their logits."""
    is_option = options.ids >= 0

    def total(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = option_losses(logits, options.probs, is_option, kind)
        return jnp.sum(losses), losses

    gradient, losses = jax.grad(total, has_aux=True)(picked)
    return losses, gradient


def option_losses(
    logits: jax.Array, probs: jax.Array, is_option: jax.Array, kind: LossKind
) -> jax.Array:
    """Return the losses `[...]` of logits and right distributions `[..., options]`.

    Without any option a loss is 0. `kind` is that of `target_losses`.
    """
    lowest = jnp.finfo(logits.dtype).min / 2
    log_probs = jax.nn.log_softmax(jnp.where(is_option, logits, lowest))
    if kind != "ranked":
        return -jnp.sum(jnp.where(is_option, probs * log_probs, 0.0), axis=-1)
    ahead = jnp.cumsum(jnp.where(is_option, jnp.exp(log_probs) - probs, 0.0), axis=-1)
    steps = jnp.maximum(jnp.sum(is_option, axis=-1) - 1, 1).astype(logits.dtype)
    return jnp.sum(jnp.where(is_option, ahead**2, 0.0), axis=-1) / steps


def _add_at(gradient: jax.Array, ids: jax.Array, change: jax.Array) -> jax.Array:
    """Add changes `[groups, chunk, options]` to a gradient at the tokens of the options."""
    groups, chunk, _ = ids.shape
    group = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    place = jnp.arange(chunk, dtype=jnp.int32)[None, :, None]
    return gradient.at[group, place, jnp.maximum(ids, 0)].add(jnp.where(ids >= 0, change, 0.0))


def _used_chunks(ids: jax.Array, chunk: int) -> jax.Array:
    most = jnp.max(jnp.sum(ids >= 0, axis=1))
    return (most + chunk - 1) // chunk


def _chunk_at(index: jax.Array, chunk: int, arrays: Any) -> Any:
    def cut(array: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array, index * chunk, chunk, axis=1)

    return jax.tree.map(cut, arrays)


def _empty(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros(ids.shape, jnp.float32), jnp.zeros(ids.shape, bool)


def _put(carry: Any, values: Any, index: jax.Array, chunk: int) -> Any:
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(all_, value, index * chunk, axis=1)
        for all_, value in zip(carry, values, strict=True)
    )


def _count(mask: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    if weights is not None:
        return jnp.sum(jnp.where(mask, weights, 0.0))
    # Counted in integers: float32 sums are exact only while partial sums stay below 2**24.
    return jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32)


def label_loss(
    model: Any, batch: LabelBatch, kind: LossKind = "labels"
) -> tuple[jax.Array, Metrics]:
    """Sum the loss of `label_evaluation` over the texts: `(loss_sum, metrics)`."""
    metrics = label_evaluation(model, batch, kind)
    del metrics["logits"]
    return metrics["loss_sum"], metrics


def label_evaluation(model: Any, batch: LabelBatch, kind: LossKind = "labels") -> Metrics:
    """Return `loss_sum` and `loss_count` over labelled texts, and `logits` `[texts, labels]`.

    A model of several labels has cross-entropy, `label_count` and `label_correct`; one of a single
    label has squared error. Both are as in transformers. With `kind` "ranked" the labels are
    ordered, and the loss is that of `target_losses`.
    """
    given = jnp.asarray(batch.labels)
    segments = given.shape[1] if given.ndim == 2 else None
    logits = model(batch.input_ids, batch.segment_ids, segments=segments)
    logits, given = logits.reshape(given.size, logits.shape[-1]), given.reshape(-1)
    used = ~jnp.isnan(given)
    weights = None if batch.weights is None else jnp.asarray(batch.weights).reshape(-1)
    labels = jnp.where(used, given, 0.0)
    count = _count(used, weights)
    more: Metrics = {}
    if logits.shape[1] == 1:
        losses = jnp.square(logits[:, 0] - labels)
    else:
        numbers = labels.astype(jnp.int32)
        losses = _class_losses(logits, numbers, batch.probs, kind)
        correct = used & (jnp.argmax(logits, axis=1) == numbers)
        more = {"label_count": count, "label_correct": _count(correct, weights)}
    losses = jnp.where(used, losses, 0.0)
    loss_sum = jnp.sum(losses if weights is None else losses * weights)
    return {"loss_sum": loss_sum, "loss_count": count, **more, "logits": logits}


def _class_losses(
    logits: jax.Array, numbers: jax.Array, probs: jax.Array | None, kind: LossKind
) -> jax.Array:
    """Return the losses of logits `[texts, classes]` for classes or distributions over them."""
    if probs is None and kind != "ranked":
        chosen = jnp.take_along_axis(logits, numbers[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - chosen
    if probs is None:
        probs = jax.nn.one_hot(numbers, logits.shape[1], dtype=logits.dtype)
    probs = jnp.asarray(probs).reshape(logits.shape)
    return option_losses(logits, probs, jnp.ones(logits.shape, bool), kind)
