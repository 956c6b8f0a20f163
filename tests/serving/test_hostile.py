"""Hostile requests and clients: every answer is a refusal in words, and the server serves on."""

import gzip
import json
import socket
import threading
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import replace

import jax
import pytest
from servers import REQUEST, serving
from small_models import small_model
from texts import SCRIPTS

from mlmjax import Decider, RunError
from mlmjax.decisions.answers import answer_json
from mlmjax.serving.protocol import Limits, read_request

QUESTION = {"type": "noul", "instructions": "Is it?"}
CHOICE = {"type": "choice", "instructions": "Which?", "criteria": {"a": None, "b": "x"}}
SCORE = {"type": "score", "instructions": "How?", "criteria": ["low", "high"]}
NOT_TEXT = [None, True, 7, 1.5]
DEEP = 2000


def changed(**values):
    """Return a request with other values; Ellipsis leaves one out."""
    found = {"model": "jev-latest", "state": "text", "questions": {"q": QUESTION}} | values
    return {key: value for key, value in found.items() if value is not ...}


def asking(question, **values):
    return changed(questions={"q": question}, **values)


def raw(text):
    return text if isinstance(text, bytes) else text.encode()


def bodies():
    """Return bodies of requests that are wrong, with their statuses."""
    whole = json.dumps(changed())
    yield from ((raw(whole[:end]), 422) for end in range(0, len(whole), 6))
    not_objects = ["null", "true", "[]", '"text"', "7", "[{}]", "{}", "NaN", "Infinity", "-1e999"]
    yield from ((raw(text), 422) for text in not_objects)
    broken = [
        b"\xff\xfe",
        b"\x00",
        raw(whole).replace(b"text", b"te\xffxt"),
        whole.encode("utf-16"),
    ]
    broken += [raw(whole + "x"), raw(whole + whole), raw("﻿" + whole), b"{'model': 1}", b"a=b"]
    yield from ((body, 422) for body in broken)
    for text in ('{"a": NaN}', '{"a": Infinity}', '{"a": -Infinity}', '{"a": 1e999}', "1e999"):
        yield raw(whole.replace('"text"', text)), 422
    for text in ('"\\ud800"', '{"\\udfff": 1}', '["\\ud83d"]', "[" * DEEP + "]" * DEEP):
        yield raw(whole.replace('"text"', text)), 422
    yield raw(whole.replace('"text"', '{"a":' * 70 + "1" + "}" * 70)), 422
    yield raw(whole.replace('"text"', "[" + "9" * 5000 + "]")), 422
    for text in ('"a": 1, "a": 2', '"questions": {}', '"model": "x"', '"state": "x"'):
        yield raw(f"{whole[:-1]}, {text}}}"), 422  # a key twice
    yield raw('{"q": 1, "q": 2}'), 422
    for key in ("model", "state", "questions"):
        yield changed(**{key: ...}), 422
        yield from ((changed(**{key: value}), 422) for value in NOT_TEXT)
    yield from (
        (changed(questions=value), 422) for value in ([], [QUESTION], "q", {}, {"": QUESTION})
    )
    yield changed(model="no-such-model"), 404
    yield changed(model="\ud800"), 422
    yield changed(model=["jev-latest"]), 422
    yield changed(questions={"\ud800": QUESTION}), 422
    yield changed(questions={str(i): QUESTION for i in range(10_000)}), 422
    yield changed(questions={str(i): QUESTION for i in range(257)}), 422
    yield from ((asking(value), 422) for value in (*NOT_TEXT, "q", [], {}, [QUESTION]))
    for kind in (None, "", "boolean", "Choice", "NOUL", "choice ", 3, [], {}, ["noul"], {"a": 1}):
        yield asking(QUESTION | {"type": kind}), 422
    for question in (CHOICE, SCORE):
        for key in ("instructions", "criteria"):
            yield asking({k: v for k, v in question.items() if k != key}), 422
            yield from (
                (asking(question | {key: value}), 422) for value in (None, True, 3, "\ud800")
            )
    choices = [{}, {"a": None}, ["a"], {"": None, "b": None}, {"a": 3, "b": None}, "ab"]
    choices += [{str(i): None for i in range(256)}, {"a": "\ud800", "b": None}, ["a", "a"], [1, 2]]
    choices += [{"\ud800": None, "b": None}, {"a": True, "b": None}]
    yield from ((asking(CHOICE | {"criteria": value}), 422) for value in choices)
    levels = [[], ["a"], list("abcdefghijk"), ["a", None], ["a", 3], {"0": "a", "1": "b"}, "ab"]
    levels += [["a", "\ud800"], [True, False]]
    yield from ((asking(SCORE | {"criteria": value}), 422) for value in levels)
    sides = [[], ["a"], "a", 3, {"yes": "a"}, {"true": 3}, {"True": "a"}, {"true": "\ud800"}]
    yield from ((asking(QUESTION | {"criteria": value}), 422) for value in sides)
    yield from ((asking(QUESTION | {"instructions": value}), 422) for value in (3, True, "\ud800"))
    yield asking(QUESTION | {"instructions": "why " * 400}), 422
    yield asking(SCORE | {"criteria": ["long " * 300, "b"]}), 422
    yield asking(CHOICE | {"criteria": {"long " * 300: None, "b": None}}), 422
    yield raw(json.dumps(changed(state="x" * 7 * 2**20))), 413


