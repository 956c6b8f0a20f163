"""The page of the report on prepared rows, in Markdown that no text in it can break."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlmjax.data.reading.files import BROKEN_RECORD
from mlmjax.reporting.markdown import LONG_CELL, cell, fenced, number, share, table

TOP = 30
"""Tasks and answers shown by name."""

KEPT, NOT_SELECTED = "in the rows", "left out by data.select"
_FILES, _HITS = 30, 5


def page(found: Mapping[str, Any]) -> str:
    """Return the page for the figures of `rows_report.figures`."""
    train = found["splits"]["train"]
    records = sum(source["records"] for source in found["sources"])
    parts = [
        "# What the rows hold",
        f"{train['examples']:,} examples to train on, {train['tokens']:,} tokens in "
        f"{train['rows']:,} rows of {found['seq_length']:,} ({train['padding_share']:.2%} "
        f"padding), made from {records:,} records. All figures are in `report.json`, what the rows "
        "were made from in `manifest.json` of the rows folder.",
        "## What became of the records",
        "![share of the records of each source that were kept, and why others were not]"
        "(records.png)",
        *_records(found["sources"]),
        *_exclusions(found["exclusions"]),
        *_selection(found["selection"]),
        "## Rows",
        *_rows(found),
        *_weights(found["weights"]),
        "## Tasks",
        *_tasks(train),
        "## Answers",
        *_answers(train),
        "## Lengths",
        "![examples by their number of tokens](lengths.png)",
        *_lengths(found["splits"]),
        f"## {len(found['prompts'])} examples, drawn at random",
        "Each is shown as the model sees it, special tokens written out, the answer's token "
        "replaced by the mask. Characters that could not be seen are written as their numbers, as "
        "in ⟨U+00A0⟩. Of plain text the masks are drawn while training. In a row, examples are "
        "blind to one another.",
        *(_prompt(place, one) for place, one in enumerate(found["prompts"], start=1)),
        "## Made from",
        *_made_from(found),
    ]
    return "\n\n".join(parts) + "\n"


def _records(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["source", "for", "records:", "dropped:", "examples:", f"{NOT_SELECTED}:", "train:"]
    overview = table(
        [*head, "validation:"],
        (
            [
                cell(source["name"]),
                source["configured_for"],
                *map(
                    number,
                    (
                        source["records"],
                        sum(source["dropped"].values()),
                        source["examples"],
                        source["not_selected"],
                        source["examples_in_rows"].get("train", 0),
                        source["examples_in_rows"].get("validation", 0),
                    ),
                ),
            ]
            for source in sources
        ),
    )
    told = [
        [
            cell(source["name"]),
            what,
            cell(reason),
            number(n),
            share(n, source["records"]),
        ]
        for source in sources
        for what in ("dropped", "shortened", "normalized")
        for reason, n in sorted(source[what].items(), key=lambda item: (-item[1], item[0]))
    ]
    hits = [
        [cell(source["name"]), cell(name), *(cell(part, LONG_CELL) for part in hit)]
        for source in sources
        for name, found in source["hits"].items()
        for hit in found[:_HITS]
    ]
    parts = [
        overview,
        "Records are what was read; an example is one prompt with its answer, or one window of "
        "plain text, of which a record may give many.",
    ]
    if told:
        parts.append(
            table(["source", "what", "why, or in which field", "records:", "share:"], told)
        )
    parts += _broken(sources)
    if hits:
        parts.append(
            f"Of the records that share text with an evaluation set, the first {_HITS} of each "
            "source and set:"
        )
        parts.append(table(["source", "evaluation set", "record", "words"], hits))
    return parts


def _broken(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name what was skipped as broken: every source's files, and then the first of its records."""
    counted, lines = [], []
    for source in sources:
        parts = []
        for what, named, found in (
            ("file", source["broken_files_named"], source["broken_files"]),
            ("record", source["broken"][:_HITS], source["dropped"].get(BROKEN_RECORD, 0)),
        ):
            if found:
                parts.append(f"the first {len(named):,} of {found:,} {what}s")
            for place, message in enumerate(named, start=1):
                lines.append([cell(source["name"]), f"{what} {place:,}", cell(message, LONG_CELL)])
        if parts:
            counted.append(f"{cell(source['name'])}: {' and '.join(parts)}")
    if not counted:
        return []
    return [
        'Broken, and skipped because `broken = "skip"` says so. Files are named that broke off, '
        "which are in no line above; what could be read of them before is used. Named are, of "
        f"{'; of '.join(counted)}.",
        table(["source", "broken", "what was found"], lines),
    ]


