"""The HTTP application: routes, the key, bounds of a body, and the shapes of errors."""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlmjax._version import __version__
from mlmjax.decisions.answers import answer_json
from mlmjax.decisions.decider import Decider
from mlmjax.serving import schema
from mlmjax.serving.batching import Answers, Batcher
from mlmjax.serving.metrics import Metrics
from mlmjax.serving.protocol import Asked, Limits, RequestError, read_request

log = logging.getLogger(__name__)
RELEASED = "2026-11-30"
"""The date that the list of models gives; clients expect one."""
ALIAS = "jev-latest"
"""A model name that clients of the protocol send by default."""
PROTECTED = ("/v1/", "/docs", "/openapi.json", "/metrics")
"""Beginnings of the paths that need the key, if there is one."""
READ_TO_END = 4
"""A body up to this many times too large is read to its end, so that its client can read why."""
LARGE_BYTES = 2**18
"""Larger bodies are read by one thread, so that they leave the others to small ones."""
PAGE = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
PAGE += "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
"""What the pages may do: they have no outside host to ask."""
PAGE_HEADERS = {"Content-Security-Policy": PAGE, "X-Content-Type-Options": "nosniff"}


def make_app(
    load: Callable[[], Decider],
    *,
    limits: Limits | None = None,
    key: str | None = None,
    log_texts: bool = False,
) -> FastAPI:
    """Return the application; `load` returns the decider and runs in a thread after the start.

    With a `key`, `/v1`, `/docs` and `/metrics` need `Authorization: Bearer KEY`. Texts of requests
    are logged only with `log_texts`.
    """
    server = _Server(limits or Limits(), load, key, log_texts)
    app = FastAPI(
        title="mlmjax",
        version=__version__,
        description=schema.DESCRIPTION,
        lifespan=server.lifespan,
        docs_url=None,  # the usual page loads scripts from an outside host
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = server
    app.add_api_route(
        "/v1/systemone",
        server.decide,
        methods=["POST"],
        summary="Answer typed questions about a state",
        **schema.DECIDE,
    )
    app.add_api_route("/v1/models", server.models, methods=["GET"], summary="List the models")
    app.add_api_route("/health", server.health, methods=["GET"], summary="Tell that it runs")
    app.add_api_route("/ready", server.ready, methods=["GET"], summary="Tell if it can answer")
    app.add_api_route("/metrics", server.figures, methods=["GET"], summary="Figures for Prometheus")
    app.add_api_route("/", server.page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/docs", server.reference, methods=["GET"], include_in_schema=False)
    app.add_middleware(_Guard, server=server)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)
    return app


class _StoppedError(Exception):
    """A signal came while programs were being compiled."""


class _Server:
    """The routes of one application, and what they share."""

    def __init__(
        self, limits: Limits, load: Callable[[], Decider], key: str | None, log_texts: bool
    ):
        self.limits, self.load, self.log_texts = limits, load, log_texts
        self.key = None if key is None else key.encode()
        self.batcher = Batcher(limits, lambda count: self.metrics.batches.observe(count))
        self.metrics = Metrics(lambda: self.batcher.waiting)
        self.open_bytes = 0
        self.address: str | None = None
        self.large = ThreadPoolExecutor(1, thread_name_prefix="large")
        self.failure: BaseException | None = None
        self.stopping = False

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Load the model in a thread, so that `/health` answers at once; then end the engine."""
        loading = asyncio.create_task(asyncio.to_thread(self._load))
        yield
        self.stopping = True
        await loading
        await asyncio.to_thread(self.batcher.stop)
        self.large.shutdown(wait=False, cancel_futures=True)

    def _load(self) -> None:
        started = time.perf_counter()
        try:
            decider = self.load()
            decider.warm_up(self._warmed)
        except _StoppedError:
            return
        except Exception as error:
            self.failure = error
            log.error("the model cannot be loaded: %s", error)
            return
        self.batcher.start(decider)
        where = "" if self.address is None else f": {self.address} is a page that asks"
        log.info("ready after %.1f s%s", time.perf_counter() - started, where)

    def _warmed(self, done: int, total: int) -> None:
        if self.stopping:
            raise _StoppedError

    async def decide(self, request: Request) -> Response:
        """Answer typed questions about a state: see the protocol in docs/decisions.md."""
        body = await self._body(request)
        size, started = len(body), time.perf_counter()
        pool = self.large if size > LARGE_BYTES else None
        try:
            loop = asyncio.get_running_loop()
            asked = await loop.run_in_executor(pool, read_request, body, self.limits)
            if self.log_texts:
                log.info("request: %s", body.decode())
            del body
            answers = await self._answers(asked, pool)
        finally:
            self.open_bytes -= size
        self.metrics.seconds.observe(time.perf_counter() - started)
        tokens = sum(answer.tokens for answer in answers.values())
        self.metrics.tokens.inc(tokens)
        self.metrics.shortened.inc(sum(answer.shortened > 0 for answer in answers.values()))
        shown = {key: answer_json(answer) for key, answer in answers.items()}
        for answer in shown.values():
            self.metrics.questions.labels(answer["type"]).inc()
        usage = {"input_tokens": tokens, "output_tokens": 0}
        return JSONResponse({"model": self._name(), "answers": shown, "usage": usage})

    async def _answers(self, asked: Asked, pool: Executor | None) -> Answers:
        if self.batcher.decider is not None and asked.model not in (ALIAS, self._name()):
            text = f"there is no model {asked.model!r:.100}; expected {ALIAS} or {self._name()}"
            raise RequestError(404, "model_not_found", text)
        return await self.batcher.answer(asked, pool)

    async def models(self) -> Any:
        """List the model under its own name and under the alias of the protocol."""
        text = "answers typed questions by a masked language model (mlmjax)"
        return {
            "models": [
                {"name": name, "description": text, "release_date": RELEASED}
                for name in dict.fromkeys([ALIAS, self._name()])
            ]
        }

    async def health(self) -> Any:
        """Tell that the process runs."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """Tell whether the model is loaded and its programs are compiled."""
        if self.failure is not None:
            return JSONResponse({"status": "failed"}, 503)
        is_ready = self.batcher.decider is not None
        return JSONResponse(
            {"status": "ready" if is_ready else "loading"},
            200 if is_ready else 503,
            None if is_ready else {"Retry-After": "2"},
        )

    async def figures(self) -> Response:
        """Return the figures of the server in the text form of Prometheus."""
        return PlainTextResponse(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def page(self) -> Response:
        """Return the page that asks questions."""
        text = (files("mlmjax") / "serving" / "page.html").read_text(encoding="utf-8")
        text = text.replace("%NEEDS_KEY%", "true" if self.key else "false")
        return HTMLResponse(text, headers=PAGE_HEADERS)

    async def reference(self, request: Request) -> Response:
        """Return a page about the routes."""
        return HTMLResponse(schema.reference(request.app.openapi()), headers=PAGE_HEADERS)

    def _name(self) -> str:
        decider = self.batcher.decider
        return ALIAS if decider is None else decider.name

    async def _body(self, request: Request) -> bytes:
        """Return the body of a request; raise `RequestError` if it is too large or too slow.

        Its bytes count as open until the request is answered.
        """
        limits, headers = self.limits, request.headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            text = f"the body is {kind or 'of no type'}; expected Content-Type: application/json"
            raise RequestError(415, "unsupported_media_type", text)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise RequestError(
                415, "unsupported_media_type", "the body is compressed; send it plain"
            )
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > READ_TO_END * limits.body_bytes:
            raise self._too_large()
        body, size, is_whole = bytearray(), 0, False
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= limits.body_bytes:
                        body += chunk
                        self.open_bytes += len(chunk)
                    elif size > READ_TO_END * limits.body_bytes:
                        raise self._too_large()
                    self._check_open()
            if size > limits.body_bytes:
                raise self._too_large()
            is_whole = True
        except TimeoutError as error:
            text = f"the body did not arrive in {limits.body_seconds:g} s"
            raise RequestError(408, "timeout", text, {"Connection": "close"}) from error
        except ClientDisconnect as error:
            raise RequestError(400, "client_gone", "the client closed the connection") from error
        finally:
            if not is_whole:
                self.open_bytes -= len(body)
        return bytes(body)

    def _check_open(self) -> None:
        if self.open_bytes > self.limits.open_bytes:
            text = "too many large requests are under way; try again"
            raise RequestError(503, "overloaded", text, {"Retry-After": "1"})

    def _too_large(self) -> RequestError:
        text = f"the body is larger than {self.limits.body_bytes:,} bytes; send less"
        return RequestError(413, "request_too_large", text, {"Connection": "close"})


class _Guard:
    """Ask for the key where there is one, refuse two lengths of a body, and count the responses."""

    def __init__(self, app: ASGIApp, server: _Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.server.metrics.requests.labels(message["status"]).inc()
            await send(message)

        try:
            self._check(Request(scope))
        except RequestError as refusal:
            await _response(refusal)(scope, receive, counted)
        else:
            await self.app(scope, receive, counted)

    def _check(self, request: Request) -> None:
        if {"content-length", "transfer-encoding"} <= set(request.headers):
            # A proxy may take another end of the body, and so let in a hidden request.
            text = "the request has both Content-Length and Transfer-Encoding; send one of them"
            raise RequestError(400, "bad_request", text, {"Connection": "close"})
        key = self.server.key
        if key is None or not request.url.path.startswith(PROTECTED):
            return
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, b"Bearer " + key):
            text = "send the key of this server as Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise RequestError(401, "authentication_error", text, headers)


def _response(refusal: RequestError) -> Response:
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _response(error)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    refusal = RequestError(error.status_code, kind, str(error.detail), error.headers)
    return _response(refusal)


async def _failed(request: Request, error: Exception) -> Response:
    log.error("a request failed: %s", type(error).__name__)
    return _response(RequestError(503, "internal_error", "the request failed; try again"))