BODIES = list(bodies())
TYPES = ["", "text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data"]


def is_refusal(status, found):
    """Tell whether a response has one of the two shapes of an error."""
    detail = found["detail"]
    if status == 422:
        return all(
            one["loc"][0] == "body" and isinstance(one["msg"], str) and isinstance(one["type"], str)
            for one in detail
        )
    return isinstance(detail["error_type"], str) and isinstance(detail["message"], str)


def test_wrong_bodies_are_refused_in_words(client):
    assert len(BODIES) >= 150
    for body, expected in BODIES:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, headers, found = client.ask(content)
        assert status == expected, (content[:300], found)
        assert headers["content-type"] == "application/json"
        assert is_refusal(status, found), content[:300]
    assert client.ask()[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        *[("POST", "/v1/systemone", {"Content-Type": kind}, 415) for kind in TYPES],
        ("POST", "/v1/systemone", {"Content-Encoding": "gzip"}, 415),
        ("POST", "/v1/systemone", {"Content-Encoding": "br"}, 415),
        ("POST", "/v1/systemone", {"Content-Length": "99999999"}, 413),
        ("POST", "/v1/systemone/", {}, 404),
        ("POST", "/v2/systemone", {}, 404),
        ("POST", "/v1/models", {}, 405),
        ("GET", "/v1/systemone", {}, 405),
        ("DELETE", "/v1/systemone", {}, 405),
        ("GET", "/../../etc/passwd", {}, 404),
        ("GET", "/page.html", {}, 404),
        ("GET", "/%00", {}, 404),
    ],
)
def test_wrong_routes_and_headers_are_refused_in_words(client, method, path, headers, status):
    body = gzip.compress(b" " * 50_000_000) if "gzip" in headers.values() else b"{}"
    given = client.send(method, path, body if method == "POST" else None, **headers)
    assert given[0] == status
    assert is_refusal(status, given[2])


def opened(client, *lines, body=b""):
    """Open a connection that has sent the head of a request and part of its body."""
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=10)
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


HEAD = ["POST /v1/systemone HTTP/1.1", "Host: x", "Content-Type: application/json"]


def test_stalled_and_broken_clients_hold_nobody_up(client):
    with ExitStack() as stack:
        idle = [stack.enter_context(opened(client)) for _ in range(200)]
        stalled = [
            stack.enter_context(opened(client, *HEAD, "Content-Length: 100", body=b'{"model"'))
            for _ in range(20)
        ]
        for _ in range(20):  # gone in the middle of a body, and before the answer
            opened(client, *HEAD, "Content-Length: 100", body=b'{"model"').close()
            body = json.dumps(REQUEST).encode()
            opened(client, *HEAD, f"Content-Length: {len(body)}", body=body).close()
        started = time.monotonic()
        assert client.ask()[0] == 200
        assert time.monotonic() - started < 5
        for connection in stalled:  # the limit of the tests is a second
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        assert len(idle) == 200
    endless = opened(client, *HEAD, "Transfer-Encoding: chunked")
    with closing(endless), suppress(OSError):  # the server closes the connection
        for _ in range(10_000):
            endless.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
        pytest.fail("the server read 655 MB")
    assert client.ask()[0] == 200


