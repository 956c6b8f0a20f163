"""Report on prepared rows: figures as JSON, and a page with pictures for people."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mlmjax.data.manifest import SPLITS, Manifest, RowFile, SourceReport, read_manifest, totals
from mlmjax.data.preparing.prepare import shortages, task_notes
from mlmjax.data.reading.files import BROKEN_FILE
from mlmjax.data.rows import RowSource
from mlmjax.errors import InputError
from mlmjax.reporting.charts import (
    ACCENT,
    IN_THE_DARK,
    ON_DARK,
    ON_LIGHT,
    OTHER,
    add_legend,
    hide_left_axis,
    new_figure,
    own_style,
    picture_label,
    save,
    set_percent_ticks,
)
from mlmjax.reporting.markdown import visible
from mlmjax.reporting.pages import render
from mlmjax.storage import build_folder
from mlmjax.text.tokenizer import Tokenizer

PROMPTS = 20
REPORT = "report"
KEPT, NOT_SELECTED = "in the rows", "left out by data.select"
RECORDS = "What became of the records of each source, both splits together"
LENGTHS = "Examples by their number of tokens, training split"
LENGTH_KINDS = {"with_answer": "with an answer", "without": "without an answer"}


def write_rows_report(rows: str | Path, tokenizer: Tokenizer, *, seed: int = 0) -> Path:
    """Write `report/` into a finished rows folder if it is missing; return the page's path.

    `report.md` is the page, `report.json` has all figures, the pictures are SVG files. The same
    rows give the same bytes. Raises `InputError` for damaged rows, for a tokenizer that they were
    not made with, and for a folder that cannot be written; `RunError` when writing fails.
    """
    folder = Path(rows)
    manifest = read_manifest(folder)
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise InputError(
            f"{folder}: was made with another tokenizer (sha256 {manifest.tokenizer_sha256[:12]}"
            f"..., not {tokenizer.sha256[:12]}...); give that one, because the report shows texts"
        )
    target = folder / REPORT
    page = target / "report.md"
    if not page.is_file():
        if "train" not in manifest.splits or not manifest.splits.keys() <= set(SPLITS):
            raise InputError(
                f"{folder}: has the splits {sorted(manifest.splits)}, expected train and perhaps "
                "validation; delete it and prepare again"
            )
        with build_folder(target) as partial:
            if partial is not None:
                _write(partial, figures(folder, manifest, tokenizer, seed))
    if not page.is_file():
        raise InputError(f"{target}: has no report.md; delete the folder to write it again")
    return page


def _write(folder: Path, found: dict[str, Any]) -> None:
    text = json.dumps(found, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    train = found["splits"]["train"]
    save(draw_records(found["sources"]), folder / "records.svg", RECORDS)
    save(draw_lengths(train["lengths"], found["seq_length"]), folder / "lengths.svg", LENGTHS)
    lengths = [
        {"split": split, "kind": LENGTH_KINDS[kind], **describe_lengths(counts)}
        for split, one in found["splits"].items()
        for kind, counts in one["lengths"].items()
        if counts
    ]
    page = render("data/preparing/report.md.j2", found=found, lengths=lengths)
    (folder / "report.md").write_text(page, encoding="utf-8")


class Counted(NamedTuple):
    """Count the examples of one split, by length and by the number of their task.

    `lengths[kind, n]` counts those of n tokens, with an answer (0) and without (1). `tasks` leaves
    out plain text. `pairs` counts by task and answer token. `drawn` is in the order of the rows.
    """

    lengths: np.ndarray
    tasks: Counter[int]
    pairs: Counter[tuple[int, int]]
    drawn: list[dict[str, Any]]


def count_split(
    folder: Path, manifest: Manifest, split: str, tokenizer: Tokenizer, *, draw: int, seed: int
) -> Counted:
    """Count the examples of a split, and draw some of them, each equally likely.

    Memory does not grow with the rows: one block of one row file is in memory. Raises `InputError`
    for a damaged row file, which is compared with the hash of the manifest.
    """
    total = sum(entry.examples for entry in manifest.splits[split])
    rng = np.random.default_rng([seed])
    wanted = np.sort(rng.choice(total, min(draw, total), replace=False))
    found = Counted(np.zeros((2, manifest.seq_length + 1), np.int64), Counter(), Counter(), [])
    seen = 0
    for entry in manifest.splits[split]:
        if not entry.rows:
            continue
        source = RowSource(folder, split, entry, manifest, seen, None)
        source.check_hash()
        before = seen
        for tokens, sizes, places, tasks, _, labels, *_ in source.blocks():
            starts = np.cumsum(sizes) - sizes
            has_answer = places >= 0
            for kind, which in enumerate((has_answer, ~has_answer)):
                found.lengths[kind] += np.bincount(sizes[which], minlength=manifest.seq_length + 1)
            answers = tokens[(starts + places)[has_answer]].tolist()
            found.pairs.update(zip(tasks[has_answer].tolist(), answers, strict=True))
            if not entry.text:
                found.tasks.update(tasks.tolist())
            first, last = np.searchsorted(wanted, [seen, seen + len(sizes)])
            for number in wanted[first:last].tolist():
                at = number - seen
                ids = tokens[starts[at] : starts[at] + sizes[at]].astype(np.uint32)
                facts = {"number": number, "source": entry.name, "task": manifest.tasks[tasks[at]]}
                facts |= _example(ids, int(places[at]), float(labels[at]), tokenizer)
                found.drawn.append(facts)
            seen += len(sizes)
        if seen - before != entry.examples:
            raise source.damaged(f"{seen - before} examples, the manifest says {entry.examples}")
    return found


def _example(
    ids: np.ndarray, answer_position: int, label: float, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Describe an example as the model sees it, with its answer masked."""
    answer = None
    if answer_position >= 0:
        answer = int(ids[answer_position])
        ids[answer_position] = tokenizer.mask_id
    return {
        "tokens": len(ids),
        "answer_id": answer,
        "answer": None if answer is None else token_text(tokenizer, answer),
        "label": label if math.isfinite(label) else None,
        "ids": ids.tolist(),
        "text": tokenizer.decode(ids),
    }


