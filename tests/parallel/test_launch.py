"""Whether a process looks for others, and what it says if it cannot find them."""

import json
import os
import socket
from contextlib import suppress

import processes as children
import pytest

from mlmjax.errors import InputError
from mlmjax.parallel import processes
from mlmjax.parallel.launch import check_flags, find_launcher, joined

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "node[007-010],other",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "4",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2"}

JOIN = """
import json
from mlmjax.parallel.launch import joined
from mlmjax.parallel.processes import broadcast_from_first, process_count, process_index
with joined():
    print(json.dumps([process_index(), process_count(), broadcast_from_first(process_index)]))
"""


@pytest.fixture
def environment(monkeypatch):
    """An environment without launchers, to which a test adds."""
    known = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION", "JAX_COORD")
    for name in [name for name in os.environ if name.startswith(known)]:
        monkeypatch.delenv(name)

    def add(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return add


PLAIN = """
import socket, time
from mlmjax.parallel.launch import joined
def refuse(*args): raise AssertionError("a connection")
socket.socket.connect = refuse
begun = time.monotonic()
with joined(): pass
assert time.monotonic() - begun < 1
from mlmjax.parallel.jax_internals import has_started
assert not has_started()
"""


def test_a_plain_machine_neither_waits_nor_looks():
    """Neither a backend nor a connection, in a child process."""
    assert children.finish([children.spawn(PLAIN)])[0] == [0]


def free_job():
    """Return a job number from which JAX derives a free port."""
    for job in range(os.getpid() % 4000, 2**12):
        with suppress(OSError), socket.create_server(("127.0.0.1", job + 2**16 - 2**12)):
            return job
    raise AssertionError("no free port")


@pytest.mark.parametrize("launcher", ["SLURM", pytest.param("Open MPI", marks=pytest.mark.long)])
def test_processes_of_a_launcher_find_each_other_and_end_together(environment, launcher):
    job = free_job()
    if launcher == "SLURM":
        values = SLURM | {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_JOB_ID": str(job)}
        numbers = ("SLURM_PROCID", "SLURM_LOCALID")
    else:
        values = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:34911"}
        numbers = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    started = [
        children.spawn(JOIN, environment=values | dict.fromkeys(numbers, number))
        for number in ("0", "1")
    ]
    codes, outputs, errors = children.finish(started, timeout=60)
    assert codes == [0, 0], errors
    assert "mlmjax" not in "".join(errors)
    assert [json.loads(output) for output in outputs] == [[0, 2, 0], [1, 2, 0]]


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # one command, run by hand in a larger allocation
        {name: value for name, value in SLURM.items() if "STEP" not in name},  # a batch script
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # any pod
        {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"},  # without a TPU
    ],
)
def test_a_process_is_alone_under_a_launcher(alone):
    assert find_launcher(alone) is None


def fail(*args, **options):
    raise OSError("no such host")


@pytest.mark.parametrize(
    ("flags", "is_alone"),
    [
        ((None, 1, None), True),
        ((None, 1, 0), True),
        (("localhost:1234", 1, 0), True),
        (("10.0.0.1:8476", 3, 2), False),
    ],
)
def test_flags_come_before_the_launcher(environment, monkeypatch, flags, is_alone):
    environment(**SLURM)
    given = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *a, **options: given.append(a))
    with joined(*flags):
        assert given == ([] if is_alone else [flags])


def test_a_launcher_that_does_not_say_enough_is_named(environment):
    environment(**OPEN_MPI)
    with pytest.raises(InputError, match="Open MPI started several processes, but JAX"), joined():
        pass


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("a:1", None, None), "--coordinator is given without --processes and --process"),
        ((None, 2, None), "--processes is given without --coordinator and --process"),
        ((None, None, 0), "--process is given without --coordinator and --processes"),
        (("a:1", 2, None), "--coordinator and --processes are given without --process"),
        (("a", 2, 0), "--coordinator 'a': expected HOST:PORT"),
        ((":80", 2, 0), "expected HOST:PORT"),
        (("a:99999", 2, 0), "expected HOST:PORT"),
        (("a:-1", 2, 0), "expected HOST:PORT"),
        (("a:1", 2, 2), "--process 2: expected 0 to 1"),
        (("no.such.host.invalid:5555", 2, 1), "unknown host 'no.such.host.invalid'"),
    ],
)
def test_incomplete_and_wrong_flags_are_rejected(flags, message):
    with pytest.raises(InputError, match=f"^{message}" if message[0] == "-" else message):
        check_flags(*flags)


@pytest.mark.parametrize(
    ("workers", "slices", "are_several"),
    [("a", None, False), ("a,b", None, True), ("a", "2", True)],
)
def test_a_tpu_pod_is_known_by_its_workers(monkeypatch, workers, slices, are_several):
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", True)
    values = {"TPU_WORKER_HOSTNAMES": workers}
    values |= {"MEGASCALE_NUM_SLICES": slices} if slices else {}
    assert find_launcher(values) == ("the TPU pod" if are_several else None)
    assert find_launcher(values | {"JAX_PLATFORMS": "cpu"}) is None


def test_a_tpu_machine_without_metadata_is_alone(environment, monkeypatch):
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax.distributed.initialize", fail)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with joined():
        assert processes.process_count() == 1
    environment(TPU_WORKER_HOSTNAMES="a,b")
    message = r"the TPU pod started several .*no such host"
    with pytest.raises(InputError, match=message), joined():
        pass
