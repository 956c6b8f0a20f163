"""What the OpenAPI page says of a request for answers."""

from typing import Any

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
DECIDE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _REQUEST, "example": _EXAMPLE}},
    }
}
