"""Define the commands of `mlmjax`, each a thin layer over the Python API."""

import gc
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlmjax.cli import options
from mlmjax.cli.convert import convert
from mlmjax.cli.decide import decide, serve
from mlmjax.cli.deploy import embed, export_program, mask_table, push
from mlmjax.cli.evaluations.evaluate import answer_decisions, evaluate_suite, evaluate_task
from mlmjax.cli.options import FiniteRange, Group, LearningRate, given_words
from mlmjax.errors import EXIT_FAILED, counted

if TYPE_CHECKING:
    from mlmjax.config.run import RunConfig

# Options that several commands share.
_config = click.argument("config")
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_positive = click.IntRange(min=1)
_json = click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")


@click.group(cls=Group, examples=["mlmjax demo", "mlmjax fit tickets.csv --text body --label team"])
def cli() -> None:
    """Masked language models that answer."""


cli.add_command(convert)
cli.add_command(decide)
cli.add_command(embed)
cli.add_command(export_program)
cli.add_command(mask_table)
cli.add_command(serve)
cli.add_command(push)


@cli.command(examples=["mlmjax demo --out my-demo", "mlmjax demo --limit 80"])
@click.option("--out", default="mlmjax-demo", show_default=True, help="Folder for its files.")
@click.option(
    "--limit",
    type=click.IntRange(min=8),
    metavar="N",
    help="Learn from about N passages and test on N, for a quick look; the figures are poorer.",
)
def demo(out: str, limit: int | None) -> None:
    """Fine-tune the packaged model offline.

    It learns bundled textbook passages, is tested on others, and is exported with a report.
    """
    from mlmjax.cli.demo import run_demo

    run_demo(Path(out), limit=limit)


@cli.command(examples=["mlmjax prepare configs/atp_tiny.toml data.workers=2"])
@_config
@_overrides
def prepare(config: str, overrides: tuple[str, ...]) -> None:
    """Prepare the rows of CONFIG.toml on disk.

    The sources are packed into rows, and a report on them is written.
    """
    from mlmjax.data.preparing.report import write_rows_report
    from mlmjax.training.run.initial_model import load_tokenizer
    from mlmjax.training.run.train import prepare_rows

    run_config = _load(config, overrides)
    try:
        rows = prepare_rows(run_config)
    except KeyboardInterrupt:
        partial = f"{run_config.data.rows}.partial"
        click.echo(f"stopped; finished work is in {partial}; the same command resumes", err=True)
        raise
    if os.access(rows, os.W_OK) or (rows / "report").exists():
        click.echo(f"report: {write_rows_report(rows, load_tokenizer(run_config))}")
    else:
        click.echo(f"report: there is none, and {rows} cannot be written")


@cli.command(
    examples=[
        "mlmjax train configs/atp_tiny.toml",
        "mlmjax train configs/atp_tiny.toml steps=200 out=runs/short",
        "mlmjax train configs/atp_tiny.toml objective.masking=my_masks:nouns --code my_masks",
    ]
)
@_config
@_overrides
@click.option("--profile", metavar="FIRST:LAST", help="Trace these updates.")
@click.option(
    "--code",
    multiple=True,
    metavar="MODULE",
    help="Run code of this module, which CONFIG names. Repeat it for others.",
)
@click.option("--coordinator", metavar="HOST:PORT", help="Address of process 0.")
@click.option("--processes", type=_positive, help="Number of processes.")
@click.option("--process", type=click.IntRange(min=0), help="Number of this one.")
def train(
    config: str,
    overrides: tuple[str, ...],
    profile: str | None,
    code: tuple[str, ...],
    coordinator: str | None,
    processes: int | None,
    process: int | None,
) -> None:
    """Run or resume the training of CONFIG.toml.

    The same command again resumes it.

    On a TPU pod and under SLURM, Open MPI and Kubernetes, the processes of a run find one another.
    Elsewhere, give --coordinator, --processes and --process.
    """
    run_config = _load(config, overrides)
    from mlmjax.parallel.launch import joined

    with joined(coordinator, processes, process):
        from mlmjax.training.run.train import run_training

        run_training(run_config, profile=profile, code=code)