def test_a_second_request_cannot_hide_in_a_body_of_two_lengths(client):
    hidden = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    lines = [*HEAD, "Transfer-Encoding: chunked", "Content-Length: 5"]
    with closing(opened(client, *lines, body=hidden)) as connection:
        found = b"".join(iter(lambda: connection.recv(4096), b""))  # until it is closed
    assert found.startswith(b"HTTP/1.1 400")
    assert found.count(b"HTTP/1.1") == 1
    assert b"send one of them" in found


def test_a_slow_reader_holds_nobody_up(client):
    """Answers of 4 MB, which nobody reads, wait in their own connections."""
    many = {f"{n}" * 2**20: QUESTION for n in range(4)}
    body = json.dumps(changed(questions=many)).encode()
    with ExitStack() as stack:
        for _ in range(8):
            slow = stack.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", client.port))
            slow.sendall("\r\n".join([*HEAD, f"Content-Length: {len(body)}", "", ""]).encode())
            slow.sendall(body)
            assert slow.recv(12) == b"HTTP/1.1 200"
        started = time.monotonic()
        assert client.ask()[0] == 200
        assert time.monotonic() - started < 5
    assert client.ask()[0] == 200


def test_large_requests_leave_room_for_small_ones(decider, monkeypatch):
    """However many large bodies there are, one thread reads them, and their bytes are bounded."""
    going, large = threading.Event(), 2**19

    def read(body, limits):
        if len(body) > large:
            assert going.wait(60)
        return read_request(body, limits)

    monkeypatch.setattr("mlmjax.serving.app.read_request", read)
    with serving(decider, limits=Limits(open_bytes=40 * large)) as client:
        threads, found = ask_all(client, ["x" * large] * 10)
        small = client.ask()
        assert small[0] == 200
        assert found == [None] * 10
        client.app.state.server.limits = replace(client.app.state.server.limits, open_bytes=large)
        status, headers, refused = client.ask(changed(state="x" * large))
        assert (status, headers["retry-after"]) == (503, "1")
        assert "too many large requests are under way" in refused["detail"]["message"]
        going.set()
        for thread in threads:
            thread.join()
        assert client.app.state.server.open_bytes == 0
    assert [one[0] for one in found] == [200] * 10


def test_states_of_any_size_and_the_most_options_are_answered(client):
    for state in ("", "word " * 1_000_000, {"a": "é" * 1_000_000, "b": "short"}, [1] * 100_000):
        status, _, found = client.ask(changed(state=state))
        assert status == 200
        assert ("x_shortened" in found["answers"]["q"]) == bool(state)
    many = {f"name {i}": "text" if i % 2 else None for i in range(255)}
    status, _, found = client.ask(asking(CHOICE | {"criteria": many}))
    assert status == 200
    assert list(found["answers"]["q"]["probabilities"]) == list(many)


def test_names_in_ten_scripts_and_ten_levels_come_back_byte_by_byte(client, decider):
    asked = {name: {**CHOICE, "criteria": dict.fromkeys(SCRIPTS)} for name in SCRIPTS}
    asked["levels"] = {**SCORE, "criteria": SCRIPTS}
    status, _, found = client.ask(changed(questions=asked))
    assert status == 200
    assert list(found["answers"]) == list(asked)
    for name in SCRIPTS:
        assert list(found["answers"][name]["probabilities"]) == SCRIPTS
    assert list(found["answers"]["levels"]["legend"].values()) == SCRIPTS
    direct = decider.decide("text", asked)
    assert found["answers"] == {key: answer_json(one) for key, one in direct.items()}


