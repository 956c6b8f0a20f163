"""The variables that JAX reads: nonsense is named, and an absent TPU is not searched for."""

import os
import subprocess
import sys

import jax
import pytest

from mlmjax.parallel.environment import explain_environment

QUIET = "import mlmjax.parallel.processes, jax; print(jax.devices()[0].platform)"


def run_python(code, **environment):
    """Run code in a child process that has no JAX variables but these."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=plain | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def failure_of(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("it did not fail")


@pytest.mark.long
def test_a_platform_that_is_not_here_is_named_with_what_is(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    error = failure_of(lambda: jax.devices("nonsense"))
    assert explain_environment(error) is None  # JAX works, so the variables are right
    for name in [name for name in os.environ if name.startswith("JAX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_ENABLE_X64", "false")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu,nonsense")
    found = explain_environment(error)
    assert found.message == (
        "JAX_PLATFORMS: found 'cpu,nonsense', which JAX cannot use here; this machine has cpu; "
        "name one of these, or unset the variable"
    )
    assert explain_environment(ValueError("of our own")) is None


COMMAND = "from mlmjax.cli.main import run; raise SystemExit(run({arguments!r}))"


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JAX_PLATFORMS", "nonsense", "found 'nonsense', which JAX cannot use here"),
        long("JAX_DEFAULT_DEVICE", "cuda:0", "found 'cuda:0', which JAX cannot use here"),
        long("JAX_ENABLE_COMPILATION_CACHE", "maybe", "found 'maybe', which JAX rejects"),
    ],
)
def test_a_command_exits_2_with_one_line(name, value, message, tmp_path):
    (tmp_path / "texts").write_text("a text\n")
    arguments = ["classify", "--labels", "a,b", str(tmp_path / "texts")]
    done = run_python(COMMAND.format(arguments=arguments), **{name: value})
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mlmjax: {name}: {message}")
    assert "this machine has cpu" in line


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--nonsense", "Unknown flag in XLA_FLAGS: --nonsense"),
        (
            "--xla_cpu_enable_fast_math=maybe",
            "Couldn't interpret value maybe for flag xla_cpu_enable_fast_math",
        ),
        ("no/such/file", 'Could not open file "no/such/file"'),
    ],
)
def test_flags_that_xla_dies_of_are_one_line(flags, reason):
    line = (
        f"XLA_FLAGS: found '{flags}', which XLA rejects ({reason}); correct or unset the variable"
    )
    done = run_python(COMMAND.format(arguments=["compare", "a", "b"]), XLA_FLAGS=flags)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"mlmjax: {line}\n")


def test_flags_are_checked_before_python_imports_jax():
    code = """
import mlmjax
mlmjax.Template  # needs no JAX
try:
    mlmjax.Classifier
except mlmjax.InputError as error:
    print(error)
"""
    done = run_python(code, XLA_FLAGS="--nonsense")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("XLA_FLAGS: found '--nonsense', which XLA rejects")


@pytest.mark.libtpu
def test_a_machine_without_a_tpu_is_quiet_about_it():
    done = run_python(QUIET)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")


@pytest.mark.libtpu
def test_a_requested_tpu_fails_without_the_lines_of_its_runtime():
    done = run_python(QUIET, JAX_PLATFORMS="tpu")
    assert done.returncode == 1
    assert "worker" not in done.stderr
    assert "Unable to initialize backend 'tpu'" in done.stderr.splitlines()[-1]


def test_libraries_that_register_for_tpus_load_after_us():
    code = "import mlmjax.parallel.processes, flax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
