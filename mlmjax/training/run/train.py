"""Run a training from one configuration, or resume it."""

import math
from collections import defaultdict
from collections.abc import Collection
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from mlmjax.config.run import RunConfig
from mlmjax.data.contamination import TrainingManifest, training_manifest
from mlmjax.data.manifest import Manifest, read_manifest
from mlmjax.data.preparing.prepare import prepare, summary
from mlmjax.data.schedule import micro_batches
from mlmjax.errors import InputError, counted, suggest_keywords
from mlmjax.model.modernbert import merged
from mlmjax.parallel.environment import check_devices
from mlmjax.parallel.processes import broadcast_from_first, check_not_forked, is_first
from mlmjax.parallel.sharding import gather_on_first
from mlmjax.reporting.terminal import count_progress, say, working
from mlmjax.reporting.trackers import Trackers
from mlmjax.storage import TRAINING, alone_in, write_json
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.adapters import split_trained, trained_patterns
from mlmjax.training.loss import Metrics
from mlmjax.training.objectives import check_code, head_of_run
from mlmjax.training.optimizer import optimizer_of
from mlmjax.training.run.initial_model import initial_parameters, load_start, load_tokenizer
from mlmjax.training.run.inputs import Loaders, open_loaders
from mlmjax.training.run.log import MetricsLog, RunDisplay, Totals
from mlmjax.training.run.loop import Loop, catch_signals
from mlmjax.training.run.resume import (
    check_before_start,
    check_folders,
    check_rows_shared,
    check_run_folder,
    check_same_run,
    checkpoint_folder,
    identity_of,
)
from mlmjax.training.run.timing import Clock, profiling
from mlmjax.training.run.validation import (
    read_finished,
    report_held_out,
    report_lines,
    training_card,
)
from mlmjax.training.step import (
    AnyBatch,
    Loss,
    TrainState,
    TrainStep,
    abstract_train_state,
    shared_eval_step,
    shared_replicated_step,
    shared_train_step,
    split_parameters,
    start_state,
)
from mlmjax.weights import pretrained
from mlmjax.weights.adapters import save_adapter
from mlmjax.weights.cards import measured, model_card, with_results
from mlmjax.weights.checkpoints import Checkpoints

STEPS = {"pjit": shared_train_step, "pmap": shared_replicated_step}


@suggest_keywords
def run_training(
    config: RunConfig, *, profile: str | None = None, code: Collection[str] = ()
) -> TrainState:
    """Train, validate, checkpoint and export as the configuration says; return the final state.

    The run folder `config.out` gets `config.json`, `metrics.jsonl`, TensorBoard events,
    `checkpoints/`, `export/` and `validation.json`. The same configuration again resumes from the
    newest checkpoint, bit for bit as if the run had never stopped; a finished run is only reported.
    `profile` names updates, as in `"10:15"`, that are traced into `profile/`. `code` names the
    modules whose code the configuration may run, such as `my_package.masks`.

    Raises `InputError` for what is wrong in the configuration, the data or the model folder, and
    for the folder of another run. Raises `RunError` for a loss that is not finite and for failed
    writing. On SIGTERM it saves a checkpoint and raises `SystemExit(143)`, on SIGINT
    `KeyboardInterrupt`.
    """
    check_not_forked()
    check_devices()
    check_code(config.objective, code)
    clock, out = Clock(), Path(config.out)
    config = count_steps(config)
    mesh = check_before_start(config, profile)
    lock = alone_in(out, check_run_folder) if is_first() else nullcontext()
    with lock, catch_signals() as stop:
        model, tokenizer, history = load_start(config)
        architecture, graphdef = model.config, split_parameters(model)[0]
        optimizer, head = (
            optimizer_of(config),
            head_of_run(config.head, config.objective, tokenizer),
        )
        loaders = _open_rows(config, tokenizer)
        with Checkpoints(checkpoint_folder(config), config.checkpoint) as checkpoints:
            step = broadcast_from_first(checkpoints.resumable) or 0
            params, frozen = _start_parameters(config, model, mesh, resumes=step > 0)
            identity = identity_of(config, architecture, tokenizer, loaders, frozen)
            state, totals = _first_state(
                config, checkpoints, step, identity, params, optimizer, mesh
            )
            if loaders.adaptive and step:
                losses = checkpoints.metadata(step).get("token_losses")
                loaders.adaptive.load(losses, f"{checkpoints.folder}/{step}")
            del model, params
            stop.is_armed = True  # From here on a signal waits until the state is saved.
            with (
                profiling(profile, out / "profile", step, config.steps) as trace,
                closing(_open_log(config, step)) if is_first() else nullcontext() as log,
                RunDisplay(config.steps, step) as display,
            ):
                loop = Loop(
                    config=config,
                    loaders=loaders,
                    architecture=architecture,
                    mesh=mesh,
                    frozen=frozen,
                    train_step=_train_step(config, graphdef, optimizer, head.loss),
                    eval_step=shared_eval_step(graphdef, head.evaluate),
                    checkpoints=checkpoints,
                    identity=identity,
                    totals=totals,
                    stop=stop,
                    clock=clock,
                    log=log,
                    display=display,
                )
                state = loop.run(state, trace)
            with clock("checkpoint"), working("waiting for the checkpoint to be written"):
                checkpoints.wait()
            report = _finish(loop, graphdef, state, tokenizer, history)
    _print_report(config, report)
    return state


