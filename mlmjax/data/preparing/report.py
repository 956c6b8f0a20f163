"""The report on prepared rows that people look at: figures as JSON, a page and pictures."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlmjax.data.manifest import SPLITS, Manifest, RowFile, SourceReport, read_manifest
from mlmjax.data.preparing.census import Counted, Drawn, count
from mlmjax.data.preparing.prepare import shortages
from mlmjax.data.preparing.rows_charts import bars, fates, lengths
from mlmjax.data.preparing.rows_page import KEPT, NOT_SELECTED, TOP, page
from mlmjax.data.reading.files import BROKEN_FILE
from mlmjax.errors import InputError
from mlmjax.reporting.charts import own_style, save
from mlmjax.reporting.markdown import visible
from mlmjax.storage import build_folder
from mlmjax.text.tokenizer import Tokenizer

PROMPTS = 20
REPORT = "report"
MAX_SOURCES = 24
_GROUPS = {
    "task excluded by": "task excluded by its name",
    "overlaps": "shares text with an evaluation set",
}


def write_rows_report(rows: str | Path, tokenizer: Tokenizer, *, seed: int = 0) -> Path:
    """Write `report/` into a finished rows folder, unless it is there; return the page's path.

    `report.md` is the page, `report.json` has all figures, the pictures are PNG files. The same
    rows give the same bytes. Raises `InputError` for damaged rows, for a tokenizer that they were
    not made with, and for a folder that cannot be written; `RunError` when writing fails.
    """
    folder = Path(rows)
    manifest = read_manifest(folder)
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise InputError(
            f"{folder}: was made with another tokenizer (sha256 {manifest.tokenizer_sha256[:12]}"
            f"..., not {tokenizer.sha256[:12]}...); give that one, or the "
            "report would show other texts"
        )
    target = folder / REPORT
    if not (target / "report.md").is_file():
        if "train" not in manifest.splits or not manifest.splits.keys() <= set(SPLITS):
            raise InputError(
                f"{folder}: has the splits {sorted(manifest.splits)}, expected train and perhaps "
                "validation; delete it and prepare again"
            )
        drawn = {"train": PROMPTS}
        with build_folder(target) as partial:
            if partial is not None:
                counted = {
                    split: count(folder, split, draw=drawn.get(split, 0), seed=seed)
                    for split in manifest.splits
                }
                _write(partial, figures(manifest, counted, tokenizer), counted)
    if not (target / "report.md").is_file():
        raise InputError(f"{target}: has no report.md; delete the folder to have it written again")
    return target / "report.md"


def _write(folder: Path, found: dict[str, Any], counted: Mapping[str, Counted]) -> None:
    text = json.dumps(found, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    train = found["splits"]["train"]
    with own_style():
        save(fates(*_fates(found["sources"])), folder / "records.png")
        save(lengths(counted["train"].lengths), folder / "lengths.png")
        if train["tasks"]:
            title = "Examples by task, training split, plain text left out"
            save(bars(*_top(train["tasks"].items(), "tasks"), title), folder / "tasks.png")
        answers = [(one["text"], one["examples"]) for one in train["answers"]]
        if answers:
            title = "Examples by the token of their answer, training split"
            save(bars(*_top(answers, "tokens"), title), folder / "answers.png")
    (folder / "report.md").write_text(page(found), encoding="utf-8")


def _top(
    counts: Iterable[tuple[str, int]], what: str
) -> tuple[list[tuple[str, int]], int, str | None]:
    """Return what `bars` draws of counts in descending order, and says of the others."""
    ordered = list(counts)
    others = ordered[TOP:]
    total, n = sum(n for _, n in ordered), sum(n for _, n in others)
    rest = f"not shown: {len(others):,} other {what}, {n:,} examples ({n / max(total, 1):.1%})"
    return ordered[:TOP], total, rest if others else None


def figures(
    manifest: Manifest, counted: Mapping[str, Counted], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return all figures of the report as JSON values; no time and no machine's name."""
    return {
        "version": manifest.version,
        "format": manifest.format,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "vocab_size": manifest.vocab_size,
        "seq_length": manifest.seq_length,
        "config": manifest.config,
        "sources": [
            _source(report, manifest, origin, split)
            for split, key in (("train", "sources"), ("validation", "validation_sources"))
            for report, origin in zip(getattr(manifest, key), _origins(manifest, key), strict=True)
        ],
        "exclusions": _exclusions(manifest),
        "selection": manifest.selection
        and {**manifest.selection.model_dump(), "shortages": shortages(manifest.selection)},
        "weights": _weights(manifest.splits["train"]),
        "splits": {
            split: _split(split, files, manifest, counted[split], tokenizer)
            for split, files in manifest.splits.items()
        },
        "prompts": [_prompt(one, tokenizer) for one in counted["train"].drawn],
    }


