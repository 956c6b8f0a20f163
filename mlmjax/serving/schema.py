"""What the OpenAPI document says of requests for answers, and the page that shows it."""

from collections.abc import Mapping
from typing import Any

from mlmjax.reporting.pages import render, stylesheet

DESCRIPTION = (
    "Typed questions about a text or JSON, each answered by one forward pass of a masked language "
    "model. The route follows the public, unofficial specification 0.1 of the conformance suite "
    "jevcompat. This project is not affiliated with any vendor."
)
_TEXT: dict[str, Any] = {"type": ["string", "object", "array"]}
_OPTIONAL: dict[str, Any] = {"type": ["string", "object", "array", "null"]}


def _question(kind: str, needed: list[str], criteria: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["type", *needed],
        "properties": {
            "type": {"const": kind},
            "instructions": _TEXT if needed else _OPTIONAL,
            "criteria": criteria,
        },
    }


_CHOICE = {
    "type": "object",
    "minProperties": 2,
    "maxProperties": 255,
    "additionalProperties": _OPTIONAL,
}
_YES_NO = {"type": ["object", "null"], "properties": {"true": _OPTIONAL, "false": _OPTIONAL}}
_SCORE = {"type": "array", "minItems": 2, "maxItems": 10, "items": _TEXT}
_REQUEST = {
    "type": "object",
    "required": ["model", "state", "questions"],
    "properties": {
        "model": {"type": "string"},
        "state": _TEXT,
        "x_explain": {"type": "boolean", "default": False},
        "questions": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {
                "oneOf": [
                    _question("choice", ["instructions", "criteria"], _CHOICE),
                    _question("noul", [], _YES_NO),
                    _question("score", ["instructions", "criteria"], _SCORE),
                ]
            },
        },
    },
}
_EXAMPLE = {
    "model": "jev-latest",
    "state": {"subject": "Billed twice", "body": "Please refund the duplicate today."},
    "questions": {
        "team": {
            "type": "choice",
            "instructions": "Which team should handle this?",
            "criteria": {"billing": "invoices, refunds", "support": "everything else"},
        },
        "churn": {"type": "noul", "instructions": "Does the customer threaten to leave?"},
        "urgency": {
            "type": "score",
            "instructions": "How urgent is it?",
            "criteria": ["can wait", "this week", "today"],
        },
    },
}
_ANSWERS = {
    "model": "mlmjax-small",
    "answers": {
        "team": {
            "type": "choice",
            "choice": "billing",
            "probabilities": {"billing": 0.75, "support": 0.25},
            "confidence": 0.5,
        },
        "churn": {"type": "noul", "noul": 0.25, "x_confidence": 0.5},
        "urgency": {
            "type": "score",
            "score": 1.5,
            "legend": {"0": "can wait", "1": "this week", "2": "today"},
            "probabilities": {"0": 0.125, "1": 0.25, "2": 0.625},
            "confidence": 0.25,
        },
    },
    "usage": {"input_tokens": 210, "output_tokens": 0},
}
_INVALID = {
    "detail": [{"loc": ["body", "state"], "msg": "is missing", "type": "missing"}],
}
_REFUSED = {"detail": {"error_type": "overloaded", "message": "1024 questions wait; try again"}}


def _response(description: str, example: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"example": example}}}


DECIDE: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _REQUEST, "example": _EXAMPLE}},
        }
    },
    "responses": {
        200: _response("The answers by the ids of the questions.", _ANSWERS),
        422: _response("The request is wrong; each problem has its place.", _INVALID),
        "4XX": {
            "description": "Refused: 401 without the key, 404 for another model, 408 for a body "
            "that does not arrive, 413 for too much, 415 for another type."
        },
        503: _response("Not ready, or too busy: try again after Retry-After.", _REFUSED),
    },
}
"""What the route for answers says of its requests and responses."""


def reference(openapi: Mapping[str, Any]) -> str:
    """Return an HTML page of the routes that an OpenAPI document describes.

    It has no script and needs no other file.
    """
    return render("serving/reference.html.j2", api=openapi, style=stylesheet())
