"""The protocol, by its conformance suite and its official client, and equal answers."""

import json
import re

import pytest
from jevcompat.runner import run
from servers import KEY, REQUEST, serving

from mlmjax import Decider
from mlmjax.decisions.answers import answer_json
from mlmjax.decisions.questions import read_questions


def failed(report):
    return [(one.id, [f.message for f in one.findings]) for one in report.results if one.findings]


def test_the_conformance_suite_passes_with_and_without_a_key(client, locked):
    reports = [run(f"http://127.0.0.1:{c.port}", key=k) for c, k in ((client, None), (locked, KEY))]
    for report in reports:
        assert not failed(report)
        assert report.conformant
    passed = {one.id: one.level for r in reports for one in r.results if one.status == "pass"}
    assert sorted(passed.values()) == ["MUST"] * 33 + ["SHOULD"] * 15


@pytest.mark.long
def test_the_conformance_suite_passes_with_the_packaged_model():
    with serving(Decider("mlmjax-small")) as client:
        report = run(f"http://127.0.0.1:{client.port}")
        assert not failed(report)
        assert report.conformant
        assert "mlmjax-small" in client.send("GET", "/v1/models")[2]["models"][1]["name"]


@pytest.mark.parametrize(
    "path", ["/v1/systemone", "/v1/models", "/docs", "/metrics", "/openapi.json"]
)
def test_a_key_is_needed_where_there_is_one(locked, path):
    method = "POST" if path.endswith("one") else "GET"
    body = REQUEST if method == "POST" else None
    for given in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}):
        status, headers, found = locked.send(method, path, body, **given)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert found["detail"]["error_type"] == "authentication_error"
        assert KEY not in json.dumps(found)
    assert locked.send(method, path, body, Authorization=f"Bearer {KEY}")[0] == 200
    assert all(locked.send("GET", one)[0] == 200 for one in ("/", "/health", "/ready"))


def test_answers_are_those_of_the_decider_to_the_last_bit(client, decider):
    _, _, found = client.ask()
    direct = decider.decide(REQUEST["state"], REQUEST["questions"])
    assert found["answers"] == {key: answer_json(one) for key, one in direct.items()}
    assert found["usage"]["input_tokens"] == sum(one.tokens for one in direct.values())
    assert found["model"] == "mlmjax"
    many = list(decider.decide_many(["x", REQUEST["state"]], read_questions(REQUEST["questions"])))
    assert many[1] == direct


def test_metrics_count_requests_and_questions(client):
    def figures():
        lines = client.send("GET", "/metrics")[2].decode().splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

    before = figures()
    client.ask()
    client.ask(REQUEST | {"state": "word " * 400})
    client.ask({})
    after = figures()
    for name, more in {
        'mlmjax_requests_total{status="200"}': 3,  # the figures themselves are one
        'mlmjax_requests_total{status="422"}': 1,
        'mlmjax_questions_total{type="choice"}': 2,
        "mlmjax_shortened_questions_total": 3,
    }.items():
        assert float(after[name]) - float(before.get(name, 0)) == more
    assert float(after["mlmjax_waiting_questions"]) == 0


def test_the_page_and_the_openapi_are_served(client):
    status, headers, page = client.send("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"https://" not in page.replace(b"https://example", b"")
    _, _, openapi = client.send("GET", "/openapi.json")
    route = openapi["paths"]["/v1/systemone"]["post"]
    example = route["requestBody"]["content"]["application/json"]["example"]
    status, _, found = client.ask(example)
    shown = route["responses"]["200"]["content"]["application/json"]["example"]
    assert status == 200
    assert keys(found) == keys(shown)


def keys(value):
    """Return the keys of tables in tables, with the types of other values."""
    if isinstance(value, dict):
        return {key: keys(one) for key, one in value.items()}
    return type(value)


def test_the_reference_shows_all_routes_and_asks_no_other_host(client):
    status, headers, page = client.send("GET", "/docs")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    text = page.decode()
    _, _, openapi = client.send("GET", "/openapi.json")
    for path in openapi["paths"]:
        assert f" {path}</code></h2>" in text
    assert "Which team should handle this?" in text
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", text)
    assert addresses
    assert all(one.startswith(("/", "data:")) and one[:2] != "//" for one in addresses)
    assert "<script" not in text
    assert "@import" not in text


def test_words_over_http(client, decider):
    request = {
        "model": "jev-latest",
        "state": {"subject": "Billed twice", "body": "Refund it."},
        "questions": {key: REQUEST["questions"][key] for key in ("team", "urgency")},
    }
    status, _, plain = client.ask(request)
    assert status == 200
    assert all("x_words" not in answer for answer in plain["answers"].values())
    status, _, found = client.ask(request | {"x_explain": True})
    assert status == 200
    for key, question in request["questions"].items():
        words = decider.explain(request["state"], question)
        expected = [{"text": word.text, "importance": word.importance} for word in words]
        assert found["answers"][key].pop("x_words") == expected
    assert found["answers"] == plain["answers"]
    status, _, wrong = client.ask(request | {"x_explain": "yes"})
    assert status == 422
    assert wrong["detail"][0]["loc"] == ["body", "x_explain"]
    long = request | {"state": "goal " * 2000, "x_explain": True}
    assert client.ask(long)[0] == 413
