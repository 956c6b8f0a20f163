"""Compare two evaluations of the same rows."""

import codecs
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError

from mlmjax.config.tables import StrictTable
from mlmjax.errors import InputError, counted, printable, read_failed
from mlmjax.statistics.comparison import mcnemar, paired_bootstrap
from mlmjax.storage import MAX_JSON_BYTES, plain_file, read_bounded

RESULTS, PREDICTIONS = "results.json", "predictions.jsonl"
MAX_LINE_BYTES, MAX_LABELS = 1 << 20, 10_000
LEVEL = 0.05
"""The verdict calls a difference significant below this probability."""
_AGAIN = "run the evaluation again"

Read = TypeVar("Read", bound=StrictTable)


class _Results(StrictTable, extra="ignore"):  # later versions add keys
    task: str
    protocol: str
    n: Annotated[int, Field(ge=1)]


class Prediction(StrictTable, extra="ignore"):
    """The answer to one question: `index` is its record in the file."""

    index: Annotated[int, Field(ge=0)]
    gold: str
    prediction: str
    probabilities: dict[str, Annotated[FiniteFloat, Field(ge=0)]]


class Evaluated(NamedTuple):
    """The content of a result folder: gold labels and predictions by row index."""

    folder: str
    task: str
    protocol: str
    gold: dict[int, str]
    predicted: dict[int, str]


