"""What a run will need on machines that need not be there: its programs compiled, and reported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlmjax.config import RunConfig, parse_config
from mlmjax.errors import InputError
from mlmjax.topology import Topology, environment, parse_topology

Say = Callable[[str], None]
_RESHARDING = "Involuntary full rematerialization"
_GIB, _TERA = 2**30, 1e12


def make_plan(config: RunConfig, topology: str, *, say: Say = lambda line: None) -> dict[str, Any]:
    """Compile the programs of a run for a topology, and find what would make them fit.

    `topology` is `KIND:SHAPE` as in `"v5e:16x16"`, or `"cpu:8"` for simulated devices. Every
    program is compiled in a process of its own, so neither the devices of this one nor a compiler
    that aborts matter. Returns plain values (bytes are those of one device): `fits`, `machine`,
    `training`, `scoring`, `assumptions`, and where training does not fit `tried`, the changes
    compiled one after another up to the first that does, which is `change` (None: none did).
    `say` is told what is being compiled.

    Raises `InputError` for an unknown topology, a missing compiler, and what a run would refuse.
    """
    described = parse_topology(topology)
    say(f"compiling for {described.name}")
    answer = _ask(config, described, scoring=True)
    plan = {"fits": _fits(answer, "training") and _fits(answer, "scoring"), **answer}
    if _fits(answer, "training"):
        return plan
    plan["tried"], plan["change"] = [], None
    for change in changes(config, answer["machine"]["mesh"]):
        say(f"does not fit; compiling with {_told(change)}")
        found = _ask(changed(config, change), described, scoring=False)
        plan["tried"].append({"change": change, **found["training"]})
        if _fits(found, "training"):
            plan["change"] = change
            break
    return plan


def changes(config: RunConfig, mesh: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield what makes a training step smaller, the cheapest in time first.

    Recomputation, then micro-batches half as large again and again, then parameters and optimizer
    state cut over twice as many devices. Each change keeps the ones before it.
    """
    change: dict[str, Any] = {}
    for remat in ("dots", "layer"):
        if ("none", "dots", "layer").index(remat) > ("none", "dots", "layer").index(config.remat):
            change["remat"] = remat
            yield dict(change)
    data, shards = config.data, mesh["data"] * mesh["fsdp"]
    accumulate = data.accumulate
    while data.batch_size % (shards * accumulate * 2) == 0:
        accumulate *= 2
        yield {**change, "data.accumulate": accumulate}
    fsdp, rest = mesh["fsdp"], mesh["data"]
    while rest % 2 == 0:
        fsdp, rest = fsdp * 2, rest // 2
        yield {**change, "data.accumulate": accumulate, "mesh.fsdp": fsdp, "mesh.data": rest}


def changed(config: RunConfig, change: dict[str, Any]) -> RunConfig:
    """Return the configuration with dotted keys set to other values."""
    table = config.model_dump(mode="json")
    for key, value in change.items():
        *outer, last = key.split(".")
        inner = table
        for name in outer:
            inner = inner[name]
        inner[last] = value
    return parse_config(table)


def _fits(answer: dict[str, Any], program: str) -> bool:
    found = answer[program]
    if not found["fits"]:
        return False
    # A CPU's compiler refuses nothing.
    return bool(found["memory"]["total"] <= answer["machine"]["memory"])


