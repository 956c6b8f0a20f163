"""Settings all tests share: eight simulated devices, no network, strict shapes."""

import gc
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The command line sets the first flag, too, so that results are equal to the last bit. The others
# make compiling eight times as fast, which is most of the time of the tests. Child processes
# inherit them. jaxlib 0.12 no longer knows the third, and ends the process that sets it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import jax
import pytest
from systems import files_that_need_posix

from mlmjax.parallel import sharding

CACHE, CACHE_BYTES = Path(__file__).parents[1] / ".pytest_cache" / "xla", 2 * 2**30
MOST_MEMORY = 3 * 2**30
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # All test processes, their children and the next run share compiled programs. Without them,
    # a run takes twice as long, because many tests compile the same small programs.
    if sum(file.stat().st_size for file in CACHE.glob("*")) > CACHE_BYTES:
        shutil.rmtree(CACHE, ignore_errors=True)  # another process may do the same
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
    jax.config.update("jax_compilation_cache_dir", str(CACHE))

# As the commands do, because a full garbage collection takes longer than most tests.
gc.set_threshold(50_000, 10, 10)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Scoring splits batches over all devices, and eight that share two cores are slow. The tests of the
# engine restore them.
sharding.local_devices = lambda: jax.local_devices()[:1]

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
HAS_TRACKERS = all(map(importlib.util.find_spec, ("trackio", "wandb", "mlflow")))
HAS_MINICONS = importlib.util.find_spec("minicons") is not None
HAS_BROWSER = bool(shutil.which("chromium") and shutil.which("chromedriver"))
TEST_DATA = os.environ.get("MLMJAX_TEST_DATA")
if sys.platform == "win32":
    collect_ignore = [str(path) for path in files_that_need_posix()]


def pytest_report_header():
    """Say how many files are left out where there is no POSIX."""
    left_out = len(globals().get("collect_ignore", ()))
    return f"files that need POSIX, left out: {left_out}" if left_out else None


def wants(config, mark):
    """Return whether tests with this mark are requested, by `-m` or by `MLMJAX_TESTS=all`."""
    if mark == "long" and os.environ.get("MLMJAX_TESTS") == "all":
        return True
    return mark in (config.getoption("-m") or "").replace(f"not {mark}", "")


def pytest_configure(config):
    if not wants(config, "hub"):  # huggingface_hub reads this when it is imported, later
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(config, items):
    """Deselect and count the tests that this machine cannot run or nobody requested."""
    kept, dropped = [], []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        unwanted = any(mark in marks and not wants(config, mark) for mark in ("hub", "long"))
        lacking = ("data" in marks and not TEST_DATA) or ("libtpu" in marks and not HAS_LIBTPU)
        lacking |= "browser" in marks and not HAS_BROWSER
        lacking |= "track" in marks and not HAS_TRACKERS
        lacking |= "minicons" in marks and not HAS_MINICONS
        (dropped if unwanted or lacking else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_runtest_teardown(item, nextitem):
    """Drop compiled programs after a file if the process holds much memory.

    The next file reads those it needs from the disk. A worker grew to 5 GB without this.
    """
    if nextitem is not None and nextitem.path != item.path and resident_bytes() > MOST_MEMORY:
        jax.clear_caches()


def resident_bytes():
    """Return the memory this process holds, as Linux counts it, or 0."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Return the folder of real data that is not part of the repository."""
    return Path(TEST_DATA)


@pytest.fixture(scope="session")
def tokenizer():
    """Load the packaged ModernBERT tokenizer."""
    from mlmjax.text.tokenizer import Tokenizer

    return Tokenizer.from_pretrained()


@pytest.fixture
def orbax_leftovers():
    """Collect what a failed read of Orbax leaves behind, within the test that made it fail.

    Its unfinished coroutines complain when they are collected, which otherwise happens in whatever
    test comes later. Our code has no way to await them.
    """
    gc.freeze()  # so that the collection below looks only at what the test made
    before = sys.unraisablehook

    def leave_out_closed_loops(found):
        if str(found.exc_value) != "Event loop is closed":
            before(found)

    sys.unraisablehook = leave_out_closed_loops
    yield
    sys.unraisablehook = lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = before
        gc.unfreeze()
