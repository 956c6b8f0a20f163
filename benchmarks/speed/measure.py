"""Measure times, memory and the speed of a plain product, for both sides.

A side is a module of functions `NAME(folder) -> figures`. `python ours.py NAME FOLDER` measures one
of them in its own process, because the thread pools of torch and JAX halve each other's speed. It
prints one line of JSON at its end.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
LETTERS = ["A", "B", "C", "D"]
LONG = 8192
INSTRUCT_LENGTH = 512
GEMM = (1024, 768, 2304)
"""Rows, inputs and outputs of the product that shows how fast the machine is at that moment."""


def timed(
    act: Callable[[], Any], *, repeats: int = 1, warm_up: Callable[[], Any] | None = None
) -> tuple[Figures, Any]:
    """Warm up with `warm_up` or `act`, time `repeats` calls of `act`; return figures and result.

    `first` is how much longer the first call took than the others, mostly to compile.
    """
    start = time.perf_counter()
    (warm_up or act)()
    first = time.perf_counter() - start
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = act()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    figures = {"seconds": median}
    if warm_up is None:
        figures["first"] = max(0.0, first - median)
    return figures, result


def gemm_gflops(multiply: Callable[[], Any]) -> float:
    """Return the GFLOP/s of a float32 product of the shape `GEMM`."""
    rows, inputs, outputs = GEMM
    figures, _ = timed(multiply, repeats=9)
    return 2e-9 * rows * inputs * outputs / figures["seconds"]


def peak_mib() -> float:
    """Return the peak memory of this process; rusage would include its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main(functions: dict[str, Callable[[Path], Figures]], gemm: Callable[[], float]) -> None:
    """Measure the function that the command line names on a folder; print one JSON line."""
    name, folder = sys.argv[1:]
    figures = functions[name](Path(folder))
    figures["peak_mib"] = peak_mib()
    figures["gemm_gflops"] = gemm()
    print(json.dumps(figures))


def write(folder: Path, name: str, content: Any) -> None:
    """Write `NAME.json`."""
    (folder / f"{name}.json").write_text(json.dumps(content, default=int))


def read(folder: Path, name: str) -> Any:
    """Read what `write` wrote."""
    return json.loads((folder / f"{name}.json").read_text())
