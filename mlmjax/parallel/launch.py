"""Processes of a run that watch over each other: when one ends, all end, and say why."""

import ctypes
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax
from jax._src import clusters

from mlmjax.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    InputError,
    RunError,
    first_line,
)
from mlmjax.parallel.processes import (
    client,
    end_together,
    ended_together,
    is_first,
    process_count,
    process_index,
    read_all,
)
from mlmjax.parallel.relay import Relay

JOIN_SECONDS = 300
"""How long processes wait for one another to start."""


TPU = "the TPU pod"


class Peers(NamedTuple):
    """Where the first process listens, how many there are, which one this is, its devices."""

    coordinator: str
    processes: int
    process: int
    local_devices: Any = None


def find_peers(coordinator: str | None, processes: int | None, process: int | None) -> Peers | None:
    """Return the peers that the flags or the environment name; None for a process of its own.

    Only the environment is looked at, and on a TPU machine its metadata server: a plain machine
    never waits. `processes = 1` says not to look. Raises `InputError` for flags given by half, and
    for a launcher that does not tell enough.
    """
    if processes == 1 and coordinator is None and process in (None, 0):
        return None
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    given = [name for name, value in flags.items() if value is not None]
    if given and len(given) < len(flags):
        missing = [name for name in flags if name not in given]
        raise InputError(
            f"{', '.join(given)}: {', '.join(missing)} missing; give all three of "
            "--coordinator HOST:PORT --processes N --process I, or none"
        )
    if coordinator is not None and processes is not None and process is not None:
        _check_flags(coordinator, processes, process)
        return Peers(coordinator, processes, process) if processes > 1 else None
    launcher = next((name for name, here in LAUNCHERS.items() if here(os.environ)), None)
    if launcher is None:
        return None
    # A TPU machine may be alone, without anything that says so.
    is_known = launcher != TPU or _tpu_workers(os.environ) is not None
    try:
        address, count, index, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, JOIN_SECONDS
        )
    except Exception as error:
        if not is_known:
            return None
        raise _not_told(launcher, first_line(error)) from error
    if address is None or count is None or index is None:
        if not is_known:
            return None
        raise _not_told(launcher, "no address of the first process")
    return Peers(address, count, index, devices) if count > 1 else None


def _check_flags(coordinator: str, processes: int, process: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"--coordinator {coordinator!r}: expected HOST:PORT, as in 10.0.0.1:8476: where the "
            "process with --process 0 listens"
        )
    if not 0 <= process < processes:
        raise InputError(
            f"--process {process}: expected 0 to {processes - 1}, of --processes {processes}; "
            "each process has a number of its own"
        )
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--coordinator {coordinator!r}: {host!r} is no known host ({error}); give the name or "
            "address of the machine of process 0"
        ) from error


def _not_told(launcher: str, why: str) -> InputError:
    return InputError(
        f"{launcher} started several processes, but their addresses could not be found ({why}); "
        "give --coordinator HOST:PORT --processes N --process I, or --processes 1 for a run of "
        "one process"
    )


def _several(environment: Mapping[str, str], *names: str) -> bool:
    counts = [environment[name] for name in names if name in environment]
    return bool(counts) and all(count.isdecimal() and int(count) > 1 for count in counts)


def _slurm(environment: Mapping[str, str]) -> bool:
    # Set in the tasks of `srun`; a batch script, which has SLURM_NTASKS too, is no task.
    return "SLURM_STEP_NODELIST" in environment and _several(
        environment, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"
    )


def _open_mpi(environment: Mapping[str, str]) -> bool:
    return _several(environment, "OMPI_COMM_WORLD_SIZE")


def _tpu_workers(environment: Mapping[str, str]) -> str | None:
    return environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))


def _tpu(environment: Mapping[str, str]) -> bool:
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    on_tpu = running_in_cloud_tpu_vm and "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu")
    workers = _tpu_workers(environment)
    if not on_tpu or workers is None:
        return on_tpu and "TPU_SKIP_MDS_QUERY" not in environment
    return "," in workers or _several(environment, "MEGASCALE_NUM_SLICES")