def _exclusions(exclusions: Mapping[str, Any]) -> list[str]:
    """Tell what was kept out for evaluation, also what kept out nothing."""
    lines = [
        ["task", cell(one["glob"]), "", "", number(one["records"])] for one in exclusions["tasks"]
    ]
    lines += [
        [
            "text",
            cell(one["set"]),
            cell(exclusions["ngram"]),
            " ".join(cell(place, LONG_CELL) for place in one["data"]),
            number(one["records"]),
        ]
        for one in exclusions["overlap"]
    ]
    if not lines:
        return ["By `data.exclude`, nothing was kept out for evaluation."]
    return [
        "What `data.exclude` kept out of the sources to train on, for evaluation. A record is "
        "counted once, by the first that keeps it out: by the name of its task, or because it has "
        "as many words in a row as are named here in common with an evaluation set.",
        table(["by its", "task or evaluation set", "words:", "data of the set", "records:"], lines),
    ]


def _selection(selection: Mapping[str, Any] | None) -> list[str]:
    if selection is None:
        return []
    return [
        f"Of the examples with an answer, `data.select` left out {selection['unbalanced']:,} whose "
        f"answer is too common in its task, and then {selection['capped']:,} of tasks that are too "
        "large.",
        *(f"Set {place}: {text}." for place, text in enumerate(selection["shortages"], 1) if text),
    ]


def _rows(found: Mapping[str, Any]) -> list[str]:
    columns = ["files", "rows", "examples", "tokens"]

    def line(first: Sequence[str], totals: Mapping[str, Any]) -> list[str]:
        return [*first, *(number(totals[c]) for c in columns), f"{totals['padding_share']:.2%}"]

    heads = [*(f"{name}:" for name in columns), "padding:"]
    lines = [
        line([split, cell(name)], totals)
        for split, one in found["splits"].items()
        for name, totals in one["sources"].items()
    ]
    lines += [line([split, "all"], one) for split, one in found["splits"].items()]
    parts = [table(["split", "source", *heads], lines)]
    if found["selection"]:
        parts.append(
            "Sets of the training split, named by `data.subset`: each has all of the smaller "
            "ones and all plain text in it. What was chosen are examples with an answer, some of "
            "which are held out."
        )
        sets = zip(found["selection"]["sets"], found["splits"]["train"]["sets"], strict=True)
        chosen = (
            line(
                [
                    "all" if one["asked"] is None else number(one["asked"]),
                    number(one["examples"]),
                    number(one["per_task"]),
                ],
                totals,
            )
            for one, totals in sets
        )
        parts.append(table(["set:", "chosen:", "most of a task:", *heads], chosen))
    return parts


def _weights(weights: Sequence[Mapping[str, Any]]) -> list[str]:
    weighted = any(one["weight"] is not None for one in weights)
    lines = [
        [
            cell(one["source"]),
            number(one["rows"]),
            number(one["tokens"]),
            "none" if one["weight"] is None else f"{one['weight']:g}",
            f"{one['share_of_rows']:.2%}",
            f"{one['share_of_draws']:.2%}",
            f"{one['repeats']:,.2f}",
        ]
        for one in weights
    ]
    head = ["source", "rows:", "tokens:", "weight:", "share of rows:", "share of draws:"]
    return [
        "What training draws, with the weights of the configuration that made the rows (`weight`, "
        "which may change without making them again) and all sets: "
        + (
            "a source repeats by its share of the rows drawn over its share of the rows there are."
            if weighted
            else "no source has a weight, so every row is drawn once per epoch."
        ),
        table([*head, "repeats:"], lines),
    ]


def _tasks(train: Mapping[str, Any]) -> list[str]:
    tasks = list(train["tasks"].items())
    asked = sum(train["tasks"].values())
    lines = [[cell(name), number(n), share(n, asked)] for name, n in tasks[:TOP]]
    if tasks[TOP:]:
        n = sum(count for _, count in tasks[TOP:])
        rest = f"other {len(tasks) - TOP:,} tasks"
        lines.append([rest, number(n), share(n, asked)])
    plain = train["examples"] - asked
    without = f" Plain text, {plain:,} examples, is no task and left out here." if plain else ""
    if not tasks:
        return [f"No example has a task.{without}"]
    return [
        "![examples of each task, plain text left out](tasks.png)",
        f"{len(tasks):,} tasks in the training split; shares are of their {asked:,} examples."
        f"{without}",
        table(["task", "examples:", "share:"], lines),
    ]


