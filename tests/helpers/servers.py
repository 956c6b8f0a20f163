"""Servers in a thread of the tests, over a model that is small and random."""

import http.client
import json
import threading
import time
from contextlib import contextmanager

from mlmjax.serving.app import make_app
from mlmjax.serving.serve import listen, make_server

KEY = "key-of-the-tests"
REQUEST = {
    "model": "jev-latest",
    "state": {"subject": "Billed twice", "body": "Refund it today."},
    "questions": {
        "team": {"type": "choice", "instructions": "Who?", "criteria": {"a": "x", "b": None}},
        "churn": {"type": "noul", "instructions": "Leaving?"},
        "urgency": {"type": "score", "instructions": "Urgent?", "criteria": ["no", "so", "yes"]},
    },
}


class Client:
    """Sends requests to a server of the tests."""

    def __init__(self, port, app):
        self.port, self.app = port, app

    def send(self, method, path, body=None, timeout=30, **headers):
        """Return status, headers and body of the response, decoded if it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            if body is not None:
                headers.setdefault("Content-Type", "application/json")
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read()
            if "json" in response.headers.get("content-type", ""):
                content = json.loads(content)
            return response.status, response.headers, content
        finally:
            connection.close()

    def ask(self, request=None, **headers):
        return self.send(
            "POST", "/v1/systemone", REQUEST if request is None else request, **headers
        )

    def is_ready(self):
        try:
            return self.send("GET", "/ready")[0] == 200
        except OSError:
            return False


@contextmanager
def serving(decider, **options):
    app = make_app(lambda: decider, **options)
    server = make_server(app)
    with listen("127.0.0.1", 0) as opened:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        client = Client(opened.getsockname()[1], app)
        try:
            deadline = time.monotonic() + 300
            while not client.is_ready():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield client
        finally:
            server.should_exit = True
            thread.join()
