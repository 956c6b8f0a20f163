"""Read what a compiler says of a program: its memory, its collectives, and why it is rejected."""

import math
import re
from collections import Counter
from typing import Any


def measure_memory(compiled: Any) -> dict[str, int]:
    """Return the bytes that a program needs on each device, by purpose and in `total`.

    Outputs that reuse the memory of arguments count once in `total`.
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


def read_refusal(error: Exception) -> dict[str, Any] | None:
    """Read how much memory a compiler lacks; None for any other error.

    >>> read_refusal(RuntimeError("RESOURCE_EXHAUSTED: Used 23.50G of 15.75G hbm."))["needed"]
    25232932864.0
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    found: dict[str, Any] = {"message": text.partition("\n")[0][:300]}
    for pattern in (
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    ):
        if match := re.search(pattern, text):
            units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
            found["needed"] = float(match[1]) * units[match[2]]
            found["available"] = float(match[3]) * units[match[4]]
    return found


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:(ENTRY) )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
# Groups written out, as [groups,members]<=[devices], or as mesh['x'=4,'y'=2] {'y'}.
_GROUPS = re.compile(
    r"replica_groups=(?:\[\d+,(\d+)\]<=|\{\{([\d,]+)\}|mesh\[([^\]]*)\]\s*\{([^}]*)\})"
)


def count_collectives(text: str) -> dict[str, dict[str, int]]:
    """Count the collectives of one call of a program: `{kind: {"count": n, "bytes": n}}`.

    `text` is `compiled.as_text()`. Bytes are those of the whole array that one device takes part
    in: the result of an all-gather or all-reduce, the input of a reduce-scatter. A collective in a
    loop counts once for each iteration, or once if the number of iterations is unknown. A
    collective among one device does not count.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = computations[head[1] or head[2]] = []
        elif line.startswith(" "):
            lines.append(line)
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in computations.get(name, ()):
            called = dict(_CALLED.findall(line))
            for how, names in called.items():
                condition = computations.get(called.get("condition", "").removeprefix("%"), [])
                iterations = _count_iterations(line, condition) if how == "body" else 1
                for inner in re.findall(r"[\w.\-]+", names):
                    visit(inner, times * iterations)

    visit("ENTRY", 1)
    # A collective that overlaps with several computations is written in each of them.
    found: dict[tuple[str, Any], tuple[int, int]] = {}
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            kind, size = _read_collective(line)
            if not kind or not runs[name]:
                continue
            # A TPU writes a reduce-scatter as an all-reduce in a computation of this name.
            if kind == "all-reduce" and "reduce-scatter" in name:
                kind = "reduce-scatter"
            channel = re.search(r"channel_id=(\d+)", line)
            key = (kind, channel[1] if channel else (name, number))
            found[key] = max(found.get(key, (0, 0)), (runs[name], size))
    totals = {kind: {"count": 0, "bytes": 0} for kind in COLLECTIVES}
    for (kind, _), (times, size) in found.items():
        totals[kind]["count"] += times
        totals[kind]["bytes"] += times * size
    return {kind: total for kind, total in totals.items() if total["count"]}


def _count_iterations(loop: str, condition: list[str]) -> int:
    """Return the iterations of a loop, stated or up to a constant; 1 if they are unknown."""
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
        return int(stated[1])
    last = next((line for line in condition if "ROOT" in line), "")
    constants = re.findall(r"(%[\w.\-]+) = s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    operands = re.findall(r"%[\w.\-]+", last)
    bounds = [int(number) for name, number in constants if name in operands]
    return bounds[0] if "direction=LT" in last and len(bounds) == 1 else 1


def _read_collective(line: str) -> tuple[str, int]:
    """Return the kind and the bytes of a collective; an empty kind for any other line."""
    operation = _OPERATION.match(line)
    result, name = operation.groups() if operation else ("", "")
    kind = name.removesuffix("-start")
    members = _count_members(line) if kind in COLLECTIVES else 1
    if members == 1:
        return "", 0
    size = 0
    for _, bits, sides in re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", result):
        size += math.prod(int(n) for n in sides.split(",") if n) * int(bits or 8) // 8
    if kind == "reduce-scatter":
        size *= members or 1
    elif name == "all-gather-start":  # The result holds the input too.
        size = size * members // (members + 1) if members else size
    elif name == "collective-permute-start":
        size //= 2
    return kind, size


def _count_members(line: str) -> int:
    """Return the number of devices in a group of a collective; 0 if the line has no groups."""
    found = _GROUPS.search(line)
    if not found:
        return 0
    count, listed, mesh, axes = found.groups()
    if count or listed:
        return int(count) if count else len(listed.split(","))
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", axes))
