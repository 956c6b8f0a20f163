"""How the processes of a run find each other: by flags, or by what their launcher says."""

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax._src import clusters

from mlmjax.errors import InputError

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
        raise _not_told(launcher, str(error).strip().splitlines()[0]) from error
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