def test_the_tokens_of_a_request_are_bounded(client):
    many = {str(n): asking(CHOICE)["questions"]["q"] for n in range(256)}
    status, _, found = client.ask(changed(state="word " * 200, questions=many))
    assert status == 200
    options = {f"option {n}": "a description" for n in range(255)}
    many = {str(n): CHOICE | {"criteria": options} for n in range(256)}
    status, _, found = client.ask(changed(questions=many))
    assert status == 413
    assert "tokens; expected at most 131,072 in one request" in found["detail"]["message"]


class Failing:
    """A decider that fails where its state says so."""

    name = "failing"

    def __init__(self, decider):
        self.decider = decider
        self.calls = []
        self.wait = threading.Event()
        self.wait.set()

    def __getattr__(self, name):
        return getattr(self.decider, name)

    def warm_up(self, progress):
        progress(1, 1)

    def decide_all(self, requests):
        self.wait.wait()
        states = [state.text for state, _ in requests]
        self.calls.append(len(states))
        if "fail" in states:
            raise RunError("the devices' memory does not hold one text")
        return self.decider.decide_all(requests)


def test_a_batch_that_is_too_large_for_the_memory_is_halved(tokenizer, caplog):
    model = small_model(num_hidden_layers=1, max_position_embeddings=128)
    small = Decider((model, tokenizer), batch_size=8)
    engine = small._asker.scorer.engine
    whole = engine.jitted

    def jitted(state, ids, *more):
        if len(ids) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return whole(state, ids, *more)

    with serving(small) as client, caplog.at_level("INFO"):
        engine.jitted = jitted
        status, _, found = client.ask()
        assert status == 200
        assert "continuing with 2 rows" in caplog.text
        direct = small.decide(REQUEST["state"], REQUEST["questions"])
        assert found["answers"] == {key: answer_json(one) for key, one in direct.items()}


def ask_all(client, states):
    """Ask about all states at once, and return the statuses in their order."""
    found = [None] * len(states)

    def ask(at):
        found[at] = client.ask(changed(state=states[at]))

    threads = [threading.Thread(target=ask, args=[at]) for at in range(len(states))]
    for thread in threads:
        thread.start()
    return threads, found


def test_one_failing_request_fails_no_other(decider, caplog):
    failing = Failing(decider)
    with serving(failing) as client:
        failing.wait.clear()
        threads, found = ask_all(client, ["fail", *map(str, range(9))])
        time.sleep(0.5)
        failing.wait.set()
        for thread in threads:
            thread.join()
        assert found[0][0] == 503
        assert found[0][1]["retry-after"] == "5"
        assert is_refusal(503, found[0][2])
        for number, (status, _, answers) in enumerate(found[1:]):
            assert status == 200
            direct = decider.decide(str(number), {"q": QUESTION})["q"].probability
            assert answers["answers"]["q"]["noul"] == direct
        assert max(failing.calls) > 1
        assert client.ask()[0] == 200
    assert "Is it?" not in caplog.text


def test_a_full_queue_turns_requests_away_and_loses_none(decider):
    failing = Failing(decider)
    with serving(failing, limits=Limits(waiting=4, answer_seconds=4)) as client:
        failing.wait.clear()
        threads, found = ask_all(client, list(map(str, range(12))))
        deadline = time.monotonic() + 10
        while sum(one is not None for one in found) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        failing.wait.set()
        for thread in threads:
            thread.join()
        statuses = [status for status, _, _ in found]
        assert statuses.count(200) == 4
        assert statuses.count(503) == 8
        turned = next(one for one in found if one[0] == 503)
        assert turned[1]["retry-after"] == "1"
        assert is_refusal(503, turned[2])
        failing.wait.clear()
        assert client.ask()[0] == 503  # no answer in time
        failing.wait.set()
        assert client.ask()[0] == 200


def test_a_server_whose_model_cannot_be_loaded_says_so():
    def load():
        raise RunError("no memory")

    from mlmjax.serving.app import make_app

    app = make_app(load)
    app.state.server._load()
    assert app.state.server.failure is not None
