"""The private and experimental names of JAX: any release may move them.

The only module that imports from `jax._src` or `jax.experimental`. The table in
`tests/parallel/test_jax_internals.py` names what replaces each.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import distributed, xla_bridge
from jax.experimental import mesh_utils, multihost_utils

log = logging.getLogger(__name__)


class SplashKernels(NamedTuple):
    """The modules of the attention kernels for TPUs."""

    kernel: Any
    mask: Any


def process_state() -> Any:
    """Return what JAX knows of the processes of this run, without starting a backend.

    It has `process_id`, `num_processes`, `coordinator_address` and `client`, each None until this
    process joins a run.
    """
    return distributed.global_state


def has_started() -> bool:
    """Tell whether JAX has started a backend in this process."""
    return bool(xla_bridge.backends_are_initialized())


def is_tpu_machine() -> bool:
    """Tell whether JAX found TPU chips on this machine."""
    try:
        from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    except ImportError:
        return "TPU_WORKER_HOSTNAMES" in os.environ
    return bool(running_in_cloud_tpu_vm)


def gather(values: np.ndarray) -> np.ndarray:
    """Return the array of every process, stacked along a new first axis."""
    return np.asarray(multihost_utils.process_allgather(values))


def lay_out_hybrid(
    within: Sequence[int], across: Sequence[int], devices: Sequence[Any]
) -> np.ndarray:
    """Arrange the devices of several slices: `within` is the mesh of one, `across` that of all."""
    return mesh_utils.create_hybrid_device_mesh(within, across, devices)


def describe_tpu(name: str, **options: Any) -> list[Any]:
    """Return described devices of a TPU slice such as `v5e:2x4`; raises what JAX raises."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    return list(found.devices)


@cache
def splash_kernels() -> SplashKernels | None:
    """Return the attention kernels for TPUs; None, with a warning, if this JAX lacks them."""
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel,
            splash_attention_mask,
        )
    except (ImportError, AttributeError) as error:
        log.warning(
            "jax %s has no splash attention kernels (%s), so attention 'auto' is 'banded', which "
            "is slower on a TPU; install a jax that this release of mlmjax was tested with",
            *(jax.__version__, error),
        )
        return None
    return SplashKernels(splash_attention_kernel, splash_attention_mask)


def skip_absent_tpu() -> None:
    """Keep JAX from searching for a TPU, unless there may be one or a variable requests it.

    The compiler for TPUs comes with its runtime, which prints many lines when it finds no TPU. If
    `JAX_PLATFORMS` requests one, these lines are shown only if the runtime starts.
    """
    from jax._src.cloud_tpu_init import jax_force_tpu_init
    from jax._src.hardware_utils import num_available_tpu_chips_and_device_id

    requested = (jax.config.jax_platforms or "").split(",")  # type: ignore[attr-defined]
    chips, _ = num_available_tpu_chips_and_device_id()
    if chips or jax_force_tpu_init():
        return
    factories = xla_bridge._backend_factories
    if (found := factories.get("tpu")) is not None:
        # The name stays, because JAX registers how to lower operations for the platforms it knows.
        start = partial(_start_quietly, found.factory) if "tpu" in requested else _start_absent
        factories["tpu"] = replace(found, factory=start)


def _start_absent() -> Any:
    raise RuntimeError("this machine has no TPU chips, and JAX_PLATFORMS does not request one")


def _start_quietly(start: Callable[[], Any]) -> Any:
    """Call `start`; show what its library printed to stderr only if that succeeds."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            started = start()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        printed.seek(0)
        os.write(2, printed.read())
    return started


# On import, because it has to come before the first array. Without it JAX works but prints more.
with suppress(ImportError, AttributeError):
    skip_absent_tpu()
