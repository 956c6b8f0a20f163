"""What a compiled program says of itself: its memory and its collectives, for each device."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]<=|\{\{([\d,]*)\})")


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Count the collectives of one call of a compiled program by kind: `{kind: {count, bytes}}`.

    Bytes are those of the whole array that one device takes part in: what an all-gather or an
    all-reduce gives, what goes into a reduce-scatter.
    `text` is `compiled.as_text()`. A loop whose number of rounds the compiler does not know counts
    once. A collective among one device alone is none.
    """
    computations, entry = _computations(text)
    runs = Counter({entry: 1})
    for name in _callers_first(computations, entry):
        for line in computations[name]:
            for called, times in _calls(line):
                runs[called] += runs[name] * times
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, lines in computations.items():
        for kind, size in filter(None, map(_collective, lines)):
            # A TPU makes a reduce-scatter of an all-reduce of which each device keeps a part.
            if kind == "all-reduce" and "reduce-scatter" in name:
                kind = "reduce-scatter"
            counts[kind] += runs[name]
            sizes[kind] += runs[name] * size
    return {k: {"count": counts[k], "bytes": sizes[k]} for k in KINDS if counts[k]}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return found, entry


def _callers_first(computations: Mapping[str, list[str]], entry: str) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()
    stack = [(entry, False)]
    while stack:
        name, is_done = stack.pop()
        if is_done:
            order.append(name)
        elif name in computations and name not in seen:
            seen.add(name)
            stack.append((name, True))
            stack += [(c, False) for line in computations[name] for c, _ in _calls(line)]
    return order[::-1]


def _calls(line: str) -> Iterator[tuple[str, int]]:
    if "=%" not in line and "={%" not in line:
        return
    trips = _TRIPS.search(line)
    for how, names in _CALLED.findall(line):
        times = int(trips[1]) if trips and how == "body" else 1
        for name in names.strip("{}").split(","):
            yield name.strip().removeprefix("%"), times


def _collective(line: str) -> tuple[str, int] | None:
    operation = _OPERATION.match(line)
    if not operation:
        return None
    result, name = operation.groups()
    kind = name.removesuffix("-start")
    if kind not in KINDS:
        return None
    groups = _GROUPS.search(line)
    members = 0
    if groups:
        members = int(groups[2]) if groups[2] else len(groups[3].split(","))
    if members == 1:
        return None
    size = sum(_bytes(*shape) for shape in _SHAPE.findall(result))
    if kind == "reduce-scatter":
        size *= members or 1
    elif name == "all-gather-start":  # what it gives is written beside what it takes
        size = size * members // (members + 1) if members else size
    elif name == "collective-permute-start":
        size //= 2
    return kind, size


def _bytes(dtype: str, dimensions: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = BITS.get(dtype) or (int(digits[0]) if digits else 0)
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8


def memory(compiled: Any) -> dict[str, int]:
    """Return bytes on each device: arguments, outputs, those of them that are one, and the rest.

    `total` is what the program needs: arguments, outputs that do not take the place of arguments,
    temporaries and code.
    """
    figures = compiled.memory_analysis()
    found = {
        "arguments": figures.argument_size_in_bytes,
        "outputs": figures.output_size_in_bytes,
        "outputs_in_arguments": figures.alias_size_in_bytes,
        "temporaries": figures.temp_size_in_bytes,
        "code": figures.generated_code_size_in_bytes,
    }
    total = sum(found.values()) - 2 * found["outputs_in_arguments"]
    return {**found, "total": total}


def refusal(error: Exception) -> dict[str, Any] | None:
    """Read a compiler's refusal for want of memory; None for any other error.

    >>> refusal(RuntimeError("RESOURCE_EXHAUSTED: Used 23.50G of 15.75G hbm."))["needed"] / 2**30
    23.5
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    says = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", text) or re.search(
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", text
    )
    found: dict[str, Any] = {"message": text.partition("\n")[0][:300]}
    if says:
        found["needed"] = float(says[1]) * _UNITS[says[2]]
        found["available"] = float(says[3]) * _UNITS[says[4]]
    return found
