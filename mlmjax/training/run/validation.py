"""Validate a run: figures over the held-out rows, and the report on held-out answers."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sklearn.metrics import f1_score

from mlmjax.config.run import RunConfig
from mlmjax.data.batch import ATP, UNUSED, Batch
from mlmjax.data.loader import LabelLoader, Loader
from mlmjax.data.manifest import Manifest
from mlmjax.data.preparing.prepare import summary
from mlmjax.parallel.processes import sum_over_processes
from mlmjax.parallel.sharding import mesh_of
from mlmjax.statistics.metrics import wilson_interval
from mlmjax.storage import CONFIG
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.run.inputs import AnyLoader, Loaders, feed
from mlmjax.training.run.log import Totals, add, count_tokens, summarize

EvalStep = Callable[[Any, Any], Mapping[str, jax.Array]]
SOURCE_FIGURES = ("loss_atp", "loss_mlm", "answer_accuracy")


def validate(
    eval_step: EvalStep,
    params: Any,
    loader: AnyLoader,
    check: Callable[[], None],
    width: int | None = None,
) -> dict[str, float | None]:
    """Return the figures of one pass over the held-out rows.

    `check` is called before each batch, and raises if a signal asked to stop. With `width` the
    targets are filled up to it, so that the step is not compiled again.
    """
    totals: Totals = defaultdict(float)
    counts: Totals = defaultdict(float)

    def widened(batch: Any) -> Any:
        return batch if width is None or not isinstance(batch, Batch) else _widened(batch, width)

    for _, batch, counted in feed(loader, mesh_of(params), 0, loader.epoch_steps(), widened):
        check()
        metrics = eval_step(params, batch)
        add(totals, jax.device_get({k: v for k, v in metrics.items() if not v.ndim}))
        add(counts, count_tokens(counted))
    add(totals, sum_over_processes(counts))
    return summarize(totals)


def _widened(batch: Batch, width: int) -> Batch:
    unused = ((0, 0), (0, width - batch.target_ids.shape[1]))
    targets = ("target_positions", "target_ids", "target_objective")
    return batch._replace(
        **{name: np.pad(getattr(batch, name), unused, constant_values=UNUSED) for name in targets}
    )


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

    The MLM head is reported overall, by task, and by source (`per_source`).
    """
    answers, validation = loaders.answers, loaders.validation
    if answers is None:
        return {"n": 0}
    if isinstance(answers, LabelLoader):
        return _report_labels(eval_step, params, answers, labels, loaders.tasks, check)
    assert isinstance(validation, Loader)  # Its width is the one that is compiled.
    width = validation.target_width
    report = _report_answers(eval_step, params, answers, width, loaders.tasks, tokenizer, check)
    per_source = {}
    for name, of_source in loaders.by_source.items():
        per_source[name] = dict.fromkeys(SOURCE_FIGURES)
        for loader in of_source:
            figures = validate(eval_step, params, loader, check, width)
            per_source[name] |= {k: figures[k] for k in SOURCE_FIGURES if figures[k] is not None}
    return {**report, "per_source": per_source}