@cli.command(examples=["mlmjax init fit tickets", "mlmjax init atp large --machine v5e-16"])
@click.argument("kind", type=click.Choice(["atp", "fit", "mlm"]))
@click.argument("name", required=False)
@click.option(
    "--machine",
    "machine_name",
    metavar="MACHINE",
    help="Machine to train on, such as v5e-16, h200:8, rtx4090 (default: the one at hand).",
)
def init(kind: str, name: str | None, machine_name: str | None) -> None:
    """Write a run file to begin from.

    KIND is atp (prompts with one-token answers), fit (a table of texts with labels) or mlm (plain
    text). NAME.toml has comments, and precision, batch and micro-batches that suit the machine.
    """
    from mlmjax.cli.start.init import write_run_file
    from mlmjax.cli.start.machine import find_machine, machine_by_name
    from mlmjax.reporting.terminal import say

    machine = find_machine() if machine_name is None else machine_by_name(machine_name)
    say(f"{'found' if machine_name is None else 'writing for'} {machine.described}")
    path, run_config = write_run_file(kind, name, machine)
    data, parts = run_config.data, counted(run_config.data.accumulate, "part")
    click.echo(
        f"{path}: {run_config.init_from}, {run_config.dtype}, {data.batch_size} rows of "
        f"{data.seq_length} tokens in {parts}, remat {run_config.remat}\n"
        f"Edit the lines marked yours, then: mlmjax train {shlex.quote(str(path))}"
    )
    if machine.name is not None:
        say(f"to check it: mlmjax plan {shlex.quote(str(path))} --topology {machine.name}")


@cli.command(examples=["mlmjax plan configs/atp_base.toml --topology v6e-8"])
@_config
@_overrides
@click.option(
    "--topology",
    required=True,
    metavar="MACHINE",
    help="Such as v5e-16, v5litepod-256, v6e-8, v5p:4x4x4, h200:8, a100-80g, rtx4090, cpu:8.",
)
@click.option(
    "--search-seconds",
    type=FiniteRange(min=0),
    default=600.0,
    show_default=True,
    help="If it does not fit, start no compilation of other settings after this time.",
)
@_json
def plan(
    config: str,
    overrides: tuple[str, ...],
    topology: str,
    search_seconds: float,
    as_json: bool,
) -> int:
    """Check if CONFIG.toml fits a TPU or GPU.

    None is needed here: TPUs have a compiler (mlmjax[plan]), and the memory of GPUs is estimated.
    The exit code is 1 if the run does not fit.
    """
    run_config = _load(config, overrides)
    from mlmjax.reporting.terminal import say, working
    from mlmjax.training.planning.plan import make_plan, report

    found = make_plan(run_config, topology, say=say, watch=working, search_seconds=search_seconds)
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(report(found)))
    return EXIT_FAILED if found["fits"] is False else 0


