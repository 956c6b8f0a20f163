"""A training run from one configuration, read from top to bottom; run again, it goes on."""

import time
from collections import defaultdict
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

from flax import nnx

from mlmjax.config.run import MeshConfig, RunConfig
from mlmjax.data.contamination import TrainingManifest, read_training_manifest, training_manifest
from mlmjax.data.loader import LabelLoader, Loader
from mlmjax.data.manifest import read_manifest
from mlmjax.data.preparing.prepare import prepare, summary
from mlmjax.data.schedule import row_schedule
from mlmjax.errors import InputError
from mlmjax.parallel import processes
from mlmjax.parallel.processes import broadcast_from_first
from mlmjax.parallel.sharding import check_rows, gather_on_first, make_mesh
from mlmjax.reporting.terminal import Talk, say
from mlmjax.storage import TRAINING, alone_in, check_name, write_json
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.flops import peak_flops
from mlmjax.training.loss import Metrics
from mlmjax.training.optimizer import averaged_parameters, make_optimizer
from mlmjax.training.run.initial_model import initial_parameters, load_start, load_tokenizer
from mlmjax.training.run.inputs import open_loaders
from mlmjax.training.run.log import Totals, open_log
from mlmjax.training.run.loop import Run, Steps, StopRequest, TrainStep
from mlmjax.training.run.resume import (
    check_alike,
    check_places,
    check_processes,
    check_rows_shared,
    check_run_folder,
    check_same_run,
    checkpoint_folder,
    identity_of,
)
from mlmjax.training.run.timing import Clock, profiling
from mlmjax.training.run.validation import (
    answer_report,
    finished_report,
    label_report,
    report_lines,
    source_report,
    training_card,
)
from mlmjax.training.step import (
    HEADS,
    AnyBatch,
    TrainState,
    abstract_train_state,
    make_eval_step,
    make_replicated_step,
    make_train_step,
    split_parameters,
    start_state,
)
from mlmjax.weights import hub, pretrained
from mlmjax.weights.checkpoints import Checkpoints

STEPS = {"pjit": make_train_step, "pmap": make_replicated_step}


def run_training(config: RunConfig, *, profile: str | None = None) -> TrainState:
    """Train, validate, checkpoint and export as the configuration says; return the final state.

    The run folder `config.out` gets `config.json`, `metrics.jsonl`, TensorBoard events,
    `checkpoints/`, `export/` and `validation.json`. The same configuration again goes on from the
    newest checkpoint, bit by bit as if it had never stopped; a finished run is only reported.
    `profile` names updates, as in `"10:15"`, that are traced into `profile/`.

    Raises `InputError` for anything the configuration, the data or the model folder has wrong and
    for the folder of another run; `RunError` for a non-finite loss and for failed writing. On
    SIGTERM a checkpoint is saved and `SystemExit(143)` raised, on SIGINT `KeyboardInterrupt`.
    """
    if config.parallel == "pmap" and config.mesh != MeshConfig():
        raise InputError(
            "mesh: parallel = 'pmap' keeps the whole state on every device; leave [mesh] out, or "
            "set parallel = 'pjit'"
        )
    if config.parallel == "pmap" and processes.process_count() > 1:
        raise InputError(
            "parallel = 'pmap' drives the devices of one process, and there are "
            f"{processes.process_count()}; set parallel = 'pjit'"
        )
    clock = Clock()
    out = Path(config.out)
    check_places(config)
    check_name(out)
    check_alike(config)
    with (
        alone_in(out, check_run_folder) if processes.is_first() else nullcontext(),
        StopRequest() as stop,
    ):
        # 1. What is trained on what: model and tokenizer, devices, rows, optimizer.
        model, tokenizer = load_start(config)
        before = _trained_before(config)
        mesh = make_mesh(config.mesh)
        check_processes(out, checkpoint_folder(config), mesh)
        sizes = row_schedule(config.data, config.steps)
        check_rows(mesh.shape, config.data.batch_size, config.data.accumulate)
        check_rows(mesh.shape, sizes.start, micro_batches(config, sizes.start))
        optimizer = make_optimizer(config.optimizer, config.schedule, config.steps)
        prepared = broadcast_from_first(
            lambda: str(_prepare(config, tokenizer)), "process 0 prepares the rows"
        )
        check_rows_shared(Path(prepared))
        say(_told(Path(prepared)))
        loaders = open_loaders(config, tokenizer)
        graphdef, params = split_parameters(model)
        identity = identity_of(config, model.config, tokenizer, loaders)

        with Checkpoints(checkpoint_folder(config), config.checkpoint) as checkpoints:
            # 2. Where it stands: the newest checkpoint if it is of this run, or the beginning.
            step = broadcast_from_first(checkpoints.resumable) or 0
            interval: Totals = defaultdict(float)
            if step:
                metadata = checkpoints.metadata(step)
                check_same_run(out, config, step, metadata, identity)
                interval.update(metadata["interval"])
                state = checkpoints.restore(step, abstract_train_state(params, optimizer, mesh))
                say(f"{out}: goes on from step {step}")
            else:
                params = initial_parameters(config, model, params, mesh)
                state = start_state(params, optimizer, mesh)
                # Without it the export of an older run there would pass for this one's.
                if processes.is_first():
                    (out / "validation.json").unlink(missing_ok=True)
            architecture = model.config
            del model, params

            # 3. The steps. From here on a signal waits until the state is saved.
            stop.arm()
            eval_step = make_eval_step(graphdef, HEADS[config.head].evaluate)
            peak = peak_flops(mesh.devices.flat[0].device_kind, config.dtype)
            run = Run(
                config,
                loaders,
                identity,
                checkpoints,
                stop,
                eval_step,
                architecture,
                mesh,
                None if peak is None else peak * mesh.size,
                before,
                clock,
            )
            train_step = _train_step(config, graphdef, optimizer)
            with (
                profiling(profile, out / "profile", step, config.steps) as traced,
                open_log(out, step) as log,
                Talk(config.steps, step) as talk,
            ):
                if processes.is_first():
                    write_json(out / "config.json", config.model_dump(mode="json"))
                state = Steps(run, train_step, interval, log, talk).take(state, traced)

            # 4. What comes of it: held-out answers, and a folder that transformers loads.
            params = averaged_parameters(state.params, state.opt_state)
            _finish(run, graphdef, params, tokenizer)
    return state


