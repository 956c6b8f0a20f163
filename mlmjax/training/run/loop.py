"""The loop of a run: its updates, what is counted of them, and when it pauses, saves and stops."""

import signal
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mlmjax.config.run import RunConfig
from mlmjax.data.contamination import TrainingManifest
from mlmjax.errors import RunError
from mlmjax.model.architecture import ModelConfig
from mlmjax.parallel import processes
from mlmjax.reporting.terminal import Talk
from mlmjax.training.flops import training_flops
from mlmjax.training.loss import Metrics
from mlmjax.training.optimizer import averaged_parameters, make_schedule
from mlmjax.training.run.inputs import Loaders, feed
from mlmjax.training.run.log import MetricsLog, NoLog, Totals, add, count_tokens, summarize
from mlmjax.training.run.timing import Clock, Profile
from mlmjax.training.run.validation import EvalStep, validate
from mlmjax.training.step import AnyBatch, TrainState
from mlmjax.weights.checkpoints import Checkpoints

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within this context SIGTERM and SIGINT ask for a stop instead of ending the process.

    Before `arm` there is nothing to save, so the process leaves at once. After it a signal only
    sets `requested`; the owner looks at it between pieces of work, saves, and calls `leave`. A
    second SIGINT interrupts at once. Outside the main thread signals stay as they are.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._armed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def arm(self) -> None:
        """From here on a signal waits until the owner has saved."""
        self._armed = True

    def leave(self) -> None:
        """End the process the way the signal asks: exit code 143, or `KeyboardInterrupt`."""
        if self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + int(self.requested or signal.SIGTERM))

    def _take(self, number: int, frame: FrameType | None) -> None:
        again = self.requested == number == signal.SIGINT
        self.requested = number
        if again or not self._armed:
            self.leave()


IN_FLIGHT = 2
"""Updates the devices may be behind the host before it waits for their metrics."""


EXAMPLES_NAMED = 50
MOST_SKIPPED = 20
"""Updates in a row that may be skipped as spikes (`optim.skip_spikes`)."""


TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Run:
    """What every part of a run looks at and none changes."""

    config: RunConfig
    loaders: Loaders
    identity: dict[str, Any]
    checkpoints: Checkpoints
    stop: StopRequest
    eval_step: EvalStep
    architecture: ModelConfig
    mesh: Mesh
    peak: float | None
    before: TrainingManifest | None
    clock: Clock

    def asked(self) -> bool:
        """Tell whether this process was asked to stop."""
        return self.stop.requested is not None

    def stopping(self) -> bool:
        """Tell whether any process was; all of them have to ask together."""
        return processes.any_process(self.asked())

    def leave(self) -> None:
        """End this process, with all others, the way a signal asks."""
        processes.end_together("stopped")
        self.stop.leave()


