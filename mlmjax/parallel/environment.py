"""Explain what is wrong with the environment variables that JAX reads.

JAX reads them when it is imported and when a backend starts, and says neither which variable it was
nor what this machine has.
"""

import logging
import os
import re
import subprocess
import sys
import traceback

from mlmjax.errors import InputError, first_line

log = logging.getLogger(__name__)

# By default XLA orders a CPU program for concurrency: a training step then needs a quarter to a
# half more memory, `remat` saves nothing, and it is no faster on few cores.
FRUGAL = "--xla_cpu_enable_concurrency_optimized_scheduler=false"

PROBE_SECONDS = 60
# Variables that choose devices come first, since they are the usual reason.
_CHOOSE_DEVICES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_DEFAULT_DEVICE")
_PROBE = """
import os, jax
from mlmjax.parallel import processes
named = jax.config.jax_default_device
jax.devices(named) if isinstance(named, str) else None
found = [(device.platform, device.device_kind) for device in jax.devices()]
found += [("cpu", "cpu")] if jax.default_backend() != "cpu" else []
names = [p if p == kind else f"{p} ({kind})" for p, kind in dict.fromkeys(found)]
print(", ".join(f"{n} x {found.count(pair)}" if found.count(pair) > 1 else n
                for n, pair in zip(names, dict.fromkeys(found))))
"""


_FLAGS_PROBE = "from jaxlib import xla_client; xla_client.CompileOptions()"
_FLAGS_REASON = re.compile(
    r"((?:Unknown flag|Couldn't interpret|Could not open file) .*?)(?:[.]| to read .*)?$", re.M
)


def set_flags() -> None:
    """Add our flag to `XLA_FLAGS` if the user does not set it."""
    given = os.environ.get("XLA_FLAGS", "")
    if FRUGAL.partition("=")[0] not in given:
        os.environ["XLA_FLAGS"] = f"{given} {FRUGAL}".strip()


def check_flags() -> None:
    """Raise `InputError` if XLA rejects `XLA_FLAGS`, for which it would end the process.

    Only flags of the user are tried, in a child process, and only before JAX is imported.
    """
    flags = os.environ.get("XLA_FLAGS", "").removesuffix(f" {FRUGAL}").removesuffix(FRUGAL)
    if not flags or "jax" in sys.modules:
        return
    failed = _run_child(_FLAGS_PROBE, {**os.environ, "XLA_FLAGS": flags})
    if failed is None or failed.returncode == 0:
        return
    works = _run_child(_FLAGS_PROBE, {**os.environ, "XLA_FLAGS": ""})
    if works is None or works.returncode != 0:
        return  # the flags are not the reason
    reason = _FLAGS_REASON.search(failed.stderr)
    why = f" ({reason[1]})" if reason else ""
    raise InputError(
        f"XLA_FLAGS: found {flags!r}, which XLA rejects{why}; correct or unset the variable"
    )


def check_devices() -> None:
    """Start JAX on the default device of this machine.

    Call it before work that takes long. Raises `InputError` that names a variable which JAX
    rejects.
    """
    try:
        import jax
        import numpy as np

        jax.device_put(np.int32(0)).block_until_ready()
        log.debug("devices: %s", ", ".join(map(str, jax.devices())))
    except Exception as error:
        if (reason := explain_environment(error)) is None:
            raise
        raise reason from error


def explain_environment(error: BaseException) -> InputError | None:
    """Return the error for the variable that made JAX fail; None if JAX works here.

    It tries JAX in child processes, each without one of the variables, so it costs seconds and is
    for commands that have failed already.
    """
    variables = [name for name in os.environ if name.startswith("JAX_")]
    if not variables or not _is_from_jax(error) or _machine() is not None:
        return None
    variables.sort(key=lambda name: (not _names(error, name), name not in _CHOOSE_DEVICES))
    for name in variables:
        if (machine := _machine(name)) is not None:
            return _rejected(name, error, machine)
    machine = _machine(*variables)
    return None if machine is None else _rejected(variables[0], error, machine)


def _rejected(name: str, error: BaseException, machine: str) -> InputError:
    found = os.environ[name]
    if name in _CHOOSE_DEVICES:
        return InputError(
            f"{name}: found {found!r}, which JAX cannot use here; this machine has {machine}; "
            "name one of these, or unset the variable"
        )
    return InputError(
        f"{name}: found {found!r}, which JAX rejects ({first_line(error)}); correct or unset the "
        f"variable (this machine has {machine})"
    )


def _is_from_jax(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    # JAX removes its frames from some tracebacks, but keeps them in what it was raised from.
    causes = (error, error.__cause__, error.__context__)
    named = any("jax" in type(cause).__module__ for cause in causes if cause is not None)
    return named or any(re.search(r"[/\\]jax(lib)?[/\\]", frame.filename) for frame in frames)


def _names(error: BaseException, name: str) -> bool:
    return name.lower() in str(error).lower().replace(".", "_")


def _machine(*without: str) -> str | None:
    """Return the devices that JAX finds without some variables; None if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in without}
    folder = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = filter(None, [folder, environment.get("PYTHONPATH")])
    done = _run_child(_PROBE, {**environment, "PYTHONPATH": os.pathsep.join(paths)})
    return None if done is None or done.returncode != 0 else done.stdout.strip() or None


def _run_child(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str] | None:
    """Run Python code in a child process; None if it does not start or end in time."""
    try:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