def _print_report(config: RunConfig, report: dict[str, Any]) -> None:
    """Print the report of a run and where its results are, on the first process."""
    if is_first():
        names = ["adapter", "export"] if config.adapter else ["export"]
        where = [f"{name}: {Path(config.out) / name}" for name in names]
        print("\n".join([*report_lines(report), *where]))


def _open_log(config: RunConfig, step: int) -> MetricsLog:
    """Write the configuration of a run that goes on from a step; open its metrics and trackers."""
    out, settings = Path(config.out), config.model_dump(mode="json")
    log = MetricsLog(out, step)
    write_json(out / "config.json", settings)
    options: Any = {"project": config.log.project, "settings": settings, "step": step}
    log.trackers = Trackers(config.log.to, out, **options)
    return log


def _start_parameters(
    config: RunConfig, model: Any, mesh: Mesh, *, resumes: bool
) -> tuple[Any, Any]:
    """Return the parameters to train and the frozen ones, on the mesh.

    Those to train stay where they are if the run resumes, because they are in its checkpoint.
    """
    params = split_parameters(model)[1]
    patterns = trained_patterns(model, config.optimizer.train)
    if patterns is not None or not resumes:
        params = initial_parameters(config, model, params, mesh)
    return split_trained(params, patterns)


def _first_state(
    config: RunConfig,
    checkpoints: Checkpoints,
    step: int,
    identity: dict[str, Any],
    params: Any,
    optimizer: Any,
    mesh: Mesh,
) -> tuple[TrainState, Totals]:
    """Return the state of a step to go on from, and the sums of its unfinished line of metrics."""
    out = Path(config.out)
    if step:
        metadata = checkpoints.metadata(step)
        check_same_run(config, step, metadata, identity)
        state = checkpoints.restore(step, abstract_train_state(params, optimizer, mesh))
        say(f"{out}: resumes from step {step}")
        return state, defaultdict(float, metadata["interval"])
    state = start_state(params, optimizer, mesh)
    # Otherwise the export of an older run in this folder would pass for this one's.
    if is_first():
        (out / "validation.json").unlink(missing_ok=True)
    return state, defaultdict(float)


def count_steps(config: RunConfig) -> RunConfig:
    """Return the configuration with `steps` in place of `epochs`, counted on its prepared rows.

    The rows are prepared if they are not there.
    """
    if (epochs := config.epochs) is None:
        return config
    check_folders(config)

    def count() -> int:
        tokenizer = load_tokenizer(config)
        _prepare(config, tokenizer)
        return math.ceil(epochs * open_loaders(config, tokenizer).train.epoch_steps())

    steps = broadcast_from_first(count, "process 0 prepares the rows")
    say(f"epochs = {epochs:g}: {counted(steps, 'update')} of {config.data.batch_size} rows")
    return config.with_steps(max(1, steps))