class Steps:
    """The updates of a run that are left; `take` takes them."""

    def __init__(
        self, run: Run, step: TrainStep, interval: Totals, log: MetricsLog | NoLog, talk: Talk
    ):
        self._run, self._step, self._log, self._talk = run, step, log, talk
        self._interval = interval
        self._counts: Totals = defaultdict(float)
        """What only this process has counted since the last pause."""
        self._skipped_in_a_row = 0
        config = run.config
        self._rate = make_schedule(config.schedule, config.optimizer.learning_rate, config.steps)

    def take(self, state: TrainState, profile: Profile) -> TrainState:
        """Take the steps that are left; return the state after the last."""
        run, clock, config = self._run, self._run.clock, self._run.config
        start, pending = int(state.step), deque[tuple[int, Any, Callable[[], bool]]]()
        if start and not processes.broadcast_from_first(lambda: self._log.has(start, "validation")):
            self._evaluate(start, state)  # A signal came in the middle of it.
            if run.stopping():
                self._leave(start)
        batches = feed(run.loaders.train, run.mesh, start, config.steps)
        with clock("step"):
            for index, batch, counted in clock.waiting("data", batches):
                step = index + 1
                compiles = index == start or run.loaders.train.rows(index) > run.loaders.train.rows(
                    index - 1
                )
                profile.before(step)
                # The first step of a size compiles: its time says nothing of the others.
                with clock("compile" if compiles else "step"):
                    state, metrics = self._step(state, batch)
                    if compiles:
                        jax.block_until_ready(metrics)
                profile.after(step, metrics)
                add(self._counts, _host_counts(run, counted, timed=not compiles))
                pending.append((step, metrics, processes.vote(run.asked())))
                pauses = (
                    self._is_due(step, config.log.every)
                    or self._is_due(step, config.checkpoint.every)
                    or self._is_due(step, config.evaluation.every)
                    or (processes.process_count() == 1 and run.asked())
                )
                stops = False
                while len(pending) > (0 if pauses or stops else IN_FLIGHT):
                    stops |= self._settle(*pending.popleft())
                self._talk.step(step)
                if pauses or stops:
                    self._pause(step, state)
        return state

    def _is_due(self, step: int, every: int) -> bool:
        return step == self._run.config.steps or (every > 0 and step % every == 0)

    def _pause(self, step: int, state: TrainState) -> None:
        """Log, validate, save and stop, whatever of it is due; no update is in flight."""
        run, config, interval = self._run, self._run.config, self._interval
        add(interval, run.clock.taken(), processes.sum_over_processes(self._counts))
        self._counts.clear()
        saves = self._is_due(step, config.checkpoint.every) or run.stopping()
        if self._is_due(step, config.log.every):
            figures = summarize(interval, run.peak, run.mesh.size)
            self._tell(step, "train", figures | {"learning_rate": float(self._rate(step - 1))})
            interval.clear()
        held_out = None
        if self._is_due(step, config.evaluation.every):
            held_out = self._evaluate(step, state)
        if saves or run.stopping():
            with run.clock("checkpoint"):
                self._save(step, state, held_out)
        if run.stopping() and step < config.steps:
            self._leave(step)

    def _leave(self, step: int) -> None:
        self._run.checkpoints.wait()
        self._talk.say(f"stopped by a signal; step {step} is saved")
        self._run.leave()

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float | None] | None:
        run, loader = self._run, self._run.loaders.validation
        if loader is None or not self._is_due(step, run.config.evaluation.every):
            return None
        params = averaged_parameters(state.params, state.opt_state)
        with run.clock("evaluation"):
            figures = validate(run.eval_step, params, loader, run.stopping)
        if figures is not None and not np.isfinite(figures["loss"] or 0.0):
            raise self._diverged(step, f"the validation loss is {figures['loss']}")
        if figures is not None:
            self._tell(step, "validation", figures)
        return figures

    def _tell(self, step: int, split: str, figures: dict[str, float | None]) -> None:
        self._log.write(step, split, figures)
        self._talk.figures(step, split, figures)

    def _save(self, step: int, state: TrainState, held_out: Any) -> None:
        self._log.sync()
        if not _are_finite(state.params):
            raise self._diverged(step, "the parameters are not all finite")
        loss = held_out["loss"] if held_out else None
        self._run.checkpoints.save(
            step,
            state,
            metrics=None if loss is None else {"loss": loss},
            metadata={"identity": self._run.identity, "interval": dict(self._interval)},
        )

    def _settle(self, step: int, metrics: Any, stops: Callable[[], bool]) -> bool:
        """Take in the metrics of a step that the devices have done; tell whether all shall stop.

        Raises `RunError` for what is not finite.
        """
        values = jax.device_get(metrics)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if values["skipped"] else 0
        if values["skipped"] and self._skipped_in_a_row <= MOST_SKIPPED:
            add(self._interval, {"skipped": 1.0})
            self._talk.say(f"step {step}: skipped, its gradient norm is {values['grad_norm']:.3g}")
            return stops()
        if (
            not values["skipped"]
            and np.isfinite(values["loss_sum"])
            and np.isfinite(values["grad_norm"])
        ):
            add(self._interval, values, {"steps": 1.0})
            return stops()
        examples = np.concatenate(self._run.loaders.train.example_indices(step - 1)).tolist()
        named = ", ".join(map(str, examples[:EXAMPLES_NAMED]))
        more = f" and {len(examples) - EXAMPLES_NAMED} more" * (len(examples) > EXAMPLES_NAMED)
        what = f"the loss is {values['loss_sum']}, the gradient norm {values['grad_norm']}"
        if values["skipped"]:
            what += f", and the {MOST_SKIPPED} updates before it were skipped"
        raise self._diverged(step, f"{what}; its batch holds the training examples {named}{more}")

    def _diverged(self, step: int, what: str) -> RunError:
        kept = self._run.checkpoints.latest()
        saved = f"The checkpoint of step {kept} is whole" if kept else "No checkpoint was saved yet"
        return RunError(
            f"step {step}: {what}. {saved}. Lower the learning rate, or take out the examples at "
            "fault"
        )


def _host_counts(run: Run, batch: AnyBatch, timed: bool) -> dict[str, float]:
    counts = {**count_tokens(batch), "timed_tokens": 0.0, "timed_flops": 0.0}
    if timed:
        counts["timed_tokens"] = counts["tokens"]
        counts["timed_flops"] = training_flops(run.architecture, batch)
    return counts


@jax.jit
def _are_finite(params: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
