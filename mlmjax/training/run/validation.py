"""Figures of a run: sums over steps turned into a line of metrics, and the held-out answers."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sklearn.metrics import f1_score

from mlmjax.config.run import RunConfig
from mlmjax.data.batch import ATP, Batch
from mlmjax.data.loader import LabelLoader, Loader
from mlmjax.data.manifest import Manifest
from mlmjax.data.preparing.prepare import summary
from mlmjax.parallel.processes import sum_over_processes
from mlmjax.parallel.sharding import mesh_of
from mlmjax.statistics.metrics import wilson_interval
from mlmjax.storage import CONFIG
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.run.inputs import feed
from mlmjax.training.run.log import Totals, _widened, add, count_tokens, summarize

EvalStep = Callable[[Any, Any], Mapping[str, jax.Array]]
SOURCE_FIGURES = ("loss_atp", "loss_mlm", "answer_accuracy")


def validate(
    eval_step: EvalStep,
    params: Any,
    loader: Loader | LabelLoader,
    stop: Callable[[], bool] = lambda: False,
    width: int | None = None,
) -> dict[str, float | None] | None:
    """Go once through the held-out rows; return the figures, or None if `stop()` became true.

    With `width` the targets are filled up to it, as in `answer_report`.
    """
    totals: Totals = defaultdict(float)
    counts: Totals = defaultdict(float)

    def widened(batch: Any) -> Any:
        return batch if width is None or not isinstance(batch, Batch) else _widened(batch, width)

    for _, batch, counted in feed(loader, mesh_of(params), 0, loader.epoch_steps(), widened):
        if stop():
            return None
        add(totals, jax.device_get(_scalars(eval_step(params, batch))))
        add(counts, count_tokens(counted))
    add(totals, sum_over_processes(counts))
    return summarize(totals)


def _scalars(metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: value for name, value in metrics.items() if not value.ndim}


def answer_report(
    eval_step: EvalStep,
    params: Any,
    loader: Loader,
    width: int,
    tasks: Sequence[str],
    tokenizer: Tokenizer,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Return the accuracy on held-out answers, overall and by task, beside the commonest answer.

    `loader` draws ATP alone, so every held-out answer counts once; its targets are filled up to
    `width`, for which the step is compiled already. The interval is Wilson's 95 %.
    The commonest answers are those of the held-out answers themselves, the hardest to beat. None
    if `stop()` became true.
    """
    answers: dict[int, Counter[int]] = defaultdict(Counter)
    correct: Counter[int] = Counter()
    for step, batch in loader.batches(0, loader.epoch_steps()):
        if stop():
            return None
        is_answer = np.asarray(batch.target_objective) == ATP
        metrics = eval_step(params, _widened(batch, width))
        right = np.asarray(metrics["correct"])[:, : is_answer.shape[1]][is_answer]
        numbers = loader.tasks(step)[is_answer]
        for task, answer in zip(numbers, np.asarray(batch.target_ids)[is_answer], strict=True):
            answers[int(task)][int(answer)] += 1
        correct.update(int(task) for task in numbers[right])
    return _accuracy_report(answers, correct, tasks, lambda token: tokenizer.decode([token]))


def source_report(
    eval_step: EvalStep,
    params: Any,
    by_source: Mapping[str, Sequence[Loader | LabelLoader]],
    width: int,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, float | None]] | None:
    """Return, for each source of held-out rows, its loss by ATP and by MLM, and its accuracy.

    `by_source` is that of `run.Loaders`; None stands for what a source has not, or the run does not
    train. None if `stop()` became true.
    """
    report = {}
    for name, loaders in by_source.items():
        found: dict[str, float | None] = dict.fromkeys(SOURCE_FIGURES)
        for loader in loaders:
            figures = validate(eval_step, params, loader, stop, width)
            if figures is None:
                return None
            found |= {key: figures[key] for key in found if figures[key] is not None}
        report[name] = found
    return report


