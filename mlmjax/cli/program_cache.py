"""Where compiled programs are kept from one command to the next."""

import os
import platform
import zlib


def keep_compiled() -> None:
    """Have JAX keep compiled programs in `~/.cache/mlmjax/xla`, unless it is told otherwise.

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` keeps
    nothing. A folder that cannot be written is left alone.
    """
    enabled = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or enabled in ("false", "0", "no", "off"):
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(base, "mlmjax", "xla", _processor())
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK | os.X_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder


def _processor() -> str:
    """Name what this processor can do: a program compiled for one may not run on another."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            features = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"
