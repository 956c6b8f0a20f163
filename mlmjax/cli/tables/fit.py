"""Fit a classifier to a labelled table, test it on held-out rows, and save it with a report."""

import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import confusion_matrix

from mlmjax.classification.classifier import Classifier
from mlmjax.classification.fitting import LearnedNothingWarning, split_rows
from mlmjax.cli.tables.choice import Choice, Way, choose, text_lengths
from mlmjax.cli.tables.inputs import check_csv
from mlmjax.cli.tables.report import fit_page
from mlmjax.config.data import CsvOptions
from mlmjax.data.reading.labelled import LabelledTable, read_labelled
from mlmjax.decisions.classifiers import is_one_prompt
from mlmjax.errors import InputError, counted
from mlmjax.evaluation.suite.entrants import tfidf_regression
from mlmjax.evaluation.summary import warn_of_few
from mlmjax.parallel.environment import check_devices
from mlmjax.reporting.accuracy import Method, top_confusions
from mlmjax.reporting.markdown import shortened, visible
from mlmjax.reporting.terminal import count_progress, say, working
from mlmjax.statistics import reliability
from mlmjax.statistics.metrics import classification_metrics, wilson_interval
from mlmjax.storage import check_replaceable, replace_folder, write_json, write_whole
from mlmjax.weights.hub import EXPORT_FILES, PACKAGED

REPORT = "report"
FILES = EXPORT_FILES | {REPORT}
FAR, LEAST = 4, 16
"""A text of more than `FAR` medians, of at least `LEAST` tokens each, slows the others down."""

WIDTH = 80
"""Characters of a line of the terminal."""


class Split(NamedTuple):
    """Hold the rows of a table that are trained on, and those that are tested."""

    train: list[int]
    test: list[int]
    said: tuple[str, ...]


