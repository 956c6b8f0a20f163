"""Run the server until a signal ends it."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from mlmjax.errors import InputError

GRACE_SECONDS = 30
"""How long requests that have begun may take after a signal."""
DRAIN_TICKS = 5
"""Ticks of a tenth of a second, each at least one turn of the event loop, after a signal."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
BACKLOG = 2048


class QuietServer(uvicorn.Server):
    """A server that returns on SIGTERM and SIGINT, after it has answered what has begun."""

    has_signal = False
    ticks = DRAIN_TICKS

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop some ticks after the first signal, so that requests already sent are read."""
        if self.has_signal:
            super().handle_exit(sig, frame)
        self.has_signal = True

    async def on_tick(self, counter: int) -> bool:
        """Count the ticks after a signal; a busy machine delays them, and so the end."""
        if self.has_signal:
            self.ticks -= 1
            self.should_exit |= self.ticks <= 0
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop accepting at the first signal, and end at once at a second SIGINT."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def make_server(app: FastAPI) -> QuietServer:
    """Return a server of an application, which `run(sockets=[...])` starts."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
    )
    return QuietServer(config)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raise `InputError` for an address that cannot be used."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise InputError(
            f"{host}, port {port}: cannot listen there ({error.strerror or error}); give another "
            "--host or --port"
        ) from error


def serve(app: FastAPI, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve an application until SIGTERM or SIGINT; then answer what has begun, and return."""
    with listen(host, port) as opened:
        if host not in LOOPBACK and app.state.server.key is None:
            say(
                f"warning: other machines may reach {host}, and there is no key, so anyone there "
                "can use this server; --api-key-env NAME asks for a key"
            )
        shown = f"[{host}]" if ":" in host else host
        app.state.server.address = f"http://{shown}:{opened.getsockname()[1]}/"
        say("loading the model; Ctrl-C ends the server")
        make_server(app).run(sockets=[opened])
