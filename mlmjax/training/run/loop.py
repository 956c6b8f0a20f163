"""Run the updates of a run, and pause to log, validate, save and stop."""

import signal
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mlmjax.config.run import RunConfig
from mlmjax.errors import RunError
from mlmjax.model.architecture import ModelConfig
from mlmjax.parallel import failures, processes
from mlmjax.parallel.sharding import named_leaves
from mlmjax.training.adapters import joined
from mlmjax.training.flops import peak_flops, training_flops
from mlmjax.training.optimizer import (
    averaged_parameters,
    best_parameters,
    make_schedule,
    rates_at,
)
from mlmjax.training.run.inputs import Loaders, feed
from mlmjax.training.run.log import (
    Figures,
    MetricsLog,
    RunDisplay,
    Totals,
    add,
    count_tokens,
    describe_step_compiling,
    summarize,
)
from mlmjax.training.run.timing import Clock
from mlmjax.training.run.validation import (
    EvalStep,
    describe_best,
    is_over,
    record_validation,
    validate,
)
from mlmjax.training.step import AnyBatch, TrainState, TrainStep
from mlmjax.weights.checkpoints import Checkpoints

SIGNALS = (signal.SIGTERM, signal.SIGINT)
IN_FLIGHT = 2
"""Updates that the devices may be behind the host before it waits for their metrics."""

EXAMPLES_NAMED = 50
MOST_SKIPPED = 20
"""Updates in a row that `optimizer.skip_spikes` may skip."""


class StoppedError(Exception):
    """End a validation because a signal requests a stop."""