def _open_rows(config: RunConfig, tokenizer: Tokenizer) -> Loaders:
    """Prepare the rows on the first process, and open them on all."""
    waiting_for, prepared = "process 0 prepares the rows", lambda: str(_prepare(config, tokenizer))
    rows = Path(broadcast_from_first(prepared, waiting_for))
    check_rows_shared(rows)
    loaders = open_loaders(config, tokenizer)
    say(_describe_rows(rows, loaders.manifest))
    if (there := sum(file.rows for file in loaders.manifest.splits["train"])) < (
        wanted := config.data.batch_size
    ):
        say(
            f"warning: data.batch_size is {wanted:,}, and there are only {counted(there, 'row')}, "
            "so every update reads rows more than once; lower it, or give more data"
        )
    adaptive = loaders.adaptive is not None
    if (adaptive or config.evaluation.patience is not None) and loaders.validation is None:
        key = "objective.masking = 'loss'" if adaptive else "evaluation.patience"
        raise InputError(
            f"{key}: {rows} has no held-out rows to validate on; hold out more "
            f"(data.validation_rows), or leave {key} out"
        )
    return loaders


def _finish(
    loop: Loop,
    graphdef: Any,
    state: TrainState,
    tokenizer: Tokenizer,
    history: TrainingManifest | None,
) -> dict[str, Any]:
    """Report on the held-out answers and export, unless a run before did; return the report."""
    config, loaders, out = loop.config, loop.loaders, Path(loop.config.out)
    step = int(state.step)
    written = broadcast_from_first(lambda: read_finished(out, step))
    if written is not None:
        say(f"{out}: is complete at step {step}; nothing to do")
        return written
    params = loop.best_parameters(state)
    with loop.clock("evaluation"), working("evaluating the held-out answers"):
        held_out = report_held_out(
            loop.eval_step,
            params,
            loaders,
            labels=config.label_names,
            tokenizer=tokenizer,
            check=loop.stop.check,
        )
    report = {"step": step, **held_out}
    if config.evaluation.patience is not None:
        report["best_step"] = int(state.opt_state.step)
    whole = gather_on_first(params)  # All processes take part, and the first writes.
    if is_first():
        model = nnx.merge(graphdef, whole)
        sections = training_card(config, loaders.manifest, report)
        results = measured(report, "held-out answers") if "accuracy" in report else ()
        card = with_results(model_card(merged(model), sections=sections), results)
        manifest = training_manifest(config.init_from, loaders.manifest, history)
        files: Any = {"card": card, "more_files": {TRAINING: manifest.text()}}
        with working("exporting the model"):
            if config.adapter is not None:
                save_adapter(model, tokenizer, out / "adapter", **files)
            pretrained.save_pretrained(model, tokenizer, out / "export", **files)
        write_json(out / "validation.json", report)
    say(loop.clock.describe())
    return report


def _train_step(config: RunConfig, graphdef: Any, optimizer: Any, loss: Loss) -> TrainStep:
    """Return the update of a run, for any number of micro-batches that its batch grows to."""
    make = STEPS[config.parallel]

    def step(state: TrainState, batch: AnyBatch, frozen: Any) -> tuple[TrainState, Metrics]:
        parts = micro_batches(config.data, len(batch.input_ids))
        return make(graphdef, optimizer, accumulate=parts, loss=loss)(state, batch, frozen)

    return step


def prepare_rows(config: RunConfig) -> Path:
    """Prepare the rows of a run and print what was kept; return their folder.

    Raises `InputError` and `RunError` as `prepare`.
    """
    check_folders(config)
    rows = _prepare(config, load_tokenizer(config))
    print(_describe_rows(rows, read_manifest(rows)))
    return rows


def _prepare(config: RunConfig, tokenizer: Tokenizer) -> Path:
    with count_progress("preparing, records read", "preparing the rows") as show:
        seen: dict[str, int] = {}

        def progress(name: str, records: int) -> None:
            seen[name] = records
            show(sum(seen.values()), 0)

        return prepare(config.data, tokenizer, progress, head=config.head)


def _describe_rows(rows: Path, manifest: Manifest) -> str:
    return "\n".join([f"{rows}:", *summary(manifest)])
