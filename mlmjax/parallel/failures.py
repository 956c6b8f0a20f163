"""End all processes of a run when one fails, and let the others say why.

JAX ends the others when a process dies: at once if it was the first one, else after
`HEARTBEAT_SECONDS`. This file adds the failures that a process can still explain: it publishes its
exit code and its message, and the others end with them within seconds.
"""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from mlmjax.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    InputError,
    RunError,
    first_line,
)
from mlmjax.parallel import processes
from mlmjax.parallel.processes import process_count, process_index

HEARTBEAT_SECONDS = 40
"""How long a process may send no heartbeat before JAX ends the others."""

POLL_SECONDS = 1.0
"""How often a process looks whether another one has failed."""

LINGER_SECONDS = 15.0
"""How long the first process stays after a failure, so that the others can read why."""

FAILURES = "mlmjax/failure/"

# What libraries report when the process at the other end of a connection has ended.
_LOST = re.compile(
    r"gloo|nccl|socket|connection (closed|reset|refused)|by peer|unavailable:|deadline_exceeded|"
    r"barrier|timed.?out",
    re.I,
)
_RESUME = "; the same command on all hosts resumes from the newest checkpoint"

_is_watching, _has_failed = threading.Event(), threading.Event()


@contextmanager
def ending_together() -> Iterator[None]:
    """Publish the failure of this process, and end it when another one fails."""
    _is_watching.set()
    threading.Thread(target=_watch, daemon=True, name="mlmjax-failures").start()
    try:
        yield
        end_together("end")
        jax.distributed.shutdown()
    except BaseException as error:
        if not _is_watching.is_set():
            raise
        # An error of a library may come from another process that has ended.
        ours = isinstance(error, InputError | SystemExit | KeyboardInterrupt)
        if not ours and _LOST.search(str(error)):
            time.sleep(5 * POLL_SECONDS)  # If the other process says why, this one ends here.
            if not isinstance(error, RunError):
                lost = f"lost the connection to another process ({first_line(error)})"
                error = RunError(f"{lost}{_RESUME}")
        _fail(error)
        raise error


def end_together(name: str) -> None:
    """Wait for all processes; afterwards each may end without failing the others."""
    processes.barrier(name)
    _is_watching.clear()


def leave(code: int) -> None:
    """End this process with an exit code; after a failure do not wait for the others.

    JAX would wait minutes for processes that have ended.
    """
    if _has_failed.is_set():
        _stop(code)
    sys.exit(code)


def _stop(code: int) -> None:
    """End this process once the others, which read through the first one, know why."""
    if processes.is_first():
        until = time.monotonic() + LINGER_SECONDS
        with suppress(Exception):
            while time.monotonic() < until and len(processes.read_all(FAILURES)) < process_count():
                time.sleep(0.2)
    exit_now(code)


def exit_now(code: int) -> None:
    """End this process without running anything else."""
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _watch() -> None:
    while _is_watching.is_set():
        time.sleep(POLL_SECONDS)
        with suppress(Exception):  # JAX ends this process if the first one is gone.
            failures = processes.read_all(FAILURES)
            if failures and _is_watching.is_set():
                _follow(json.loads(next(iter(failures.values()))))


def _follow(failure: dict[str, Any]) -> None:
    code, resume = failure["code"], _RESUME if failure["code"] == EXIT_FAILED else ""
    print(
        f"mlmjax: process {failure['process']} of {process_count()} (on {failure['host']}) "
        f"{failure['message']}; process {process_index()} stops too{resume}",
        file=sys.stderr,
    )
    _publish(failure)
    _stop(code)


def _fail(error: BaseException) -> None:
    _is_watching.clear()
    _has_failed.set()
    code, message = EXIT_FAILED, f"failed: {first_line(error).removesuffix(_RESUME)}"
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else EXIT_FAILED
        message = "was asked to stop"
    elif isinstance(error, KeyboardInterrupt):
        code, message = EXIT_INTERRUPTED, "was interrupted"
    elif isinstance(error, InputError):
        code = EXIT_BAD_INPUT
    host = socket.gethostname()
    _publish({"code": code, "message": message, "process": process_index(), "host": host})


def _publish(failure: dict[str, Any]) -> None:
    """Let the others know that this process ends because of a failure, its own or another's."""
    with suppress(Exception):
        key = f"{FAILURES}{process_index()}"
        processes.client().key_value_set(key, json.dumps(failure), allow_overwrite=True)