class StopRequest:
    """A request to stop, by SIGTERM or SIGINT.

    Until `is_armed` there is nothing to save, so the process ends at once. Then a signal only sets
    `number`; the run looks at it between updates, saves, and calls `leave`. A second SIGINT ends
    the process at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_armed = False

    def is_here(self) -> bool:
        """Tell whether this process got a signal to stop."""
        return self.number is not None

    def is_anywhere(self) -> bool:
        """Tell whether any process got one; all processes call it together."""
        return processes.vote(self.is_here())()

    def check(self) -> None:
        """Raise `StoppedError` if `is_anywhere`."""
        if self.is_anywhere():
            raise StoppedError

    def leave(self) -> None:
        """End all processes together, as the signal demands."""
        failures.end_together("stopped")
        self._end()

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        is_second = self.number == number == signal.SIGINT
        self.number = number
        if is_second or not self.is_armed:
            self._end()

    def _end(self) -> None:
        """End this process: by exit code 143, or by `KeyboardInterrupt`."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + int(self.number or signal.SIGTERM))


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Yield the `StopRequest` of this process; only the main thread can handle signals.

    `StoppedError` within the block ends the process as the signal demands.
    """
    stop = StopRequest()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop.take) for number in SIGNALS}
    try:
        yield stop
    except StoppedError:
        stop.leave()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(kw_only=True)
class Loop:
    """The updates of a run that are left to do; `run` does them.

    `frozen` are the parameters that no update changes, None if there are none. `totals` are the
    sums since the last line of metrics. Only the first process has a log.
    """

    config: RunConfig
    loaders: Loaders
    architecture: ModelConfig
    mesh: Mesh
    frozen: Any
    train_step: TrainStep
    eval_step: EvalStep
    checkpoints: Checkpoints
    identity: dict[str, Any]
    totals: Totals
    stop: StopRequest
    clock: Clock
    log: MetricsLog | None
    display: RunDisplay

    def __post_init__(self) -> None:
        config = self.config
        self._counts: Totals = defaultdict(float)  # Those of this process since the last pause.
        self._skipped_in_a_row = self._programs = 0
        self._trained: frozenset[str] = frozenset()
        peak = peak_flops(self.mesh.devices.flat[0].device_kind, config.dtype)
        self._peak = None if peak is None else peak * self.mesh.size  # of all devices
        self._rate = make_schedule(config.schedule, config.optimizer.learning_rate, config.steps)

    def run(self, state: TrainState, trace: Callable[[int, Any], None]) -> TrainState:
        """Do the updates that are left; return the state after the last.

        `trace` is that of `timing.profiling`.
        """
        config, clock, train = self.config, self.clock, self.loaders.train
        start, pending = int(state.step), deque[tuple[int, Any, Callable[[], bool]]]()
        self._trained = frozenset(named_leaves(state.params))
        state = self._make_up_evaluation(start, state)
        if is_over(state, config.evaluation.patience):
            return state
        batches = self._batches(start)
        trace(start, None)
        with clock("step"):
            for index, batch, counted in clock.waiting("data", batches):
                step = index + 1
                compiles = index == start or train.rows(index) > train.rows(index - 1)
                # The first step of a size compiles: its time says nothing about the others.
                with self._compiling(train.rows(index)) if compiles else clock("step"):
                    state, metrics = self.train_step(state, batch, self.frozen)
                    if compiles:
                        jax.block_until_ready(metrics)
                trace(step, metrics)
                self._count(counted, is_timed=not compiles)
                pending.append((step, metrics, processes.vote(self.stop.is_here())))
                pauses = self._is_due(
                    step, config.log.every, config.checkpoint.every, config.evaluation.every
                ) or (processes.process_count() == 1 and self.stop.is_here())
                stops = False
                while len(pending) > (0 if pauses or stops else IN_FLIGHT):
                    stops |= self._settle(*pending.popleft())
                self.display.advance(step)
                if pauses or stops:
                    state = self._pause(step, state)
                    if is_over(state, config.evaluation.patience):
                        break
        return state

    def _batches(self, start: int) -> Iterator[tuple[int, Any, AnyBatch]]:
        """Yield batches as `feed` does; none is made before the validation that its masks need."""
        last = self.config.steps
        every = self.config.evaluation.every if self.loaders.adaptive else last
        while start < last:
            stop = min(last, (start // every + 1) * every)
            yield from feed(self.loaders.train, self.mesh, start, stop)
            start = stop

    def parameters(self, state: TrainState) -> Any:
        """Return the parameters to validate: averaged ones, and the frozen ones."""
        return joined(averaged_parameters(state.params, state.opt_state), self.frozen)

    def best_parameters(self, state: TrainState) -> Any:
        """Return the parameters to export, the best ones of a run that may stop early."""
        return joined(best_parameters(state.params, state.opt_state), self.frozen)

    @contextmanager
    def _compiling(self, rows: int) -> Iterator[None]:
        self._programs += 1
        text = describe_step_compiling(self.architecture.num_hidden_layers, self._programs, rows)
        with self.clock("compile"), self.display.doing(text):
            yield

    def _is_due(self, step: int, *every: int) -> bool:
        return step == self.config.steps or any(n > 0 and step % n == 0 for n in every)

    def _count(self, batch: AnyBatch, *, is_timed: bool) -> None:
        counts = count_tokens(batch)
        tokens = counts["tokens"] if is_timed else 0.0
        flops = training_flops(self.architecture, batch, self._trained) if is_timed else 0.0
        add(self._counts, counts, {"timed_tokens": tokens, "timed_flops": flops})

    def _settle(self, step: int, metrics: Any, stops: Callable[[], bool]) -> bool:
        """Add up the metrics of an update that is done; tell whether any process has to stop.

        Raises `RunError` if they are not finite.
        """
        values = jax.device_get(metrics)
        if values["skipped"]:
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row > MOST_SKIPPED:
                raise self._bad_update(step, values)
            add(self.totals, {"skipped": 1.0})
            norm = f"{values['grad_norm']:.3g}"
            self.display.say(f"warning: step {step}: update skipped; its gradient norm is {norm}")
        else:
            self._skipped_in_a_row = 0
            if not np.isfinite([values["loss_sum"], values["grad_norm"]]).all():
                raise self._bad_update(step, values)
            add(self.totals, values, {"steps": 1.0})
        return stops()

    def _bad_update(self, step: int, values: Any) -> RunError:
        what = f"the loss is {values['loss_sum']}, the gradient norm {values['grad_norm']}"
        if values["skipped"]:
            what += f", and the {MOST_SKIPPED} updates before it were skipped"
        examples = np.concatenate(self.loaders.train.example_indices(step - 1)).tolist()
        named = ", ".join(map(str, examples[:EXAMPLES_NAMED]))
        more = f" and {len(examples) - EXAMPLES_NAMED} more" * (len(examples) > EXAMPLES_NAMED)
        return self._diverged(step, f"{what}; its batch holds the training examples {named}{more}")

    def _pause(self, step: int, state: TrainState) -> TrainState:
        """Log, validate, save and stop, each if it is due; no update is in flight."""
        config, stop = self.config, self.stop
        add(self.totals, self.clock.take_seconds(), processes.sum_over_processes(self._counts))
        self._counts.clear()
        saves = self._is_due(step, config.checkpoint.every) or stop.is_anywhere()
        if logs := self._is_due(step, config.log.every):
            self._log(step)
        held_out = None
        if self._is_due(step, config.evaluation.every):
            held_out = self._evaluate(step, state)
            state = self._record(state, held_out)
        ends = is_over(state, config.evaluation.patience)
        if ends:
            self.display.say(f"step {step}: stops early; {describe_best(state)}")
            if not logs:
                self._log(step)
        if saves or ends or stop.is_anywhere():
            with self.clock("checkpoint"), self.display.doing("saving a checkpoint"):
                self._save(step, state, held_out)
        if stop.is_anywhere() and step < config.steps:
            self._leave(step)
        return state

    def _log(self, step: int) -> None:
        """Write the figures of the updates since the last line."""
        figures = summarize(self.totals, self._peak, self.mesh.size)
        rate = float(rates_at(self._rate, step - 1))
        self._report(step, "train", figures | {"learning_rate": rate})
        self.totals.clear()

    def _make_up_evaluation(self, step: int, state: TrainState) -> TrainState:
        """Validate the state that a run resumes from, if a signal stopped that before."""
        log = self.log
        if self.config.evaluation.patience is not None:
            is_done = step == int(jax.device_get(state.opt_state.validated))
        else:
            is_done = processes.broadcast_from_first(lambda: log and log.has(step, "validation"))
        if step and not is_done:
            if self._is_due(step, self.config.evaluation.every):
                state = self._record(state, self._evaluate(step, state))
            if self.stop.is_anywhere():
                self._leave(step)
        return state

    def _record(self, state: TrainState, held_out: Figures | None) -> TrainState:
        """Return the state that knows of a validation, if the run may stop early."""
        loss = None if held_out is None else held_out["loss"]
        if self.config.evaluation.patience is None or loss is None:
            return state
        return record_validation(state, loss)

    def _evaluate(self, step: int, state: TrainState) -> Figures | None:
        """Validate the state, and report on it; None without held-out rows, or if stopped."""
        if self.loaders.validation is None:
            return None
        loader, adaptive = self.loaders.validation, self.loaders.adaptive
        params, seen = self.parameters(state), list[tuple[np.ndarray, ...]]()

        def watch(metrics: Mapping[str, jax.Array]) -> None:
            if adaptive:
                names = ("mlm_ids", "loss", "mlm_weights")
                seen.append(tuple(np.asarray(metrics[name]).ravel() for name in names))

        try:
            with self.clock("evaluation"), self.display.doing("validating"):
                check = self.stop.check
                figures = validate(self.eval_step, params, loader, check, watch=watch)
        except StoppedError:
            return None
        if not np.isfinite(figures["loss"] or 0.0):
            raise self._diverged(step, f"the validation loss is {figures['loss']}")
        if adaptive:
            ids, losses, weights = map(np.concatenate, zip(*seen, strict=True))
            is_mlm = ids >= 0
            adaptive.update(ids[is_mlm], losses[is_mlm], weights[is_mlm])
        self._report(step, "validation", figures)
        return figures

    def _report(self, step: int, split: str, figures: Figures) -> None:
        if self.log and not self.log.has(step, split):
            self.log.write(step, split, figures)
        self.display.show(step, split, figures)

    def _save(self, step: int, state: TrainState, held_out: Figures | None) -> None:
        if self.log:
            self.log.sync()
        if not _are_finite(state.params):
            raise self._diverged(step, "the parameters are not all finite")
        loss = held_out["loss"] if held_out else None
        metadata: dict[str, Any] = {"identity": self.identity, "interval": dict(self.totals)}
        if self.loaders.adaptive:
            metadata["token_losses"] = self.loaders.adaptive.dump()
        self.checkpoints.save(
            step,
            state,
            metrics=None if loss is None else {"loss": loss},
            metadata=metadata,
        )

    def _leave(self, step: int) -> None:
        self.checkpoints.wait()
        self.display.say(
            f"stopped by a signal; step {step} is saved in {self.config.out}; the same "
            "command resumes"
        )
        self.stop.leave()

    def _diverged(self, step: int, what: str) -> RunError:
        kept = self.checkpoints.latest()
        saved = f"The checkpoint of step {kept} is whole" if kept else "No checkpoint was saved yet"
        return RunError(
            f"step {step}: {what}. {saved}. Lower the learning rate, or remove the examples that "
            "cause this"
        )


@jax.jit
def _are_finite(params: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
