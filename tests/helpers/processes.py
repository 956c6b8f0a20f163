"""Processes on this machine that train one run together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHILD = """
import sys
import jax
devices, code, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
jax.config.update("jax_num_cpu_devices", devices)
from mlmjax.cli.main import main
from mlmjax.parallel import failures, launch
failures.HEARTBEAT_SECONDS, failures.POLL_SECONDS, failures.LINGER_SECONDS = 10, 0.3, 2
exec(code)
sys.argv[1:] = arguments
main()
"""


def to_toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {to_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value)


def write_config(table):
    """Write a run file next to its run folder; return its path."""
    path = Path(f"{table['out']}.toml")
    lines = [f"{key} = {to_toml(value)}\n" for key, value in table.items()]
    path.write_text("".join(lines))
    return path


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def spawn(code, *arguments, environment=None):
    """Start a process that runs some code; its outputs are read by `finish`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(config, count, devices, code=None, flags=None):
    """Start `count` processes with `devices` each; each first runs its part of `code`."""
    port = free_port()

    def peers(number):
        return ["--coordinator", f"127.0.0.1:{port}", "--processes", count, "--process", number]

    return [
        spawn(CHILD, devices, (code or {}).get(n, ""), "train", config, *(flags or peers)(n))
        for n in range(count)
    ]


def finish(children, timeout=240):
    """Wait for all of them; return their exit codes, outputs and errors."""
    try:
        outputs = [child.communicate(timeout=timeout) for child in children]
    finally:
        for child in children:
            child.kill()
    return [child.returncode for child in children], *map(list, zip(*outputs, strict=True))


def train(config, count, devices, code=None, timeout=240):
    return finish(start(config, count, devices, code), timeout)
