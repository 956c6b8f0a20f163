"""Private and experimental names of JAX are in one module, and each has a known replacement."""

import ast
import importlib.util
import logging
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import mlmjax
from mlmjax.errors import InputError
from mlmjax.model import attention
from mlmjax.parallel import jax_internals

PACKAGE = Path(mlmjax.__file__).parent
HOME = "parallel/jax_internals.py"
UNSTABLE = re.compile(r"(jax\._src|jax\.experimental|jaxlib)(\.|$)")
SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"

# What mlmjax.parallel.jax_internals uses, and what to use when a release of JAX drops it.
REPLACEMENTS = {
    "jax._src.distributed.global_state.process_id": "the flags given to jax.distributed.initialize",
    "jax._src.distributed.global_state.num_processes": "the flags given to it",
    "jax._src.distributed.global_state.coordinator_address": "the flags given to it",
    "jax._src.distributed.global_state.client": "collectives of multihost_utils, with time limits",
    "jax._src.xla_bridge.backends_are_initialized": "a flag that the first array of ours sets",
    "jax._src.xla_bridge._backend_factories": "nothing: JAX then prints that there is no TPU",
    "jax._src.cloud_tpu_init.running_in_cloud_tpu_vm": "the variable TPU_WORKER_HOSTNAMES",
    "jax._src.cloud_tpu_init.jax_force_tpu_init": "nothing: JAX then prints that there is no TPU",
    "jax._src.hardware_utils.num_available_tpu_chips_and_device_id": "files /dev/accel* and vfio",
    "jax.experimental.mesh_utils.create_hybrid_device_mesh": "devices sorted by slice_index",
    "jax.experimental.multihost_utils.process_allgather": "jax.make_array_from_process_local_data",
    "jax.experimental.topologies.get_topology_desc": "the arithmetic of mlmjax plan",
    f"{SPLASH}.splash_attention_kernel": "attention 'banded'",
    f"{SPLASH}.splash_attention_mask": "attention 'banded'",
}


def unstable_imports(path):
    """Yield the unstable names that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from filter(UNSTABLE.match, found)


def test_only_one_module_imports_unstable_names():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() != HOME:
            found = list(unstable_imports(path))
            assert not found, f"{path}: {found}; import it in {HOME}, or use {REPLACEMENTS}"


def test_every_unstable_name_is_there_and_has_a_replacement():
    imported = set(unstable_imports(PACKAGE / HOME))
    for name in imported:
        assert any(f"{one}.".startswith(f"{name}.") for one in REPLACEMENTS), (
            f"{name}: replacement?"
        )
    for name, instead in REPLACEMENTS.items():
        assert any(f"{name}.".startswith(f"{one}.") for one in imported), f"{name}: is not used"
        owner, _, last = name.rpartition(".")
        where, _, attribute = owner.rpartition(".")
        try:
            home = importlib.import_module(owner)
        except ImportError:
            home = getattr(importlib.import_module(where), attribute)
        lacking = f"jax {jax.__version__} has no {name}; use {instead}"
        assert hasattr(home, last) or importlib.util.find_spec(name), lacking


@pytest.fixture
def without_splash(monkeypatch):
    """Take the kernels away, as a release of JAX may."""
    monkeypatch.setitem(sys.modules, SPLASH, None)
    jax_internals.splash_kernels.cache_clear()
    yield
    jax_internals.splash_kernels.cache_clear()


def test_without_the_kernels_attention_is_banded_and_says_so(without_splash, monkeypatch, caplog):
    arrays = [jnp.ones((1, 2, 8, 4))] * 3
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    with caplog.at_level(logging.WARNING):
        found = [attention.attend(*arrays, None, window=None) for _ in range(2)][1]
    assert (found == 1).all()
    assert caplog.text.count("has no splash attention kernels") == 1
    assert attention.choose_implementation("auto", "tpu", "float32", 64) == "banded"
    with pytest.raises(InputError, match="has no such kernels; set attention to 'banded'"):
        attention.attend(*arrays, None, window=None, implementation="splash")


WITHOUT = """
import os, sys
import jax
for name in ("cloud_tpu_init", "hardware_utils"):
    sys.modules[f"jax._src.{name}"] = None
from mlmjax.parallel import jax_internals, processes
assert not jax_internals.is_tpu_machine()
os.environ["TPU_WORKER_HOSTNAMES"] = "a,b"
assert jax_internals.is_tpu_machine()
assert processes.process_count() == 1
"""


def test_a_release_without_the_names_for_tpus_still_loads(monkeypatch):
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
