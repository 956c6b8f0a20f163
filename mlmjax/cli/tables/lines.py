"""Say what a fit is about to do, and what came out, in lines for a terminal."""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlmjax.cli.tables.choice import Choice, PromptLengths
from mlmjax.cli.tables.split import LEAST_CALIBRATION, WIDTH, Split
from mlmjax.config.data import CsvOptions
from mlmjax.errors import counted
from mlmjax.reporting.accuracy import top_confusions
from mlmjax.reporting.markdown import shortened, visible
from mlmjax.scoring.engine import describe_limit

REPORT = "report"
"""The folder of the report, in that of the classifier."""

TOO_SURE = 0.1
"""A mean confidence so far above the accuracy is named."""

MOST_SPARED = 0.4
"""The largest share of the rows that advice spares for calibration."""

FAR, LEAST = 4, 16
"""A text of more than `FAR` medians, of at least `LEAST` tokens each, slows the others down."""


USUAL = 0.95
"""The share of the texts that a suggested `--max-length` leaves whole."""


def length_lines(
    where: Sequence[str], found: PromptLengths, max_length: int | None = None
) -> Iterator[str]:
    """Yield how long texts and prompt are in tokens, and how many of the texts do not fit.

    `where` has the place of each text. If one is far longer than the others, a limit is suggested.
    """
    lengths = found.prompts - found.own
    longest, middle = int(lengths.max()), float(np.median(lengths))
    yield (
        f"texts: {middle:,.0f} tokens in the median, {longest:,} in the longest "
        f"({where[int(lengths.argmax())]}); the prompt adds {found.own:,} to each"
    )
    usual = found.own + math.ceil(np.quantile(lengths, USUAL))
    if max_length is None and longest > FAR * max(middle, LEAST) and usual < found.limit:
        yield (
            f"the longest text sets the length of all batches; --max-length {usual}, which counts "
            f"prompt and text, shortens {counted(found.over(usual), 'text')}"
        )
    if count := found.over(found.limit):
        yield (
            f"warning: {count:,} of the {len(lengths):,} texts ({count / len(lengths):.1%}) are "
            "shortened, because prompt and text together have at most "
            f"{describe_limit(found.limit, found.longest, 'this fit (--max-length)')}"
        )


def start_lines(model: str, choice: Choice, split: Split, labels: Sequence[str]) -> Iterator[str]:
    """Yield what is fitted, how it will answer and how long it learns."""
    yield (
        f"fitting {model} on {len(split.train):,} rows with {len(labels)} labels, testing on "
        f"{len(split.test):,}"
    )
    rate = choice.learning_rate
    shown = "found by a short training" if rate == "auto" else f"{rate:g}"
    yield (
        f"answers: {choice.way} ({choice.why}); learning rate {shown}, epochs {choice.epochs}, "
        f"updates {choice.updates(len(split.train)):,}"
    )
    if choice.trained < 1:
        yield f"trains {choice.trained:.2%} of the parameters; the others are frozen"
    if restarts := choice.recipe["restarts"]:
        yield (
            f"trains up to {counted(restarts, 'time')} more if nothing was learned, and keeps the "
            f"best on {choice.recipe['validation_share']:.0%} of the training rows, which are held "
            "out"
        )


def classify_line(figures: dict[str, Any]) -> str:
    """Return the command that classifies another table of the same columns."""
    options = f"--model {shlex.quote(figures['out'])} --text {shlex.quote(figures['text'])}"
    if figures["encoding"] is not None:
        options += f" --encoding {figures['encoding']}"
    for name, value in figures["csv"].items():
        options += f" {CsvOptions().setting(name, value)}"
    return f"mlmjax classify {options} --out answers.csv {shlex.quote(figures['table'])}"


def try_line(figures: dict[str, Any]) -> str | None:
    """Return the whole command that may do better; None if nothing speaks against this fit."""
    changes: dict[str, str] = {}
    if _doubts(figures) or figures["fit"]["warning"]:
        changes = figures["fit"]["try"]
    elif _excess(figures) > TOO_SURE:
        spared = figures["rows_calibrated"]
        share = max(2 * spared, LEAST_CALIBRATION) / (
            figures["rows_trained"] + spared + figures["n"]
        )
        if share <= MOST_SPARED:
            changes = {"--calibration-share": f"{math.ceil(100 * share) / 100:g}"}
    if not changes or not figures["words"]:
        return None
    return shlex.join(["mlmjax", "fit", *with_options(figures["words"], changes)])


def with_options(words: Sequence[str], options: Mapping[str, str]) -> list[str]:
    """Return the words of a command with other values of options.

    >>> with_options(["a.csv", "--epochs", "3", "--seed=1", "--json"], {"--epochs": "9"})
    ['--epochs', '9', 'a.csv', '--seed=1', '--json']
    """
    kept, rest = [], iter(words)
    for word in rest:
        name, separator, _ = word.partition("=")
        if name not in options:
            kept.append(word)
        elif not separator:
            next(rest, None)
    return [*(word for option in options.items() for word in option), *kept]


