"""A training run from one configuration, read from top to bottom; run again, it goes on."""

import time
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlmjax import hf, hub
from mlmjax.architecture import ModelConfig
from mlmjax.checkpoint import Checkpoints
from mlmjax.config import MeshConfig, RunConfig
from mlmjax.data.batch import Batch
from mlmjax.data.prepare import prepare, summary
from mlmjax.data.rows import read_manifest
from mlmjax.errors import InputError, RunError
from mlmjax.log import MetricsLog, Talk, say
from mlmjax.modernbert import ModernBertForMaskedLM
from mlmjax.optim import make_optimizer, make_schedule
from mlmjax.partition import check_rows, make_mesh
from mlmjax.replicated import make_replicated_step
from mlmjax.run import Loaders, alone_in, check_same_run, identity_of, open_loaders, write_json
from mlmjax.signals import StopRequest
from mlmjax.step import (
    TrainState,
    abstract_train_state,
    make_eval_step,
    make_train_step,
    parameter_sharding,
    split_parameters,
    start_state,
)
from mlmjax.tokenizer import Tokenizer
from mlmjax.validation import (
    EvalStep,
    Totals,
    add,
    answer_report,
    count_tokens,
    finished_report,
    report_lines,
    summarize,
    training_card,
    validate,
)

STEPS = {"pjit": make_train_step, "pmap": make_replicated_step}
IN_FLIGHT = 2
"""Updates the devices may be behind the host before it waits for their metrics."""

EXAMPLES_NAMED = 50


@dataclass(frozen=True)
class _Run:
    """What every part of a run looks at and none changes."""

    config: RunConfig
    loaders: Loaders
    identity: dict[str, Any]
    checkpoints: Checkpoints
    stop: StopRequest
    eval_step: EvalStep

    def stopping(self) -> bool:
        return self.stop.requested is not None


def run_training(config: RunConfig) -> TrainState:
    """Train, validate, checkpoint and export as the configuration says; return the final state.

    The run folder `config.out` gets `config.json`, `metrics.jsonl`, TensorBoard events,
    `checkpoints/`, `export/` and `validation.json`. The same configuration again goes on from the
    newest checkpoint, bit by bit as if it had never stopped; a finished run is only reported.

    Raises `InputError` for anything the configuration, the data or the model folder has wrong and
    for the folder of another run; `RunError` for a non-finite loss and for failed writing. On
    SIGTERM a checkpoint is saved and `SystemExit(143)` raised, on SIGINT `KeyboardInterrupt`.
    """
    if config.parallel == "pmap" and config.mesh != MeshConfig():
        raise InputError(
            "mesh: parallel = 'pmap' keeps the whole state on every device; leave [mesh] out, or "
            "set parallel = 'pjit'"
        )
    out = Path(config.out)
    with alone_in(out), StopRequest() as stop:
        # 1. What is trained on what: model and tokenizer, devices, rows, optimizer.
        model, tokenizer = _load_model(config)
        mesh = make_mesh(config.mesh)
        check_rows(mesh.shape, config.data.batch_size, config.data.accumulate)
        optimizer = make_optimizer(config.optimizer, config.schedule, config.steps)
        say(_told(_prepare(config, tokenizer)))
        loaders = open_loaders(config, tokenizer)
        graphdef, params = split_parameters(model)
        identity = identity_of(config, model.config, tokenizer, loaders)

        with Checkpoints(out / "checkpoints", config.checkpoint) as checkpoints:
            # 2. Where it stands: the newest checkpoint if it is of this run, or the beginning.
            step = checkpoints.latest() or 0
            interval: Totals = defaultdict(float)
            if step:
                metadata = checkpoints.metadata(step)
                check_same_run(out, config, step, metadata, identity)
                interval.update(metadata["interval"])
                state = checkpoints.restore(step, abstract_train_state(params, optimizer, mesh))
                say(f"{out}: goes on from step {step}")
            else:
                params = _initial_parameters(config, model, params, mesh)
                state = start_state(params, optimizer, mesh)
                # Without it the export of an older run there would pass for this one's.
                (out / "validation.json").unlink(missing_ok=True)
            del model, params
            write_json(out / "config.json", config.model_dump(mode="json"))

            # 3. The steps. From here on a signal waits until the state is saved.
            stop.arm()
            run = _Run(config, loaders, identity, checkpoints, stop, make_eval_step(graphdef))
            train_step = STEPS[config.parallel](
                graphdef, optimizer, accumulate=config.data.accumulate
            )
            with MetricsLog(out, step) as log, Talk(config.steps, step) as talk:
                state = _steps(run, train_step, state, interval, log, talk)

            # 4. What comes of it: held-out answers, and a folder that transformers loads.
            _finish(run, nnx.merge(graphdef, state.params), state, tokenizer)
    return state


