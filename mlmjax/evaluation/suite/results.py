"""The cells of a suite: one result each, written whole, found again by what it is made of."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError

from mlmjax.config.tables import StrictTable
from mlmjax.errors import InputError
from mlmjax.evaluation.questions import Question
from mlmjax.statistics.metrics import classification_metrics
from mlmjax.statistics.reliability import calibration
from mlmjax.storage import PARTIAL, hash_value, write_whole

_READABLE = re.compile(r"[^A-Za-z0-9._-]+")


class Prediction(StrictTable):
    """The answer to one question: `index` is its record in the file."""

    index: int
    gold: str
    prediction: str
    probabilities: dict[str, Annotated[FiniteFloat, Field(ge=0)]]


class Result(StrictTable):
    """What a cell found out; a training that diverged has no predictions, and says why."""

    shortened: Annotated[int, Field(ge=0)] = 0
    losses: list[FiniteFloat] = Field(default_factory=list)
    diverged: str | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)
    order: dict[str, Any] | None = None
    predictions: list[Prediction] = Field(default_factory=list)


def result_of(
    questions: Sequence[Question],
    labels: Sequence[str],
    log_probs: np.ndarray,
    *,
    shortened: int = 0,
    losses: Sequence[float] = (),
    order: dict[str, Any] | None = None,
) -> Result:
    """Make the result of log probabilities `[questions, labels]`, -inf where a row has no such."""
    predictions = [
        Prediction(
            index=question.index,
            gold=labels[question.gold],
            prediction=labels[int(row.argmax())],
            probabilities={
                label: round(float(np.exp(value)), 8)
                for label, value in zip(labels, row, strict=True)
                if np.isfinite(value)
            },
        )
        for question, row in zip(questions, log_probs, strict=True)
    ]
    truth = [question.gold for question in questions]
    # A method that gives labels alone has nothing that could be calibrated.
    has_shares = bool((np.isfinite(log_probs).sum(axis=1) > 1).all())
    return Result(
        shortened=shortened,
        losses=list(losses),
        metrics={
            **_metrics(predictions),
            "calibration": calibration(log_probs, truth) if has_shares else None,
        },
        order=order,
        predictions=predictions,
    )


def _metrics(predictions: Sequence[Prediction]) -> dict[str, Any]:
    gold, predicted = [p.gold for p in predictions], [p.prediction for p in predictions]
    return {"n": len(predictions), **classification_metrics(gold, predicted)}


class Cells:
    """The folder of the results of a suite, one JSON file per cell.

    A cell is found by its identity, a JSON object of everything its result depends on: a cell of
    another model, setting or row is another file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"*{PARTIAL}"):  # of a run that was killed while it wrote
            left.unlink()

    def path(self, identity: Mapping[str, Any]) -> Path:
        """Return the file of a cell: readable words, and the hash of its identity."""
        words = _READABLE.sub("_", f"{identity['task']['name']}-{identity['method']}")[:60]
        return self.folder / f"{words}-{hash_value(identity)[:16]}.json"

    def get(
        self,
        identity: Mapping[str, Any],
        asked: Sequence[Question],
        labels: Sequence[str],
        compute: Callable[[], Result],
    ) -> tuple[Result, bool]:
        """Return the result of a cell, and whether it had to be computed.

        Raises `InputError` for a file that is no such cell, is not about the questions `asked`, or
        whose figures are not those of its predictions; `RunError` where it cannot be written.
        """
        path = self.path(identity)
        if path.exists():
            return _read(path, identity, asked, labels), False
        result = compute()
        _write(path, identity, result)
        return result, True


def _read(
    path: Path, identity: Mapping[str, Any], asked: Sequence[Question], labels: Sequence[str]
) -> Result:
    try:
        table = json.loads(path.read_bytes(), parse_constant=_no_number)
        if not isinstance(table, dict):
            raise ValueError(f"it holds a {type(table).__name__}; expected an object")
        if "identity" not in table:
            raise ValueError("identity: is missing")
        if table.pop("identity") != json.loads(json.dumps(identity)):
            raise ValueError("its identity is that of another cell")
        result = Result.model_validate(table)
        if result.diverged is None:
            _check_predictions(result.predictions, asked, labels)
            return _with_own_metrics(result)
        if result.predictions or result.metrics:
            raise ValueError("its training diverged, and yet it has predictions or metrics")
        return result
    except ValidationError as error:
        reason = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
    raise InputError(
        f"{path}: is no cell of this suite ({reason:.200}); take the file away to have it computed "
        "again"
    )


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _check_predictions(
    rows: Sequence[Prediction], asked: Sequence[Question], labels: Sequence[str]
) -> None:
    """Raise `ValueError` for predictions that are not about these questions."""
    if len(rows) != len(asked):
        raise ValueError(f"predictions: are {len(rows)}; expected {len(asked)}")
    for number, (row, question) in enumerate(zip(rows, asked, strict=True)):
        where, shares, gold = f"predictions.{number}", row.probabilities, labels[question.gold]
        if (row.index, row.gold) != (question.index, gold):
            raise ValueError(
                f"{where}: is index {row.index}, gold {row.gold!r:.40}; expected "
                f"index {question.index}, gold {gold!r:.40}"
            )
        if not shares.keys() <= set(labels):
            raise ValueError(f"{where}.probabilities: has labels that the task has not")
        if row.prediction not in shares or shares[row.prediction] < max(shares.values()):
            raise ValueError(f"{where}: {row.prediction!r:.40} is not its most probable label")


def _with_own_metrics(result: Result) -> Result:
    """Return the result with the metrics of its predictions; `ValueError` if it tells others.

    Bootstrapped intervals are taken anew, as another numpy may draw other rows.
    """
    own = _metrics(result.predictions)
    for key in (*own, "calibration"):
        if key not in result.metrics:
            raise ValueError(f"metrics.{key}: is missing")
    for key, value in own.items():
        told = result.metrics[key]
        if not key.endswith("_ci95") and not (_is_finite(told) and abs(told - value) < 1e-9):
            raise ValueError(f"metrics.{key}: is {told!r:.40}; its predictions give {value}")
    told = result.metrics["calibration"]
    # Computed of unrounded probabilities: not the same again, to the last digit.
    if told is not None and not (isinstance(told, dict) and all(map(_is_finite, told.values()))):
        raise ValueError("metrics.calibration: has values that are no finite numbers")
    has_shares = all(len(row.probabilities) > 1 for row in result.predictions)
    if (told is not None and "ece" in told) != has_shares:
        raise ValueError("metrics.calibration: is not that of its probabilities")
    if result.order is not None and not _is_finite(result.order.get("changed")):
        raise ValueError("order.changed: is no finite number")
    return result.model_copy(update={"metrics": {**result.metrics, **own}})


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _write(path: Path, identity: Mapping[str, Any], result: Result) -> None:
    values = {"identity": identity, **result.model_dump()}
    rows = values.pop("predictions")
    head = [f"{json.dumps(key)}: {_line(value)}" for key, value in values.items()]
    lines = ",\n".join(map(_line, rows))
    text = "{\n" + ",\n".join([*head, f'"predictions": [\n{lines}\n]']) + "\n}\n"
    write_whole(path, text.encode())


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
