"""What a run will need on machines that need not be there: its programs compiled, and reported."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlmjax.config.run import RunConfig, parse_config
from mlmjax.errors import InputError
from mlmjax.training.planning.programs import PROGRAMS, check_run
from mlmjax.training.planning.topology import Topology, environment, parse_topology

Say = Callable[[str], None]
_RESHARDING = "Involuntary full rematerialization"
_UNKNOWN_FLAG = "Unknown flag"
_KILLED = -9
_UNITS = {"GiB": 2**30, "MiB": 2**20}
_TERA = 1e12


def make_plan(config: RunConfig, topology: str, *, say: Say = lambda line: None) -> dict[str, Any]:
    """Compile the programs of a run for a topology, and find what would make them fit.

    `topology` is `KIND:SHAPE` as in `"v5e:16x16"`, or `"cpu:8"` for simulated devices. Every
    program is compiled in a process of its own, so neither the devices of this one nor a compiler
    that aborts matter. Returns plain values (bytes are those of one device): `fits` (None for
    simulated devices, which have no memory to judge by), `machine`, `training`, `scoring`,
    `assumptions`, and where training does not fit `tried`, the changes compiled one after another
    up to the first that does, which is `change` (None: none did). Each one tried has the figures
    of its training, or its refusal, and where that fits its `scoring`.
    `say` is told what is being compiled.

    Raises `InputError` for an unknown topology, a missing compiler, and what a run would refuse.
    """
    described = parse_topology(topology)
    check_run(config, described)
    say(f"compiling for {described.name}")
    answer = _ask(config, described)
    verdicts = [answer[program]["fits"] for program in PROGRAMS]
    plan = {"fits": None if None in verdicts else all(verdicts), **answer}
    if _is_done(config, answer["training"], answer["scoring"]):
        return plan
    plan["tried"], plan["change"] = [], None
    for change in changes(config, answer["machine"]["mesh"]):
        tried = _try(config, change, described, say)
        plan["tried"].append({"change": change, **tried})
        if _is_done(config, tried, tried["scoring"]):
            plan["change"] = change
            break
    return plan


def _is_done(config: RunConfig, training: dict[str, Any], scoring: dict[str, Any] | None) -> bool:
    """Tell whether no change of the training is needed, or none would help.

    Of the MLM head, scoring is of prompts, which no setting of the training makes smaller; of a
    classification head it is the validation, which has the rows of a micro-batch.
    """
    programs = [training, scoring] if config.head == "classification" else [training]
    return all(program is not None and program["fits"] is not False for program in programs)


def _try(config: RunConfig, change: dict[str, Any], topology: Topology, say: Say) -> dict[str, Any]:
    """Compile with a change; one that cannot be is refused, like one that does not fit."""
    try:
        candidate = changed(config, change)
        check_run(candidate, topology)
        say(f"does not fit; compiling with {_told(change)}")
        training = _ask(candidate, topology, ["training"])["training"]
        scoring = _ask(candidate, topology, ["scoring"])["scoring"] if training["fits"] else None
    except InputError as error:
        return {"fits": False, "refusal": {"message": error.message}, "scoring": None}
    return {**training, "scoring": scoring}


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


def _ask(
    config: RunConfig, topology: Topology, programs: Sequence[str] = PROGRAMS
) -> dict[str, Any]:
    """Have a fresh process compile; raises its `InputError`, or one for a compiler that dies."""
    request = {
        "config": config.model_dump(mode="json"),
        "topology": topology.name,
        "programs": list(programs),
    }
    package = str(Path(__file__).parents[3])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "mlmjax.training.planning.programs"],
        input=json.dumps(request),
        env={**os.environ, **environment(topology), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise _died(topology, done.returncode, done.stderr.splitlines())
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise InputError(answer["error"][0], answer["error"][1:])
    resharded = sum(_RESHARDING in line for line in done.stderr.splitlines())
    if resharded:
        answer["assumptions"].append(
            f"slow: {resharded} arrays are gathered whole on every device to be cut anew"
        )
    return answer


def _died(topology: Topology, status: int, errors: list[str]) -> InputError:
    """Tell why a compiler ended without an answer, as far as its last lines say."""
    flag = next((line for line in errors if _UNKNOWN_FLAG in line), None)
    if flag is not None:
        flag = flag.partition(_UNKNOWN_FLAG)[2].partition(": ")[2].strip()
        return InputError(
            f"XLA_FLAGS: {flag} is no flag of this compiler; take it out of the environment"
        )
    if status == _KILLED:
        return InputError(
            f"--topology {topology.name}: the compiler was killed, most likely because this "
            "machine has too little memory to compile; plan on a larger one"
        )
    says = [line for line in errors if "Check failed" in line]
    return InputError(
        f"--topology {topology.name}: the compiler stopped (exit status {status}) without an "
        "answer; try another shape or a smaller model",
        (says or errors)[-3:],
    )


def report(plan: dict[str, Any]) -> Iterator[str]:
    """Yield the lines people read of a plan."""
    machine, training, scoring = plan["machine"], plan["training"], plan["scoring"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in machine["mesh"].items())
    verdict = {True: "fits", False: "DOES NOT FIT", None: "not judged: simulated devices"}
    yield f"{machine['topology']}: {verdict[plan['fits']]}"
    unused = machine["devices"] - machine["used"]
    limit = machine["memory"]
    yield (
        f"  {machine['used']} x {machine['device']}"
        + (f", {_sized(limit, 'GiB')} each" if limit else "")
        + f"; mesh {mesh}"
        + (f"; {unused} devices unused" if unused else "")
    )
    chosen, blocks = machine["attention_chosen"], machine["splash_blocks"]
    auto = f": {chosen}" if chosen != machine["attention"] else ""
    cut = f", blocks of {blocks[0]} in global and {blocks[1]} in local layers" if blocks else ""
    yield f"  attention {machine['attention']}{auto}{cut}"
    yield f"  jax {machine['jax']}, {machine['compiler']}"
    yield (
        f"training step: {training['rows']} rows of {training['seq_length']} tokens in "
        f"{training['accumulate']} micro-batch(es), remat {training['remat']}; "
        f"{training['tokens_per_device']} tokens per device"
    )
    yield from _program(training, machine)
    yield f"  model FLOPs      {training['model_flops']:.4g}" + (
        f", {_seconds(training['seconds_at_peak'])} at the peak of "
        f"{machine['peak_flops'] / _TERA:.4g} TFLOP/s per device"
        if machine["peak_flops"]
        else ""
    )
    yield (
        f"scoring: {scoring['rows']} rows of {scoring['seq_length']} tokens on "
        f"{scoring['devices']} device(s)"
    )
    yield from _program(scoring, machine)
    yield from _advice(plan, machine)
    for assumption in plan["assumptions"]:
        yield f"note: {assumption}"


def _advice(plan: dict[str, Any], machine: dict[str, Any]) -> Iterator[str]:
    """Say what was tried, what fits, and what is left to do."""
    for tried in plan.get("tried", ()):
        yield f"tried {_told(tried['change'])}: {_outcome(tried, machine)}"
    scoring, rest = plan["scoring"], "take more devices or a shorter seq_length"
    if plan.get("change"):
        scoring = plan["tried"][-1]["scoring"]
        fits = "that fits" if scoring["fits"] else "with which the training step fits"
        yield f"nearest change {fits}: {_told(plan['change'])}"
    elif "change" in plan:
        yield f"none of these fits; {rest}"
    if scoring and scoring["fits"] is False:
        yield f"scoring does not fit: {scoring['what_helps']}"


def _program(program: dict[str, Any], machine: dict[str, Any]) -> Iterator[str]:
    unit = _unit(program)
    yield f"  {_outcome(program, machine)}"
    for name in ("parameters", "optimizer_state", "batch"):
        if name in program:
            yield f"    {name.replace('_', ' '):<17}{_sized(program[name], unit)}"
    if "memory" in program:
        memory = program["memory"]
        kept = memory["outputs"] - memory["outputs_in_arguments"]
        temporaries = _sized(memory["temporaries"], unit)
        yield f"    {'temporaries':<17}{temporaries} (activations, gradients)"
        yield f"    {'outputs':<17}{_sized(kept, unit)} beside the arguments' place"
        yield f"    {'code':<17}{_sized(memory['code'], unit)}"
        for kind, found in program["collectives"].items():
            yield f"  {kind:<19}{_sized(found['bytes'], unit)}, {found['count']} a step"
    seconds = ", ".join(f"{name} {_seconds(value)}" for name, value in program["seconds"].items())
    yield f"  {seconds}"


def _outcome(program: dict[str, Any], machine: dict[str, Any]) -> str:
    unit, limit = _unit(program), machine["memory"]
    if "memory" in program:
        of = f" of {_sized(limit, 'GiB')}" if limit else ""
        return f"{_sized(program['memory']['total'], unit)}{of} per device"
    refusal = program["refusal"]
    if "needed" not in refusal:
        return f"refused: {refusal['message']}"
    return f"refused: {_sized(refusal['needed'], unit)} of {_sized(refusal['available'], unit)}"


def _told(change: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in change.items())


def _unit(program: dict[str, Any]) -> str:
    """Choose the unit of all figures of a program by what it needs in all."""
    needed = program["memory"]["total"] if "memory" in program else math.inf
    return "GiB" if needed >= _UNITS["GiB"] else "MiB"


def _sized(size: float, unit: str) -> str:
    return f"{size / _UNITS[unit]:.{3 if unit == 'GiB' else 2}f} {unit}"


def _seconds(seconds: float) -> str:
    """Write a time in the unit it is read best in.

    >>> _seconds(0.0123), _seconds(7.25), _seconds(190)
    ('12.3 ms', '7.2 s', '3 min 10 s')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