def _trained_before(config: RunConfig) -> TrainingManifest | None:
    """Read what the model that a run starts from tells of its own training."""
    if config.init_from is None:
        return None
    folder = hub.fetch(config.init_from, revision=config.revision, local_files_only=True)
    return read_training_manifest(folder)


def micro_batches(config: RunConfig, rows: int) -> int:
    """Count the micro-batches of an update of so many rows; they keep their size."""
    return max(1, rows * config.data.accumulate // config.data.batch_size)


def _train_step(config: RunConfig, graphdef: Any, optimizer: Any) -> TrainStep:
    """Return the update of a run, whatever number of micro-batches its batch has grown to."""
    make = partial(STEPS[config.parallel], graphdef, optimizer, loss=HEADS[config.head].loss)
    steps = cache(lambda parts: make(accumulate=parts))

    def step(state: TrainState, batch: AnyBatch) -> tuple[TrainState, Metrics]:
        return steps(micro_batches(config, len(batch.input_ids)))(state, batch)

    return step


def prepare_rows(config: RunConfig) -> Path:
    """Prepare the rows of a run and print what was kept; return their folder.

    Raises `InputError` and `RunError` as `data.prepare.prepare`.
    """
    check_places(config)
    folder = _prepare(config, load_tokenizer(config))
    print(_told(folder))
    return folder


def _prepare(config: RunConfig, tokenizer: Tokenizer) -> Path:
    shown = time.monotonic()

    def progress(name: str, records: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            say(f"{name}: {records} records read")

    return prepare(config.data, tokenizer, progress, head=config.head)


def _told(rows: Path) -> str:
    return "\n".join([f"{rows}:", *summary(read_manifest(rows))])


def _held_out_answers(run: Run, params: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    validation, answers, tasks = run.loaders.validation, run.loaders.answers, run.loaders.tasks
    report: dict[str, Any] | None
    if validation is None or answers is None:
        return {"n": 0}
    if isinstance(answers, LabelLoader):
        labels = run.config.label_names
        report = label_report(run.eval_step, params, answers, labels, tasks, run.stopping)
    else:
        assert isinstance(validation, Loader)
        width = validation.target_width
        report = answer_report(
            run.eval_step, params, answers, width, tasks, tokenizer, run.stopping
        )
        sources = source_report(run.eval_step, params, run.loaders.by_source, width, run.stopping)
        report = None if report is None or sources is None else {**report, "per_source": sources}
    if report is None:
        run.leave()
    return report or {}


def _finish(run: Run, graphdef: Any, params: Any, tokenizer: Tokenizer) -> None:
    """Report on held-out answers and export, unless that was done before; print the result."""
    config, out = run.config, Path(run.config.out)
    with run.clock("checkpoint"):
        run.checkpoints.wait()
    report = broadcast_from_first(lambda: finished_report(out, config.steps))
    if report is not None:
        say(f"{out}: is complete at step {config.steps}; nothing to do")
    else:
        with run.clock("evaluation"):
            report = {"step": config.steps, **_held_out_answers(run, params, tokenizer)}
        whole = gather_on_first(params)  # Every process takes part; the first one writes.
        if processes.is_first():
            model = nnx.merge(graphdef, whole)
            sections = training_card(config, run.loaders.manifest, report)
            card = pretrained.model_card(model, sections=sections)
            told = training_manifest(config.init_from, run.loaders.manifest, run.before).text()
            files = {TRAINING: told}
            pretrained.save_pretrained(
                model, tokenizer, out / "export", card=card, more_files=files
            )
            write_json(out / "validation.json", report)
        say(run.clock.told())
    if processes.is_first():
        print("\n".join([*report_lines(report), f"export: {out / 'export'}"]))