def prepare_rows(config: RunConfig) -> Path:
    """Prepare the rows of a run and print what was kept; return their folder.

    Raises `InputError` and `RunError` as `data.prepare.prepare`.
    """
    if config.init_from is None or config.tokenizer is not None:
        tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    else:
        tokenizer = hf.load_tokenizer(hub.fetch(config.init_from, revision=config.revision))
    folder = _prepare(config, tokenizer)
    print(_told(folder))
    return folder


def _prepare(config: RunConfig, tokenizer: Tokenizer) -> Path:
    shown = time.monotonic()

    def progress(name: str, records: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            say(f"{name}: {records} records read")

    return prepare(config.data, tokenizer, progress)


def _told(rows: Path) -> str:
    return "\n".join([f"{rows}:", *summary(read_manifest(rows))])


def _load_model(config: RunConfig) -> tuple[ModernBertForMaskedLM, Tokenizer]:
    """Load `init_from`, or describe the model of `[model]` without taking memory for it."""
    own = Tokenizer.from_pretrained(config.tokenizer) if config.tokenizer else None
    model: Any
    if config.init_from is not None:
        where = config.init_from
        model, tokenizer = hf.load_pretrained(
            where, revision=config.revision, dtype=config.dtype, attention=config.attention
        )
        tokenizer = own or tokenizer
        if not isinstance(model, ModernBertForMaskedLM):
            raise InputError(
                f"{where}: is a {type(model).__name__}; training needs a ModernBertForMaskedLM"
            )
    else:
        where = "[model]"
        tokenizer = own or Tokenizer.from_pretrained()
        defaults = {
            "vocab_size": -(-tokenizer.vocab_size // 64) * 64,
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": tokenizer.cls_id,
            "eos_token_id": tokenizer.sep_id,
            "cls_token_id": tokenizer.cls_id,
            "sep_token_id": tokenizer.sep_id,
        }
        architecture = ModelConfig.from_hf(defaults | dict(config.model or {}), strict=True)
        model = hf.abstract_model(
            ModernBertForMaskedLM.__name__,
            architecture,
            dtype=config.dtype,
            attention=config.attention,
        )
    hf.check_tokenizer(Path(where), model.config.to_hf(), tokenizer)
    longest = model.config.max_position_embeddings
    if config.data.seq_length > longest:
        raise InputError(
            f"data.seq_length: found {config.data.seq_length}; the model takes at most {longest} "
            "positions (max_position_embeddings)"
        )
    for name in ("embedding_dropout", "attention_dropout", "mlp_dropout"):
        if getattr(model.config, name):
            raise InputError(
                f"{where}: {name} is {getattr(model.config, name)}; training has no dropout: set "
                "it to 0 in the model's configuration"
            )
    return model, tokenizer


def _initial_parameters(config: RunConfig, model: Any, params: Any, mesh: Mesh) -> Any:
    """Put the loaded parameters, or those of a new model, on the mesh."""
    sharding = parameter_sharding(mesh, params)
    if config.init_from is None:
        # Drawn on the host: the same numbers on every mesh, no whole copy on any device, and a few
        # shapes to compile instead of every parameter.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            drawn = ModernBertForMaskedLM(model.config, rngs=nnx.Rngs(config.seed))
        params = nnx.state(drawn, nnx.Param)
    return jax.device_put(params, sharding)


def _steps(
    run: _Run, train_step: Any, state: TrainState, interval: Totals, log: MetricsLog, talk: Talk
) -> TrainState:
    """Take the steps that are left; return the state after the last."""
    config = run.config
    rate = make_schedule(config.schedule, config.optimizer.learning_rate, config.steps)
    start, pending = int(state.step), deque[tuple[int, Any, dict[str, float]]]()

    def is_due(step: int, every: int) -> bool:
        return step == config.steps or (every > 0 and step % every == 0)

    def evaluate(step: int) -> dict[str, float | None] | None:
        loader = run.loaders.validation
        if loader is None or not is_due(step, config.evaluation.every):
            return None
        figures = validate(run.eval_step, state.params, loader, run.stopping)
        if figures is not None:
            log.write(step, "validation", figures)
            talk.figures(step, "validation", figures)
        return figures

    if start and not log.has(start, "validation"):
        evaluate(start)  # A signal came in the middle of it.
    clock = time.perf_counter()
    for index, batch in run.loaders.train.batches(start, config.steps):
        state, metrics = train_step(state, batch)
        step = index + 1
        pending.append((step, metrics, _host_counts(batch, timed=index > start)))
        if index == start:
            jax.block_until_ready(metrics)
            clock = time.perf_counter()  # The first step compiles: its time says nothing.
        logs = is_due(step, config.log.every)
        saves = is_due(step, config.checkpoint.every) or run.stopping()
        pauses = logs or saves or is_due(step, config.evaluation.every)
        while len(pending) > (0 if pauses else IN_FLIGHT):
            _settle(run, interval, *pending.popleft())
        talk.step(step)
        if not pauses:
            continue

        interval["seconds"] += time.perf_counter() - clock
        if logs:
            figures = {**summarize(interval), "learning_rate": float(rate(step - 1))}
            log.write(step, "train", figures)
            talk.figures(step, "train", figures)
            interval.clear()
        held_out = evaluate(step)
        if saves or run.stopping():
            log.sync()
            loss = held_out["loss"] if held_out else None
            run.checkpoints.save(
                step,
                state,
                metrics=None if loss is None else {"loss": loss},
                metadata={"identity": run.identity, "interval": dict(interval)},
            )
        if run.stopping() and step < config.steps:
            run.checkpoints.wait()
            talk.say(f"stopped by a signal; step {step} is saved")
            run.stop.leave()
        clock = time.perf_counter()
    return state


def _host_counts(batch: Batch, timed: bool) -> dict[str, float]:
    counts = count_tokens(batch)
    return {**counts, "steps": 1.0, "timed_tokens": counts["tokens"] if timed else 0.0}


def _settle(run: _Run, interval: Totals, step: int, metrics: Any, counts: dict[str, float]) -> None:
    """Take in the metrics of a step that the devices have done; raise `RunError` if not finite."""
    values = jax.device_get(metrics)
    if np.isfinite(values["loss_sum"]) and np.isfinite(values["grad_norm"]):
        add(interval, values, counts)
        return
    examples = np.concatenate(run.loaders.train.example_indices(step - 1)).tolist()
    named = ", ".join(map(str, examples[:EXAMPLES_NAMED]))
    more = f" and {len(examples) - EXAMPLES_NAMED} more" if len(examples) > EXAMPLES_NAMED else ""
    kept = run.checkpoints.latest()
    raise RunError(
        f"step {step}: the loss is {values['loss_sum']}, the gradient norm {values['grad_norm']}; "
        f"its batch holds the training examples {named}{more}. "
        + (f"The checkpoint of step {kept} is whole. " if kept else "No checkpoint was saved yet. ")
        + "Lower the learning rate, or take out the examples at fault"
    )


def _held_out_answers(run: _Run, state: TrainState, tokenizer: Tokenizer) -> dict[str, Any]:
    validation, answers, tasks = run.loaders.validation, run.loaders.answers, run.loaders.tasks
    if validation is None or answers is None:
        return {"n": 0}
    width = validation.target_width
    report = answer_report(
        run.eval_step, state.params, answers, width, tasks, tokenizer, run.stopping
    )
    if report is None:
        run.stop.leave()
    return report or {}


def _finish(run: _Run, model: Any, state: TrainState, tokenizer: Tokenizer) -> None:
    """Report on held-out answers and export, unless that was done before; print the result."""
    config, out = run.config, Path(run.config.out)
    run.checkpoints.wait()
    report = finished_report(out / "validation.json", config.steps)
    if report is not None and (out / "export" / hub.CONFIG).is_file():
        say(f"{out}: is complete at step {config.steps}; nothing to do")
    else:
        report = {"step": config.steps, **_held_out_answers(run, state, tokenizer)}
        card = hf.model_card(model) + training_card(config, run.loaders.manifest, report)
        hf.save_pretrained(model, tokenizer, out / "export", card=card)
        write_json(out / "validation.json", report)
    print("\n".join([*report_lines(report), f"export: {out / 'export'}"]))
