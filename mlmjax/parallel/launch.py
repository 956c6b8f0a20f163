"""Join the processes of a run, which flags or the launcher that started them name."""

import ctypes
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec

import jax

from mlmjax.errors import EXIT_FAILED, InputError, RunError, first_line
from mlmjax.parallel import failures
from mlmjax.parallel.jax_internals import is_tpu_machine
from mlmjax.parallel.processes import coordinator_address, process_count

JOIN_SECONDS = 300
"""How long processes wait for each other to start."""

TPU = "the TPU pod"


@contextmanager
def joined(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Iterator[None]:
    """Join the other processes of this run; does nothing if there are none.

    Call it before anything starts a JAX backend. When one process fails, the others end too and
    say which one. `processes=1` turns launchers off; without flags only the environment is read,
    so a plain machine never waits. Raises `InputError` for incomplete or wrong flags and for a
    launcher that does not say enough, `RunError` if the others cannot be reached.
    """
    has_flags = check_flags(coordinator, processes, process)
    launcher = None if has_flags or processes == 1 else find_launcher(os.environ)
    if processes == 1 or not (has_flags or launcher):
        yield
        return
    with _own_output():
        try:
            _initialize(coordinator, processes, process)
        except Exception as error:
            if coordinator_address() is not None:
                raise RunError(
                    f"{coordinator_address()}: cannot reach the other processes or be reached "
                    f"({first_line(error)}); give another HOST:PORT"
                ) from error
            # A TPU machine that names no workers may be one without others.
            if launcher != TPU or _tpu_workers(os.environ) is not None:
                raise InputError(
                    f"{launcher} started several processes, but JAX cannot find their addresses "
                    f"({first_line(error)}); give --coordinator HOST:PORT --processes N "
                    "--process I, or --processes 1 for a run of one process"
                ) from error
        if process_count() == 1:
            yield
            return
        with failures.ending_together():
            yield


def _initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would take SIGTERM from ours.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own time limit aborts the process with a C++ trace.
    limit = threading.Timer(JOIN_SECONDS, _give_up)
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=10 * JOIN_SECONDS,
            heartbeat_timeout_seconds=failures.HEARTBEAT_SECONDS,
        )
    finally:
        limit.cancel()


def _give_up() -> None:
    print(
        f"mlmjax: not all processes reached {coordinator_address() or 'process 0'} within "
        f"{JOIN_SECONDS} s; start the same command on every host, with an address of process 0 "
        "that all hosts reach",
        file=sys.stderr,
    )
    failures.exit_now(EXIT_FAILED)


def check_flags(coordinator: str | None, processes: int | None, process: int | None) -> bool:
    """Tell whether the flags name the processes; raise `InputError` for some without the others."""
    if processes == 1 and coordinator is None and process in (None, 0):
        return False
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    given = [name for name, value in flags.items() if value is not None]
    if not given:
        return False
    if coordinator is None or processes is None or process is None:
        missing = " and ".join(name for name in flags if name not in given)
        raise InputError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} given without {missing}; "
            "give all three of --coordinator HOST:PORT --processes N --process I, or none"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"--coordinator {coordinator!r}: expected HOST:PORT, as in 10.0.0.1:8476, where the "
            "process with --process 0 listens"
        )
    if not 0 <= process < processes:
        raise InputError(
            f"--process {process}: expected 0 to {processes - 1} for --processes {processes}; "
            "give each process another number"
        )
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--coordinator {coordinator!r}: unknown host {host!r} ({error}); give the name or "
            "address of the machine of process 0"
        ) from error
    return True


def find_launcher(environment: Mapping[str, str]) -> str | None:
    """Return the launcher that has started several processes, as the environment says."""

    def are_several(*names: str) -> bool:
        counts = [environment[name] for name in names if name in environment]
        return bool(counts) and all(count.isdecimal() and int(count) > 1 for count in counts)

    # `srun` sets the node list for its tasks; a batch script has SLURM_NTASKS too, but is no task.
    is_task = "SLURM_STEP_NODELIST" in environment
    if is_task and are_several("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        return "SLURM"
    if are_several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if is_tpu_machine() and "tpu" in (environment.get("JAX_PLATFORMS") or "tpu"):
        workers = _tpu_workers(environment)
        if workers is None and "TPU_SKIP_MDS_QUERY" not in environment:
            return TPU  # The metadata server may name workers.
        if workers and ("," in workers or are_several("MEGASCALE_NUM_SLICES")):
            return TPU
    # Only an indexed job has an index; JAX reads the rest from the cluster through this package.
    is_indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    return "Kubernetes" if is_indexed and find_spec("kubernetes") else None


def _tpu_workers(environment: Mapping[str, str]) -> str | None:
    return environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))


@contextmanager
def _own_output() -> Iterator[None]:
    """Keep standard output to ourselves; libraries print to standard error instead.

    Gloo prints a line whenever devices connect for the first time, even in the middle of a run.
    """
    try:
        is_descriptor = sys.stdout.fileno() == 1
    except (AttributeError, OSError, ValueError):
        is_descriptor = False  # Code in this process captures what is printed.
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
            ctypes.CDLL(None).fflush(None)  # Write out what libraries still buffer.
        os.dup2(kept, 1)
        os.close(kept)
