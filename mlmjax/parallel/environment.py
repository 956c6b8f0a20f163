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
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
