"""Show the main job end to end, offline: fine-tune, compare, export, reload, report."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.resources import files
from pathlib import Path
from shlex import quote
from string import Template
from typing import Any

import jax
import numpy as np
from flax import nnx
from sklearn.metrics import confusion_matrix

from mlmjax._version import __version__
from mlmjax.classification.classifier import Classifier
from mlmjax.cli.demo_report import Answer, Efficiency, efficiency_sentence, page
from mlmjax.config.run import RunConfig, load_config
from mlmjax.data.rows import open_rows
from mlmjax.errors import InputError, RunError
from mlmjax.evaluation.suite.entrants import tfidf_regression
from mlmjax.model.modernbert import ModernBertForMaskedLM, parameters
from mlmjax.parallel.environment import check_devices
from mlmjax.reporting.accuracy import Method
from mlmjax.reporting.terminal import say
from mlmjax.statistics.metrics import wilson_interval
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.run.log import METRICS
from mlmjax.training.run.train import run_training
from mlmjax.training.step import split_parameters
from mlmjax.weights import hub, pretrained

TRAIN, WATCHED, TEST = "train.jsonl", "watched.jsonl", "test.jsonl"
ATTRIBUTION = "ATTRIBUTION.md"
TRAINED = 75  # paragraphs of each subject; training takes about a minute on two cores
WATCHED_AT_MOST = 10  # of each subject after those, for the curve of the held-out loss
FEWER = (8, 32)  # paragraphs of each subject, for the accuracy with fewer labels
READ_BACK = 100  # paragraphs that the exported model answers too
OWN_FILES = ("data", "run.toml", "subjects.toml", "rows", "run", "model", "report.html")
PROMPT = "{text}\nSubject: [unused0] [MASK]"
SENTENCES = (
    "The largest moons of Jupiter were first seen through a small telescope.",
    "When the price of bread rises, families buy less of it and bakers offer more.",
    "Enzymes in the stomach break proteins into pieces that the blood can carry.",
    "Multiply both sides of the equation by the denominator to get rid of the fraction.",
    "The treaty ended the war, and the soldiers went home to their farms.",
    "If every event has a cause, are we ever free to choose what we do?",
)


def run_demo(
    out: Path, overrides: Sequence[str] = (), *, limit: int | None = None
) -> dict[str, float]:
    """Test the packaged model before and after fine-tuning; return the accuracy of each method.

    The texts are the bundled textbook paragraphs. Results go to stdout, progress to stderr. `out`
    gets `report.html`, the texts, the run's configuration, the task and the model in Hugging Face
    format. In the same folder, a second call resumes the training, or finds it complete, and
    repeats the rest. `overrides` are those of `load_config`; `limit` keeps the first paragraphs of
    each file, for a quick look.

    Raises `InputError` for a folder of another run, `RunError` if the exported model does not give
    exactly the answers of the model in memory.
    """
    started = time.perf_counter()
    check_devices()
    labels = write_files(out, limit)
    config = load_config(out / "run.toml", overrides)
    source = config.init_from or hub.PACKAGED
    train, test = (read_texts(out / "data" / name) for name in (TRAIN, TEST))
    texts, gold = test
    say(f"\n1/6  {source}, zero-shot, on {len(texts):,} held-out paragraphs")
    untrained = Classifier(source, labels, template=PROMPT, progress=True)
    zero_shot = untrained.predict(texts).tolist()

    say(f"\n2/6  fine-tuning by answer token prediction on {len(train[0]):,} other paragraphs")
    model, tokenizer, seconds = fine_tune(config)
    classifier = Classifier((model, tokenizer), labels, template=PROMPT, progress=True)
    probabilities = classifier.predict_proba(texts)
    predicted = [labels[best] for best in probabilities.argmax(axis=1)]

    say("\n3/6  fine-tuning with a classification head on the same paragraphs")
    settings = recipe(config, len(train[0])) | {"progress": True}
    head = Classifier(source, labels, head="classification", **settings)
    by_head = head.fit(*train).predict(texts).tolist()

    say("\n4/6  TF-IDF + logistic regression")
    by_words = tfidf_regression(*train, texts)
    methods = compare(source, labels, gold, zero_shot, predicted, by_head, by_words)

    say("\n5/6  the same with fewer labels")
    efficiency = with_fewer_labels(methods, settings, config, train, test)

    say("\n6/6  export, reload, compare")
    shown = [*SENTENCES, *texts[:READ_BACK]]
    again = export(classifier, out / "model", shown)
    sentences = make_answers(labels, SENTENCES, again[: len(SENTENCES)])
    counts = {"tested": len(texts), "compared": len(shown)}
    print_results(methods, efficiency, sentences, out / "model", **counts)
    about = {**facts(out, config, model), "trained": len(train[0]), "seconds": round(seconds)}
    about |= {"methods": methods, "efficiency": efficiency, "sentences": sentences}
    about["curve"] = read_jsonl(Path(config.out) / METRICS)
    write_page(out, labels, test, probabilities, **about)
    seconds = time.perf_counter() - started
    print(f"\nreport: {out / 'report.html'}\ntotal time: {seconds:.0f} seconds")
    return {method.name: method.accuracy for method in methods}


def fine_tune(config: RunConfig) -> tuple[ModernBertForMaskedLM, Tokenizer, float]:
    """Train a run; return the model of its final state, its tokenizer and the seconds it took."""
    started = time.perf_counter()
    with redirect_stdout(sys.stderr):
        state = run_training(config)
    seconds = time.perf_counter() - started
    export = Path(config.out) / "export"
    model, tokenizer = pretrained.load_pretrained(export, local_files_only=True)
    graphdef, _ = split_parameters(model)
    return nnx.merge(graphdef, jax.device_get(state.params)), tokenizer, seconds


def compare(
    source: str,
    labels: Sequence[str],
    gold: Sequence[str],
    zero_shot: Sequence[str],
    tuned: Sequence[str],
    by_head: Sequence[str],
    by_words: Sequence[str],
) -> list[Method]:
    """Return every method with its accuracy, and a sentence that says what its bar is for."""
    commonest = Counter(gold).most_common(1)[0][1] / len(gold)
    return [
        Method(
            "chance",
            1 / len(labels),
            purpose="Guessing among the subjects. A method at this level knows nothing.",
        ),
        Method(
            "majority subject",
            commonest,
            purpose="Always giving the most frequent subject. A useful method is above this.",
        ),
        measure("zero-shot", zero_shot, gold)._replace(
            purpose=f"{source} as it is: what the model can do without any labels."
        ),
        measure("fine-tuned by answer token prediction", tuned, gold)._replace(
            is_ours=True,
            purpose="The model after training on the answer's word, which is what mlmjax is for.",
        ),
        measure("fine-tuned with a classification head", by_head, gold)._replace(
            purpose="The same model with a new last layer: the usual way to train a classifier."
        ),
        measure("TF-IDF + logistic regression", by_words, gold)._replace(
            purpose="Counts of words, without a language model: what a language model must beat."
        ),
    ]


def few_labels(
    texts: Sequence[str], gold: Sequence[str], each: Sequence[int]
) -> list[list[tuple[str, str]]]:
    """Return subsets with the first texts of each label, as many as `each` says.

    A number of which some label has no more texts gives no subset.

    >>> few_labels(["a", "b", "c", "d"], ["x", "x", "y", "y"], (1, 2))
    [[('a', 'x'), ('c', 'y')]]
    """
    pairs = list(zip(texts, gold, strict=True))
    most = min(Counter(gold).values())
    return [first_of_each(pairs, number) for number in each if number < most]


def first_of_each(pairs: Sequence[tuple[Any, str]], number: int) -> list[tuple[Any, str]]:
    """Return the first pairs of each label, in their order; a pair's second item is its label."""
    seen: Counter[str] = Counter()
    kept = []
    for pair in pairs:
        seen[pair[1]] += 1
        if seen[pair[1]] <= number:
            kept.append(pair)
    return kept