def _report_answers(
    eval_step: EvalStep,
    params: Any,
    loader: Loader,
    width: int,
    tasks: Sequence[str],
    tokenizer: Tokenizer,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Return the accuracy on held-out answers, overall and by task, and the most common answers.

    `loader` draws only ATP, so every held-out answer counts once. The interval is Wilson's, 95 %.
    The most common answers are those of the held-out answers, which is the strictest baseline.
    """
    answers: dict[int, Counter[int]] = defaultdict(Counter)
    correct: Counter[int] = Counter()
    for step, batch in loader.batches(0, loader.epoch_steps()):
        check()
        is_answer = np.asarray(batch.target_objective) == ATP
        metrics = eval_step(params, _widened(batch, width))
        right = np.asarray(metrics["correct"])[:, : is_answer.shape[1]][is_answer]
        numbers = loader.tasks(step)[is_answer]
        for task, answer in zip(numbers, np.asarray(batch.target_ids)[is_answer], strict=True):
            answers[int(task)][int(answer)] += 1
        correct.update(int(task) for task in numbers[right])
    return _accuracy(answers, correct, tasks, lambda token: tokenizer.decode([token]))


def _report_labels(
    eval_step: EvalStep,
    params: Any,
    loader: LabelLoader,
    labels: Sequence[str],
    tasks: Sequence[str],
    check: Callable[[], None],
) -> dict[str, Any]:
    """Return how well the classification head predicts the held-out texts.

    With `labels` the figures are those of `_report_answers` and macro-F1. Without, for a
    regression, they are `mse`, `mae` and `mse_of_mean`, the error of always giving the mean.
    """
    truth, logits, numbers = [], [], []
    for step, batch in loader.batches(0, loader.epoch_steps()):
        check()
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
        **_accuracy(answers, correct, tasks, lambda number: labels[number]),
        "macro_f1": float(f1_score(gold, guess, average="macro", zero_division=0)),
    }


def _accuracy(
    answers: Mapping[int, Counter[int]],
    correct: Counter[int],
    tasks: Sequence[str],
    name: Callable[[int], str],
) -> dict[str, Any]:
    """Return accuracy and majority from the answers counted by task, and those predicted right."""
    overall = sum(answers.values(), Counter())
    n = overall.total()
    if not n:
        return {"n": 0}
    return {
        "n": n,
        "accuracy": correct.total() / n,
        "accuracy_ci95": list(wilson_interval(correct.total(), n)),
        **_majority(overall, name),
        # The accuracy of giving each task's most common answer.
        "per_task_majority": sum(max(count.values()) for count in answers.values()) / n,
        "per_task": {
            tasks[task]: {
                "n": answers[task].total(),
                "accuracy": correct[task] / answers[task].total(),
                **_majority(answers[task], name),
            }
            for task in sorted(answers, key=lambda number: tasks[number])
        },
    }


def _majority(answers: Counter[int], name: Callable[[int], str]) -> dict[str, Any]:
    count, answer = max((count, -answer) for answer, count in answers.items())
    return {"majority": count / answers.total(), "majority_answer": name(-answer)}


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the report on held-out answers as lines: by task, overall, by source."""
    sources = _source_lines(report.get("per_source") or {})
    if not report["n"]:
        return ["there are no held-out answers", *sources]
    if "mse" in report:
        return [
            f"{report['n']} held-out values: mean squared error {report['mse']:.4g} (always giving "
            f"their mean: {report['mse_of_mean']:.4g}), mean absolute error {report['mae']:.4g}"
        ]
    baseline = "all, by task majority"
    width = max(map(len, [*report["per_task"], baseline]))
    lines = [f"{'task':{width}}  {'n':>6}  accuracy  majority"]
    for name, row in (*report["per_task"].items(), ("all", report)):
        figures = f"{row['n']:6d}  {row['accuracy']:8.3f}  {row['majority']:8.3f}"
        lines.append(f"{name:{width}}  {figures}  {row['majority_answer']!r}")
    low, high = report["accuracy_ci95"]
    lines[-1] += f", 95 % interval {low:.3f} to {high:.3f}"
    lines.append(f"{baseline:{width}}  {'':6}  {'':8}  {report['per_task_majority']:8.3f}")
    return lines + sources


def _source_lines(per_source: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Return the losses of the sources as lines: a heading, then one for each."""
    if not per_source:
        return []
    width = max(map(len, ["source", *per_source]))
    shown = {
        name: ["" if row[key] is None else f"{row[key]:.3f}" for key in ("loss_atp", "loss_mlm")]
        for name, row in per_source.items()
    }
    rows = {"source": ["loss_atp", "loss_mlm"], **shown}
    return [f"{name:{width}}  {atp:>8}  {mlm:>8}" for name, (atp, mlm) in rows.items()]


def read_finished(out: Path, step: int) -> dict[str, Any] | None:
    """Return the report of a run that is complete and exported at this step, else None."""
    try:
        report = json.loads((out / "validation.json").read_bytes())
        is_whole = report["step"] == step and "n" in report
        return report if is_whole and (out / "export" / CONFIG).is_file() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def training_card(config: RunConfig, manifest: Manifest, report: Mapping[str, Any]) -> str:
    """Return the part of a model card on the training, its data, and the held-out answers."""
    optimizer = config.optimizer
    start = f"started from `{config.init_from}`" if config.init_from else "trained from scratch"
    lines = [
        "",
        "## Training",
        "",
        f"- {config.steps} updates of {config.data.batch_size} rows of {config.data.seq_length} "
        f"tokens, {start}, seed {config.seed}, computed in {config.dtype}",
        f"- {_objective(config)}",
        f"- {optimizer.name}, learning rate {optimizer.learning_rate} ({config.schedule.name}), "
        f"weight decay {optimizer.weight_decay}",
        *_extras(config),
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


def _objective(config: RunConfig) -> str:
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


def _extras(config: RunConfig) -> list[str]:
    """Return lines on what the plain recipe does not have."""
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
    return [line for line, is_used in lines.items() if is_used]