def _origins(manifest: Manifest, key: str) -> list[dict[str, Any]]:
    """Return the sources as configured."""
    tables = _list(_table(manifest.config.get("data")).get(key))
    reports = len(getattr(manifest, key))
    return [_table(t) for t in (tables + [{}] * reports)[:reports]]


def _table(found: Any) -> dict[str, Any]:
    """Return a table of the configuration, which the manifest has as whatever JSON it holds."""
    return found if isinstance(found, dict) else {}


def _list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []


def _exclusions(manifest: Manifest) -> dict[str, Any]:
    """Return all that `data.exclude` names, and the records that each kept out, be it none."""
    exclude = _table(_table(manifest.config.get("data")).get("exclude"))
    dropped: Counter[str] = Counter()
    for report in manifest.sources:
        dropped.update(report.dropped)
    places: dict[str, list[str]] = {}
    for one in map(_table, _list(manifest.config.get("evaluation"))):
        # A set of several files is configured as several entries of one task.
        own = places.setdefault(str(one.get("task")), [])
        own += [str(path) for path in _table(one.get("files"))]
        hub = [one[k] for k in ("hub", "subset", "folder", "split", "revision") if one.get(k)]
        own += [" ".join(map(str, hub))] if hub else []
    globs = dict.fromkeys(g for g in _list(exclude.get("tasks")) if isinstance(g, str))
    return {
        "ngram": exclude.get("ngram"),
        "tasks": [{"glob": g, "records": dropped[f"task excluded by {g!r}"]} for g in globs],
        "overlap": [
            {"set": name, "data": data, "records": dropped[f"overlaps {name}"]}
            for name, data in places.items()
        ],
    }


def _source(
    report: SourceReport, manifest: Manifest, origin: Mapping[str, Any], split: str
) -> dict[str, Any]:
    files = {s: [f for f in fs if f.name == report.name] for s, fs in manifest.splits.items()}
    in_rows = {s: sum(f.examples for f in fs) for s, fs in files.items()}
    where = {k: origin[k] for k in ("hub", "subset", "folder", "revision") if origin.get(k)}
    return {
        "name": report.name,
        "configured_for": split,
        "plain_text": any(f.text for fs in files.values() for f in fs) or bool(origin.get("text")),
        "from": where,
        "records": report.records,
        "examples": report.examples,
        "examples_in_rows": in_rows,
        "not_selected": report.examples - sum(in_rows.values()),
        "dropped": {why: n for why, n in report.dropped.items() if why != BROKEN_FILE},
        "broken_files": report.dropped.get(BROKEN_FILE, 0),
        "shortened": report.shortened,
        "normalized": dict.fromkeys(_list(origin.get("normalize")), 0) | report.normalized,
        "broken_files_named": report.broken_files,
        "broken": report.broken,
        "hits": report.hits,
        "files": [file.model_dump() for file in report.files],
    }


def _weights(files: list[RowFile]) -> list[dict[str, Any]]:
    """Return for each source how much of what is drawn comes from it, and how often it repeats.

    `repeats` is the share of draws over the share of rows: what is drawn twice as often as it
    would be without weights has 2.
    """
    sources = {
        file.name: file.weight if 0 < (file.weight or 0) < math.inf else None
        for file in files
        if file.rows
    }
    weighted = None not in sources.values()
    rows = {name: sum(f.rows for f in files if f.name == name) for name in sources}
    drawn = {name: (weight if weighted else rows[name]) or 0 for name, weight in sources.items()}
    found = []
    for name, weight in sources.items():
        of_rows, of_draws = rows[name] / sum(rows.values()), drawn[name] / sum(drawn.values())
        found.append(
            {
                "source": name,
                "rows": rows[name],
                "tokens": sum(f.tokens for f in files if f.name == name),
                "weight": weight,
                "share_of_rows": of_rows,
                "share_of_draws": of_draws,
                "repeats": of_draws / of_rows,
            }
        )
    return found