def result_lines(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that the command prints: accuracy, confusion, calibration, what is next."""
    methods = figures["methods"]
    width = max(map(len, methods))
    head = f"accuracy on {figures['n']:,} held-out rows"
    yield f"{head:{width + 8}}   95 % interval"
    for name, found in methods.items():
        low, high = found["accuracy_ci95"]
        yield f"{name:{width}}  {found['accuracy']:6.1%}   {low:.1%} to {high:.1%}"
    yield from verdict_lines(figures)
    yield ""
    yield from confusion_lines(figures["labels"], np.array(figures["confusion"]))
    yield ""
    yield from _training_lines(figures["fit"])
    yield f"macro-F1: {figures['macro_f1']:.3f}"
    yield from _calibration_lines(figures)
    folder = Path(figures["out"])
    yield f"classifier: {folder}"
    yield f"report: {folder / REPORT / 'report.html'}"
    if again := try_line(figures):
        yield f"to try: {again}"
    yield f"next: {classify_line(figures)}"
    if figures["serves"]:
        yield f"or: mlmjax serve --model {shlex.quote(figures['out'])}"


def verdict_lines(figures: dict[str, Any]) -> Iterator[str]:
    """Yield what speaks against the use of this classifier, and what usually helps."""
    doubts = _doubts(figures)
    yield from (f"verdict: {doubt}" for doubt in doubts)
    if doubts:
        yield "what usually helps: more labelled rows, a larger --model, more --epochs"
    if (excess := _excess(figures)) > TOO_SURE:
        yield (
            f"verdict: its mean confidence is {100 * excess:.0f} points above its accuracy; a "
            "larger --calibration-share usually helps"
        )


def _doubts(figures: dict[str, Any]) -> list[str]:
    """Say why something simpler may do as well."""
    ours, *others = figures["methods"].values()
    *words, commonest = (one["accuracy"] for one in others)
    found = []
    if ours["accuracy_ci95"][0] <= commonest:
        found.append("it is not shown to be better than always giving the commonest label")
    if any(other >= ours["accuracy"] for other in words):
        found.append("TF-IDF is at least as accurate, and cheaper")
    return found


def _excess(figures: dict[str, Any]) -> float:
    """Return by how much the mean confidence is above the accuracy."""
    ours = next(iter(figures["methods"].values()))
    return float(figures["calibration"]["confidence"] - ours["accuracy"])


def _training_lines(fit: dict[str, Any]) -> Iterator[str]:
    """Yield what was learned, next to what an answer has that reads no text."""
    learned = fit["training"]
    head = f"on {learned['n']:,} training rows"
    yield f"{head:26}  this classifier  reading no text"
    yield f"{'loss':26}  {learned['loss']:15.3f}  {learned['baseline_loss']:15.3f}"
    yield f"{'accuracy':26}  {learned['accuracy']:15.1%}  {learned['majority']:15.1%}"
    if fit["attempts"] > 1:
        yield f"{fit['attempts']} trainings, of which the best on held-out training rows was kept"
    if fit["warning"]:
        yield f"warning: {fit['warning']}"


def _calibration_lines(figures: dict[str, Any]) -> Iterator[str]:
    """Yield how far the probabilities of the held-out rows are from the share of right answers."""
    after, before = figures["calibration"], figures["uncalibrated"]
    methods = {"as saved": after}
    if before is not None:
        rows = f"{figures['rows_calibrated']:,} other rows"
        methods = {
            f"with temperature {figures['temperature']:.3g} ({rows})": after,
            "without it": before,
        }
    head = "probabilities"
    width = max(map(len, [head, *methods]))
    yield f"{head:{width}}  mean confidence  calibration error"
    for name, found in methods.items():
        yield f"{name:{width}}  {found['confidence']:15.1%}  {found['ece']:17.3f}"


def confusion_lines(labels: Sequence[str], confusion: np.ndarray) -> Iterator[str]:
    """Yield a table of counts that fits 80 columns, or else the most frequent confusions."""
    names = [shortened(visible(label), 20) for label in labels]
    first = max(map(len, names))
    cells = [max(len(name), len(str(confusion.max()))) for name in names]
    if first + sum(cells) + 2 * len(cells) <= WIDTH:
        yield "confusion (rows: correct label, columns: predicted label)"
        yield " " * first + "".join(f"  {n:>{w}}" for n, w in zip(names, cells, strict=True))
        for name, row in zip(names, confusion, strict=True):
            counts = "".join(f"  {n:>{w}}" for n, w in zip(row, cells, strict=True))
            yield f"{name:{first}}{counts}"
        return
    yield from top_confusions(names, confusion)
