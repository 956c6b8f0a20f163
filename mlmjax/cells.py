"""The cells of a suite: one result each, written whole, found again by what it is made of."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mlmjax.errors import InputError, write_failed
from mlmjax.metrics import classification_metrics
from mlmjax.questions import Question
from mlmjax.reliability import calibration

PARTIAL = ".partial"
_READABLE = re.compile(r"[^A-Za-z0-9._-]+")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Prediction(_Part):
    """The answer to one question: `index` is its record in the file."""

    index: int
    gold: str
    prediction: str
    probabilities: dict[str, float]


class Result(_Part):
    """What a cell found out; a training that diverged has no predictions, and says why."""

    shortened: int = 0
    losses: list[float] = []
    diverged: str | None = None
    metrics: dict[str, Any] = {}
    order: dict[str, Any] | None = None
    predictions: list[Prediction] = []


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
    gold, predicted = [p.gold for p in predictions], [p.prediction for p in predictions]
    return Result(
        shortened=shortened,
        losses=list(losses),
        metrics={
            "n": len(questions),
            **classification_metrics(gold, predicted),
            "calibration": calibration(log_probs, truth) if has_shares else None,
        },
        order=order,
        predictions=predictions,
    )


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
        text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
        words = _READABLE.sub("_", f"{identity['task']['name']}-{identity['method']}")[:60]
        return self.folder / f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def get(
        self, identity: Mapping[str, Any], compute: Callable[[], Result]
    ) -> tuple[Result, bool]:
        """Return the result of a cell, and whether it had to be computed.

        Raises `InputError` for a file that is no such cell, `RunError` where it cannot be written.
        """
        path = self.path(identity)
        if path.exists():
            return _read(path, identity), False
        result = compute()
        _write(path, identity, result)
        return result, True


def _read(path: Path, identity: Mapping[str, Any]) -> Result:
    try:
        table = json.loads(path.read_bytes())
        if table.pop("identity") != json.loads(json.dumps(identity)):
            raise ValueError("its identity is that of another cell")
        return Result.model_validate(table)
    except ValidationError as error:
        reason = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
    raise InputError(
        f"{path}: is no cell of this suite ({reason:.200}); take the file away to have it computed "
        "again"
    )


def _write(path: Path, identity: Mapping[str, Any], result: Result) -> None:
    values = {"identity": identity, **result.model_dump()}
    rows = values.pop("predictions")
    head = [f"{json.dumps(key)}: {_line(value)}" for key, value in values.items()]
    lines = ",\n".join(map(_line, rows))
    text = "{\n" + ",\n".join([*head, f'"predictions": [\n{lines}\n]']) + "\n}\n"
    write_whole(path, text.encode())


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all; raises `RunError` if it cannot be."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise write_failed(path, error) from error
