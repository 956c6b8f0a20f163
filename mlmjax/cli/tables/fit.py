"""Fit a classifier to a labelled table, test it on held-out rows, and save it with a report."""

import json
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sklearn.metrics import confusion_matrix

from mlmjax.classification.classifier import Classifier
from mlmjax.classification.fitting import LearnedNothingWarning, found_problems
from mlmjax.cli.tables.choice import Choice, Way, choose, prompt_lengths
from mlmjax.cli.tables.inputs import check_csv
from mlmjax.cli.tables.lines import (
    REPORT,
    classify_line,
    length_lines,
    start_lines,
    try_line,
    verdict_lines,
)
from mlmjax.cli.tables.report import fit_page
from mlmjax.cli.tables.split import Split, split_table
from mlmjax.config.data import CsvOptions
from mlmjax.data.contamination import with_table_run
from mlmjax.data.reading.labelled import LabelledTable, read_labelled
from mlmjax.decisions.classifiers import is_one_prompt
from mlmjax.errors import InputError
from mlmjax.evaluation.suite.entrants import tfidf_linear
from mlmjax.parallel.environment import check_devices
from mlmjax.reporting.accuracy import Method
from mlmjax.reporting.markdown import shortened, visible
from mlmjax.reporting.terminal import Progress, count_progress, say, working
from mlmjax.statistics import reliability
from mlmjax.statistics.metrics import classification_metrics, wilson_interval
from mlmjax.storage import (
    CARD,
    check_replaceable,
    check_writable,
    replace_folder,
    write_json,
    write_whole,
)
from mlmjax.weights.adapters import check_apart
from mlmjax.weights.cards import measured, with_results
from mlmjax.weights.hub import EXPORT_FILES, PACKAGED, fetch