def _kubernetes(environment: Mapping[str, str]) -> bool:
    # Of an indexed job; JAX asks the cluster for the rest, through a package of its own.
    from importlib.util import find_spec

    indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    return indexed and find_spec("kubernetes") is not None


LAUNCHERS: Mapping[str, Callable[[Mapping[str, str]], bool]] = {
    "SLURM": _slurm,
    "Open MPI": _open_mpi,
    TPU: _tpu,
    "Kubernetes": _kubernetes,
}
"""What starts processes, and whether its environment says that there are several."""


BEAT_SECONDS = 3.0
SILENCE_SECONDS = 40.0
"""After how long without a sign of life a process counts as dead."""


LINGER_SECONDS = 15.0
"""How long the first process stays, after a failure, for the others to read why."""


_LOST = re.compile(
    r"gloo|nccl|socket|connection|peer|unavailable|deadline|barrier|timed.?out", re.I
)
"""What libraries say when a process at the other end is gone."""


BEATS, ENDS = "mlmjax/beat/", "mlmjax/end/"


@contextmanager
def joined(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Iterator[None]:
    """Join the peers of this run while this lasts; does nothing where there are none.

    Has to come before anything that starts a JAX backend. When one process dies or fails, the
    others say which one and end within a minute, wherever they are. Raises `InputError` as
    `find_peers`; when the others do not come, the process ends with exit code 1.
    """
    peers = find_peers(coordinator, processes, process)
    if peers is None:
        yield
        return
    with _own_output(), _connected(peers):
        yield


@contextmanager
def _own_output() -> Iterator[None]:
    """Keep standard output to ourselves: what libraries print on it goes to standard error.

    Gloo prints a line whenever devices meet for the first time, also in the middle of a run.
    """
    try:
        is_descriptor = sys.stdout.fileno() == 1
    except (AttributeError, OSError, ValueError):
        is_descriptor = False  # Somebody in this process keeps what is printed.
    if not is_descriptor:
        yield
        return
    theirs = sys.stdout
    theirs.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(kept, "w", encoding=theirs.encoding, errors=theirs.errors, closefd=False) as ours:
            sys.stdout = ours
            yield
    finally:
        sys.stdout = theirs
        with suppress(Exception):
            ctypes.CDLL(None).fflush(None)  # Theirs, before the descriptor is ours again.
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _connected(peers: Peers) -> Iterator[None]:
    relay = None
    address = peers.coordinator
    if peers.process:
        # JAX kills a process at once, and with pages of C++, when it loses the first one.
        relay = Relay(peers.coordinator)
        address = relay.address
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would take SIGTERM from ours.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own time limit ends the process with pages of C++.
    limit = threading.Timer(JOIN_SECONDS, _give_up, [peers])
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            address,
            peers.processes,
            peers.process,
            peers.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=10 * JOIN_SECONDS,
        )
    except Exception as error:
        raise RunError(
            f"process {peers.process} of {peers.processes}: cannot be reached or reach the others "
            f"through {peers.coordinator} ({first_line(error)}); give another HOST:PORT"
        ) from error
    finally:
        limit.cancel()
    watch = _Watch(relay)
    try:
        yield
        _publish(0, "is done")
        end_together("end")
        jax.distributed.shutdown()
    except BaseException as error:
        # Most likely a peer is gone in the middle of something: the watch finds out which.
        lost = _LOST.search(str(error)) and not ended_together.is_set()
        if watch.stops.wait(SILENCE_SECONDS + 4 * BEAT_SECONDS if lost else 0):
            time.sleep(LINGER_SECONDS)  # It ends this process.
        _publish(*_verdict(error))
        raise


def _give_up(peers: Peers) -> None:
    print(
        f"mlmjax: process {peers.process} of {peers.processes}: not all of the others came to "
        f"{peers.coordinator} within {JOIN_SECONDS} s; start the same command on every host, with "
        "an address of the first one that all of them reach",
        file=sys.stderr,
    )
    _exit(EXIT_FAILED)


