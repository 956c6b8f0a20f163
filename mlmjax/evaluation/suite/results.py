"""Results of a suite: one file each, found again by the identity of what it depends on."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError

from mlmjax.config.tables import StrictTable
from mlmjax.errors import InputError
from mlmjax.evaluation.compare import Prediction
from mlmjax.evaluation.evaluate import Answers, list_predictions
from mlmjax.evaluation.questions import Question
from mlmjax.statistics.metrics import classification_metrics
from mlmjax.statistics.reliability import calibration
from mlmjax.storage import PARTIAL, hash_value, write_whole

_UNREADABLE = re.compile(r"[^A-Za-z0-9._-]+")


class Result(StrictTable):
    """One result; a training that diverged has the reason and no predictions."""

    shortened: Annotated[int, Field(ge=0)] = 0
    losses: list[FiniteFloat] = Field(default_factory=list)
    diverged: str | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)
    order: dict[str, Any] | None = None
    predictions: list[Prediction] = Field(default_factory=list)


def make_result(questions: Sequence[Question], labels: Sequence[str], answers: Answers) -> Result:
    """Make the result of the answers to questions."""
    log_probs, truth = answers.log_probs, [question.gold for question in questions]
    predictions = list_predictions(questions, labels, log_probs)
    for one in predictions:
        one["probabilities"] = {name: round(p, 8) for name, p in one["probabilities"].items()}
    # TF-IDF gives labels without probabilities: nothing can be calibrated.
    has_shares = bool((np.isfinite(log_probs).sum(axis=1) > 1).all())
    return Result(
        shortened=answers.shortened,
        losses=list(answers.losses),
        metrics={
            "n": len(predictions),
            **classification_metrics(
                [one["gold"] for one in predictions], [one["prediction"] for one in predictions]
            ),
            "calibration": calibration(log_probs, truth) if has_shares else None,
        },
        order=answers.order,
        predictions=[Prediction(**one) for one in predictions],
    )


def open_results(folder: Path) -> None:
    """Make the folder of results and remove what a killed run left half written."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"*{PARTIAL}"):
        left.unlink()


def find_or_compute(
    folder: Path, identity: Mapping[str, Any], compute: Callable[[], Result]
) -> tuple[Result, bool]:
    """Return the result with an identity, and whether it had to be computed.

    An identity is a JSON object of everything that the result depends on: a result of another
    model, setting or row is another file. Raises `InputError` for a file that is damaged or not a
    result, `RunError` if a file cannot be written.
    """
    words = _UNREADABLE.sub("_", f"{identity['task']['name']}-{identity['method']}")[:60]
    path = folder / f"{words}-{hash_value(identity)[:16]}.json"
    if path.exists():
        return _read(path, identity), False
    result = compute()
    _write(path, identity, result)
    return result, True


def _read(path: Path, identity: Mapping[str, Any]) -> Result:
    try:
        table = json.loads(path.read_bytes())
        if not isinstance(table, dict):
            raise ValueError(f"it holds a {type(table).__name__}; expected an object")
        if table.pop("identity", None) != json.loads(json.dumps(identity)):
            raise ValueError("it has another identity")
        result = Result.model_validate(table)
        if result.diverged is None and not result.predictions:
            raise ValueError("it has no predictions")
        return result
    except ValidationError as error:
        reason = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
    raise InputError(
        f"{path}: is not a result of this suite ({reason:.200}); delete the file to compute the "
        "result again"
    )


def _write(path: Path, identity: Mapping[str, Any], result: Result) -> None:
    """Write a result with one line for each prediction."""
    values = {"identity": identity, **result.model_dump()}
    rows = ",\n".join(map(_line, values.pop("predictions")))
    head = [f"{json.dumps(key)}: {_line(value)}" for key, value in values.items()]
    text = "{\n" + ",\n".join([*head, f'"predictions": [\n{rows}\n]']) + "\n}\n"
    write_whole(path, text.encode())


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