FILES = EXPORT_FILES | {REPORT}


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
    learning_rate: float | Literal["auto"] | None = None,
    epochs: int | None = None,
    adapter: Mapping[str, Any] | None = None,
    train: Sequence[str] = (),
    restarts: int = 0,
    test_share: float = 0.2,
    calibration_share: float = 0.1,
    seed: int = 0,
    skip_blank: bool = False,
    drop_labels: Sequence[str] = (),
    encoding: str | None = None,
    csv: CsvOptions | None = None,
    max_length: int | None = None,
    words: Sequence[str] = (),
) -> dict[str, Any]:
    """Fit, test and save a classifier; return its figures, as `report/results.json` has them.

    `out` (by default the table's name with `-classifier`) becomes a folder that `classify`,
    `Classifier.from_pretrained` and transformers load. `words` are those of the command, which
    advice repeats. Raises `InputError` for a table, columns or a folder that cannot be used, before
    any training.
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
    split = split_table(table, test_share, seed, calibration_share=calibration_share)
    for line in (*table.said, *split.said):
        say(line)
    trained, spared, tested = map(table.at, (split.train, split.calibration, split.test))
    choice = choose(
        model,
        labels,
        len(split.train),
        revision=revision,
        way=answer,
        learning_rate=learning_rate,
        epochs=epochs,
        adapter=adapter,
        train=train,
        restarts=restarts,
    )
    if adapter is not None:
        check_apart(folder, fetch(model, revision=revision))
    options = {
        **choice.options(),
        "anchor": anchor,
        "max_length": max_length,
        "dtype": dtype,
        "revision": revision,
        "seed": seed,
    }
    classifier = Classifier(model, labels, **options, progress=False)
    with working("measuring the texts"):
        lengths = prompt_lengths(classifier, table.texts)
    for line in (
        *length_lines(table.where, lengths, max_length),
        *start_lines(model, choice, split, labels),
    ):
        say(line)
    learned = learn(classifier, trained, choice)
    classifier.manifest_ = with_table_run(
        classifier.manifest_, path, init_from=model, records=len(table.texts)
    )
    temperature = calibrate(classifier, spared)
    probabilities = answer_texts(classifier, tested[0])
    untested = trained[0] + spared[0], trained[1] + spared[1]
    with count_progress("TF-IDF: labels fitted", "comparing with TF-IDF") as progress:
        found, methods = measure(untested, tested, labels, probabilities, temperature, progress)
    dialect = {} if csv is None else csv.model_dump(exclude_unset=True)
    figures: dict[str, Any] = {"table": str(path), "encoding": encoding, "csv": dialect}
    figures |= {"model": model, "out": str(folder), "words": list(words)}
    figures |= describe(choice, table, split, labels) | found
    figures |= {"fit": learned, "learning_rate": learned["learning_rate"]}
    figures["serves"] = is_one_prompt(classifier.asking_)
    rows = [(table.where[i], table.texts[i], table.labels[i]) for i in split.test]
    with working("writing the model and the report"):
        _save(folder, classifier, figures, methods, rows, probabilities)
    return figures | {"seconds": round(time.perf_counter() - started, 1)}


def learn(
    classifier: Classifier, trained: tuple[list[str], list[str]], choice: Choice
) -> dict[str, Any]:
    """Fit a classifier with progress; return what the fit says of itself."""
    with (
        count_progress("fine-tuning: updates", "loading and compiling", "testing") as progress,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", LearnedNothingWarning)  # in the results
        classifier.fit(*trained, progress=progress)
    # The choice was made before the classifier, which therefore takes it for an argument.
    reason = {"reason": choice.reason}
    classifier.settings_ = classifier.settings_.model_copy(update=reason)
    return describe_learning(classifier, choice)


def calibrate(classifier: Classifier, spared: tuple[list[str], list[str]]) -> float | None:
    """Fit a temperature to labelled texts that were not trained on; say if none fits them."""
    if not spared[0]:
        return None
    try:
        with working("fitting a temperature"):
            classifier.calibrate(*spared)
    except InputError as error:
        say(f"probabilities stay as they are: {error.message}")
        return None
    assert classifier.calibration_ is not None
    return classifier.calibration_.temperature


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
    check_writable(folder)


def measure(
    untested: tuple[list[str], list[str]],
    tested: tuple[list[str], list[str]],
    labels: Sequence[str],
    probabilities: np.ndarray,
    temperature: float | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Method]]:
    """Return the figures of the test rows, and the methods to compare with their accuracy.

    `probabilities` `[tested, labels]` were calibrated by `temperature`, if there is one. `progress`
    is that of `tfidf_linear`.
    """
    texts, gold = tested
    predicted = [labels[best] for best in probabilities.argmax(axis=1)]
    commonest = Counter(untested[1]).most_common(1)[0][0]
    name = f"always {shortened(visible(commonest), 20)!r}"
    methods = [
        _method("this classifier", predicted, gold, "What the saved folder answers.", is_ours=True),
        _method(name, [commonest] * len(gold), gold, "A useful classifier is above this."),
    ]
    try:
        linear, by_words = tfidf_linear(*untested, texts, progress)
    except ValueError:  # no word of two letters is in any text
        say("TF-IDF finds no words in these texts, so there is no comparison with it")
    else:
        purpose = "Counts of words, fitted to all other rows: what a language model must beat."
        methods.insert(1, _method(linear, by_words, gold, purpose))
    with np.errstate(divide="ignore"):
        log_probs = np.maximum(np.log(probabilities), -745.0)
    truth = [labels.index(name) for name in gold]
    figures: dict[str, Any] = {
        **classification_metrics(gold, predicted),
        "methods": {
            one.name: {"accuracy": one.accuracy, "accuracy_ci95": list(one.interval or ())}
            for one in methods
        },
        "calibration": reliability.calibration(log_probs, truth),
        "temperature": temperature,
        "uncalibrated": None
        if temperature is None
        else reliability.calibration(log_probs * temperature, truth),
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
        "epochs": choice.epochs,
        "trained_share": choice.trained,
        "batch_size": choice.batch_size,
        "rows_trained": len(split.train),
        "rows_calibrated": len(split.calibration),
        "n": len(split.test),
        "labels": list(labels),
        "notes": [*table.said, *split.said],
    }


def describe_learning(classifier: Classifier, choice: Choice) -> dict[str, Any]:
    """Return what `results.json` says of the training itself."""
    summary = classifier.fit_summary_
    measured = asdict(summary.training)
    answer = str(classifier.classes_[measured.pop("answer")])
    kept = summary.attempts[summary.kept]
    seen = found_problems(summary.attempts, summary.kept, is_tested=True)
    advice = ", ".join(choice.other_options(kept.learning_rate))
    return {
        "training": measured | {"answer": answer},
        "epochs": classifier.history_,
        "learning_rate": kept.learning_rate,
        "attempts": len(summary.attempts),
        "warning": None if seen is None else f"{seen}. What usually helps: {advice}",
        "try": choice.first_options(),
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
        verdicts=list(verdict_lines(figures)),
        again=try_line(figures),
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
        tested = measured(figures, f"held-out rows of {Path(figures['table']).name}")
        card = with_results((new / CARD).read_text(encoding="utf-8"), tested)
        write_whole(new / CARD, card.encode())
        (new / REPORT).mkdir()
        write_json(new / REPORT / "results.json", figures)
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in predictions)
        write_whole(new / REPORT / "predictions.jsonl", text.encode())
        write_whole(new / REPORT / "report.html", page.encode())
