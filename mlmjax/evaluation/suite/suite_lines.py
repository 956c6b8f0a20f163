"""What a suite found: the lines of its tables, each summed up over seeds."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlmjax.config.suite import Planned
from mlmjax.data.contamination import Contamination
from mlmjax.evaluation.suite.results import Result
from mlmjax.evaluation.suite.rows import Rows
from mlmjax.evaluation.suite.sweep import Setting
from mlmjax.statistics.metrics import (
    classification_metrics,
    macro_f1,
    mcc,
    mean_interval,
    wilson_interval,
)

_BOOTSTRAPPED = {"macro_f1": macro_f1, "mcc": mcc}


@dataclass(frozen=True)
class Line:
    """One line of a table: a method on a model, on one task.

    `score` is the mean of `scores`, one for each seed, in the task's own `metric`; `spread` their
    sample standard deviation. `ci95` is of the mean, over the rows. `majority` is the score of the
    label that is commonest in training (zero-shot: in the rows asked) and `chance` the accuracy of
    guessing. `ece` is the calibration error and `order_changed` the share of answers that change
    with the order of the options, means over seeds, None where there is none. `tried` are the
    settings with their scores on validation rows, `diverged` the seeds that have no score.
    """

    task: str
    kind: str
    tables: tuple[int, ...]
    method: str
    model: str
    metric: str
    score: float | None
    spread: float | None
    ci95: tuple[float, float] | None
    scores: list[float]
    n: int
    chosen: dict[str, float] | None
    tried: list[dict[str, float | None]]
    diverged: int
    shortened: int
    left_out: int
    train: int
    validation: int
    held_out: bool
    majority: float
    chance: float
    ece: float | None
    order_changed: float | None
    published: float | None
    contamination: str
    trained_on: list[str]


def line_of(
    planned: Planned,
    rows: Rows,
    results: Sequence[Result],
    *,
    model: str,
    method: str,
    published: float | None = None,
    known: Contamination | None = None,
    chosen: Setting | None = None,
    tried: Mapping[Setting, float | None] | None = None,
) -> Line:
    """Sum up the results of one method on one task, one for each seed."""
    entry, task = planned
    whole = [result for result in results if result.predictions]
    scores = [float(result.metrics[task.metric]) for result in whole]
    commonest = Counter(question.gold for question in rows.train or rows.test).most_common()
    # Of equally common ones the first label, whatever order the rows are in.
    best = min(gold for gold, count in commonest if count == commonest[0][1])
    gold = [str(question.gold) for question in rows.test]
    majority = classification_metrics(gold, [str(best)] * len(gold))[task.metric]
    return Line(
        task=task.name,
        kind=entry.kind,
        tables=entry.tables,
        method=method,
        model=model,
        metric=task.metric,
        score=statistics.fmean(scores) if scores else None,
        spread=statistics.stdev(scores) if len(scores) > 1 else None,
        ci95=_interval(task.metric, whole) if whole else None,
        scores=scores,
        n=len(rows.test),
        chosen=chosen._asdict() if chosen else None,
        tried=[
            {**setting._asdict(), "validation": value} for setting, value in (tried or {}).items()
        ],
        diverged=len(results) - len(whole),
        shortened=max((result.shortened for result in whole), default=0),
        left_out=rows.left_out,
        train=len(rows.train),
        validation=len(rows.validation),
        held_out=rows.held_out,
        majority=float(majority),  # type: ignore[arg-type]
        chance=statistics.fmean(1 / len(question.row["options"]) for question in rows.test),
        ece=_mean(found["ece"] for result in whole if (found := result.metrics["calibration"])),
        order_changed=_mean(result.order["changed"] for result in whole if result.order),
        published=published,
        contamination=known.status if known else "",
        trained_on=known.trained_on if known else [],
    )


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


def _interval(metric: str, results: Sequence[Result]) -> tuple[float, float]:
    """Return the interval of the mean over seeds: they are asked the same rows.

    Of accuracy it is Wilson's for the mean share over the rows, as if seeds agreed on every row,
    which is never too narrow; of the others a bootstrap over the rows.
    """
    if len(results) == 1:
        low, high = results[0].metrics[f"{metric}_ci95"]
        return low, high
    n = len(results[0].predictions)
    if metric == "accuracy":
        mean = statistics.fmean(result.metrics["accuracy"] for result in results)
        return wilson_interval(mean * n, n)
    gold = [p.gold for p in results[0].predictions]
    predicted = [[p.prediction for p in result.predictions] for result in results]
    return mean_interval(gold, predicted, _BOOTSTRAPPED[metric])