def label_report(
    eval_step: EvalStep,
    params: Any,
    loader: LabelLoader,
    labels: Sequence[str],
    tasks: Sequence[str],
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Return how well the classification head does on the held-out texts.

    With `labels` as `answer_report`, and macro-F1; without, for a regression: `mse`, `mae`, and
    `mse_of_mean`, the error of answering the held-out mean. None if `stop()` became true.
    """
    truth, logits, numbers = [], [], []
    for step, batch in loader.batches(0, loader.epoch_steps()):
        if stop():
            return None
        used = ~np.isnan(batch.labels)
        truth.append(batch.labels[used])
        logits.append(np.asarray(eval_step(params, batch)["logits"])[used])
        numbers.append(loader.tasks(step)[used])
    gold, scores, task_of = map(np.concatenate, (truth, logits, numbers))
    if not labels:
        errors = scores[:, 0].astype(np.float64) - gold
        return {
            "n": len(gold),
            "mse": float(np.mean(errors**2)),
            "mae": float(np.mean(abs(errors))),
            "mse_of_mean": float(np.var(gold.astype(np.float64))),
        }
    guess, gold = scores.argmax(axis=1), gold.astype(int)
    answers = {t: Counter(gold[task_of == t].tolist()) for t in np.unique(task_of).tolist()}
    correct = Counter(task_of[guess == gold].tolist())
    return {
        **_accuracy_report(answers, correct, tasks, lambda number: labels[number]),
        "macro_f1": float(f1_score(gold, guess, average="macro", zero_division=0)),
    }


def _accuracy_report(
    answers: Mapping[int, Counter[int]],
    correct: Counter[int],
    tasks: Sequence[str],
    name: Callable[[int], str],
) -> dict[str, Any]:
    """Report on the answers counted by task, and on how many of them were given right."""
    overall = sum(answers.values(), Counter())
    n = overall.total()
    if not n:
        return {"n": 0}
    return {
        "n": n,
        "accuracy": correct.total() / n,
        "accuracy_ci95": list(wilson_interval(correct.total(), n)),
        **_commonest(overall, name),
        # Somebody who knows the task and answers its commonest answer is right this often.
        "per_task_majority": sum(max(count.values()) for count in answers.values()) / n,
        "per_task": {
            tasks[task]: {
                "n": answers[task].total(),
                "accuracy": correct[task] / answers[task].total(),
                **_commonest(answers[task], name),
            }
            for task in sorted(answers, key=lambda number: tasks[number])
        },
    }


def _commonest(answers: Counter[int], name: Callable[[int], str]) -> dict[str, Any]:
    count, answer = max((count, -answer) for answer, count in answers.items())
    return {"majority": count / answers.total(), "majority_answer": name(-answer)}


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Put an answer report into lines for people: one per task, all together, one per source."""
    sources = _source_lines(report.get("per_source") or {})
    if not report["n"]:
        return ["there are no held-out answers", *sources]
    if "mse" in report:
        return [
            f"{report['n']} held-out values: mean squared error {report['mse']:.4g} (of answering "
            f"their mean {report['mse_of_mean']:.4g}), mean absolute error {report['mae']:.4g}"
        ]
    rows = [(name, row) for name, row in report["per_task"].items()]
    width = max([len(name) for name, _ in rows] + [len("all, by task majority")])
    lines = [f"{'task':{width}}  {'n':>6}  accuracy  majority"]
    lines += [
        f"{name:{width}}  {row['n']:6d}  {row['accuracy']:8.3f}  {row['majority']:8.3f}"
        f"  {row['majority_answer']!r}"
        for name, row in rows
    ]
    low, high = report["accuracy_ci95"]
    lines += [
        f"{'all':{width}}  {report['n']:6d}  {report['accuracy']:8.3f}  {report['majority']:8.3f}"
        f"  {report['majority_answer']!r}, 95 % interval {low:.3f} to {high:.3f}",
        f"{'all, by task majority':{width}}  {'':6}  {'':8}  {report['per_task_majority']:8.3f}",
    ]
    return lines + sources


def _source_lines(per_source: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Put the losses of the sources into lines: a heading, then one for each."""
    if not per_source:
        return []
    width = max(map(len, ["source", *per_source]))
    shown = {
        name: ["" if row[key] is None else f"{row[key]:.3f}" for key in ("loss_atp", "loss_mlm")]
        for name, row in per_source.items()
    }
    rows = {"source": ["loss_atp", "loss_mlm"], **shown}
    return [f"{name:{width}}  {atp:>8}  {mlm:>8}" for name, (atp, mlm) in rows.items()]


def finished_report(out: Path, step: int) -> dict[str, Any] | None:
    """Return the report of a run that is complete, export and all, at this step; else None."""
    try:
        report = json.loads((out / "validation.json").read_bytes())
        is_whole = report["step"] == step and "n" in report
        return report if is_whole and (out / "export" / CONFIG).is_file() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def training_card(config: RunConfig, manifest: Manifest, report: Mapping[str, Any]) -> str:
    """Return the part of a model card that tells what an export was trained on, and how well."""
    optimizer = config.optimizer
    start = f"started from `{config.init_from}`" if config.init_from else "trained from scratch"
    lines = [
        "",
        "## Training",
        "",
        f"- {config.steps} updates of {config.data.batch_size} rows of {config.data.seq_length} "
        f"tokens, {start}, seed {config.seed}, computed in {config.dtype}",
        f"- {_objective_told(config)}",
        f"- {optimizer.name}, learning rate {optimizer.learning_rate} ({config.schedule.name}), "
        f"weight decay {optimizer.weight_decay}",
        *_more_told(config),
        "",
        "## Data",
        "",
        *(f"- {line}" for line in summary(manifest)),
        "",
        "## Held-out answers",
        "",
        "```",
        *report_lines(report),
        "```",
        "",
    ]
    return "\n".join(lines)


def _objective_told(config: RunConfig) -> str:
    if config.head == "classification":
        what = f"the labels {', '.join(config.label_names)}" if config.label_names else "a number"
        return f"a classification head over the pooled text, trained to give {what}"
    objective = config.objective
    atp = 1.0 - objective.dummy_mlm_share - objective.mlm_share
    end = f" to {objective.mlm_rate_end}" if objective.mlm_rate_end is not None else ""
    return (
        f"examples with an answer: {atp:.0%} answer token prediction, "
        f"{objective.dummy_mlm_share:.0%} dummy MLM, {objective.mlm_share:.0%} MLM; "
        f"mask rate {objective.mlm_rate}{end}"
    )


def _more_told(config: RunConfig) -> list[str]:
    """Return lines on what departs from the plain recipe."""
    optimizer, data = config.optimizer, config.data
    lines = {
        f"- learning rate times {optimizer.layer_decay} for each layer above": (
            optimizer.layer_decay != 1
        ),
        f"- these weights are an exponential average over the updates, decay {optimizer.ema}": (
            optimizer.ema > 0
        ),
        f"- the batch grew from {data.batch_start} rows": data.batch_start is not None,
    }
    return [line for line, told in lines.items() if told]