def _verdict(error: BaseException) -> tuple[int, str]:
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else EXIT_FAILED
        return code, "was asked to stop"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "was interrupted"
    code = EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED
    return code, f"failed: {first_line(error)}"


def leave(code: int) -> None:
    """End this process with an exit code; after a failure, without waiting for the others.

    JAX would wait minutes for processes that are gone. The first process, which the others speak
    through, stays until they know.
    """
    watch = _Watch.current
    if watch is None or ended_together.is_set():
        sys.exit(code)
    ended_together.set()
    if is_first():
        until = time.monotonic() + LINGER_SECONDS
        with suppress(Exception):
            while time.monotonic() < until and len(read_all(ENDS)) < process_count():
                time.sleep(0.2)
    _exit(code)


def _exit(code: int) -> None:
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class _Watch:
    """Two threads: one tells that this process lives and reads of the others, one judges."""

    current: "_Watch | None" = None

    def __init__(self, relay: Relay | None):
        self.stops = threading.Event()
        """Set when this process is about to end because of another one."""
        self._relay = relay
        self._heard = dict.fromkeys(range(process_count()), ("", time.monotonic()))
        self._ended: dict[int, dict[str, Any]] = {}
        self._hosts: dict[int, str] = {}
        _Watch.current = self
        for work in (self._speak, self._judge):
            threading.Thread(target=work, daemon=True, name=f"mlmjax{work.__name__}").start()

    def _speak(self) -> None:
        host, count = socket.gethostname(), 0
        while not ended_together.is_set():
            with suppress(Exception):
                count += 1
                client().key_value_set(
                    f"{BEATS}{process_index()}", f"{count} {host}", allow_overwrite=True
                )
                for process, text in read_all(BEATS).items():
                    self._hosts[process] = text.partition(" ")[2]
                    if text != self._heard[process][0]:
                        self._heard[process] = (text, time.monotonic())
                self._ended |= {p: json.loads(text) for p, text in read_all(ENDS).items()}
            ended_together.wait(BEAT_SECONDS)

    def _judge(self) -> None:
        while not ended_together.wait(BEAT_SECONDS / 4):
            # A copy in one piece: the other thread adds to it.
            for process, end in tuple(self._ended.items()):
                if end["code"] and process != process_index():
                    self._stop(end["cause"], end["message"], end["code"])
            if self._relay is not None and self._relay.lost.is_set():
                ended_together.wait(BEAT_SECONDS)  # It may have said why before.
                if not any(end["code"] for end in tuple(self._ended.values())):
                    self._stop(0, "has ended without a word", EXIT_FAILED)
                continue
            now = time.monotonic()
            silent = [
                process
                for process, (_, since) in tuple(self._heard.items())
                if now - since > SILENCE_SECONDS and process not in self._ended
            ]
            # When the first one is gone nobody is heard.
            if silent:
                what = f"has given no sign of life for {SILENCE_SECONDS:.0f} s"
                self._stop(silent[0], what, EXIT_FAILED)

    def _stop(self, process: int, what: str, code: int) -> None:
        if ended_together.is_set():
            return
        self.stops.set()
        ended_together.set()
        host = self._hosts.get(process)
        where = f" (on {host})" if host else ""
        then = ". The same command on all hosts goes on from the newest checkpoint"
        print(
            f"mlmjax: process {process} of {process_count()}{where} {what}; process "
            f"{process_index()} stops as well{then * (code == EXIT_FAILED)}",
            file=sys.stderr,
            flush=True,
        )
        _publish(code, what, process)
        if is_first():
            time.sleep(2 * BEAT_SECONDS)  # The others read through this one.
        _exit(code)


def _publish(code: int, message: str, cause: int | None = None) -> None:
    """Tell the others how this process ends, and because of which; wait little if nobody hears."""
    cause = process_index() if cause is None else cause

    def tell() -> None:
        with suppress(Exception):
            text = json.dumps({"code": code, "message": message, "cause": cause})
            client().key_value_set(f"{ENDS}{process_index()}", text, allow_overwrite=True)

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    telling.join(BEAT_SECONDS)
