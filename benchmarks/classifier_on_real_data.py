"""Measure a classifier on public data: each way to prompt, fit and calibrate it.

    python benchmarks/classifier_on_real_data.py --data FOLDER --out FOLDER

`--data` holds parquet files: ag_news_sample5k_train, ag_news_sample5k_dev, ag_news_test,
trec_train, trec_test, cola_in_domain_dev, 20newsgroups_bydate_train, 20newsgroups_bydate_test.
The script prints a Markdown table and writes figures.json and reliability diagrams.
`--only PART ...` measures some parts again and keeps the others. Rows for tests and calibration are
never trained on.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score
from study import HEADER, LETTERS, TOPICS, WORDS, Study, draw, line

from mlmjax import Classifier, fill_mask, load_pretrained, pseudo_log_likelihood
from mlmjax.config.task import newsgroup
from mlmjax.errors import InputError
from mlmjax.evaluation.report import DIAGRAM, diagram
from mlmjax.evaluation.suite.entrants import tfidf_regression
from mlmjax.reporting import charts
from mlmjax.statistics import label_sets
from mlmjax.statistics.option_orders import sensitivity, shifted
from mlmjax.statistics.reliability import calibration, confidence
from mlmjax.weights.hub import PACKAGED

DESCRIBED = {
    "World": "politics, war and people of the world",
    "Sports": "games, teams and athletes",
    "Business": "companies, markets and money",
    "Technology": "science, computers and the internet",
}
KINDS = {
    "ABBR": "an abbreviation",
    "DESC": "a description or a reason",
    "ENTY": "a thing",
    "HUM": "a person or a group",
    "LOC": "a place",
    "NUM": "a number or a date",
}
GROUPS = ["comp.graphics", "rec.sport.baseball", "sci.space", "talk.politics.mideast"]
WAYS = {
    "words": WORDS,
    "letters": LETTERS,
    "head": {"head": "classification", "answer": None, "instruction": None},
}
RECIPE = {"learning_rate": 1e-3, "patience": 1, "validation_share": 0.1}


def mode(labels: Sequence[str]) -> str:
    return Counter(labels).most_common(1)[0][0]


def numbers(labels, names) -> np.ndarray:
    return np.array([list(names).index(label) for label in labels])


def fitting(s: Study) -> None:
    """Compare words, letters and a classification head, without and with fitting, and TF-IDF."""
    train, test = s.topics("sample5k_train", 500), s.topics("test", 500)
    s.accuracy("commonest label of the test", [mode(test[1])] * len(test[1]), test[1])
    for way, options in WAYS.items():
        fit = s.classifier(**options)
        if way != "head":
            s.accuracy(f"not fitted, {way}", fit.predict(test[0]), test[1])
        fit.fit(*train, epochs=3, **RECIPE)
        s.accuracy(f"fitted, {way}", fit.predict(test[0]), test[1])
        s.rows[-1]["history"] = fit.history_
        fit.save_pretrained(s.out / f"fitted-{way}")
    s.accuracy("TF-IDF", tfidf_regression(*train, test[0]), test[1])


def orders(s: Study) -> None:
    """Measure accuracy by cyclic order of the options, and two remedies for its influence."""
    texts, gold = s.topics("test", 200)
    dev, _ = s.topics("sample5k_dev", 100)
    truth = numbers(gold, TOPICS)
    plain, fitted = partial(s.classifier, **LETTERS), partial(s.fitted, "letters")
    for name, make in (("not fitted", plain), ("fitted", fitted)):
        asked = []
        for shift in range(4):
            one = make(labels=shifted(TOPICS, shift))
            asked.append(np.log(one.predict_proba(texts))[:, numbers(TOPICS, one.classes_)])
        found = sensitivity(np.stack(asked, axis=1), truth)
        for shift, share in enumerate(found["accuracy_by_shift"]):
            s.add(
                f"{name}, options from {TOPICS[shift]}",
                "accuracy",
                share["accuracy"],
                share["rows"],
            )
        s.add(name, "answers that change with the order", found["changed"], found["rows"])
        every = make(orders="all")
        s.accuracy(f'{name}, orders="all"', every.predict(texts), gold, passes=every.prompts)
        once = make().calibrate(dev, method="order")
        before = once.prompts
        s.accuracy(f'{name}, calibrate(method="order")', once.predict(texts), gold)
        s.rows[-1] |= {"passes": once.prompts - before, "passes to calibrate": before}


def trust(s: Study) -> None:
    """Fit calibration, label sets and abstention on dev rows; measure them on test rows."""
    texts, gold = s.topics("test", 500)
    dev, names = s.topics("sample5k_dev")
    half = len(dev) // 2
    truth = numbers(gold, TOPICS)

    def measure(what: str, asked: Classifier) -> np.ndarray:
        scores = np.log(asked.predict_proba(texts))
        s.accuracy(what, asked.classes_[scores.argmax(axis=1)], gold)
        for measure, value in calibration(scores, truth).items():
            s.add(what, measure, value)
        return scores

    for name, make in (("not fitted", s.classifier), ("fitted", partial(s.fitted, "words"))):
        measure(name, make())
        measure(f"{name}, batch", make().calibrate(dev[:half]))
        measure(f"{name}, null", make().calibrate())
        both = make()
        try:
            both.calibrate(dev[:half], names[:half])
        except InputError as error:  # answers no better than a guess have no temperature
            print(f"{name}, temperature: {error}")
            scores = np.log(both.predict_proba(texts))
        else:
            scores = measure(f"{name}, temperature", both)
        charts.save(diagram(*confidence(scores, truth)), s.out / f"{name}.svg", DIAGRAM)
        held = np.log(both.predict_proba(dev[half:]))
        for method in ("lac", "aps"):
            sets = label_sets.fit(held, numbers(names[half:], TOPICS), method=method)
            for share in (0.8, 0.9, 0.95):
                found = label_sets.coverage(sets.sets(scores, share), truth)
                what = f"{name}, {method}, requested {share}"
                s.add(what, "coverage", found["coverage"], found["rows"])
                s.rows[-1] |= {key: found[key] for key in ("mean_size", "empty", "single")}
    both.conform(dev[half:], names[half:], method="aps")
    if not (both.predict_set(texts, coverage=0.95) == sets.sets(scores, 0.95)).all():
        raise RuntimeError("predict_set and label_sets.fit differ")
    for share in (0.8, 0.85, 0.9, 0.95):
        what = f"fitted, abstain(accuracy={share})"
        try:
            both.abstain(dev[half:], names[half:], accuracy=share)
        except InputError as error:
            print(f"{what}: {error}")
            continue
        answers = both.predict(texts)
        answered = answers != ""
        s.add(what, "answered", answered.mean(), len(answered))
        s.accuracy(what, answers[answered], np.array(gold)[answered])


def many(s: Study) -> None:
    """Measure fifty labels: in one prompt, in rounds, and with a classification head."""
    train, test = s.read("trec_train"), s.read("trec_test")
    labels = sorted({row["label_fine"] for row in train})
    seen = {row["text"] for row in test}
    train = draw([row for row in train if row["text"] not in seen], 1200)
    texts, gold = ([row[key] for row in test] for key in ("text", "label_fine"))
    kind = LETTERS | {"labels": labels, "instruction": "What does the question ask for?"}
    head = s.classifier(labels=labels, **WAYS["head"])
    questions, trained = ([row[key] for row in train] for key in ("text", "label_fine"))
    head.fit(questions, trained, epochs=4, **RECIPE)
    s.accuracy("fit, classification", head.predict(texts), gold)
    s.accuracy("commonest label of the training rows", [mode(trained)] * len(gold), gold)
    s.accuracy("TF-IDF", tfidf_regression(questions, trained, texts), gold)
    for length in (512, 192, 96):
        asked = s.classifier(**kind, max_length=length)
        s.accuracy(f"not fitted, max_length {length}", asked.predict(texts[:100]), gold[:100])
        s.rows[-1]["passes"] = asked.prompts


def context(s: Study) -> None:
    """Measure few-shot examples, descriptions and labels of several tokens, without fitting."""
    texts, gold = s.topics("test", 200)
    shots = list(zip(*s.topics("sample5k_train", 24), strict=True))
    for name, options in {
        "words": WORDS,
        "words, 24 examples": {**WORDS, "examples": shots},
        "words, 24 examples, calibrated (batch)": {**WORDS, "examples": shots},
        "letters": LETTERS,
        "letters, descriptions": {**LETTERS, "labels": DESCRIBED},
    }.items():
        asked = s.classifier(max_length=512, **options)
        if "calibrated" in name:
            asked.calibrate(s.topics("sample5k_dev", 100)[0])
        s.accuracy(f"topics, {name}", asked.predict(texts), gold)
        if "examples" in options:
            s.rows[-1]["shots"] = asked.examples_shown
    rows = s.read("trec_test")
    texts, gold = [row["text"] for row in rows], [KINDS[row["label"]] for row in rows]
    for answer in ("letters", "continuation"):
        asked = s.classifier(labels=list(KINDS.values()), answer=answer, instruction=None)
        s.accuracy(f"kinds of question, {answer}", asked.predict(texts), gold)
        s.rows[-1]["passes"] = asked.prompts


def documents(s: Study) -> None:
    """Measure posts longer than the prompt: truncated, or scored window by window."""
    parts = []
    for name, limit in (("train", 250), ("test", None)):
        rows = s.read(f"20newsgroups_bydate_{name}")
        rows = draw([row for row in rows if row["label"] in GROUPS], limit)
        pairs = [(newsgroup(row["text"]), row["label"]) for row in rows]
        parts.append([pair for pair in pairs if pair[0].strip()])
    train, test = parts
    fit = s.classifier(labels=GROUPS, **WAYS["head"])
    fit.fit(*zip(*train, strict=True), epochs=3, **RECIPE)
    folder = s.out / "fitted-posts"
    fit.save_pretrained(folder)
    tokenizer = load_pretrained(folder)[1]
    long = [pair for pair in test if len(tokenizer.encode_plain(pair[0])) > 126][:100]
    texts, gold = zip(*long, strict=True)
    for rule in ("shorten", "mean", "max"):
        asked = Classifier(str(folder), progress=False, long_text=rule)
        s.accuracy(f"posts of more than 126 tokens, {rule}", asked.predict(texts), gold)
        s.rows[-1]["passes"] = asked.prompts
    s.accuracy("TF-IDF, whole posts", tfidf_regression(*zip(*train, strict=True), texts), gold)


def language(s: Study) -> None:
    """Measure how well likelihood tells acceptable sentences, and `fill_mask` finds words."""
    model, tokenizer = load_pretrained(s.model)
    rows = s.read("cola_in_domain_dev")
    good = [row["label"] for row in rows]
    for method in ("word_l2r", "original"):
        found = pseudo_log_likelihood(model, tokenizer, [r["text"] for r in rows], method=method)
        for measure in ("total", "per_token", "per_word"):
            values = [getattr(one, measure) for one in found]
            s.add(f"CoLA, {method}, {measure}", "AUC", roc_auc_score(good, values), rows=len(rows))
    rng, texts, words = np.random.default_rng(0), [], []
    for text in s.topics("test", 500)[0]:
        split = text.split()[:40]
        at = rng.integers(1, len(split) - 1)
        if len(tokenizer.encode_plain(f" {split[at]}")) == 1 and split[at].isalpha():
            words.append(split[at])
            texts.append(" ".join([*split[:at], "[MASK]", *split[at + 1 :]]))
    found = fill_mask(model, tokenizer, texts, top_k=5)
    hits = [
        word in [one.token.strip() for one in masks[0]]
        for word, masks in zip(words, found, strict=True)
    ]
    s.add("masked words of news", "among the first five", np.mean(hits), len(hits))


PARTS = (fitting, orders, trust, many, context, documents, language)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=PACKAGED)
    parser.add_argument("--out", type=Path, required=True)
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, help="parts to measure (again)")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / "figures.json"
    found = json.loads(kept.read_text()) if kept.exists() and given.only else {}
    study = Study(given.data, given.model, given.out)
    for part in PARTS:
        name = part.__name__
        if given.only and name not in given.only:
            continue
        study.part, study.rows = name, []
        part(study)
        found[name] = {"rows": study.rows}
        kept.write_text(json.dumps(found, indent=1) + "\n")
    rows = [row for part in PARTS if part.__name__ in found for row in found[part.__name__]["rows"]]
    print("\n".join([HEADER, *map(line, rows)]))


if __name__ == "__main__":
    main()