def _split(
    split: str, files: list[RowFile], manifest: Manifest, counted: Counted, tokenizer: Tokenizer
) -> dict[str, Any]:
    selection = manifest.selection
    tasks = np.argsort(-counted.tasks, kind="stable")
    answers = np.argsort(-counted.answers, kind="stable")
    return {
        **_totals(files, manifest.seq_length),
        "sets": [
            _totals([f for f in files if f.level <= level], manifest.seq_length)
            for level in range(len(selection.sets) if selection and split == "train" else 0)
        ],
        "sources": {
            name: _totals([f for f in files if f.name == name], manifest.seq_length)
            for name in dict.fromkeys(file.name for file in files)
        },
        "tasks": {manifest.tasks[i]: int(counted.tasks[i]) for i in tasks if counted.tasks[i]},
        "answers": [
            {
                "id": int(i),
                "text": token_text(tokenizer, int(i)),
                "examples": int(counted.answers[i]),
            }
            for i in answers
            if counted.answers[i]
        ],
        "answers_by_task": _answers_by_task(counted.pairs, manifest.tasks, tokenizer),
        "lengths": {
            name: {str(n): int(row[n]) for n in np.flatnonzero(row)}
            for name, row in zip(("with_answer", "without"), counted.lengths, strict=True)
        },
    }


def _answers_by_task(
    pairs: np.ndarray, tasks: list[str], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Return how one-sided the answers of each task are, the largest task first."""
    ordered = pairs[np.lexsort((pairs[:, 1], -pairs[:, 2], pairs[:, 0]))]
    numbers, first, different = np.unique(ordered[:, 0], return_index=True, return_counts=True)
    examples = np.add.reduceat(ordered[:, 2], first) if len(first) else first
    return [
        {
            "task": tasks[numbers[i]],
            "examples": int(examples[i]),
            "answers": int(different[i]),
            "commonest": token_text(tokenizer, int(ordered[first[i], 1])),
            "commonest_share": float(ordered[first[i], 2] / examples[i]),
        }
        for i in np.argsort(-examples, kind="stable")
    ]


def _totals(files: list[RowFile], seq_length: int) -> dict[str, Any]:
    rows, tokens = sum(file.rows for file in files), sum(file.tokens for file in files)
    return {
        "files": len(files),
        "rows": rows,
        "examples": sum(file.examples for file in files),
        "tokens": tokens,
        "padding_share": 1 - tokens / (rows * seq_length) if rows else 0.0,
    }


def _prompt(one: Drawn, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return an example as the model is asked: the answer's place holds the mask."""
    shown = one.ids.copy()
    answer = None
    if one.answer_position >= 0:
        answer = int(one.ids[one.answer_position])
        shown[one.answer_position] = tokenizer.mask_id
    return {
        "number": one.number,
        "source": one.source,
        "task": one.task,
        "tokens": len(one.ids),
        "answer_id": answer,
        "answer": None if answer is None else token_text(tokenizer, answer),
        "label": one.label if math.isfinite(one.label) else None,
        "ids": shown.tolist(),
        "text": tokenizer.decode(shown),
    }


def token_text(tokenizer: Tokenizer, number: int) -> str:
    """Return a token as one can see it: a space as `␣`, and part of a character by its name.

    >>> token_text(Tokenizer.from_pretrained(), 329)
    '␣A'
    """
    text = tokenizer.backend.decode([number], skip_special_tokens=False)
    if not text or "\ufffd" in text:
        text = tokenizer.backend.id_to_token(number) or ""
    return visible(text).replace(" ", "␣")


def _fates(sources: list[dict[str, Any]]) -> tuple[dict[str, dict[str, int]], tuple[str, ...]]:
    """Return what became of the records of each source, like reasons together, the rest summed."""
    found: dict[str, dict[str, int]] = {}
    ordered = sorted(sources, key=lambda source: -source["records"])
    named = ordered if len(ordered) <= MAX_SOURCES else ordered[: MAX_SOURCES - 1]
    for source in sources:
        own = any(source is one for one in named)
        name = source["name"] if own else f"other {len(ordered) - len(named)} sources"
        fate = found.setdefault(name, {})
        left = source["records"] - sum(source["dropped"].values()) - source["not_selected"]
        fate[KEPT] = fate.get(KEPT, 0) + left
        fate[NOT_SELECTED] = fate.get(NOT_SELECTED, 0) + source["not_selected"]
        for reason, n in source["dropped"].items():
            group = next((g for start, g in _GROUPS.items() if reason.startswith(start)), reason)
            fate[group] = fate.get(group, 0) + n
    return found, (KEPT, NOT_SELECTED)
