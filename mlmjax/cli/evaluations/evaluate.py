"""Run the three kinds of `mlmjax evaluate`: a suite, a task, and a task of several questions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlmjax.config.decisions import DecisionTask


def evaluate_suite(given: Mapping[str, Any]) -> None:
    """Run or resume a suite."""
    if given["out"] is None:
        raise click.UsageError("--suite needs --out, the folder of its results.")
    from mlmjax.config.suite import load_suite
    from mlmjax.evaluation.suite.suite import run_suite
    from mlmjax.parallel.environment import check_devices
    from mlmjax.reporting.terminal import say
    from mlmjax.weights.hub import PACKAGED, report_packaged

    check_devices()
    more = [f"limit={given['limit']}"] if given["limit"] else []
    more += [f"anchor={json.dumps(given['anchor'])}"] if given["anchor"] else []
    options = ("data", "out", "baselines", "revision", "dtype", "batch_size")
    try:
        run_suite(
            *load_suite(given["suite"], [*given["overrides"], *more]),
            given["models"] or [PACKAGED],
            **{name: given[name] for name in options},
        )
    except KeyboardInterrupt:
        say(f"stopped; finished results are in {given['out']}; the same command resumes")
        raise
    report_packaged(not given["models"])
    click.echo(f"report: {Path(given['out']) / 'suite.md'}")


def answer_decisions(task: "DecisionTask", given: Mapping[str, Any]) -> None:
    """Score a decider on a task of several questions."""
    from mlmjax.data.contamination import contamination, read_training_manifest
    from mlmjax.decisions.decider import Decider
    from mlmjax.evaluation.decisions import decision_lines, evaluate_decisions
    from mlmjax.evaluation.summary import warn_of_few, warn_of_shortened
    from mlmjax.parallel.environment import check_devices
    from mlmjax.reporting.terminal import count_progress, say
    from mlmjax.scoring.engine import describe_forward_compiling
    from mlmjax.weights.hub import PACKAGED, fetch, report_packaged

    (model,) = given["models"] or [PACKAGED]
    check_devices()
    options = {name: given[name] for name in ("revision", "dtype", "batch_size", "anchor")}
    decider = Decider(model, progress=False, **options)
    report_packaged(not given["models"])
    folder = fetch(model, revision=given["revision"], local_files_only=True)
    known = contamination(task, given["data"], read_training_manifest(folder))
    for line in known.lines:
        say(line)
    compiling = describe_forward_compiling(decider.model.config.num_hidden_layers)
    own = {name: given[name] for name in ("data", "limit", "out", "order_rows")}
    with count_progress("rows answered", compiling) as progress:
        results = evaluate_decisions(decider, task, **own, progress=progress, known=known)
    as_json = [json.dumps(results, indent=2, ensure_ascii=False)]
    click.echo("\n".join(as_json if given["as_json"] else decision_lines(results)))
    for line in (*warn_of_shortened(decider), *warn_of_few(results["n"])):
        say(line)


def evaluate_task(given: Mapping[str, Any]) -> None:
    """Score a model on a task of one question."""
    from mlmjax.config.tables import shipped_names
    from mlmjax.config.task import load_task
    from mlmjax.data.contamination import contamination, read_training_manifest
    from mlmjax.evaluation.evaluate import run_evaluation
    from mlmjax.evaluation.summary import summary_lines, warn_of_few
    from mlmjax.parallel.environment import check_devices
    from mlmjax.reporting.terminal import count_progress, say
    from mlmjax.scoring.engine import describe_forward_compiling
    from mlmjax.storage import CLASSIFIER
    from mlmjax.weights.hub import PACKAGED, fetch, report_packaged
    from mlmjax.weights.pretrained import load_pretrained

    (model,) = given["models"] or [PACKAGED]
    task = load_task(given["task"], shipped_names("decision"))
    if given["encoding"] is not None:
        task = task.model_copy(update={"encoding": given["encoding"]})
    if given["anchor"] is not None:
        task = task.model_copy(update={"anchor": given["anchor"]})
    task.under(given["protocol"])  # an unknown name raises an error before anything is loaded
    check_devices()
    loaded = load_pretrained(model, revision=given["revision"], dtype=given["dtype"])
    report_packaged(not given["models"])
    folder = fetch(model, revision=given["revision"], local_files_only=True)
    known = contamination(task, given["data"], read_training_manifest(folder))
    for line in known.lines:
        say(line)
    if (folder / CLASSIFIER).exists():
        say("the model is a classifier with its own prompt; the task's prompt is used instead")
    options = ("data", "protocol", "limit", "out", "batch_size", "order_rows", "explain")
    compiling = describe_forward_compiling(loaded[0].config.num_hidden_layers)
    with count_progress("rows scored", compiling) as progress:
        results = run_evaluation(
            *loaded, task, **{name: given[name] for name in options}, progress=progress, known=known
        )
    as_json = [json.dumps(results, indent=2, ensure_ascii=False)]
    click.echo("\n".join(as_json if given["as_json"] else summary_lines(results)))
    for line in warn_of_few(results["n"]):
        say(line)
    if given["out"] is not None:
        say(f"report: {Path(given['out']) / 'report.md'}")