def token_text(tokenizer: Tokenizer, number: int) -> str:
    """Return a token in visible characters, with `␣` for a space.

    >>> token_text(Tokenizer.from_pretrained(), 329)
    '␣A'
    """
    text = tokenizer.backend.decode([number], skip_special_tokens=False)
    if not text or "\ufffd" in text:
        text = tokenizer.backend.id_to_token(number) or ""
    return visible(text).replace(" ", "␣")


def figures(folder: Path, manifest: Manifest, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """Return all figures of the report as JSON values, without times or names of machines."""
    counted = {
        split: count_split(folder, manifest, split, tokenizer, draw=draw, seed=seed)
        for split, draw in (("train", PROMPTS), ("validation", 0))
        if split in manifest.splits
    }
    configured, selection = manifest.config.get("data", {}), manifest.selection
    splits = {
        split: _split_figures(split, files, manifest, counted[split], tokenizer)
        for split, files in manifest.splits.items()
    }
    return {
        "version": manifest.version,
        "format": manifest.format,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "vocab_size": manifest.vocab_size,
        "seq_length": manifest.seq_length,
        "config": manifest.config,
        "sources": [
            _source_figures(report, manifest, origin, split)
            for split, key in (("train", "sources"), ("validation", "validation_sources"))
            for report, origin in zip(getattr(manifest, key), configured.get(key, []), strict=True)
        ],
        "exclusions": _exclusion_figures(manifest, configured.get("exclude", {})),
        "task_notes": task_notes(manifest),
        "selection": selection and {**selection.model_dump(), "shortages": shortages(selection)},
        "weights": _weight_figures(manifest.splits["train"], splits["train"]["sources"]),
        "splits": splits,
        "prompts": counted["train"].drawn,
    }


def _source_figures(
    report: SourceReport, manifest: Manifest, origin: Mapping[str, Any], split: str
) -> dict[str, Any]:
    in_rows = {
        split: sum(file.examples for file in files if file.name == report.name)
        for split, files in manifest.splits.items()
    }
    return {
        "name": report.name,
        "configured_for": split,
        "plain_text": bool(origin.get("text")),
        "from": {k: origin[k] for k in ("hub", "subset", "folder", "revision") if origin.get(k)},
        "records": report.records,
        "examples": report.examples,
        "examples_in_rows": in_rows,
        "not_selected": report.examples - sum(in_rows.values()),
        "dropped": {why: n for why, n in report.dropped.items() if why != BROKEN_FILE},
        "broken_files": report.dropped.get(BROKEN_FILE, 0),
        "shortened": report.shortened,
        "normalized": dict.fromkeys(origin.get("normalize", ()), 0) | report.normalized,
        "blanked": report.blanked,
        "task_columns": report.task_columns,
        "unnamed": report.unnamed,
        "broken_files_named": report.broken_files,
        "broken": report.broken,
        "hits": report.hits,
        "files": [file.model_dump() for file in report.files],
    }


def _exclusion_figures(manifest: Manifest, exclude: Mapping[str, Any]) -> dict[str, Any]:
    """Return every rule of `data.exclude`, with the number of records it kept out, even 0."""
    dropped = sum((Counter(report.dropped) for report in manifest.sources), Counter[str]())
    places: dict[str, list[str]] = {}
    for one in manifest.config.get("evaluation", []):
        # A set of several files is configured as several entries of one task.
        hub = [one[k] for k in ("hub", "subset", "folder", "split", "revision") if one.get(k)]
        places.setdefault(one["task"], []).extend(one.get("files", [" ".join(hub)]))
    return {
        "ngram": exclude.get("ngram"),
        "tasks": [
            {"glob": glob, "records": dropped[f"task excluded by {glob!r}"]}
            for glob in dict.fromkeys(exclude.get("tasks", ()))
        ],
        "overlap": [
            {"set": name, "data": data, "records": dropped[f"overlaps {name}"]}
            for name, data in places.items()
        ],
    }


def _weight_figures(
    files: list[RowFile], sources: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return for each source its share of the draws, and how often it repeats."""
    weights = {file.name: file.weight for file in files if file.rows}
    rows = {name: sources[name]["rows"] for name in weights}
    is_weighted = None not in weights.values()
    draws = {name: (weight if is_weighted else rows[name]) or 0 for name, weight in weights.items()}
    return [
        {
            "source": name,
            "rows": rows[name],
            "tokens": sources[name]["tokens"],
            "weight": weight,
            "share_of_rows": (of_rows := rows[name] / sum(rows.values())),
            "share_of_draws": (of_draws := draws[name] / sum(draws.values())),
            "repeats": of_draws / of_rows,
        }
        for name, weight in weights.items()
    ]


def _split_figures(
    split: str, files: list[RowFile], manifest: Manifest, counted: Counted, tokenizer: Tokenizer
) -> dict[str, Any]:
    sets = len(manifest.selection.sets) if manifest.selection and split == "train" else 0
    length, answers = manifest.seq_length, Counter[int]()
    for (_, answer), n in counted.pairs.items():
        answers[answer] += n
    return {
        **totals(files, length),
        "sets": [totals([f for f in files if f.level <= n], length) for n in range(sets)],
        "sources": {
            name: totals([f for f in files if f.name == name], length)
            for name in dict.fromkeys(file.name for file in files)
        },
        "tasks": {manifest.tasks[number]: n for number, n in _most_common(counted.tasks)},
        "answers": [
            {"id": number, "text": token_text(tokenizer, number), "examples": n}
            for number, n in _most_common(answers)
        ],
        "answers_by_task": list(_answers_by_task(counted.pairs, manifest.tasks, tokenizer)),
        "lengths": {
            name: {str(n): int(row[n]) for n in np.flatnonzero(row)}
            for name, row in zip(LENGTH_KINDS, counted.lengths, strict=True)
        },
    }


def _most_common(counts: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return numbers and their counts, the largest count first, then the smallest number."""
    return Counter(dict(sorted(counts.items()))).most_common()


def _answers_by_task(
    pairs: Mapping[tuple[int, int], int], tasks: list[str], tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Yield how one-sided the answers of each task are, the largest task first."""
    by_task: dict[int, dict[int, int]] = {}
    for (task, answer), n in pairs.items():
        by_task.setdefault(task, {})[answer] = n
    for task, examples in _most_common({task: sum(ns.values()) for task, ns in by_task.items()}):
        (commonest, n), *_ = _most_common(by_task[task])
        yield {
            "task": tasks[task],
            "examples": examples,
            "answers": len(by_task[task]),
            "commonest": token_text(tokenizer, commonest),
            "commonest_share": n / examples,
        }


def describe_lengths(counts: Mapping[str, int]) -> dict[str, float]:
    """Return number, mean, extremes and percentiles of the lengths of examples.

    >>> describe_lengths({"2": 3, "10": 1})["mean"]
    4.0
    """
    sizes, totals = np.array([int(n) for n in counts]), np.cumsum(list(counts.values()))
    total = int(totals[-1])
    found = {"number": total, "mean": float(sizes @ np.diff(totals, prepend=0)) / total}
    for name, share in (("shortest", 0), ("median", 0.5), ("90 %", 0.9), ("99 %", 0.99)):
        found[name] = int(sizes[np.searchsorted(totals, share * total)])
    return found | {"longest": int(sizes[-1])}


_MOST_SOURCES = 24
_KEPT_COLORS = {KEPT: ACCENT, NOT_SELECTED: "#99d3cd"}
_REASONS = ["#b45309", "#e9b872", "#9f1239", "#f0a3b0", "#6d28d9", "#c4b5ec", "#475569", "#cbd5e1"]
_OTHER_REASONS = "other reasons"
_KINDS = {
    "task excluded by": "task excluded by its name",
    "overlaps": "shares text with an evaluation set",
}
_LEAST_LABELLED = 0.1
_BINS = 64


def _fates(sources: Sequence[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """Return what became of the records of each source; similar reasons, small sources together."""
    found: dict[str, Counter[str]] = {}
    most = len(sources) if len(sources) <= _MOST_SOURCES else _MOST_SOURCES - 1
    ranks = np.argsort(np.argsort([-source["records"] for source in sources], kind="stable"))
    for source, rank in zip(sources, ranks, strict=True):
        name = source["name"] if rank < most else f"other {len(sources) - most} sources"
        fate = found.setdefault(name, Counter())
        dropped, not_selected = source["dropped"], source["not_selected"]
        fate[KEPT] += source["records"] - sum(dropped.values()) - not_selected
        fate[NOT_SELECTED] += not_selected
        for reason, n in dropped.items():
            kinds = (kind for start, kind in _KINDS.items() if reason.startswith(start))
            fate[next(kinds, reason)] += n
    return found


@own_style()
def draw_records(sources: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw for each source what became of its records, in shares."""
    fates = _fates(sources)
    totals = sum(fates.values(), Counter[str]())
    reasons = sorted(totals.keys() - _KEPT_COLORS.keys(), key=lambda name: (-totals[name], name))
    if len(reasons) > len(_REASONS):
        for fate in fates.values():
            for name in reasons[len(_REASONS) - 1 :]:
                fate[_OTHER_REASONS] += fate.pop(name, 0)
        reasons = [*reasons[: len(_REASONS) - 1], _OTHER_REASONS]
    colors = _KEPT_COLORS | dict(zip(reasons, _REASONS, strict=False))
    shown = sum(any(fate[name] for fate in fates.values()) for name in colors)
    figure, axes = new_figure(0.56 * len(fates) + 0.26 * shown + 0.9)
    whole = np.maximum([sum(fate.values()) for fate in fates.values()], 1)
    left = np.zeros(len(fates))
    legend: dict[str, Any] = {}
    for row, (name, fate) in enumerate(fates.items()):
        title = f"{picture_label(name, 26)}, {sum(fate.values()):,} records"
        axes.text(0, row - 0.24, title, va="bottom", parse_math=False)
    for name, color in colors.items():
        shares = np.array([fate[name] for fate in fates.values()]) / whole
        if not shares.any():
            continue
        bars = axes.barh(range(len(fates)), shares, left=left, color=color, height=0.4)
        legend[picture_label(name, 44)] = bars
        labels = [f"{share:.0%}" if share >= _LEAST_LABELLED else "" for share in shares]
        label_color = ON_DARK if color in IN_THE_DARK else ON_LIGHT
        axes.bar_label(bars, labels, label_type="center", color=label_color)
        left = left + shares
    axes.set_yticks([])
    axes.set_ylim(len(fates) - 0.7, -0.85)
    axes.set_xlim(0, 1)
    set_percent_ticks(axes, "x")
    axes.set_xlabel("records of the source, both splits")
    axes.set_ylabel("source")
    hide_left_axis(axes)
    add_legend(figure, legend)
    return figure


@own_style()
def draw_lengths(lengths: Mapping[str, Mapping[str, int]], longest: int) -> Figure:
    """Draw how many examples have how many tokens."""
    width = max(1, -(-longest // _BINS))
    edges = np.arange(1, longest + width + 1, width)
    figure, axes = new_figure(3.1)
    below = np.zeros(len(edges) - 1)
    for (kind, counts), color in zip(lengths.items(), (ACCENT, OTHER), strict=True):
        if counts:
            sizes, numbers = zip(*counts.items(), strict=True)
            binned, _ = np.histogram(np.array(sizes, int), edges, weights=numbers)
            bar = {"align": "edge", "width": width * 0.92, "label": LENGTH_KINDS[kind]}
            axes.bar(edges[:-1] - 0.5, binned, bottom=below, color=color, **bar)
            below = below + binned
    axes.set_xlim(0, longest + 1)
    axes.set_xlabel(f"tokens of an example (rows hold {longest:,})")
    axes.set_ylabel("examples, training split")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if axes.patches:
        axes.legend()
    return figure
