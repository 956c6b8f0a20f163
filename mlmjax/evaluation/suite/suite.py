"""A suite of evaluations: what is run, in cells that a stopped run goes on from."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlmjax._version import __version__
from mlmjax.config.suite import Planned, Suite
from mlmjax.config.task import Task
from mlmjax.data.contamination import contamination
from mlmjax.errors import InputError, printable
from mlmjax.evaluation.questions import Question
from mlmjax.evaluation.suite.entrants import Contender, Contestant, answer_by_tfidf, contestants
from mlmjax.evaluation.suite.report import Line, line_of, write_report
from mlmjax.evaluation.suite.results import Cells, Result, result_of
from mlmjax.evaluation.suite.rows import NoDataError, Rows, digest, read_rows
from mlmjax.evaluation.suite.sweep import (
    Answers,
    DivergedError,
    Progress,
    Setting,
    asked_in_orders,
    choose,
    settings_of,
)
from mlmjax.evaluation.suite.torch_baseline import find_baseline, fingerprint
from mlmjax.scoring.scorers import Scorer
from mlmjax.storage import alone_in
from mlmjax.text.prompts import Template
from mlmjax.training.run.resume import check_run_folder

SWEEP_SEED = 0
"""The seed that settings are chosen with; the reported ones are 1, 2, ..."""

ASKED = ("name", "prompt", "shorten", "labels", "verbalizer", "bare", "normalize", "head_prompt")
"""The keys of a task that its answers depend on."""

Counting = Callable[[str], AbstractContextManager[Progress]]
"""Gives a context with a function that shows `(done, total)`, as `log.counting`."""


class Bench:
    """Where cells are computed or found, and told of."""

    def __init__(self, cells: Cells, total: int, tell: Callable[[str], None], counting: Counting):
        self.cells, self.total, self.tell, self.counting = cells, total, tell, counting
        self.done = 0

    def result(
        self,
        what: str,
        identity: Mapping[str, Any],
        asked: Sequence[Question],
        labels: Sequence[str],
        compute: Callable[[Progress], Answers],
    ) -> Result:
        """Return the result of a cell, computed unless it is there."""

        def fresh() -> Result:
            try:
                with self.counting(what) as progress:
                    answers = compute(progress)
            except DivergedError as error:
                return Result(diverged=str(error))
            return result_of(
                asked,
                labels,
                answers.log_probs,
                shortened=answers.shortened,
                losses=answers.losses,
                order=answers.order,
            )

        started = time.perf_counter()
        result, is_new = self.cells.get({"version": __version__, **identity}, asked, labels, fresh)
        self.done += 1
        found = "diverged" if result.diverged else f"accuracy {result.metrics['accuracy']:.4f}"
        took = f"{time.perf_counter() - started:.1f} s" if is_new else "was there"
        self.tell(f"[{self.done}/{self.total}] {what}: {found} ({took})")
        return result


def run_suite(
    suite: Suite,
    planned: Sequence[Planned],
    models: Sequence[str],
    *,
    out: str | Path,
    data: str | Path | None = None,
    baselines: Sequence[str] = (),
    revision: str | None = None,
    dtype: str = "float32",
    batch_size: int | None = None,
    tell: Callable[[str], None],
    counting: Counting,
) -> dict[str, Any]:
    """Run the planned entries of a suite (`suite_config.load_suite`) and write the results.

    Zero-shot entries are asked of every model. Fine-tuned ones are trained with every head of the
    suite and every baseline (`transformers:FOLDER_OR_ID`): each setting of the sweep once, the one
    with the best headline on validation rows then with every seed, and only these see the test
    rows. `data` is the folder in which files are looked for; without it parts come from the hub.
    Entries without data are told of and listed with the reason.

    Each cell is written whole to `out`/cells and found again by the content of the model, task,
    rows and setting, so the same call goes on where it was stopped. Writes `suite.json` (what is
    returned), `suite.md` and `suite.png`. Raises `InputError` for anything that cannot be loaded
    or asked, before the first cell is computed, and where no entry finds its data.
    """
    if len(set(models)) < len(models) or len(set(baselines)) < len(baselines):
        raise InputError("a model is named twice; every model and baseline is run once")
    folders = {name: find_baseline(name) for name in baselines}
    contenders = [Contender(name, revision, dtype, batch_size) for name in models]
    folder = None if data is None else Path(data)
    present, missing = _look(suite, planned, folder)
    missing += [one.model_dump() for one in suite.missing if suite.is_wanted(one.task)]
    absent = [f"task {one['task']}: {one['reason']}" for one in missing]
    if not present:
        raise InputError(
            f"suite {suite.name}: no entry finds its data, so nothing was run; give a folder "
            f"with its files: {absent[0]}",
            absent[1:],
        )
    with alone_in(Path(out), check_run_folder):
        for line in absent:
            tell(printable(f"left out: {line}"))
        entrants = list(contestants(suite, contenders, folders))
        total = sum(
            len(contenders) if entry.kind == "zero-shot" else 1 + _trainings(suite, entrants)
            for entry, _ in present
        )
        bench = Bench(Cells(Path(out) / "cells"), total, tell, counting)
        lines: list[Line] = []
        for one in present:
            rows = read_rows(one, suite, folder)
            if one.entry.kind == "zero-shot":
                lines += [
                    _zero_shot(bench, suite, one, rows, contender) for contender in contenders
                ]
            else:
                lines += _fine_tuned(bench, suite, one, rows, entrants, contenders)
        about = {
            "suite": suite.name,
            "description": suite.description,
            "version": __version__,
            "limit": suite.limit,
            "seeds": suite.seeds,
            "order_rows": suite.order_rows,
            "sweep": suite.sweep.model_dump(),
            "models": {contender.name: contender.identity for contender in contenders},
            "baselines": {name: fingerprint(path) for name, path in folders.items()},
        }
        return write_report(Path(out), about, lines, missing)


def _look(
    suite: Suite, planned: Sequence[Planned], folder: Path | None
) -> tuple[list[Planned], list[dict[str, Any]]]:
    """Read everything once, so that bad rows are refused before hours of work."""
    present, missing = [], []
    for one in planned:
        try:
            read_rows(one, suite, folder)
            present.append(one)
        except NoDataError as error:
            missing.append(
                {"task": one.task.name, "reason": error.message, "tables": one.entry.tables}
            )
    return present, missing


def _trainings(suite: Suite, entrants: Sequence[Contestant]) -> int:
    settings = len(settings_of(suite.sweep))
    return len(entrants) * ((settings if settings > 1 else 0) + suite.seeds)


def _zero_shot(
    bench: Bench, suite: Suite, planned: Planned, rows: Rows, contender: Contender
) -> Line:
    entry, task = planned
    count = len(task.label_names) or max(len(question.row["options"]) for question in rows.test)
    verbalizer = task.verbalizer_for(count)

    def compute(progress: Progress) -> Answers:
        scorer = Scorer(
            *contender.load(),
            Template(task.prompt, shorten=dict(task.shorten)),
            verbalizer,
            normalize=task.normalize,
            batch_size=contender.batch_size,
        )
        done = 0

        def report(scored: int) -> None:
            nonlocal done
            done += scored
            progress(done, len(rows.test))

        asked = [question.row for question in rows.test]
        where = [question.where for question in rows.test]
        log_probs = scorer.log_probs(asked, where=where, progress=report)
        shortened = scorer.shortened
        order = asked_in_orders(scorer, task, rows.test, log_probs, suite.order_rows)
        return Answers(log_probs, shortened, [], order)

    identity = {
        **_of_task(task, "zero-shot"),
        **contender.identity,
        "order_rows": suite.order_rows,
        "asked": digest(rows.test),
    }
    what = f"{task.name}, zero-shot, {contender.name}"
    result = bench.result(what, identity, rows.test, verbalizer.labels, compute)
    contender.rest()
    return line_of(
        planned,
        rows,
        [result],
        model=contender.name,
        method="zero-shot",
        published=entry.published.get("zero-shot"),
        known=contamination(rows.task, rows.data, contender.training),
    )


def _of_task(task: Task, method: str) -> dict[str, Any]:
    values = task.model_dump(mode="json")
    return {"task": {key: values[key] for key in ASKED}, "method": method}


def _fine_tuned(
    bench: Bench,
    suite: Suite,
    planned: Planned,
    rows: Rows,
    entrants: Sequence[Contestant],
    contenders: Sequence[Contender],
) -> Iterator[Line]:
    entry, task = planned
    labels = task.label_names
    hashes = {name: digest(getattr(rows, name)) for name in ("train", "validation", "test")}

    def cell(contestant: Contestant, setting: Setting, seed: int, part: str) -> Result:
        asked = getattr(rows, part)
        shared = suite.sweep.model_dump(exclude={"epochs", "learning_rate", "held_out"})
        # Only what is reported is asked in other orders, and only of the head that reads options.
        is_asked_again = contestant.key == "mlm" and part == "test"
        order = {"order_rows": suite.order_rows} if is_asked_again else {}
        identity = {
            **_of_task(task, contestant.key),
            **contestant.identity,
            "train": hashes["train"],
            "part": part,
            "asked": hashes[part],
            "setting": {**setting._asdict(), **shared},
            "seed": seed,
            **order,
        }
        what = (
            f"{task.name}, {contestant.method}, {contestant.model}, {part}, epochs "
            f"{setting.epochs}, learning rate {setting.learning_rate:g}, seed {seed}"
        )

        def compute(progress: Progress) -> Answers:
            return contestant.answer(
                task, rows.train, asked, setting, suite.sweep, seed=seed, progress=progress, **order
            )

        return bench.result(what, identity, asked, labels, compute)

    identity = {
        **_of_task(task, "tfidf"),
        "scikit-learn": version("scikit-learn"),
        "train": hashes["train"],
        "asked": hashes["test"],
    }
    result = bench.result(
        f"{task.name}, TF-IDF + logistic regression",
        identity,
        rows.test,
        labels,
        lambda _: answer_by_tfidf(task, rows.train, rows.test),
    )
    yield line_of(planned, rows, [result], model="", method="TF-IDF + logistic regression")

    known = {
        contender.name: contamination(rows.task, rows.data, contender.training)
        for contender in contenders
    }
    for contestant in entrants:
        settings = settings_of(suite.sweep)
        tried: dict[Setting, float | None] = {}
        if len(settings) > 1:
            for setting in settings:
                found = cell(contestant, setting, SWEEP_SEED, "validation")
                tried[setting] = found.metrics.get(task.metric)
        chosen = choose(tried) if tried else settings[0]
        results = [
            cell(contestant, chosen, seed, "test")
            for seed in range(SWEEP_SEED + 1, SWEEP_SEED + 1 + suite.seeds)
            if chosen
        ]
        for contender in contenders:
            contender.rest()
        yield line_of(
            planned,
            rows,
            results,
            model=contestant.model,
            method=contestant.method,
            published=entry.published.get(contestant.key),  # type: ignore[call-overload]
            known=known.get(contestant.model),
            chosen=chosen,
            tried=tried,
        )
