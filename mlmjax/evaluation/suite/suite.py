"""Run a suite of evaluations; a stopped run resumes from its results."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from mlmjax._version import __version__
from mlmjax.config.suite import Planned, Suite
from mlmjax.config.task import Task
from mlmjax.data.contamination import contamination
from mlmjax.errors import InputError, printable
from mlmjax.evaluation.evaluate import Answers, answer_questions, make_scorer
from mlmjax.evaluation.questions import Question
from mlmjax.evaluation.suite.entrants import (
    DivergedError,
    Entrant,
    Setting,
    SuiteModel,
    answer_by_tfidf,
    choose,
    make_entrants,
    settings_of,
)
from mlmjax.evaluation.suite.report import JSON, Line, summarize, write_report
from mlmjax.evaluation.suite.results import Result, make_result, path_of, read_result, write_result
from mlmjax.evaluation.suite.rows import NoDataError, Rows, read_rows
from mlmjax.reporting.terminal import Progress, count_progress, say
from mlmjax.storage import PARTIAL, alone_in, read_json
from mlmjax.text.verbalizer import option_names
from mlmjax.training.run.resume import check_run_folder

SWEEP_SEED = 0
"""The seed of the trainings that choose a setting; reported trainings have seeds 1, 2, ..."""

CELLS = "cells"
Counting = Callable[[str], AbstractContextManager[Progress]]
"""Gives a context with a function that shows `(done, total)`, as `count_progress`."""


@dataclass
class Run:
    """One run of a suite: where its results are, and how it reports progress."""

    suite: Suite
    cells: Path
    tell: Callable[[str], None]
    counting: Counting
    total: int
    done: int = 0

    def result(
        self,
        what: str,
        identity: Mapping[str, Any],
        asked: Sequence[Question],
        labels: Sequence[str],
        answer: Callable[[Progress], Answers],
        cells: Path | None = None,
    ) -> Result:
        """Return a result, computed unless it is in `cells` (by default the run's own)."""
        started = time.perf_counter()
        identity = {"version": __version__, **identity}
        path = path_of(cells or self.cells, identity)
        if path.exists():
            result, took = read_result(path, identity, asked, labels), "already computed"
        else:
            try:
                with self.counting(what) as progress:
                    result = make_result(asked, labels, answer(progress))
            except DivergedError as error:
                result = Result(diverged=str(error))
            write_result(path, identity, result)
            took = f"{time.perf_counter() - started:.1f} s"
        self.done += 1
        found = "diverged" if result.diverged else f"accuracy {result.metrics['accuracy']:.4f}"
        self.tell(printable(f"[{self.done}/{self.total}] {what}: {found} ({took})"))
        return result


def run_suite(
    suite: Suite,
    planned: Sequence[Planned],
    models: Sequence[str],
    *,
    out: str | Path,
    data: str | Path | None = None,
    baselines: Sequence[str] = (),
    others: Sequence[Entrant] = (),
    revision: str | None = None,
    dtype: str = "float32",
    batch_size: int | None = None,
    tell: Callable[[str], None] = say,
    counting: Counting = count_progress,
) -> dict[str, Any]:
    """Run the planned entries of a suite (`config.suite.load_suite`) and write the results.

    Every model answers the zero-shot entries. Fine-tuned entries are trained with every head of the
    suite and with `others`: each setting of the sweep once, then the one with the best headline
    metric on validation rows with every seed. Only these see the test rows. `baselines` are folders
    of suites that were run elsewhere with other entrants; their results are read. `data` is the
    folder of the files; without it parts come from the hub. Entries without data are reported and
    listed with the reason.

    Each result is written whole to `out`/cells and found again by the content of the model, task,
    rows and setting, so that the same call resumes a stopped run. Writes `suite.json` (which is
    returned), `suite.md` and `suite.svg`. Raises `InputError` before the first result is computed
    for anything that cannot be loaded or answered, and if no entry finds its data.
    """
    if len(set(models)) < len(models) or len(set(baselines)) < len(baselines):
        raise InputError("a model is named twice; name every model and baseline once")
    others = [*others, *(one for name in baselines for one in read_baselines(name))]
    loaded = [SuiteModel(name, revision, dtype, batch_size) for name in models]
    entrants = [*make_entrants(suite, loaded), *others]
    folder, out = None if data is None else Path(data), Path(out)
    present, missing = _find_entries(suite, planned, folder)
    total = sum(_count_results(suite, one, loaded, entrants) for one in present)
    run = Run(suite, out / CELLS, tell, counting, total)
    _check_baselines(run, present, others, folder)
    with alone_in(out, check_run_folder):
        for one in missing:
            tell(printable(f"left out: task {one['task']}: {one['reason']}"))
        run.cells.mkdir(parents=True, exist_ok=True)
        for left in run.cells.glob(f"*{PARTIAL}"):  # half written by a killed run
            left.unlink()
        lines = [
            line for one in present for line in _answer_entry(run, one, loaded, entrants, folder)
        ]
        about = {
            "suite": suite.name,
            "version": __version__,
            **suite.model_dump(include={"description", "limit", "seeds", "order_rows", "sweep"}),
            "models": {model.name: model.identity for model in loaded},
            "baselines": {one.model: one.identity["model"] for one in others},
        }
        return write_report(out, about, lines, missing)


def _answer_entry(
    run: Run,
    planned: Planned,
    models: Sequence[SuiteModel],
    entrants: Sequence[Entrant],
    folder: Path | None,
) -> list[Line]:
    """Return the lines of one entry, a line for each model or trained entrant."""
    rows = read_rows(planned, run.suite, folder)
    if planned.entry.kind == "zero-shot":
        return [_ask_zero_shot(run, planned, rows, model) for model in models]
    baseline = _run_tfidf(run, planned, rows)
    trained = [_fine_tune(run, planned, rows, entrant) for entrant in entrants]
    return [baseline, *trained]


def read_baselines(name: str) -> list[Entrant]:
    """Return the baselines of a suite that was run elsewhere; raise `InputError` for others."""
    if name.startswith("transformers:"):
        model = name.removeprefix("transformers:") or "FOLDER_OR_ID"
        raise InputError(
            f"--baseline {name}: mlmjax does not run torch; run `python "
            f"benchmarks/torch_baseline.py {model} --suite SUITE --out FOLDER` in the repository, "
            "then give --baseline FOLDER"
        )
    folder = Path(name)
    found = read_json(folder, JSON).get("baselines") if (folder / JSON).is_file() else None
    if not isinstance(found, dict) or not found:
        raise InputError(
            f"--baseline {name}: is not a folder with results of baselines; give a folder written "
            "by benchmarks/torch_baseline.py"
        )

    def reject(task: Task, *_: Any, **options: Any) -> NoReturn:
        raise InputError(
            f"--baseline {name}: has no result for {task.name} with these rows and settings; run "
            "benchmarks/torch_baseline.py with the same suite, data, settings and version of mlmjax"
        )

    kind = "transformers"
    return [
        Entrant(model, kind, kind, {"model": digest}, reject, cells=folder / CELLS)
        for model, digest in found.items()
    ]


def _check_baselines(
    run: Run, present: Sequence[Planned], others: Sequence[Entrant], folder: Path | None
) -> None:
    """Raise `InputError` for a baseline without all of its results, before hours of work."""
    silent = replace(run, tell=lambda _: None)
    for one in present:
        if one.entry.kind == "fine-tune" and (stored := [o for o in others if o.cells]):
            rows = read_rows(one, run.suite, folder)
            for entrant in stored:
                _fine_tune(silent, one, rows, entrant)


def _find_entries(
    suite: Suite, planned: Sequence[Planned], folder: Path | None
) -> tuple[list[Planned], list[dict[str, Any]]]:
    """Return the entries with data, and the others with the reason; raise if none has data.

    It reads all rows once, so that bad rows raise an error before hours of work.
    """
    present, missing = [], []
    for one in planned:
        try:
            read_rows(one, suite, folder)
            present.append(one)
        except NoDataError as error:
            missing.append(
                {"task": one.task.name, "reason": error.message, "tables": one.entry.tables}
            )
    missing += [one.model_dump() for one in suite.missing if suite.is_wanted(one.task)]
    if not present:
        reasons = [f"task {one['task']}: {one['reason']}" for one in missing]
        raise InputError(
            f"suite {suite.name}: no entry finds its data, so nothing was run; give a folder "
            f"with its files (--data): {reasons[0]}",
            reasons[1:],
        )
    return present, missing


def _count_results(
    suite: Suite, one: Planned, models: Sequence[SuiteModel], entrants: Sequence[Entrant]
) -> int:
    if one.entry.kind == "zero-shot":
        return len(models)
    settings = len(settings_of(suite.sweep))
    return 1 + len(entrants) * ((settings if settings > 1 else 0) + suite.seeds)


def _task_identity(task: Task, method: str) -> dict[str, Any]:
    """Return the method and the keys of a task that its answers depend on."""
    read = {"name", "prompt", "shorten", "head_prompt"}
    scored = {"labels", "verbalizer", "bare", "normalize"}
    table = task.model_dump(mode="json", include=read | scored)
    return {"task": table | {"normalize": task.scored_over}, "method": method}


def _ask_zero_shot(run: Run, planned: Planned, rows: Rows, model: SuiteModel) -> Line:
    """Let a model answer the test rows of a task."""
    entry, task = planned
    order_rows = run.suite.order_rows

    def answer(progress: Progress) -> Answers:
        scorer = make_scorer(*model.load(), task, rows.test, batch_size=model.batch_size)
        return answer_questions(scorer, task, rows.test, order_rows, progress)

    result = run.result(
        f"{task.name}, zero-shot, {model.name}",
        {
            **_task_identity(task, "zero-shot"),
            **model.identity,
            "order_rows": order_rows,
            "asked": rows.hashes["test"],
        },
        rows.test,
        task.label_names or option_names(max(len(q.row["options"]) for q in rows.test)),
        answer,
    )
    model.unload()
    return summarize(
        planned,
        rows,
        [result],
        model=model.name,
        method="zero-shot",
        published=entry.published.get("zero-shot"),
        known=contamination(rows.task, rows.data, model.training),
    )


def _run_tfidf(run: Run, planned: Planned, rows: Rows) -> Line:
    """Let TF-IDF and logistic regression answer the test rows of a task."""
    task = planned.task
    result = run.result(
        f"{task.name}, TF-IDF + logistic regression",
        {
            **_task_identity(task, "tfidf"),
            "scikit-learn": version("scikit-learn"),
            "train": rows.hashes["train"],
            "asked": rows.hashes["test"],
        },
        rows.test,
        task.label_names,
        lambda _: answer_by_tfidf(task, rows.train, rows.test),
    )
    return summarize(planned, rows, [result], model="", method="TF-IDF + logistic regression")


def _fine_tune(run: Run, planned: Planned, rows: Rows, entrant: Entrant) -> Line:
    """Choose a setting on the validation rows, train it with every seed, and test that."""
    entry, task = planned
    settings = settings_of(run.suite.sweep)
    tried: dict[Setting, float | None] = {}
    if len(settings) > 1:
        for setting in settings:
            result = _train(run, task, rows, entrant, setting, SWEEP_SEED, "validation")
            tried[setting] = result.metrics.get(task.metric)
    chosen = choose(tried) if tried else settings[0]
    results = [
        _train(run, task, rows, entrant, chosen, SWEEP_SEED + 1 + number, "test")
        for number in range(run.suite.seeds)
        if chosen
    ]
    if source := entrant.source:
        source.unload()
    return summarize(
        planned,
        rows,
        results,
        model=entrant.model,
        method=entrant.method,
        published=entry.published.get(entrant.key),  # type: ignore[call-overload]
        known=contamination(rows.task, rows.data, source.training) if source else None,
        chosen=chosen,
        tried=tried,
    )


def _train(
    run: Run, task: Task, rows: Rows, entrant: Entrant, setting: Setting, seed: int, part: str
) -> Result:
    """Return the result of one training, on the validation or the test rows."""
    sweep, asked = run.suite.sweep, getattr(rows, part)
    shared = sweep.model_dump(exclude={"epochs", "learning_rate", "held_out"})
    # Only reported results measure the order of options, and only the MLM head reads options.
    is_measured = entrant.key == "mlm" and part == "test"
    order = {"order_rows": run.suite.order_rows} if is_measured else {}
    return run.result(
        f"{task.name}, {entrant.method}, {entrant.model}, {part}, epochs {setting.epochs}, "
        f"learning rate {setting.learning_rate:g}, seed {seed}",
        {
            **_task_identity(task, entrant.key),
            **entrant.identity,
            "train": rows.hashes["train"],
            "part": part,
            "asked": rows.hashes[part],
            "setting": {**setting._asdict(), **shared},
            "seed": seed,
            **order,
        },
        asked,
        task.label_names,
        lambda progress: entrant.answer(
            task, rows.train, asked, setting, sweep, seed=seed, progress=progress, **order
        ),
        entrant.cells,
    )
