"""Settings every test shares: eight simulated devices, no network, loud shape mistakes."""

import gc
import importlib.util
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The first as the command line sets it, so that what both compute is equal to the last bit. The
# second because compiling is most of the time of tests: machine code is made in half of the time,
# and child processes inherit it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false --xla_backend_optimization_level=0",
)

import jax
import pytest

from mlmjax.parallel import sharding

CACHE, CACHE_BYTES = Path(__file__).parents[1] / ".pytest_cache" / "xla", 2 * 2**30
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Compiled programs are kept for all test processes, their children and the next run: many tests
    # compile the same small programs, and compiling is half of the time of a run without them.
    if sum(file.stat().st_size for file in CACHE.glob("*")) > CACHE_BYTES:
        shutil.rmtree(CACHE)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
    jax.config.update("jax_compilation_cache_dir", str(CACHE))

# As the commands do: looking for cycles among all that was compiled takes longer than most tests.
gc.set_threshold(50_000, 10, 10)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Scoring cuts its batches over all devices, and eight that share two cores are slow; the tests of
# the engine have them back.
sharding.local_devices = lambda: jax.local_devices()[:1]

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
TEST_DATA = os.environ.get("MLMJAX_TEST_DATA")


def wants(config, mark):
    """Tell whether tests with this mark were asked for: `-m hub`, or all by `MLMJAX_TESTS=all`."""
    if mark == "long" and os.environ.get("MLMJAX_TESTS") == "all":
        return True
    return mark in (config.getoption("-m") or "").replace(f"not {mark}", "")


def pytest_configure(config):
    config.addinivalue_line("markers", "data: needs the folder named by MLMJAX_TEST_DATA")
    if not wants(config, "hub"):  # read when huggingface_hub is imported, which is later
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(config, items):
    """Deselect, and count aloud, what this machine cannot run."""
    kept, dropped = [], []
    for item in items:
        lacks_data = item.get_closest_marker("data") and not TEST_DATA
        unasked = any(
            item.get_closest_marker(mark) and not wants(config, mark) for mark in ("hub", "long")
        )
        lacks_libtpu = item.get_closest_marker("libtpu") and not HAS_LIBTPU
        (dropped if lacks_data or lacks_libtpu or unasked else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that does not travel with the repository."""
    return Path(TEST_DATA)


@pytest.fixture(scope="session")
def tokenizer():
    """The packaged ModernBERT tokenizer."""
    from mlmjax.text.tokenizer import Tokenizer

    return Tokenizer.from_pretrained()


@pytest.fixture
def orbax_leftovers():
    """Collect what a failed read of Orbax leaves behind, within the test that made it fail.

    Its unfinished coroutines complain when they are collected, which otherwise happens in whatever
    test comes later. Our code has no way to await them.
    """
    gc.freeze()  # so that the collection below looks only at what the test made
    yield
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = before
        gc.unfreeze()
