"""The command line: thin commands over the Python API, and errors turned into exit codes."""

import gc
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from mlmjax._version import __version__
from mlmjax.cli.inputs import read_labels, read_lines
from mlmjax.errors import EXIT_FAILED

if TYPE_CHECKING:
    from mlmjax.config.run import RunConfig


CLASSIFY_CHUNK = 256


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlmjax")
def cli() -> None:
    """Masked language models that answer. --debug anywhere on the line shows tracebacks."""


@cli.command()
@click.option("--out", default="mlmjax-demo", show_default=True, help="Folder for its files.")
def demo(out: str) -> None:
    """Ask, fine-tune, test and export the packaged model on bundled textbook passages, offline."""
    from mlmjax.cli.demo import run_demo

    run_demo(Path(out))


@cli.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def prepare(config: str, overrides: tuple[str, ...]) -> None:
    """Turn the sources of CONFIG.toml into packed rows on disk, and report on them."""
    from mlmjax.data.preparing.report import write_rows_report
    from mlmjax.training.run.initial_model import load_tokenizer
    from mlmjax.training.run.train import prepare_rows

    run_config = _load(config, overrides)
    try:
        rows = prepare_rows(run_config)
    except KeyboardInterrupt:
        partial = f"{run_config.data.rows}.partial"
        click.echo(f"stopped; what is done lies in {partial}; the same command goes on", err=True)
        raise
    if os.access(rows, os.W_OK) or (rows / "report").exists():
        click.echo(f"report: {write_rows_report(rows, load_tokenizer(run_config))}")
    else:
        click.echo(f"report: none is there, and none can be written to {rows}")


@cli.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--profile", default=None, metavar="FIRST:LAST", help="Trace these updates.")
@click.option("--coordinator", default=None, metavar="HOST:PORT", help="Where process 0 listens.")
@click.option("--processes", type=click.IntRange(min=1), default=None, help="How many there are.")
@click.option("--process", type=click.IntRange(min=0), default=None, help="Which one this is.")
def train(
    config: str,
    overrides: tuple[str, ...],
    profile: str | None,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
) -> None:
    """Run the training of CONFIG.toml; the same command again resumes it.

    On a TPU pod, under SLURM, Open MPI and Kubernetes the processes of a run find one another;
    elsewhere --coordinator, --processes and --process say where and which they are.
    """
    run_config = _load(config, overrides)
    from mlmjax.parallel.launch import joined

    with joined(coordinator, processes, process):
        from mlmjax.training.run.train import run_training

        run_training(run_config, profile=profile)


@cli.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--topology", required=True, metavar="KIND:SHAPE", help="As in v5e:16x16, v5p:4x4x4, cpu:8."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def plan(config: str, overrides: tuple[str, ...], topology: str, as_json: bool) -> int:
    """Compile CONFIG.toml for devices that need not be here; exit code 1 if it does not fit."""
    run_config = _load(config, overrides)
    from mlmjax.reporting.terminal import say
    from mlmjax.training.planning.plan import make_plan, report

    found = make_plan(run_config, topology, say=say)
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(report(found)))
    return EXIT_FAILED if found["fits"] is False else 0