def _ask(config: RunConfig, topology: Topology, *, scoring: bool) -> dict[str, Any]:
    """Have a fresh process compile; raises its `InputError`, or one for a compiler that dies."""
    request = {
        "config": config.model_dump(mode="json"),
        "topology": topology.name,
        "scoring": scoring,
    }
    package = str(Path(__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "mlmjax.programs"],
        input=json.dumps(request),
        env={**os.environ, **environment(topology), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        says = [line for line in done.stderr.splitlines() if "Check failed" in line]
        raise InputError(
            f"--topology {topology.name}: the compiler stopped (exit status {done.returncode}) "
            "without an answer; try another shape or a smaller model",
            (says or done.stderr.splitlines())[-3:],
        )
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise InputError(answer["error"][0], answer["error"][1:])
    resharded = sum(_RESHARDING in line for line in done.stderr.splitlines())
    if resharded:
        answer["assumptions"].append(
            f"slow: {resharded} arrays are gathered whole on every device to be cut anew"
        )
    return answer


def report(plan: dict[str, Any]) -> Iterator[str]:
    """Yield the lines people read of a plan."""
    machine, training, scoring = plan["machine"], plan["training"], plan["scoring"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in machine["mesh"].items())
    yield f"{machine['topology']}: {'fits' if plan['fits'] else 'DOES NOT FIT'}"
    unused = machine["devices"] - machine["used"]
    yield (
        f"  {machine['used']} x {machine['device']}, {_gib(machine['memory'])} each; mesh {mesh}"
        + (f"; {unused} devices unused" if unused else "")
    )
    blocks = machine["splash_blocks"]
    yield f"  attention {machine['attention']}" + (
        f": splash kernels, blocks of {blocks[0]} in global and {blocks[1]} in local layers"
        if blocks
        else ""
    )
    yield f"  jax {machine['jax']}, {machine['compiler']}"
    yield (
        f"training step: {training['rows']} rows of {training['seq_length']} tokens in "
        f"{training['accumulate']} micro-batch(es), remat {training['remat']}; "
        f"{training['tokens_per_device']} tokens per device"
    )
    yield from _program(training, machine)
    yield f"  model FLOPs      {training['model_flops']:.4g}" + (
        f", {training['seconds_at_peak']:.4g} s at the peak of {machine['peak_flops'] / _TERA:.4g} "
        f"TFLOP/s per device"
        if machine["peak_flops"]
        else ""
    )
    if scoring:
        yield (
            f"scoring: {scoring['rows']} rows of {scoring['seq_length']} tokens on "
            f"{scoring['devices']} device(s)"
        )
        yield from _program(scoring, machine)
    for tried in plan.get("tried", ()):
        yield f"tried {_told(tried['change'])}: {_outcome(tried, machine)}"
    if "change" in plan:
        change = plan["change"]
        yield (
            f"nearest change that fits: {_told(change)}"
            if change
            else "none of these fits; take more devices or a shorter seq_length"
        )
    for assumption in plan["assumptions"]:
        yield f"note: {assumption}"


def _program(program: dict[str, Any], machine: dict[str, Any]) -> Iterator[str]:
    yield f"  {_outcome(program, machine)}"
    for name in ("parameters", "optimizer_state", "batch"):
        if name in program:
            yield f"    {name.replace('_', ' '):<17}{_gib(program[name])}"
    if program["fits"]:
        memory = program["memory"]
        kept = memory["outputs"] - memory["outputs_in_arguments"]
        yield f"    {'temporaries':<17}{_gib(memory['temporaries'])} (activations, gradients)"
        yield f"    {'outputs':<17}{_gib(kept)} beside the arguments' place"
        yield f"    {'code':<17}{_gib(memory['code'])}"
        for kind, found in program["collectives"].items():
            yield f"  {kind:<19}{found['count']} a step, {_gib(found['bytes'])}"
    seconds = ", ".join(f"{name} {value} s" for name, value in program["seconds"].items())
    yield f"  {seconds}"


def _outcome(program: dict[str, Any], machine: dict[str, Any]) -> str:
    if program["fits"]:
        return f"{_gib(program['memory']['total'])} of {_gib(machine['memory'])} per device"
    refusal = program["refusal"]
    if "needed" not in refusal:
        return f"refused: {refusal['message']}"
    return f"refused: {_gib(refusal['needed'])} of {_gib(refusal['available'])}"


def _told(change: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in change.items())


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= 0.1 * _GIB else f"{size / 2**20:.2f} MiB"
