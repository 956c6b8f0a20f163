"""Whether a process looks for others, and what it says when it cannot find them."""

import subprocess
import sys

import pytest

from mlmjax.errors import InputError
from mlmjax.parallel import launch
from mlmjax.parallel.launch import LAUNCHERS, Peers, find_peers

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "node[007-010],other",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


@pytest.fixture
def environment(monkeypatch):
    """An environment without launchers, to which a test adds."""
    known = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION", "JAX_COORD")
    for name in [name for name in launch.os.environ if name.startswith(known)]:
        monkeypatch.delenv(name)

    def add(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return add


def test_a_plain_machine_is_alone(environment):
    assert find_peers(None, None, None) is None


def test_looking_takes_no_time_and_starts_nothing():
    """Neither a backend nor a connection, in a process of its own."""
    code = (
        "import socket, time\n"
        "from mlmjax.parallel.launch import find_peers\n"
        "def refuse(*args): raise AssertionError('a connection')\n"
        "socket.socket.connect = refuse\n"
        "begun = time.monotonic()\n"
        "assert find_peers(None, None, None) is None\n"
        "assert time.monotonic() - begun < 1\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_slurm_tells_all(environment):
    environment(**SLURM)
    found = find_peers(None, None, None)
    assert found.coordinator.startswith("node007:")
    assert found[1:] == (4, 2, [0])


def test_open_mpi_tells_all(environment):
    environment(**OPEN_MPI)
    found = find_peers(None, None, None)
    assert found.coordinator.startswith("10.96.0.1:")
    assert found[1:] == (2, 1, [1])


@pytest.mark.parametrize(
    "alone",
    [
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # one command, run by hand in a larger allocation
        {name: value for name, value in SLURM.items() if "STEP" not in name},  # a batch script
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # any pod
        {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"},  # without a TPU
    ],
)
def test_alone_under_a_launcher(environment, alone):
    environment(**alone)
    assert find_peers(None, None, None) is None


def test_one_process_can_be_asked_for(environment):
    environment(**SLURM)
    assert find_peers(None, 1, None) is None
    assert find_peers(None, 1, 0) is None
    assert find_peers("localhost:1234", 1, 0) is None


def test_flags_come_before_the_launcher(environment):
    environment(**SLURM)
    assert find_peers("10.0.0.1:8476", 3, 2) == Peers("10.0.0.1:8476", 3, 2)


def test_a_launcher_that_does_not_tell_enough_is_named(environment):
    environment(**{name: value for name, value in OPEN_MPI.items() if "URI" not in name.upper()})
    with pytest.raises(InputError, match="Open MPI started several processes, but their addresses"):
        find_peers(None, None, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("a:1", None, None), "--coordinator: --processes, --process missing"),
        ((None, 2, None), "--processes: --coordinator, --process missing"),
        ((None, None, 0), "--process: --coordinator, --processes missing"),
        (("a:1", 2, None), "--coordinator, --processes: --process missing"),
        (("a", 2, 0), "--coordinator 'a': expected HOST:PORT"),
        ((":80", 2, 0), "expected HOST:PORT"),
        (("a:99999", 2, 0), "expected HOST:PORT"),
        (("a:-1", 2, 0), "expected HOST:PORT"),
        (("a:1", 2, 2), "--process 2: expected 0 to 1"),
    ],
)
def test_flags_by_half_and_wrong_flags_are_refused(environment, flags, message):
    with pytest.raises(InputError, match=f"^{message}" if message[0] == "-" else message):
        find_peers(*flags)


@pytest.mark.parametrize(
    ("workers", "slices", "several"), [("a", None, False), ("a,b", None, True), ("a", "2", True)]
)
def test_a_tpu_pod_is_known_by_its_workers(environment, monkeypatch, workers, slices, several):
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    environment(
        TPU_WORKER_HOSTNAMES=workers, **({"MEGASCALE_NUM_SLICES": slices} if slices else {})
    )
    assert LAUNCHERS["the TPU pod"](launch.os.environ) == several
    environment(JAX_PLATFORMS="cpu")
    assert not LAUNCHERS["the TPU pod"](launch.os.environ)


def test_a_tpu_machine_without_metadata_is_alone(environment, monkeypatch):
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    def fails(*args):
        raise OSError("no such host")

    monkeypatch.setattr(launch.clusters.ClusterEnv, "auto_detect_unset_distributed_params", fails)
    assert find_peers(None, None, None) is None
    environment(TPU_WORKER_HOSTNAMES="a,b")
    with pytest.raises(InputError, match=r"the TPU pod started several .*no such host"):
        find_peers(None, None, None)