def with_fewer_labels(
    methods: Sequence[Method],
    settings: Mapping[str, Any],
    config: RunConfig,
    train: tuple[list[str], list[str]],
    test: tuple[list[str], list[str]],
) -> list[Efficiency]:
    """Return the accuracy of model and TF-IDF with no labels, with a few, and with all of them.

    `methods` are those of `compare`, and `settings` and `config` those of the training with all
    texts. With fewer texts there are more epochs, so that there are as many updates.
    """
    labels, source = sorted(set(train[1])), config.init_from or hub.PACKAGED
    points = [Efficiency(0, methods[2], methods[0])]
    for few in few_labels(*train, FEWER):
        texts, gold = map(list, zip(*few, strict=True))
        epochs = max(1, round(config.steps * settings["train_batch_size"] / len(texts)))
        ours = Classifier(
            source, labels, answer="words", template=PROMPT, **{**settings, "epochs": epochs}
        )
        found = ours.fit(texts, gold).predict(test[0]).tolist()
        by_words = tfidf_regression(texts, gold, test[0])
        both = (measure("", answers, test[1]) for answers in (found, by_words))
        points.append(Efficiency(len(texts) // len(labels), *both))
    return [*points, Efficiency(len(train[0]) // len(labels), methods[3], methods[5])]


def recipe(config: RunConfig, examples: int) -> dict[str, Any]:
    """Return the settings that fine-tune a classification head as a run is trained."""
    rows = sum(len(source) for source in open_rows(Path(config.data.rows), "train"))
    return {
        "epochs": max(1, round(config.steps * config.data.batch_size / rows)),
        "train_batch_size": max(1, round(examples * config.data.batch_size / rows)),
        "learning_rate": config.optimizer.learning_rate,
        "weight_decay": config.optimizer.weight_decay,
        "seed": config.seed,
    }


def write_files(out: Path, limit: int | None = None) -> list[str]:
    """Write the texts, `run.toml` and `subjects.toml` into a folder; return the labels, sorted."""
    source = files("mlmjax") / "assets" / "openstax"
    make_folder(out)
    (out / "data" / ATTRIBUTION).write_bytes((source / ATTRIBUTION).read_bytes())
    pages = (source / TRAIN).read_bytes().splitlines(keepends=True)
    test = (source / TEST).read_bytes().splitlines(keepends=True)
    labelled = [(line, json.loads(line)["label"]) for line in pages]
    labels = sorted({label for _, label in labelled})
    each = max(1, limit // len(labels)) if limit else TRAINED
    trained = first_of_each(labelled, each)
    known = set(trained)
    rest = [pair for pair in labelled if pair not in known]
    watched = first_of_each(rest, min(each, WATCHED_AT_MOST))
    parts = {
        TRAIN: [line for line, _ in trained],
        WATCHED: [line for line, _ in watched],
        TEST: test[:limit],
    }
    for name, lines in parts.items():
        (out / "data" / name).write_bytes(b"".join(lines))
    values = {
        "source": hub.PACKAGED,
        "run": str(out / "run"),
        "rows": str(out / "rows"),
        "train": str(out / "data" / TRAIN),
        "watched": str(out / "data" / WATCHED),
        "prompt": PROMPT,
        "labels": labels,
    }
    # A string and a list of strings are the same in JSON and TOML.
    written = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    for name in ("run.toml", "subjects.toml"):
        text = (source / name).read_text(encoding="utf-8")
        (out / name).write_text(Template(text).substitute(written), encoding="utf-8")
    return labels


def make_folder(out: Path) -> None:
    """Make the folder of the demo; raise `InputError` if it holds files of others."""
    if out == Path(hub.PACKAGED):
        raise InputError(
            f"{out}: is the name of the packaged model, which a folder of that name would hide; "
            "give another --out"
        )
    taken = [name for name in OWN_FILES if os.path.lexists(out / name)]
    if taken and not (out / "data" / ATTRIBUTION).is_file():
        raise InputError(
            f"{out / taken[0]}: already exists and was not written by the demo; give another --out"
        )
    try:
        (out / "data").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be used as the demo's folder ({error.strerror}); give another --out"
        ) from error


def measure(
    name: str, predicted: Sequence[str], gold: Sequence[str], is_ours: bool = False
) -> Method:
    """Return a method with its accuracy and the 95 % interval of the accuracy.

    >>> measure("guess", ["a", "a", "b", "b"], ["a", "b", "b", "b"]).accuracy
    0.75
    """
    correct = sum(map(str.__eq__, predicted, gold))
    return Method(name, correct / len(gold), wilson_interval(correct, len(gold)), is_ours)


def make_answers(
    labels: Sequence[str],
    texts: Sequence[str],
    probabilities: np.ndarray,
    gold: Sequence[str | None] | None = None,
) -> list[Answer]:
    """Return each text with its row of probabilities `[texts, labels]` and its gold label."""
    return [
        Answer(text, dict(zip(labels, row.tolist(), strict=True)), truth)
        for text, row, truth in zip(texts, probabilities, gold or [None] * len(texts), strict=True)
    ]


def export(classifier: Classifier, folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Save a classifier, load it, and return its probabilities, which must be the same."""
    classifier.save_pretrained(folder)
    again = Classifier.from_pretrained(folder).predict_proba(texts)
    check_same(folder, classifier.predict_proba(texts), again)
    return again


def check_same(folder: Path, before: np.ndarray, after: np.ndarray) -> None:
    """Raise `RunError` unless two tables of probabilities are bit-identical."""
    differing = int(np.any(before != after, axis=1).sum())
    if differing:
        raise RunError(
            f"{folder}: the exported model gives different probabilities for {differing} of "
            f"{len(before)} texts, by up to {np.abs(before - after).max():.1e}; expected the same"
        )


def print_results(
    methods: Sequence[Method],
    efficiency: Sequence[Efficiency],
    sentences: Sequence[Answer],
    folder: Path,
    *,
    tested: int,
    compared: int,
) -> None:
    """Print the accuracies, also with fewer labels, the new sentences and the export check."""
    width = max(len(method.name) for method in methods)
    print(f"\n{f'accuracy on {tested} held-out paragraphs':{width}}           95 % interval")
    for method in methods:
        interval = ""
        if method.interval:
            interval = "   {:.1%} to {:.1%}".format(*method.interval)
        print(f"{method.name:{width}}  {method.accuracy:6.1%}{interval}")
    print("\nlabels per subject  fine-tuned  TF-IDF")
    for point in efficiency:
        print(f"{point.labels:18}  {point.ours.accuracy:10.1%}  {point.tfidf.accuracy:6.1%}")
    print(efficiency_sentence(efficiency))
    print("\nnew sentences")
    for answer in sentences:
        shares = ", ".join(f"{label} {share:.0%}" for label, share in answer.best())
        print(f"  {answer.text}\n    {shares}")
    print(
        f"\nexport: {folder} (Hugging Face format); reloaded, it gives bit-identical "
        f"probabilities for {compared} texts"
    )


def facts(out: Path, config: RunConfig, model: ModernBertForMaskedLM) -> dict[str, Any]:
    """Return what the report says about the run and the next steps."""
    names = {"folder": "model", "task": "subjects.toml", "run": "run.toml"}
    return {
        **{key: quote(str(out / name)) for key, name in names.items()},
        "config": config,
        "source": config.init_from or hub.PACKAGED,
        "network": model.config,
        "parameters": sum(leaf.size for leaf in parameters(model).values()),
        "prompt": PROMPT,
        "machine": f"{jax.default_backend().upper()}, {os.cpu_count()} cores",
        "software": f"mlmjax {__version__}, jax {jax.__version__}",
    }


def write_page(
    out: Path,
    labels: Sequence[str],
    test: tuple[list[str], list[str]],
    probabilities: np.ndarray,
    **shown: Any,
) -> None:
    """Write the report: the answers to the test texts, and `shown`, as `page` takes it."""
    texts, gold = test
    predicted = [labels[best] for best in probabilities.argmax(axis=1)]
    answers = make_answers(labels, texts, probabilities, gold)
    report = page(
        labels=labels,
        confusion=confusion_matrix(gold, predicted, labels=labels),
        answers=[answers[gold.index(label)] for label in labels],
        **shown,
    )
    (out / "report.html").write_text(report, encoding="utf-8")


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    """Return the texts of a file and their labels."""
    rows = read_jsonl(path)
    return [row["text"] for row in rows], [row["label"] for row in rows]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line that this package wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
