"""What a compiled program says of itself: its memory and its collectives, for each device."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
# Written out, as [groups,members]<=[devices], or as mesh['x'=4,'y'=2] {'y'}.
_GROUPS = re.compile(
    r"replica_groups=(?:\[\d+,(\d+)\]<=|\{\{([\d,]+)\}|mesh\[([^\]]*)\]\s*\{([^}]*)\})"
)


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Count the collectives of one call of a compiled program by kind: `{kind: {count, bytes}}`.

    Bytes are those of the whole array that one device takes part in: what an all-gather or an
    all-reduce gives, what goes into a reduce-scatter. `text` is `compiled.as_text()`. What is in a
    loop counts as often as the loop goes round, once where the program alone decides that. A
    collective among one device alone is none.
    """
    computations, entry = _computations(text)
    calls = {name: list(_calls(lines, computations)) for name, lines in computations.items()}
    runs = Counter({entry: 1})
    for name in _callers_first(calls, entry):
        for called, times in calls[name]:
            runs[called] += runs[name] * times
    # A collective that runs beside computation is written in each of the parts it runs beside.
    found: dict[tuple[str, Any], tuple[int, int]] = {}
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            kind, size = _collective(line)
            if not kind or not runs[name]:
                continue
            # A TPU makes a reduce-scatter of an all-reduce of which each device keeps a part.
            if kind == "all-reduce" and "reduce-scatter" in name:
                kind = "reduce-scatter"
            channel = _CHANNEL.search(line)
            key = (kind, channel[1] if channel else (name, number))
            found[key] = max(found.get(key, (0, 0)), (runs[name], size))
    totals = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for (kind, _), (times, size) in found.items():
        totals[kind]["count"] += times
        totals[kind]["bytes"] += times * size
    return {kind: total for kind, total in totals.items() if total["count"]}


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


def _callers_first(calls: Mapping[str, list[tuple[str, int]]], entry: str) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()
    stack = [(entry, False)]
    while stack:
        name, is_done = stack.pop()
        if is_done:
            order.append(name)
        elif name in calls and name not in seen:
            seen.add(name)
            stack.append((name, True))
            stack += [(called, False) for called, _ in calls[name]]
    return order[::-1]


def _calls(lines: list[str], computations: Mapping[str, list[str]]) -> Iterator[tuple[str, int]]:
    """Yield which computations these lines call, and how often each time."""
    for line in lines:
        called = dict(_CALLED.findall(line))
        for how, names in called.items():
            times = 1
            if how == "body":
                known = _TRIPS.search(line)
                condition = called.get("condition", "").removeprefix("%")
                times = int(known[1]) if known else _rounds(computations.get(condition, []))
            for name in names.strip("{}").split(","):
                yield name.strip().removeprefix("%"), times


def _rounds(condition: list[str]) -> int:
    """Read how often a loop goes round that counts from 0 to a constant; 1 for any other."""
    last = next((line for line in condition if "ROOT" in line), "")
    bounds = {name: n for line in condition for name, n in _BOUND.findall(line)}
    named = [int(bounds[name]) for name in re.findall(r"%([\w.\-]+)", last) if name in bounds]
    return named[0] if "direction=LT" in last and len(named) == 1 else 1


def _collective(line: str) -> tuple[str, int]:
    operation = _OPERATION.match(line)
    result, name = operation.groups() if operation else ("", "")
    kind = name.removesuffix("-start")
    members = _members(line) if kind in KINDS else 1
    if members == 1:
        return "", 0
    size = sum(_bytes(*shape) for shape in _SHAPE.findall(result))
    if kind == "reduce-scatter":
        size *= members or 1
    elif name == "all-gather-start":  # what it gives is written beside what it takes
        size = size * members // (members + 1) if members else size
    elif name == "collective-permute-start":
        size //= 2
    return kind, size


def _members(line: str) -> int:
    """Count the devices that take part in a collective together; 0 where it does not say."""
    found = _GROUPS.search(line)
    if not found:
        return 0
    count, listed, mesh, axes = found.groups()
    if count:
        return int(count)
    if listed:
        return len(listed.split(","))
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", axes))


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
