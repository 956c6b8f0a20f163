"""Validate a run: figures over the held-out rows, and the report on held-out answers."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlmjax import errors
from mlmjax.config.run import RunConfig
from mlmjax.data.batch import ATP, UNUSED, Options
from mlmjax.data.loader import LabelLoader, Loader
from mlmjax.data.manifest import Manifest
from mlmjax.data.preparing.prepare import summary
from mlmjax.parallel.processes import sum_over_processes
from mlmjax.parallel.sharding import mesh_of, place
from mlmjax.reporting import pages
from mlmjax.reporting.markdown import shortened
from mlmjax.statistics.metrics import wilson_interval
from mlmjax.storage import CONFIG, without_folder
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.optimizer import averaged_parameters
from mlmjax.training.run.inputs import AnyLoader, Loaders, feed
from mlmjax.training.run.log import Totals, add, count_tokens, summarize
from mlmjax.training.step import TrainState
from mlmjax.weights.tensors.tensor_files import INDEX, WEIGHTS

EvalStep = Callable[[Any, Any], Mapping[str, jax.Array]]
NAME = 17
"""Characters of a name or an answer with which a line of the report fits 80 columns."""
SOURCE_FIGURES = ("loss_atp", "loss_mlm", "answer_accuracy")


def validate(
    eval_step: EvalStep,
    params: Any,
    loader: AnyLoader,
    check: Callable[[], None],
    width: int | None = None,
    watch: Callable[[Mapping[str, jax.Array]], None] = lambda metrics: None,
) -> dict[str, float | None]:
    """Return the figures of one pass over the held-out rows.

    `check` is called before each batch, and raises if a signal requests a stop. With `width` the
    targets are filled up to it, so that the step is not compiled again. `watch` gets the metrics of
    each batch.
    """
    totals: Totals = defaultdict(float)
    counts: Totals = defaultdict(float)
    change = partial(_widened, width=width)
    for _, batch, counted in feed(loader, mesh_of(params), 0, loader.epoch_steps(), change):
        check()
        metrics = eval_step(params, batch)
        watch(metrics)
        add(totals, jax.device_get({k: v for k, v in metrics.items() if not v.ndim}))
        add(counts, count_tokens(counted))
    add(totals, sum_over_processes(counts))
    return summarize(totals)


def _widened(batch: Any, width: int | None) -> Any:
    if width is None:
        return batch
    unused = ((0, 0), (0, width - batch.target_ids.shape[1]))
    targets = ("target_positions", "target_ids", "target_objective")
    wide: dict[str, Any] = {
        name: np.pad(getattr(batch, name), unused, constant_values=UNUSED) for name in targets
    }
    if batch.weights is not None:
        wide["weights"] = np.pad(batch.weights, unused)
    if batch.options is not None:
        ids, probs = (np.pad(part, (*unused, (0, 0))) for part in batch.options)
        wide["options"] = Options(ids, probs)  # of no target, so that any numbers do
    return batch._replace(**wide)


def report_held_out(
    eval_step: EvalStep,
    params: Any,
    loaders: Loaders,
    *,
    labels: Sequence[str],
    tokenizer: Tokenizer,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Return how well every held-out answer is predicted; `check` is that of `validate`.

    There are the accuracy with Wilson's 95 % interval and the most common answers, overall and by
    task (`per_task`). The MLM head has the losses by source (`per_source`), a classification head
    has macro-F1. A regression has `mse`, `mae`, and `mse_of_mean`, the error of giving the mean.
    """
    answers, validation, tasks = loaders.answers, loaders.validation, loaders.manifest.tasks
    if answers is None:
        return {"n": 0}
    if isinstance(answers, LabelLoader):

        def read_labels(batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            logits = np.asarray(eval_step(params, batch)["logits"])
            return ~np.isnan(batch.labels), batch.labels, logits

        task_of, gold, logits = _answers(answers, check, read_labels)
        if not labels:
            errors = logits[:, 0].astype(np.float64) - gold
            return {
                "n": len(gold),
                "mse": float(np.mean(errors**2)),
                "mae": float(np.mean(abs(errors))),
                "mse_of_mean": float(np.var(gold.astype(np.float64))),
            }
        from sklearn.metrics import f1_score  # takes as long to import as all else of a run

        guess, gold = logits.argmax(axis=1), gold.astype(int)
        report = _accuracy(task_of, gold, guess == gold, tasks, lambda number: labels[number])
        macro_f1 = f1_score(gold, guess, average="macro", zero_division=0)
        return {**report, "macro_f1": float(macro_f1)}

    assert isinstance(validation, Loader)
    width = validation.target_width  # The step is compiled for this width.

    def read_targets(batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        correct = np.asarray(eval_step(params, _widened(batch, width))["correct"])
        is_answer = np.asarray(batch.target_objective) == ATP
        return is_answer, np.asarray(batch.target_ids), correct[:, : is_answer.shape[1]]

    report = _accuracy(
        *_answers(answers, check, read_targets), tasks, lambda token: tokenizer.decode([token])
    )
    report["per_source"] = {name: dict.fromkeys(SOURCE_FIGURES) for name in loaders.by_source}
    for name, of_source in loaders.by_source.items():
        for loader in of_source:
            figures = validate(eval_step, params, loader, check, width)
            known = {key: figures[key] for key in SOURCE_FIGURES if figures[key] is not None}
            report["per_source"][name] |= known
    return report


def _answers(
    loader: AnyLoader,
    check: Callable[[], None],
    read: Callable[[Any], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the task and the gold answer of each held-out answer, and what the model gave.

    `read` takes a batch and returns where its answers are, the gold answers and the model's.
    """
    parts = []
    for step, batch in loader.batches(0, loader.epoch_steps()):
        check()
        is_answer, gold, given = read(batch)
        parts.append((loader.tasks(step)[is_answer], gold[is_answer], given[is_answer]))
    task_of, gold, given = map(np.concatenate, zip(*parts, strict=True))
    return task_of, gold, given


def _accuracy(
    task_of: np.ndarray,
    gold: np.ndarray,
    is_right: np.ndarray,
    tasks: Sequence[str],
    name: Callable[[int], str],
) -> dict[str, Any]:
    """Return accuracy and most common answer, overall and by task; `name` names an answer."""
    n, correct = len(gold), int(is_right.sum())
    if not n:
        return {"n": 0}
    per_task, most_common = {}, []
    for task in sorted(np.unique(task_of).tolist(), key=lambda number: tasks[number]):
        mine = task_of == task
        most_common.append(int(np.unique(gold[mine], return_counts=True)[1].max()))
        per_task[tasks[task]] = {
            "n": int(mine.sum()),
            "accuracy": int(is_right[mine].sum()) / int(mine.sum()),
            **_majority(gold[mine], name),
        }
    return {
        "n": n,
        "accuracy": correct / n,
        "accuracy_ci95": list(wilson_interval(correct, n)),
        **_majority(gold, name),
        # The accuracy of giving each task's most common answer.
        "per_task_majority": sum(most_common) / n,
        "per_task": per_task,
    }


def _majority(gold: np.ndarray, name: Callable[[int], str]) -> dict[str, Any]:
    """Return the share and the name of the most common answer; of equals, the smallest."""
    answers, counts = np.unique(gold, return_counts=True)
    most = int(counts.argmax())
    return {"majority": int(counts[most]) / len(gold), "majority_answer": name(int(answers[most]))}


def report_lines(report: Mapping[str, Any], most: int | None = NAME) -> list[str]:
    """Return the report on held-out answers as lines: by task, overall, by source.

    Names and answers of more than `most` characters lose their middle, so that a line has at most
    80 columns. None shows them whole.
    """

    def short(text: str) -> str:
        return text if most is None else shortened(text, most)

    sources = _source_lines(report.get("per_source") or {}, short)
    if not report["n"]:
        return ["there are no held-out answers", *sources]
    if "mse" in report:
        return [
            f"{report['n']} held-out values: mean squared error {report['mse']:.4g} (always giving "
            f"their mean: {report['mse_of_mean']:.4g}), mean absolute error {report['mae']:.4g}"
        ]
    baseline = "majority, by task"
    width = max(map(len, [*map(short, report["per_task"]), baseline]))
    heads = f"accuracy  {'95 % interval':14}  majority  most common"
    lines = [f"{'task':{width}}  {'n':>6}  {heads}"]
    for name, row in (*report["per_task"].items(), ("all", report)):
        interval = "{:.3f} to {:.3f}".format(*row["accuracy_ci95"]) if row is report else ""
        figures = f"{row['accuracy']:8.3f}  {interval:14}  {row['majority']:8.3f}"
        answer = short(repr(row["majority_answer"]))
        lines.append(f"{short(name):{width}}  {row['n']:6d}  {figures}  {answer}")
    lines.append(f"{baseline:{width}}  {'':6}  {'':8}  {'':14}  {report['per_task_majority']:8.3f}")
    return lines + sources


def _source_lines(
    per_source: Mapping[str, Mapping[str, float | None]], short: Callable[[str], str]
) -> list[str]:
    """Return the losses of the sources as lines: a heading, then one for each."""
    losses = ("loss_atp", "loss_mlm")
    rows = [["source", *losses]] if per_source else []
    for name, figures in per_source.items():
        shown = ("" if figures[key] is None else f"{figures[key]:.3f}" for key in losses)
        rows.append([short(name), *shown])
    width = max((len(name) for name, *_ in rows), default=0)
    return [f"{name:{width}}  {atp:>8}  {mlm:>8}" for name, atp, mlm in rows]


def read_finished(out: Path, step: int) -> dict[str, Any] | None:
    """Return the report of a run that is complete and exported at this step, else None."""
    try:
        report, files = json.loads((out / "validation.json").read_bytes()), out / "export"
        report_lines(report)  # fails for a report that is not whole
        weights = (files / WEIGHTS).is_file() or (files / INDEX).is_file()
        is_exported = weights and (files / CONFIG).is_file()
        return report if report["step"] == step and is_exported else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def training_card(config: RunConfig, manifest: Manifest, report: Mapping[str, Any]) -> str:
    """Return the part of a model card on the training, its data, and the held-out answers."""
    path = config.objective.mask_table
    start = None if config.init_from is None else without_folder(config.init_from)
    rows = summary(manifest)
    for source in (*manifest.sources, *manifest.validation_sources):
        rows = [line.replace(source.name, without_folder(source.name)) for line in rows]
    return pages.render(
        "assets/training_card.md",
        config=config,
        start=start,
        table=None if path is None else without_folder(path),
        rows=rows,
        held_out=report_lines(report, most=None),
    )


def record_validation(state: TrainState, loss: float) -> TrainState:
    """Return the state with the validation loss of its step, and its parameters if it is lowest.

    The optimizer is one of `optimizer.keep_best`.
    """
    best = state.opt_state
    step, lowest, since = jax.device_get((state.step, best.loss, best.since))
    values: dict[str, Any] = {"validated": np.int32(step), "since": np.int32(since + 1)}
    if loss < lowest:
        values |= {"loss": np.float32(loss), "step": np.int32(step), "since": np.int32(0)}
    placed = {name: place(value, getattr(best, name).sharding) for name, value in values.items()}
    if loss < lowest:
        found = averaged_parameters(state.params, best)
        placed["params"] = jax.tree.map(jnp.copy, found)  # an update donates the others
    return state._replace(opt_state=best._replace(**placed))


def is_over(state: TrainState, patience: int | None) -> bool:
    """Tell whether `patience` validations in a row have not lowered the loss."""
    return patience is not None and int(jax.device_get(state.opt_state.since)) >= patience


def describe_best(state: TrainState) -> str:
    """Say which step was the best, and how many validations there were after it."""
    best = state.opt_state
    loss, step, since = jax.device_get((best.loss, best.step, best.since))
    return (
        f"the lowest validation loss is {loss:.4f} at step {step}, and "
        f"{errors.counted(int(since), 'validation')} after it did not improve"
    )