def compare_results(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Compare two result folders of one task and the same rows.

    The result holds `a` and `b` (`folder, task, protocol, accuracy, macro_f1`), `n`, the counts of
    rows `both_right, only_a, only_b, neither`, `accuracy_difference` and `macro_f1_difference` (A
    minus B) with 95 % percentile intervals of a bootstrap over rows with both of their answers
    (`_ci95`), `mcnemar_p` (exact and two-sided), and `verdict`, in words.

    Raises `InputError` for a folder whose files are missing, broken or about different rows.
    """
    first, second = read_results(a), read_results(b)
    _check_same_rows(first, second)
    rows = sorted(first.gold)
    gold = [first.gold[row] for row in rows]
    answers = [[one.predicted[row] for row in rows] for one in (first, second)]
    right = np.array([[g == p for g, p in zip(gold, one, strict=True)] for one in answers])
    only_a, only_b = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    figures = paired_bootstrap(gold, *answers)
    found: dict[str, Any] = {
        side: {
            "folder": one.folder,
            "task": one.task,
            "protocol": one.protocol,
            "accuracy": float(right[i].mean()),
            "macro_f1": figures["macro_f1"].of[i],
        }
        for i, (side, one) in enumerate((("a", first), ("b", second)))
    }
    found |= {
        "n": len(rows),
        "both_right": int(right.all(axis=0).sum()),
        "only_a": only_a,
        "only_b": only_b,
        "neither": int((~right).all(axis=0).sum()),
    }
    for name, figure in figures.items():
        found[f"{name}_difference"] = figure.difference
        found[f"{name}_difference_ci95"] = list(figure.interval)
    found["mcnemar_p"] = mcnemar(only_a, only_b)
    return found | {"verdict": verdict(found)}


def verdict(found: dict[str, Any]) -> str:
    """Return the conclusion of a comparison in words."""
    more, p, n = found["only_a"] - found["only_b"], found["mcnemar_p"], found["n"]
    by_f1 = _verdict_on_macro_f1(found)
    if not found["only_a"] and not found["only_b"]:
        same = f"A and B have the same {n - found['neither']} of {n} rows right"
        return f"{same}.{by_f1 or ' No difference in accuracy can be tested.'}"
    if p >= LEVEL:
        low, high = (100 * bound for bound in found["accuracy_difference_ci95"])
        return (
            f"These {n} rows do not show which of the two is better (p = {p:.2g}): the accuracy of "
            f"A minus that of B lies between {low:+.1f} and {high:+.1f} points.{by_f1}"
        )
    better, worse = ("A", "B") if more > 0 else ("B", "A")
    return (
        f"{better} has {abs(more)} more of {n} rows right than {worse}, "
        f"{100 * abs(more) / n:.1f} points. If both were equally good on such rows, a difference "
        f"this large would occur with probability {p:.2g}. This holds for these two models on rows "
        "like these, not for other prompts, other data or another training run."
    )


def _verdict_on_macro_f1(found: dict[str, Any]) -> str:
    """Say that macro-F1 differs where accuracy does not; nothing if its interval contains 0."""
    low, high = found["macro_f1_difference_ci95"]
    if low <= 0 <= high:
        return ""
    better, worse = ("A", "B") if low > 0 else ("B", "A")
    low, high = sorted((abs(low), abs(high)))
    return (
        f" Accuracy does not separate them, but macro-F1 favours {better}: it is {100 * low:.1f} "
        f"to {100 * high:.1f} points above that of {worse}, an interval that does not contain 0. "
        "They distribute correct answers and mistakes differently over the labels."
    )


def lines(found: dict[str, Any]) -> list[str]:
    """Return a comparison as lines for people."""
    sides = [
        f"{side.upper()}: {printable(one['folder'])}: accuracy {one['accuracy']:.4f}, "
        f"macro-F1 {one['macro_f1']:.4f} (protocol {printable(one['protocol'])})"
        for side, one in ((side, found[side]) for side in ("a", "b"))
    ]
    differences = [
        "{} A - B: {:+.4f}, 95 % interval {:+.4f} to {:+.4f}".format(
            name, found[f"{key}_difference"], *found[f"{key}_difference_ci95"]
        )
        for name, key in (("accuracy", "accuracy"), ("macro-F1", "macro_f1"))
    ]
    return [
        f"{found['n']} rows of {printable(found['a']['task'])}",
        *sides,
        f"right: both {found['both_right']}, only A {found['only_a']}, only B {found['only_b']}, "
        f"neither {found['neither']}",
        *differences,
        f"exact McNemar test: p = {found['mcnemar_p']:.3g}",
        found["verdict"],
    ]


def read_results(path: str | Path) -> Evaluated:
    """Read a result folder, which may come from someone else.

    Raises `InputError` that names the file and line of broken JSON, a missing or wrong key or a
    repeated index, and rejects rows that do not match `results.json`.
    """
    folder = Path(path)
    if folder.is_file():
        raise InputError(f"{folder}: is a file; expected its folder; give {folder.parent}")
    if missing := [name for name in (RESULTS, PREDICTIONS) if not (folder / name).is_file()]:
        raise InputError(
            f"{folder}: has no file {missing[0]}; give a folder written by `mlmjax evaluate --out`"
        )
    content = read_bounded(plain_file(folder, RESULTS), MAX_JSON_BYTES)
    results = _decode(_Results, content, f"{folder / RESULTS}")
    gold, predicted = dict[int, str](), dict[int, str]()
    try:
        with plain_file(folder, PREDICTIONS).open("rb") as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                where = f"{folder / PREDICTIONS}, line {len(gold) + 1}"
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(f"{where}: is longer than {MAX_LINE_BYTES} bytes; {_AGAIN}")
                one = _decode(Prediction, line, where)
                if one.index in gold:
                    raise InputError(f"{where}: repeats index {one.index}; {_AGAIN}")
                gold[one.index], predicted[one.index] = one.gold, one.prediction
    except OSError as error:
        raise read_failed(folder / PREDICTIONS, error, _AGAIN) from error
    if len(gold) != results.n:
        found = f"{RESULTS} names {results.n} rows and {PREDICTIONS} has {len(gold)}"
        raise InputError(f"{folder}: {found}; {_AGAIN}")
    if (labels := len({*gold.values(), *predicted.values()})) > MAX_LABELS:
        raise InputError(f"{folder}: has {labels} labels; expected at most {MAX_LABELS}")
    return Evaluated(str(path), results.task, results.protocol, gold, predicted)


def _decode(kind: type[Read], content: bytes, where: str) -> Read:
    """Decode a JSON object; half characters such as `\\ud800` are errors."""
    try:
        return kind.model_validate_json(content.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {at + ': ' if at else ''}{first['msg']}; {_AGAIN}") from error


def _check_same_rows(a: Evaluated, b: Evaluated) -> None:
    if a.task != b.task:
        raise InputError(
            f"{a.folder} is about the task {a.task} and {b.folder} about {b.task}; "
            "give two evaluations of one task"
        )
    if unpaired := sorted(a.gold.keys() ^ b.gold.keys()):
        where = a.folder if unpaired[0] in a.gold else b.folder
        raise InputError(
            f"{a.folder} and {b.folder} have different rows: {counted(len(unpaired), 'row')} in "
            f"only one of them, the first with index {unpaired[0]} (in {where}); evaluate both on "
            "the same rows, with the same limit"
        )
    if other := sorted(index for index in a.gold if a.gold[index] != b.gold[index]):
        one, two = a.gold[other[0]], b.gold[other[0]]
        raise InputError(
            f"{a.folder} and {b.folder} have different gold labels in "
            f"{counted(len(other), 'row')}, the first with index {other[0]}: {one!r:.60} and "
            f"{two!r:.60}; evaluate both on the same file"
        )