@cli.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Folder or hub id of the model (none: mlmjax-small, packaged); with --suite several.",
)
@click.option("--task", default=None, help="Name of a shipped task, or a task file (TOML).")
@click.option("--suite", default=None, help="In place of a task: paper, or a suite file (TOML).")
@click.option(
    "--data", default=None, help="Local file of the task's rows; for a suite a folder of files."
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    help="transformers:FOLDER_OR_ID, fine-tuned beside the models of a suite.",
)
@click.option(
    "--protocol",
    type=click.Choice(["default", "published"]),
    default="default",
    show_default=True,
    help="How options are scored; published follows the paper's scripts.",
)
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Only the first N rows.")
@click.option("--out", default=None, help="Folder for the results; a suite goes on from it.")
@click.option("--revision", default=None, help="Revision of a hub model.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--batch-size", type=click.IntRange(min=1), default=None)
@click.option(
    "--order-rows",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Rows asked up to 3 times again under other orders of their options; 0: none.",
)
def evaluate(
    overrides: tuple[str, ...],
    models: tuple[str, ...],
    task: str | None,
    suite: str | None,
    data: str | None,
    baselines: tuple[str, ...],
    protocol: str,
    limit: int | None,
    out: str | None,
    revision: str | None,
    dtype: str,
    batch_size: int | None,
    order_rows: int,
) -> None:
    """Score a model on a task and print the results as JSON; or run a whole suite into --out.

    KEY=VALUE change the settings of a suite, as in sweep.epochs=[1] seeds=2 limit=500.
    """
    if (task is None) == (suite is None):
        raise click.UsageError("Give exactly one of --task and --suite.")
    if suite is not None:
        if out is None:
            raise click.UsageError("--suite needs --out, the folder of its results.")
        if protocol != "default":
            raise click.UsageError("--protocol is of a task; a suite's entries name their own.")
        context = click.get_current_context()
        if context.get_parameter_source("order_rows") is not ParameterSource.DEFAULT:
            raise click.UsageError("--order-rows is of a task; a suite asks in one order.")
        changes = [*overrides, *([f"limit={limit}"] if limit else [])]
        from mlmjax.config.suite import load_suite
        from mlmjax.evaluation.suite.suite import run_suite
        from mlmjax.reporting.terminal import counting, say
        from mlmjax.weights.hub import PACKAGED

        try:
            run_suite(
                *load_suite(suite, changes),
                models or [PACKAGED],
                data=data,
                out=out,
                baselines=baselines,
                revision=revision,
                dtype=dtype,
                batch_size=batch_size,
                tell=say,
                counting=counting,
            )
        except KeyboardInterrupt:
            say(f"stopped; what is done lies in {out}; the same command goes on")
            raise
        _tell_packaged(not models)
        click.echo(f"report: {Path(out) / 'suite.md'}")
        return
    assert task is not None
    if len(models) > 1 or baselines or overrides:
        found = "several --model" if len(models) > 1 else "--baseline" if baselines else "KEY=VALUE"
        raise click.UsageError(f"{found}: is for --suite alone.")
    from mlmjax.config.task import load_task
    from mlmjax.data.contamination import contamination, read_training_manifest
    from mlmjax.evaluation.evaluate import run_evaluation
    from mlmjax.reporting.terminal import counting, say
    from mlmjax.storage import CLASSIFIER
    from mlmjax.weights.hub import PACKAGED, fetch
    from mlmjax.weights.pretrained import load_pretrained

    (model,) = models or [PACKAGED]
    definition = load_task(task)
    loaded, tokenizer = load_pretrained(model, revision=revision, dtype=dtype)
    _tell_packaged(not models)
    folder = fetch(model, revision=revision, local_files_only=True)
    known = contamination(definition, data, read_training_manifest(folder))
    for line in known.lines:
        say(line)
    if (folder / CLASSIFIER).exists():
        say("the model is a classifier with a prompt of its own; it is asked by the task's prompt")
    with counting("rows scored") as progress:
        results = run_evaluation(
            loaded,
            tokenizer,
            definition,
            data=data,
            protocol=protocol,
            limit=limit,
            out=out,
            batch_size=batch_size,
            progress=progress,
            known=known,
            order_rows=order_rows,
        )
    click.echo(json.dumps(results, indent=2, ensure_ascii=False))


@cli.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def compare(a: str, b: str, as_json: bool) -> None:
    """Tell which of two evaluations of the same rows is better, and whether that may be chance.

    A and B are folders that `mlmjax evaluate --out` wrote.
    """
    from mlmjax.evaluation.compare import compare_results, lines

    found = compare_results(a, b)
    shown = [json.dumps(found, indent=2, ensure_ascii=False)] if as_json else lines(found)
    for line in shown:
        click.echo(line)


@cli.command()
@click.option(
    "--model", default=None, help="Folder or hub id of the model (none: mlmjax-small, packaged)."
)
@click.option(
    "--labels",
    default=None,
    help='Labels as "a,b,c", or a file with one label or label<TAB>description per line; '
    "a saved classifier brings its own.",
)
@click.option("--revision", default=None, help="Revision of a hub model.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--batch-size", type=click.IntRange(min=1), default=None)
@click.argument("file", default="-")
def classify(
    model: str | None,
    labels: str | None,
    revision: str | None,
    dtype: str,
    batch_size: int | None,
    file: str,
) -> None:
    """Classify each line of FILE (or - for standard input); one JSON line per input line."""
    gc.set_threshold(50_000, 10, 10)  # as `main` says, and seldom before the end too
    from mlmjax.classification.predictor import Predictor
    from mlmjax.reporting.terminal import say
    from mlmjax.weights.hub import PACKAGED

    names = None if labels is None else read_labels(labels)
    if file != "-":
        for _ in read_lines(file):  # a bad line is refused before any answer is printed
            pass
    predictor = Predictor.from_pretrained(
        PACKAGED if model is None else model,
        names,
        revision=revision,
        dtype=dtype,
        batch_size=batch_size,
    )
    _tell_packaged(model is None)
    lines = read_lines(file)
    while chunk := list(itertools.islice(lines, CLASSIFY_CHUNK)):
        for answer in predictor.answers(chunk):
            click.echo(json.dumps(answer, ensure_ascii=False))
    if predictor.shortened:
        say(f"{predictor.shortened} of the texts did not fit the model; their ends were cut off")


def _tell_packaged(is_used: bool) -> None:
    from mlmjax.reporting.terminal import say
    from mlmjax.weights.hub import PACKAGED

    if is_used:
        say(f"no --model: the packaged {PACKAGED} answers, a small model for trying things out")


def _load(config: str, overrides: Sequence[str]) -> "RunConfig":
    from mlmjax.config.run import load_config

    return load_config(config, overrides)
