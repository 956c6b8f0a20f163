"""Results of a suite: one file each, found again by the identity of what it depends on."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError

from mlmjax.config.tables import StrictTable
from mlmjax.errors import InputError
from mlmjax.evaluation.compare import Prediction
from mlmjax.evaluation.evaluate import Answers, list_predictions
from mlmjax.evaluation.questions import Question
from mlmjax.statistics.metrics import classification_metrics
from mlmjax.statistics.reliability import calibration
from mlmjax.storage import hash_value, write_whole

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
    predictions = []
    for one in list_predictions(questions, labels, log_probs):
        shares = {name: round(p, 8) for name, p in one.pop("probabilities").items()}
        predictions.append(Prediction(**one, probabilities=shares))
    # TF-IDF gives labels without probabilities: nothing can be calibrated.
    has_shares = bool((np.isfinite(log_probs).sum(axis=1) > 1).all())
    return Result(
        shortened=answers.shortened,
        losses=list(answers.losses),
        metrics={
            **_metrics_of(predictions),
            "calibration": calibration(log_probs, truth) if has_shares else None,
        },
        order=answers.order,
        predictions=predictions,
    )


def _metrics_of(predictions: Sequence[Prediction]) -> dict[str, Any]:
    gold, given = [one.gold for one in predictions], [one.prediction for one in predictions]
    return {"n": len(predictions), **classification_metrics(gold, given)}


def path_of(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Return the file of the result with an identity.

    An identity is a JSON object of everything that the result depends on: a result of another
    model, setting or row is another file.
    """
    words = _UNREADABLE.sub("_", f"{identity['task']['name']}-{identity['method']}")[:60]
    return folder / f"{words}-{hash_value(identity)[:16]}.json"


def read_result(
    path: Path, identity: Mapping[str, Any], questions: Sequence[Question], labels: Sequence[str]
) -> Result:
    """Read a result; raise `InputError` for a file that is damaged or about other questions."""
    try:
        table = json.loads(path.read_bytes(), parse_constant=_reject)
        if not isinstance(table, dict):
            raise ValueError(f"it holds a {type(table).__name__}; expected an object")
        if table.pop("identity", None) != json.loads(json.dumps(identity)):
            raise ValueError("it has another identity")
        result = Result.model_validate(table)
        if (result.diverged is None) != bool(result.predictions):
            raise ValueError("it has predictions and diverged, or neither")
        if result.predictions:
            _check_figures(result, questions, labels)
        return result
    except ValidationError as error:
        reason = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = str(error) or type(error).__name__
    raise InputError(
        f"{path}: is not a result of this suite ({reason:.200}); delete the file to compute the "
        "result again"
    )


def _reject(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")


def _check_figures(result: Result, questions: Sequence[Question], labels: Sequence[str]) -> None:
    """Raise `ValueError` unless the predictions are to these questions and give the metrics."""
    found = [(one.index, one.gold) for one in result.predictions]
    if found != [(one.index, labels[one.gold]) for one in questions]:
        raise ValueError("its predictions are for other questions")
    for one in result.predictions:
        shares = one.probabilities
        best = max(shares.values(), default=-1.0)
        if not shares.keys() <= set(labels) or shares.get(one.prediction) != best:
            raise ValueError(f"the prediction for row {one.index} is not its most probable label")
    metrics = _metrics_of(result.predictions)
    stored = {name: value for name, value in result.metrics.items() if name != "calibration"}
    if stored.keys() != metrics.keys() or not all(
        np.allclose(stored[name], value, atol=1e-6) for name, value in metrics.items()
    ):
        raise ValueError("its metrics are not those of its predictions")
    # Probabilities are stored in 8 digits, which is too few to compute the calibration again.
    for table, key in ((result.order, "changed"), (result.metrics["calibration"], "ece")):
        if table is not None and not 0.0 <= table[key] <= 1.0:
            raise ValueError(f"{key} is {table[key]!r}; expected a share")


def write_result(path: Path, identity: Mapping[str, Any], result: Result) -> None:
    """Write a result with one line for each prediction; raise `RunError` if writing fails."""
    line = partial(json.dumps, ensure_ascii=False, allow_nan=False)
    values = {"identity": identity, **result.model_dump()}
    rows = ",\n".join(map(line, values.pop("predictions")))
    head = [f"{json.dumps(key)}: {line(value)}" for key, value in values.items()]
    text = "{\n" + ",\n".join([*head, f'"predictions": [\n{rows}\n]']) + "\n}\n"
    write_whole(path, text.encode())
