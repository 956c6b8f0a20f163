"""Fine-tune in memory: packed prompts, for the answer at each slot or for a classification head."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate, chain
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from mlmjax.config.run import OptimizerConfig, ScheduleConfig
from mlmjax.config.tables import decode
from mlmjax.data.batch import ATP, UNUSED, Answers, Batch, LabelBatch, Options
from mlmjax.data.packing import lay_out, pack
from mlmjax.errors import RunError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import Model, ModernBertForSequenceClassification
from mlmjax.parallel.sharding import local_mesh
from mlmjax.reporting.terminal import Progress
from mlmjax.text.prompts import Prompt
from mlmjax.training.adapters import joined, trained_patterns
from mlmjax.training.flops import forward_flops
from mlmjax.training.loss import LossKind
from mlmjax.training.optimizer import (
    averaged_parameters,
    make_schedule,
    make_update,
    rates_at,
)
from mlmjax.training.step import TrainState, create_frozen_state, head_of, shared_train_step

ROWS = (256, 512, 1024)
"""Lengths of packed rows that are tried, in tokens."""

SUMS = {
    False: ("loss_sum", "loss_count", "atp_correct", "update_norm"),
    True: ("loss_sum", "loss_count", "label_correct", "update_norm"),
}
"""The metrics of an update that are kept, without and with a classification head."""


class Epoch(NamedTuple):
    """The mean loss of an epoch, the share of right answers, and the standard error of the loss.

    Each update answers before it learns, with the weights of that moment. `losses` are those of the
    updates, `moved` is the sum of the norms of what they added.
    """

    loss: float
    accuracy: float
    error: float
    losses: Sequence[float]
    moved: float


def fine_tune(
    model: Model,
    prompts: Sequence[Prompt],
    answers: np.ndarray | Answers,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    weight_decay: float,
    warmup: float,
    seed: int,
    pad_id: int,
    accumulate: int = 1,
    layer_decay: float = 1.0,
    ema: float = 0.0,
    kind: LossKind = "vocabulary",
    rates: Sequence[float] | None = None,
    train: Sequence[str] | None = None,
    after_epoch: Callable[[Model, "Epoch"], bool | None] | None = None,
    progress: Progress | None = None,
) -> Model:
    """Return a copy of the model, trained to give `answers` to the prompts.

    Answers are token ids at the prompts' slots. A classification model reads prompts without a
    slot, and its answers are label numbers. `kind` is the loss of answers with options
    (`loss.target_losses`). The prompts of a batch are packed into rows, which are sharded over the
    local devices; all batches have one shape. AdamW runs under a linear schedule, or with `rates`,
    one for each update until they end. The order of epoch e is that of `default_rng([seed, e])`.
    `accumulate` divides the rows of a batch as in `make_train_step`; `layer_decay` and `ema` are
    those of `make_update`, and an average of the parameters is returned in their place. `train` are
    patterns of the parameters to train; a model with an adapter trains that
    (`adapters.trained_patterns`). `after_epoch` gets the model, which is valid until it returns,
    and the epoch's figures; it ends the training by returning True. Raises `RunError` if the loss
    is not finite, unless `rates` are given.
    """
    has_head = isinstance(model, ModernBertForSequenceClassification)
    updates = epochs * -(-len(prompts) // batch_size) if rates is None else len(rates)
    given = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    more = {"layer_decay": layer_decay, "ema": ema}
    decode(OptimizerConfig, {**given, **more, "train": train}, "fit")  # rejects other values
    rate: Any = rates.__getitem__ if rates else _linear(learning_rate, warmup, updates)
    update = _update(layer_decay, ema)
    mesh = local_mesh(batch_size)
    graphdef, state, frozen = create_frozen_state(
        model, update, trained_patterns(model, train), mesh=mesh if mesh.size > 1 else None
    )
    loss = head_of("classification" if has_head else "mlm", kind).loss
    step = shared_train_step(graphdef, update, accumulate=accumulate, loss=loss)
    batches = _batches(len(prompts), epochs, batch_size, seed)
    batch_of = _batch_maker(model, prompts, answers, batches, mesh.size * accumulate, pad_id)
    done = 0
    for epoch, members_of_epoch in enumerate(batches, 1):
        sums = []
        for members in members_of_epoch[: updates - done]:
            state = _with_rates(state, given | {"learning_rate": rates_at(rate, done)})
            state, metrics = step(state, batch_of(members), frozen)
            sums.append([metrics[name] for name in SUMS[has_head]])
            done += 1
            if progress:
                progress(done, updates)
        figures = _figures(np.array(jax.device_get(sums), np.float64))
        if rates is None:
            _check_finite(figures, epoch)
        found = averaged_parameters(state.params, state.opt_state)
        trained: Model = nnx.merge(graphdef, joined(found, frozen))
        if after_epoch and after_epoch(trained, figures):
            break
    return trained


class BestEpoch:
    """The weights of the epoch that is best on held-out texts, kept on the host.

    The best one has the highest accuracy, and of equals the lowest loss. Without `patience` nothing
    is kept.
    """

    def __init__(self, patience: int | None):
        self._patience, self._since = patience, 0
        self._best, self._weights = (-1.0, 0.0), None

    def is_over(self, model: Model, accuracy: float, loss: float) -> bool:
        """Take an epoch; tell whether `patience` of them in a row have not improved."""
        if self._patience is None:
            return False
        self._since += 1
        if (accuracy, -loss) > self._best:
            self._best, self._since = (accuracy, -loss), 0
            self._weights = jax.tree.map(np.array, nnx.split(model)[1])
        return self._since >= self._patience

    def restored(self, model: Model) -> Model:
        """Return the model with the weights that were kept; without any, the model itself."""
        if self._weights is None:
            return model
        found: Model = nnx.merge(nnx.split(model)[0], jax.device_put(self._weights))
        return found


def _linear(learning_rate: float, warmup: float, updates: int) -> optax.Schedule:
    schedule = decode(ScheduleConfig, {"name": "linear", "warmup": warmup}, "fit")
    return make_schedule(schedule, learning_rate, updates)


def _batches(count: int, epochs: int, batch_size: int, seed: int) -> list[list[np.ndarray]]:
    """Return the numbers of the prompts of each batch of each epoch."""
    orders = [np.random.default_rng([seed, epoch]).permutation(count) for epoch in range(epochs)]
    starts = range(0, count, batch_size)
    return [[order[start : start + batch_size] for start in starts] for order in orders]


def _batch_maker(
    model: Model,
    prompts: Sequence[Prompt],
    answers: np.ndarray | Answers,
    batches: Sequence[Sequence[np.ndarray]],
    parts: int,
    pad_id: int,
) -> Callable[[np.ndarray], Batch | LabelBatch]:
    """Return the function that packs the prompts of these numbers, all batches in one shape."""
    lengths = [[len(prompts[i].ids) for i in members] for members in chain(*batches)]
    shape = common_shape(lengths, model.config, parts)
    wanted = answers if isinstance(answers, Answers) else Answers(np.asarray(answers))
    has_head = isinstance(model, ModernBertForSequenceClassification)
    make: Callable[..., Batch | LabelBatch] = label_batch if has_head else answer_batch

    def batch_of(members: np.ndarray) -> Batch | LabelBatch:
        shown = [prompts[i] for i in members]
        return make(shown, wanted.take(members), shape=shape, pad_id=pad_id)

    return batch_of


def _with_rates(state: TrainState, rates: Mapping[str, Any]) -> TrainState:
    """Return the state with other rates of `_update`, on the same devices."""
    values: Any = {name: np.float32(value) for name, value in rates.items()}
    where = {name: state.opt_state.hyperparams[name].sharding for name in rates}
    rated = state.opt_state._replace(hyperparams=jax.device_put(values, where))
    return state._replace(opt_state=rated)


def _check_finite(figures: Epoch, epoch: int) -> None:
    """Raise `RunError` if an epoch diverged."""
    # No loss shows what the last update did; its norm does.
    if not np.isfinite(figures.loss + figures.moved):
        raise RunError(f"fit: the loss of epoch {epoch} is not finite; give a lower learning_rate")


def _figures(sums: np.ndarray) -> Epoch:
    """Return the figures of an epoch from the `SUMS` of its updates."""
    loss, count, correct, moved = sums.sum(axis=0)
    losses = sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], 1.0)
    error = losses.std(ddof=1) / np.sqrt(len(losses)) if len(losses) > 1 else np.inf
    return Epoch(loss / count, correct / count, float(error), losses.tolist(), float(moved))


@cache
def _update(layer_decay: float, ema: float) -> optax.GradientTransformation:
    """Return the optimizer with its rates in its state, so that other rates share its program."""
    config = OptimizerConfig(layer_decay=layer_decay, ema=ema)
    make = optax.inject_hyperparams(partial(make_update, config))
    made = make(learning_rate=0.0, weight_decay=0.0)
    assert isinstance(made, optax.GradientTransformation)
    return made


class Shape(NamedTuple):
    """The shape of packed batches: `rows` of `length` tokens with at most `slots` answers each."""

    rows: int
    length: int
    slots: int


def common_shape(batches: Sequence[Sequence[int]], config: ModelConfig, parts: int) -> Shape:
    """Return the cheapest shape that holds every batch, so that one program is compiled.

    `batches` are the lengths of their prompts; `parts` divides the rows. Rows are as long as the
    longest prompt, rounded up to 16, or 256, 512 or 1,024 tokens, whichever takes the fewest FLOPs:
    longer rows have less padding, but their attention costs more. Rows and slots are rounded up, so
    that another seed or setting mostly has the same shape.

    >>> common_shape([[100, 150, 60, 200], [180, 70]], ModelConfig(), 1)
    Shape(rows=1, length=512, slots=4)
    """
    longest = -(-max(map(max, batches)) // 16) * 16
    shapes = []
    for length in sorted({longest, *(n for n in ROWS if n > longest)}):
        packed = [pack([range(n) for n in lengths], length) for lengths in batches]
        rows = _rounded(-(-max(map(len, packed)) // parts)) * parts
        slots = max(len(row) for rows in packed for row in rows)
        shapes.append(Shape(rows, length, 1 << (slots - 1).bit_length()))
    return min(shapes, key=lambda one: one.rows * forward_flops(config, [one.length], 0, 0))


def _rounded(count: int) -> int:
    """Round a count up; between a number and its double there are four results.

    >>> [_rounded(count) for count in (1, 7, 9, 18, 19, 33)]
    [1, 7, 10, 20, 20, 40]
    """
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


def answer_batch(
    prompts: Sequence[Prompt], answers: np.ndarray | Answers, *, shape: Shape, pad_id: int
) -> Batch:
    """Pack prompts into rows; the slot of each is a target, and rows left over are padding.

    `answers` are token ids. The loss over the targets is that of one prompt in each row.
    """
    answers = answers if isinstance(answers, Answers) else Answers(np.asarray(answers))
    layout, places = _packed(prompts, shape, pad_id)
    targets = np.full((3, shape.rows, shape.slots), UNUSED, np.int32)
    for member, row, number, start in places:
        targets[:, row, number] = start + prompts[member].slot, answers.ids[member], ATP
    options = answers.options and Options(
        _spread(answers.options.ids, UNUSED, places, shape),
        _spread(answers.options.probs, 0.0, places, shape),
    )
    weights = _spread(answers.weights, 0.0, places, shape)
    return Batch(*layout, *targets)._replace(weights=weights, options=options)


def label_batch(
    prompts: Sequence[Prompt], answers: np.ndarray | Answers, *, shape: Shape, pad_id: int
) -> LabelBatch:
    """Pack prompts into rows, each with its label number; rows left over are padding."""
    answers = answers if isinstance(answers, Answers) else Answers(np.asarray(answers))
    (ids, segments, _), places = _packed(prompts, shape, pad_id)
    labels = _spread(np.float32(answers.ids), np.nan, places, shape)
    probs = None
    if answers.options is not None:  # of all classes, whatever their order
        order = np.argsort(answers.options.ids, axis=1)
        probs = np.take_along_axis(answers.options.probs, order, axis=1)
    weights = _spread(answers.weights, 0.0, places, shape)
    return LabelBatch(ids, segments, labels, weights, _spread(probs, 0.0, places, shape))


def _spread(values: Any, unused: float, places: Sequence[Any], shape: Shape) -> Any:
    """Return values of prompts at their rows and numbers there; None for None."""
    if values is None:
        return None
    found = np.full((shape.rows, shape.slots, *values.shape[1:]), unused, values.dtype)
    for member, row, number, _ in places:
        found[row, number] = values[member]
    return found


def _packed(
    prompts: Sequence[Prompt], shape: Shape, pad_id: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[tuple[int, int, int, int]]]:
    """Return the layout, and each prompt with its row, its number there and its first token."""
    rows: list[Any] = [None] * shape.rows
    places = []
    for row, members in enumerate(pack([prompt.ids for prompt in prompts], shape.length)):
        lengths = [len(prompts[member].ids) for member in members]
        rows[row] = np.concatenate([prompts[member].ids for member in members]), lengths
        starts = accumulate(lengths[:-1], initial=0)
        places += [(m, row, n, s) for n, (m, s) in enumerate(zip(members, starts, strict=True))]
    return lay_out(rows, shape.length, pad_id), places