def fit_table(
    path: str,
    *,
    text: str | None = None,
    label: str | None = None,
    out: str | None = None,
    model: str = PACKAGED,
    revision: str | None = None,
    dtype: str = "float32",
    answer: Way | None = None,
    anchor: str | None = None,
    learning_rate: float | None = None,
    epochs: int | None = None,
    test_share: float = 0.2,
    seed: int = 0,
    skip_blank: bool = False,
    drop_labels: Sequence[str] = (),
    encoding: str | None = None,
    csv: CsvOptions | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Fit, test and save a classifier; return its figures, as `report/results.json` has them.

    `out` (by default the table's name with `-classifier`) becomes a folder that `classify`,
    `Classifier.from_pretrained` and transformers load. Raises `InputError` for a table, columns or
    a folder that cannot be used, before any training.
    """
    started = time.perf_counter()
    folder = Path(out if out is not None else f"{Path(path).name.split('.')[0]}-classifier")
    _check_folder(folder)
    check_csv(path, csv)
    check_devices()
    with working(f"reading {path}"):
        table = read_labelled(
            path,
            text,
            label,
            skip_blank=skip_blank,
            drop_labels=drop_labels,
            encoding=encoding,
            csv=csv,
        )
    labels = sorted(set(table.labels))
    split = split_table(table, test_share, seed)
    for line in (*table.said, *split.said):
        say(line)
    trained, tested = table.at(split.train), table.at(split.test)
    choice = choose(
        model,
        labels,
        len(split.train),
        revision=revision,
        way=answer,
        learning_rate=learning_rate,
        epochs=epochs,
    )
    with working("measuring the texts"):
        lengths = text_lengths(model, table.texts, revision=revision)
    for line in (
        describe_lengths(table, lengths, max_length),
        *start_lines(model, choice, split, labels),
    ):
        say(line)
    options = {
        **choice.options(),
        "anchor": anchor,
        "max_length": max_length,
        "dtype": dtype,
        "revision": revision,
        "seed": seed,
    }
    classifier = Classifier(model, labels, **options, progress=False)
    learned = learn(classifier, trained)
    probabilities = answer_texts(classifier, tested[0])
    if classifier.shortened:
        say(f"warning: {counted(classifier.shortened, 'prompt')} did not fit: texts were truncated")
    with working("comparing with TF-IDF"):
        found, methods = measure(trained, tested, labels, probabilities)
    dialect = {} if csv is None else csv.model_dump(exclude_unset=True)
    figures: dict[str, Any] = {"table": str(path), "encoding": encoding, "csv": dialect}
    figures |= {"model": model, "out": str(folder)}
    figures |= describe(choice, table, split, labels) | found
    figures |= {"fit": learned, "serves": is_one_prompt(classifier.asking_)}
    rows = [(table.where[i], table.texts[i], table.labels[i]) for i in split.test]
    with working("writing the model and the report"):
        _save(folder, classifier, figures, methods, rows, probabilities)
    return figures | {"seconds": round(time.perf_counter() - started, 1)}


def describe_lengths(
    table: LabelledTable, lengths: np.ndarray, max_length: int | None = None
) -> str:
    """Say how long the texts are in tokens, and what helps if one is far longer than the others."""
    longest, middle = int(lengths.max()), float(np.median(lengths))
    text = (
        f"texts: {middle:,.0f} tokens in the median, {longest:,} in the longest "
        f"({table.where[int(lengths.argmax())]})"
    )
    if max_length is None and longest > FAR * max(middle, LEAST):
        text += "; it sets the length of all batches, and --max-length N shortens it"
    return text


def start_lines(model: str, choice: Choice, split: Split, labels: Sequence[str]) -> Iterator[str]:
    """Yield what is fitted, how it will answer and how long it learns."""
    yield (
        f"fitting {model} on {len(split.train):,} rows with {len(labels)} labels, testing on "
        f"{len(split.test):,}"
    )
    yield (
        f"answers: {choice.way} ({choice.why}); learning rate {choice.learning_rate:g}, epochs "
        f"{choice.epochs}, updates {choice.updates(len(split.train)):,}"
    )


def learn(classifier: Classifier, trained: tuple[list[str], list[str]]) -> dict[str, Any]:
    """Fit a classifier with progress; return what the fit says of itself, and say its warning."""
    with (
        count_progress("fine-tuning: updates", "loading and compiling", "testing") as progress,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", LearnedNothingWarning)  # said below
        classifier.fit(*trained, progress=progress)
    learned = describe_learning(classifier)
    if learned["warning"] is not None:
        say(f"warning: {learned['warning']}")
    return learned


def answer_texts(classifier: Classifier, texts: Sequence[str]) -> np.ndarray:
    """Return the probabilities `[texts, labels]` of a classifier, with progress."""
    parts: list[np.ndarray] = []
    with count_progress("held-out rows answered", "compiling") as progress:
        for part in classifier.stream(texts):
            parts.append(part)
            progress(sum(map(len, parts)), len(texts))
    return np.concatenate(parts)


def _check_folder(folder: Path) -> None:
    if str(folder) == PACKAGED:
        raise InputError(
            f"--out {folder}: is the name of the packaged model, which a folder of that name would "
            "hide; give another --out"
        )
    check_replaceable(folder, FILES)


def split_table(table: LabelledTable, share: float, seed: int) -> Split:
    """Hold out a share of each label's rows; raise `InputError` if too few remain on a side.

    A text that the table has with several labels is only trained on.
    """
    times = Counter(table.texts)
    clear = [i for i, text in enumerate(table.texts) if times[text] == 1]
    _, test = split_rows([table.labels[i] for i in clear], share, seed)
    tested = [clear[i] for i in test]
    trained = sorted(set(range(len(table.texts))) - set(tested))
    kinds = {table.labels[i] for i in trained}
    if not tested or len(kinds) < 2:
        found = ", ".join(f"{name} {count}" for name, count in Counter(table.labels).most_common(9))
        raise InputError(
            f"{table.where[0].rpartition(' line ')[0] or 'table'}: has too few rows to hold out "
            f"some of them for a test (rows by label: {found}); give at least two rows per label"
        )
    said = []
    if len(clear) < len(table.texts):
        several = sum(count > 1 for count in times.values())
        said.append(f"{counted(several, 'text')} with more than one label: not tested")
    alone = sorted(set(table.labels) - {table.labels[i] for i in tested})
    if alone:
        shown = shortened(", ".join(alone), WIDTH)
        said.append(f"warning: no row is tested for {counted(len(alone), 'label')}: {shown}")
    said += warn_of_few(len(tested), "held-out row")
    return Split(trained, tested, tuple(said))


def measure(
    trained: tuple[list[str], list[str]],
    tested: tuple[list[str], list[str]],
    labels: Sequence[str],
    probabilities: np.ndarray,
) -> tuple[dict[str, Any], list[Method]]:
    """Return the figures of the test rows, and the methods to compare with their accuracy."""
    texts, gold = tested
    predicted = [labels[best] for best in probabilities.argmax(axis=1)]
    commonest = Counter(trained[1]).most_common(1)[0][0]
    name = f"always {shortened(visible(commonest), 20)!r}"
    methods = [
        _method("this classifier", predicted, gold, "What the saved folder answers.", is_ours=True),
        _method(name, [commonest] * len(gold), gold, "A useful classifier is above this."),
    ]
    try:
        by_words = tfidf_regression(*trained, texts)
    except ValueError:  # no word of two letters is in any text
        say("TF-IDF finds no words in these texts, so there is no comparison with it")
    else:
        purpose = "Counts of words, fitted to the same rows: what a language model must beat."
        methods.insert(1, _method("TF-IDF + logistic regression", by_words, gold, purpose))
    with np.errstate(divide="ignore"):
        log_probs = np.log(probabilities)
    truth = [labels.index(name) for name in gold]
    figures: dict[str, Any] = {
        **classification_metrics(gold, predicted),
        "methods": {
            one.name: {"accuracy": one.accuracy, "accuracy_ci95": list(one.interval or ())}
            for one in methods
        },
        "calibration": reliability.calibration(np.maximum(log_probs, -745.0), truth),
        "confusion": confusion_matrix(gold, predicted, labels=labels).tolist(),
    }
    return figures, methods


def _method(
    name: str, predicted: list[str], gold: list[str], purpose: str, is_ours: bool = False
) -> Method:
    correct = sum(map(str.__eq__, predicted, gold))
    interval = wilson_interval(correct, len(gold))
    return Method(name, correct / len(gold), interval, is_ours, purpose)


def describe(
    choice: Choice, table: LabelledTable, split: Split, labels: Sequence[str]
) -> dict[str, Any]:
    """Return what `results.json` says of a fit besides its figures."""
    return {
        "text": table.columns.text,
        "label": table.columns.label,
        "answer": choice.way,
        "learning_rate": choice.learning_rate,
        "epochs": choice.epochs,
        "batch_size": choice.batch_size,
        "rows_trained": len(split.train),
        "n": len(split.test),
        "labels": list(labels),
        "notes": [*table.said, *split.said],
    }


def describe_learning(classifier: Classifier) -> dict[str, Any]:
    """Return what `results.json` says of the training itself."""
    summary = classifier.fit_summary_
    measured = asdict(summary.training)
    answer = str(classifier.classes_[measured.pop("answer")])
    return {
        "training": measured | {"answer": answer},
        "epochs": classifier.history_,
        "warning": summary.warning,
    }


def _save(
    folder: Path,
    classifier: Classifier,
    figures: dict[str, Any],
    methods: Sequence[Method],
    rows: Sequence[tuple[str, str, str]],
    probabilities: np.ndarray,
) -> None:
    """Write the model and its report whole or not at all.

    `rows` has the place, the text and the label of each test row.
    """
    page = fit_page(
        figures=figures,
        methods=methods,
        rows=rows,
        probabilities=probabilities,
        classify=classify_line(figures),
    )
    labels = figures["labels"]
    predictions = [
        {
            "where": where,
            "gold": gold,
            "prediction": labels[int(row.argmax())],
            "probabilities": dict(zip(labels, row.tolist(), strict=True)),
        }
        for (where, _, gold), row in zip(rows, probabilities, strict=True)
    ]
    with replace_folder(folder, FILES) as new:
        classifier.save_pretrained(new)
        (new / REPORT).mkdir()
        write_json(new / REPORT / "results.json", figures)
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in predictions)
        write_whole(new / REPORT / "predictions.jsonl", text.encode())
        write_whole(new / REPORT / "report.html", page.encode())


def classify_line(figures: dict[str, Any]) -> str:
    """Return the command that classifies another table of the same columns."""
    options = f"--model {quote(figures['out'])} --text {quote(figures['text'])}"
    if figures["encoding"] is not None:
        options += f" --encoding {figures['encoding']}"
    for name, value in figures["csv"].items():
        options += f" {CsvOptions().setting(name, value)}"
    return f"mlmjax classify {options} --out answers.csv TABLE"


def result_lines(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that the command prints: accuracy, confusion, calibration, what is next."""
    methods = figures["methods"]
    width = max(map(len, methods))
    head = f"accuracy on {figures['n']:,} held-out rows"
    yield f"{head:{width + 8}}   95 % interval"
    for name, found in methods.items():
        low, high = found["accuracy_ci95"]
        yield f"{name:{width}}  {found['accuracy']:6.1%}   {low:.1%} to {high:.1%}"
    yield ""
    yield from confusion_lines(figures["labels"], np.array(figures["confusion"]))
    yield ""
    fit = figures["calibration"]
    learned = figures["fit"]["training"]
    yield (
        f"{learned['n']:,} training rows: loss {learned['loss']:.3f} (label frequencies: "
        f"{learned['baseline_loss']:.3f}), accuracy {learned['accuracy']:.1%} (commonest label: "
        f"{learned['majority']:.1%})"
    )
    if figures["fit"]["warning"]:
        yield f"warning: {figures['fit']['warning']}"
    yield f"macro-F1: {figures['macro_f1']:.3f}"
    yield (
        f"calibration: mean confidence {fit['confidence']:.1%} at an accuracy of "
        f"{figures['accuracy']:.1%}; expected calibration error {fit['ece']:.3f}"
    )
    folder = Path(figures["out"])
    yield f"classifier: {folder}"
    yield f"report: {folder / REPORT / 'report.html'}"
    yield f"next: {classify_line(figures)}"
    if figures["serves"]:
        yield f"or: mlmjax serve --model {quote(figures['out'])}"


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