def _answers(train: Mapping[str, Any]) -> list[str]:
    answers = train["answers"]
    if not answers:
        return ["No example has an answer's token."]
    asked = sum(one["examples"] for one in answers)
    lines = [
        [
            cell(one["text"]),
            str(one["id"]),
            number(one["examples"]),
            share(one["examples"], asked),
        ]
        for one in answers[:TOP]
    ]
    if answers[TOP:]:
        n = sum(one["examples"] for one in answers[TOP:])
        lines.append([f"other {len(answers) - TOP:,} tokens", "", number(n), share(n, asked)])
    return [
        "![examples by the token of their answer](answers.png)",
        f"{len(answers):,} tokens are answers in the training split, `␣` is a space; shares are of "
        f"the {asked:,} examples with an answer.",
        table(["answer", "id:", "examples:", "share:"], lines),
        *_answers_by_task(train["answers_by_task"]),
    ]


def _answers_by_task(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    lonely = sum(one["answers"] == 1 for one in tasks)
    lines = [
        [
            cell(one["task"]),
            number(one["examples"]),
            number(one["answers"]),
            cell(one["commonest"]),
            f"{one['commonest_share']:.2%}",
        ]
        for one in tasks[:TOP]
    ]
    which = f"the {TOP} largest" if tasks[TOP:] else "all"
    return [
        f"In the training split, {lonely:,} of {len(tasks):,} tasks "
        f"{'has' if lonely == 1 else 'have'} one answer only. "
        f"Of {which}:",
        table(["task", "examples:", "different answers:", "commonest", "its share:"], lines),
    ]


def _lengths(splits: Mapping[str, Any]) -> list[str]:
    lines = []
    for split, one in splits.items():
        for kind, name in (("with_answer", "with an answer"), ("without", "without")):
            if not (counts := one["lengths"][kind]):
                continue
            sizes = np.array([int(n) for n in counts])
            totals = np.cumsum(list(counts.values()))
            ranks = [int(sizes[np.searchsorted(totals, q * totals[-1])]) for q in (0.5, 0.9, 0.99)]
            mean = float(sizes @ np.diff(totals, prepend=0)) / int(totals[-1])
            shown = [int(sizes[0]), *ranks, int(sizes[-1])]
            n = number(int(totals[-1]))
            lines.append([split, name, n, f"{mean:,.1f}", *map(number, shown)])
    head = ["split", "examples", "number:", "mean:", "shortest:", "median:", "90 %:", "99 %:"]
    return [table([*head, "longest:"], lines)]


def _prompt(place: int, one: Mapping[str, Any]) -> str:
    facts = [
        f"task {cell(one['task'])}",
        f"source {cell(one['source'])}",
        f"{one['tokens']} tokens",
    ]
    if one["answer"] is not None:
        facts.append(f"answer {cell(one['answer'])}")
    if one["label"] is not None:
        facts.append(f"label {one['label']:g}")
    if one["answer"] is None and one["label"] is None:
        facts.append("plain text")
    title = f"### {place}. Example {one['number']:,}"
    return f"{title}\n\n{', '.join(facts)}\n\n{fenced(one['text'])}"


def _made_from(found: Mapping[str, Any]) -> list[str]:
    facts = [
        ["mlmjax", cell(found["version"])],
        ["format of the rows", str(found["format"])],
        ["tokenizer.json, sha256", cell(found["tokenizer_sha256"])],
        ["vocabulary", number(found["vocab_size"])],
    ]
    facts += [
        [f"{cell(source['name'])}, {key}", cell(value)]
        for source in found["sources"]
        for key, value in source["from"].items()
    ]
    files = [
        [
            cell(source["name"]),
            cell(file["path"], LONG_CELL),
            number(file["bytes"]),
            cell(file["sha256"]),
        ]
        for source in found["sources"]
        for file in source["files"]
    ]
    parts = [table(["", ""], facts)]
    if files:
        parts.append(table(["source", "file", "bytes:", "sha256"], files[:_FILES]))
    if files[_FILES:]:
        parts.append(f"And {len(files) - _FILES:,} more files, in `report.json`.")
    return parts