@cli.command(
    examples=[
        "mlmjax evaluate --task mmlu --data mmlu.jsonl --out results",
        "mlmjax evaluate --suite paper --data eval --out suite sweep.epochs=[1]",
    ]
)
@_overrides
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Folder or Hub id of the model (default: the packaged mlmjax-small). Repeat it with "
    "--suite.",
)
@click.option("--task", help="Name of a shipped task, or a task file (TOML).")
@click.option("--suite", help="Instead of a task: paper, or a suite file (TOML).")
@click.option("--data", help="File with the task's rows; for a suite, a folder of files.")
@options.encoding
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="FOLDER",
    help="Results of benchmarks/torch_baseline.py, as one more row of a suite's tables.",
)
@click.option(
    "--protocol",
    default="default",
    show_default=True,
    metavar="NAME",
    help="A protocol of the task; `published` of mmlu and mmlu_pro follows the paper's scripts.",
)
@click.option("--limit", type=_positive, help="Only the first N rows; for a suite, N drawn rows.")
@click.option("--out", help="Folder for the results; a suite resumes from it.")
@options.revision
@options.dtype
@options.batch_size
@click.option(
    "--order-rows",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Measure order sensitivity on N rows (asks each again with up to 3 other orders of its "
    "options); 0 turns it off.",
)
@click.option(
    "--explain",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Write words.html into --out: the N surest wrong answers with the words behind them.",
)
@options.anchor
@_json
@click.pass_context
def evaluate(context: click.Context, /, **given: Any) -> None:
    """Score a model on a task or a suite.

    A task prints a short table, or with --json all figures. A suite writes into --out. KEY=VALUE
    changes a setting of a suite, such as sweep.epochs=[1] seeds=2 limit=500.
    """
    if (given["task"] is None) == (given["suite"] is None):
        raise click.UsageError("Give exactly one of --task and --suite.")
    if given["suite"] is not None:
        _reject(context, "a task", "protocol", "order_rows", "explain", "as_json", "encoding")
        evaluate_suite(given)
    else:
        _reject(context, "--suite", "baselines", "overrides")
        if len(given["models"]) > 1:
            raise click.UsageError("several --model belong to --suite.")
        from mlmjax.config.decisions import find_decision_task

        decisions = find_decision_task(given["task"])
        if decisions is None:
            evaluate_task(given)
        else:
            _reject(context, "a task of one question", "protocol", "explain", "anchor", "encoding")
            answer_decisions(decisions, given)


def _reject(context: click.Context, owner: str, *names: str) -> None:
    """Raise `UsageError` for options that belong to the other kind of evaluation."""
    shown = {parameter.name: parameter for parameter in context.command.params}
    for name in names:
        is_given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
        if is_given and context.params[name] not in ((), "default"):
            option = shown[name].opts[0] if name != "overrides" else "KEY=VALUE"
            raise click.UsageError(f"{option} belongs to {owner}; leave it out here.")


@cli.command(examples=["mlmjax compare results-a results-b"])
@click.argument("a")
@click.argument("b")
@_json
def compare(a: str, b: str, as_json: bool) -> None:
    """Compare two evaluations of the same rows.

    The test of significance is paired. A and B are folders written by `mlmjax evaluate --out`.
    """
    from mlmjax.evaluation.compare import compare_results, lines

    found = compare_results(a, b)
    shown = [json.dumps(found, indent=2, ensure_ascii=False)] if as_json else lines(found)
    for line in shown:
        click.echo(line)


@cli.command(examples=["mlmjax fit tickets.csv --text body --label team --out tickets-classifier"])
@click.argument("table")
@click.option("--text", metavar="COLUMN", help="Column of the texts (default: the obvious one).")
@click.option("--label", metavar="COLUMN", help="Column of the labels (default: the obvious one).")
@click.option("--out", metavar="DIR", help="Folder to write (default: TABLE-classifier).")
@click.option(
    "--model",
    help="Folder or Hub id of the model to fine-tune (default: the packaged mlmjax-small).",
)
@click.option(
    "--answer",
    type=click.Choice(["words", "letters", "head"]),
    help="How it answers (default: chosen from the labels).",
)
@click.option(
    "--learning-rate",
    type=LearningRate(),
    help='Highest learning rate, or "auto" to find one (default: by the parameters trained).',
)
@click.option("--epochs", type=_positive, help="Passes over the rows (default: by their number).")
@click.option(
    "--adapter",
    type=click.Choice(["lora"]),
    help="Freeze the model and train an adapter, which is saved with a pointer to the model.",
)
@click.option("--rank", type=click.IntRange(1, 1024), help="Rank of the adapter (default: 8).")
@click.option(
    "--alpha",
    type=FiniteRange(min=0, min_open=True),
    help="Alpha of the adapter, which is scaled by alpha / rank (default: 16).",
)
@click.option(
    "--train",
    multiple=True,
    metavar="PATTERN",
    help="Train only parameters such as '*bias'; repeat it for more.",
)
@click.option(
    "--restarts",
    type=click.IntRange(0, 100),
    default=0,
    help="Further trainings if nothing was learned; 20 % of the training rows choose.",
)
@click.option(
    "--test-share",
    type=FiniteRange(min=0, max=1, min_open=True, max_open=True),
    default=0.2,
    show_default=True,
    help="Share of each label's rows to test on.",
)
@click.option(
    "--calibration-share",
    type=FiniteRange(min=0, max=1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the rows to fit a temperature to; 0 leaves the probabilities as they are.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of split and training.")
@options.encoding
@options.csv
@options.max_length
@click.option("--skip-blank", is_flag=True, help="Leave out rows without a text or a label.")
@click.option(
    "--drop-label", "drop_labels", multiple=True, metavar="LABEL", help="Leave out its rows."
)
@options.anchor
@options.revision
@options.dtype
@_json
def fit(
    table: str,
    model: str | None,
    as_json: bool,
    adapter: str | None,
    rank: int | None,
    alpha: float | None,
    **options: Any,
) -> None:
    """Make a classifier from a labelled TABLE.

    TABLE is CSV, TSV, JSON lines or parquet (.gz and .zst too). A share of the rows is held out to
    test it, another one to calibrate it. --out gets the model and a page with the results.
    """
    from mlmjax.cli.tables.fit import fit_table
    from mlmjax.cli.tables.lines import result_lines
    from mlmjax.weights.hub import PACKAGED, report_packaged

    given = {"kind": adapter, "rank": rank, "alpha": alpha}
    settings = {name: value for name, value in given.items() if value is not None} or None
    if settings and adapter is None:
        raise click.UsageError(f"--{next(iter(settings))} belongs to --adapter lora.")
    report_packaged(model is None)
    source = PACKAGED if model is None else model
    words = given_words(click.get_current_context())
    found = fit_table(table, model=source, adapter=settings, words=words, **options)
    shown = [json.dumps(found, indent=2, ensure_ascii=False)] if as_json else result_lines(found)
    for line in shown:
        click.echo(line)


@cli.command(
    examples=[
        "mlmjax classify --labels sports,economy texts.txt",
        "mlmjax classify --model tickets-classifier --text body --out answers.csv new.csv",
    ]
)
@click.option("--model", help="Folder or Hub id of the model (default: the packaged mlmjax-small).")
@click.option(
    "--labels",
    help='Labels as "a,b,c", or a file with one label or label<TAB>description per line; '
    "a saved classifier has its own.",
)
@options.revision
@options.dtype
@options.batch_size
@options.anchor
@click.option("--text", metavar="COLUMN", help="FILE is a table; the column of its texts.")
@click.option("--id", "id_", metavar="COLUMN", help="Put this column in place of line numbers.")
@click.option("--out", metavar="FILE", help="Write a .jsonl, .csv or .parquet file.")
@options.encoding
@options.csv
@options.max_length
@click.option("--echo", is_flag=True, help="Repeat each text in its answer.")
@click.option("--full", is_flag=True, help="Print all digits of the probabilities, not six.")
@click.argument("file", default="-")
def classify(file: str, **options: Any) -> None:
    """Classify the lines of FILE, or its rows.

    FILE may be - for standard input, or a table with --text. Each answer is one JSON line with the
    number of its line, or with its --id.
    """
    gc.set_threshold(50_000, 10, 10)  # imports make many objects, and few of them are garbage
    from mlmjax.cli.tables.classify import classify_file

    classify_file(file, **options)


def _load(config: str, overrides: Sequence[str]) -> "RunConfig":
    from mlmjax.config.run import load_config
    from mlmjax.reporting.terminal import say

    return load_config(config, overrides, say=say)
