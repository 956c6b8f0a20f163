"""Check whether a run fits a machine that is elsewhere, and find a change that makes it fit."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mlmjax.config.run import RunConfig
from mlmjax.errors import InputError, counted, install_advice
from mlmjax.parallel import sharding
from mlmjax.training.planning.arithmetic import estimate, estimate_plan
from mlmjax.training.planning.changes import apply_change, changes
from mlmjax.training.planning.compilation import PROGRAMS, check_run
from mlmjax.training.planning.topology import (
    GIB,
    Topology,
    environment,
    has_tpu_compiler,
    may_have_gpus,
    parse_topology,
)

Say = Callable[[str], None]
Watch = Callable[[str], AbstractContextManager[None]]
SEARCH_SECONDS = 600.0
"""How long the search for a change that fits may take."""
ANY_STEPS = 10**6
DOUBT = 1.5
"""How far arithmetic may be from the compiler; within it the run is called close."""
_RESHARDING = "Involuntary full rematerialization"
_KILLED = -9
_UNITS = {"GiB": 2**30, "MiB": 2**20}
_STAGES = {"trace": "reading the program", "lower": "translating it", "compile": "compiling it"}


def _in_silence(what: str) -> AbstractContextManager[None]:
    return nullcontext()


def make_plan(
    config: RunConfig,
    topology: str,
    *,
    say: Say = lambda line: None,
    watch: Watch = _in_silence,
    search_seconds: float = SEARCH_SECONDS,
) -> dict[str, Any]:
    """Find out whether a run fits a machine, and a change that makes it fit.

    `topology` is a name such as `"v5e:16x16"`, `"v5litepod-16"`, `"h200:8"`, or `"cpu:8"` for
    simulated devices. TPUs and CPUs are compiled for in a child process, so that neither the
    devices of this process nor a compiler that aborts matter. So are GPUs of this machine. Memory
    of other GPUs, and of TPUs without their compiler, is estimated by arithmetic. `say` gets a
    line for each step. `watch` gives a context for work that takes long. The search for a change
    ends after `search_seconds`.

    Returns plain values (bytes are those of one device): `fits` (None for simulated devices, which
    have no memory limit), `machine` (its `memory_by` is "compiler" or "arithmetic"), `training`,
    `scoring` and `assumptions`. If training does not fit, `tried` lists the changes tried so far,
    each with the figures of its training or its refusal, and `change` is the first that fits, or
    None. `stopped` tells whether time ran out.

    Raises `InputError` for an unknown topology and for what a run would reject.
    """
    if config.epochs is not None:  # No figure of a plan depends on the length of the run.
        config = config.with_steps(ANY_STEPS)
    described = parse_topology(topology)
    model = check_run(config, described)
    answer = _measure(config, model, described, say, watch)
    verdicts = [answer[program]["fits"] for program in PROGRAMS]
    plan = {"fits": None if None in verdicts else all(verdicts), **answer}
    if _needs_no_change(config, answer["training"], answer["scoring"]):
        return plan
    return plan | _search(config, model, described, answer["machine"], say, watch, search_seconds)


def _measure(
    config: RunConfig, model: Any, topology: Topology, say: Say, watch: Watch
) -> dict[str, Any]:
    """Return the figures of a run by the compiler, or by arithmetic if there is none for it."""
    possible = {"gpu": may_have_gpus, "tpu": has_tpu_compiler}
    if topology.platform in possible and not possible[topology.platform]():
        return estimate_plan(config, model, topology)
    _say_estimate(config, model, topology, say)
    with watch(f"compiling for {topology.name}; large models take minutes"):
        if topology.platform != "gpu":
            return _compile(config, topology)
        try:
            return _compile(config, topology)
        except InputError as error:
            found = estimate_plan(config, model, topology)
            found["assumptions"].append(f"not compiled, because {error.message}")
            return found


def _search(
    config: RunConfig,
    model: Any,
    topology: Topology,
    machine: dict[str, Any],
    say: Say,
    watch: Watch,
    seconds: float,
) -> dict[str, Any]:
    """Return `tried`, `change` and `stopped` of `make_plan` for a run that does not fit."""
    tried: list[dict[str, Any]] = []
    found: dict[str, Any] = {"tried": tried, "change": None, "stopped": False}
    by_arithmetic = machine["memory_by"] == "arithmetic"
    until = time.monotonic() + seconds
    for change in changes(config, machine["mesh"]):
        if _is_hopeless(config, model, change, topology):
            continue
        left = until - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            with watch(f"trying {_join(change)}"):
                figures = _try(config, change, topology, say, None if by_arithmetic else left)
        except TimeoutError:
            return found | {"stopped": True}
        tried.append({"change": change, **figures})
        if _needs_no_change(config, figures, figures["scoring"]):
            return found | {"change": change}
    return found


def _is_hopeless(config: RunConfig, model: Any, change: dict[str, Any], topology: Topology) -> bool:
    """Tell whether a run with a change needs far more memory by arithmetic; no if it is invalid."""
    try:
        candidate = apply_change(config, change)
        sizes = sharding.mesh_shape(candidate.mesh, topology.devices)
        total = estimate(candidate, model, sizes)["training"]["memory"]["total"]
    except InputError:
        return False
    return topology.memory is not None and total > DOUBT * topology.memory


def _say_estimate(config: RunConfig, model: Any, topology: Topology, say: Say) -> None:
    """Say by arithmetic whether a run fits, because the compiler takes longer to say it."""
    text = f"compiling for {topology.name}"
    if topology.memory is not None:
        sizes = sharding.mesh_shape(config.mesh, topology.devices)
        total = estimate(config, model, sizes)["training"]["memory"]["total"]
        share = total / topology.memory
        guess = "fits" if share < 1 / DOUBT else "does not fit" if share > DOUBT else "is close"
        needs = f"about {total / GIB:.1f} of {topology.memory / GIB:.2f} GiB per device"
        text = f"by arithmetic the training step {guess}: {needs}; {text} to be sure"
    say(text)


def _needs_no_change(
    config: RunConfig, training: dict[str, Any], scoring: dict[str, Any] | None
) -> bool:
    """Tell whether everything fits that a change of the training can make smaller.

    Validation of a classification head has the rows of a micro-batch. Scoring with the MLM head
    has prompts, which no setting of the training makes smaller.
    """
    programs = [training, scoring] if config.head == "classification" else [training]
    return all(program is not None and program["fits"] is not False for program in programs)


def _try(
    config: RunConfig,
    change: dict[str, Any],
    topology: Topology,
    say: Say,
    seconds: float | None,
) -> dict[str, Any]:
    """Compile within these seconds, or estimate without them, a run with a change.

    An invalid change is reported like one that does not fit. Raises `TimeoutError`.
    """
    try:
        candidate = apply_change(config, change)
        model = check_run(candidate, topology)
        if seconds is None:
            found = estimate_plan(candidate, model, topology)
            return {**found["training"], "scoring": found["scoring"]}
        say(f"does not fit; compiling with {_join(change)}")
        until = time.monotonic() + seconds
        training = _compile(candidate, topology, ["training"], seconds)["training"]
        fits, left = training["fits"], until - time.monotonic()
        scoring = _compile(candidate, topology, ["scoring"], left)["scoring"] if fits else None
    except InputError as error:
        return {"fits": False, "refusal": {"message": error.message}, "scoring": None}
    return {**training, "scoring": scoring}


def _compile(
    config: RunConfig,
    topology: Topology,
    programs: Sequence[str] = PROGRAMS,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Compile in a child process; raise its `InputError`, or one if its compiler dies.

    Raises `TimeoutError` if it takes longer than `seconds`; the child is ended then.
    """
    settings = config.model_dump(mode="json")
    request = {"config": settings, "topology": topology.name, "programs": list(programs)}
    paths = filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mlmjax.training.planning.compilation"],
            input=json.dumps(request),
            env={**os.environ, **environment(topology), "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"compiling for {topology.name} took too long") from error
    lines, errors = done.stdout.splitlines(), done.stderr.splitlines()
    if done.returncode or not lines:
        raise _explain_death(topology, done.returncode, errors)
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise InputError(answer["error"][0], answer["error"][1:])
    if resharded := sum(_RESHARDING in line for line in errors):
        answer["assumptions"].append(
            f"slow: every device gathers {resharded} whole arrays to shard them differently"
        )
    return answer


def _explain_death(topology: Topology, status: int, errors: list[str]) -> InputError:
    """Explain why a compiler ended without an answer, from its last lines."""
    if flag := re.search(r"Unknown flag.*?: (.*)", "\n".join(errors)):
        return InputError(
            f"XLA_FLAGS: {flag[1].strip()} is not a flag of this compiler; remove it from the "
            "environment"
        )
    if status == _KILLED:
        return InputError(
            f"--topology {topology.name}: the compiler was killed, most likely because this "
            "machine has too little memory to compile; plan on a larger one"
        )
    checks = [line for line in errors if "Check failed" in line]
    return InputError(
        f"--topology {topology.name}: the compiler stopped (exit status {status}) without an "
        "answer; try another shape or a smaller model",
        (checks or errors)[-3:],
    )


def report(plan: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a plan for people."""
    machine, training, scoring = plan["machine"], plan["training"], plan["scoring"]
    limit, unused = machine["memory"], machine["devices"] - machine["used"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in machine["mesh"].items())
    verdict = {True: "fits", False: "DOES NOT FIT", None: "no verdict for simulated devices"}
    yield f"{machine['topology']}: {verdict[plan['fits']]}"
    yield (
        f"  {machine['used']} x {machine['device']}"
        + (f", {_format_size(limit, 'GiB')} each" if limit else "")
        + f"; mesh {mesh}"
        + (f"; {unused} devices unused" if unused else "")
    )
    chosen, blocks = machine["attention_chosen"], machine["splash_blocks"]
    auto = f": {chosen}" if chosen != machine["attention"] else ""
    sizes = f", blocks of {blocks[0]} in global and {blocks[1]} in local layers" if blocks else ""
    yield f"  attention {machine['attention']}{auto}{sizes}"
    by = {"compiler": "as the compiler reports it", "arithmetic": "by arithmetic"}
    lacks = machine["memory_by"] == "arithmetic" and machine["device"].startswith("TPU")
    more = f"; to compile for this TPU, {install_advice('plan')}" if lacks else ""
    yield f"  jax {machine['jax']}, {machine['compiler']}; memory {by[machine['memory_by']]}{more}"
    yield (
        f"training step: {training['rows']} rows of {training['seq_length']} tokens in "
        f"{counted(training['accumulate'], 'micro-batch')}, remat {training['remat']}; "
        f"{training['tokens_per_device']} tokens per device"
    )
    yield from _report_program(training, limit)
    yield f"  model FLOPs      {training['model_flops']:.4g}" + (
        f", {_format_seconds(training['seconds_at_peak'])} at the peak of "
        f"{machine['peak_flops'] / 1e12:.4g} TFLOP/s per device"
        if machine["peak_flops"]
        else ""
    )
    yield (
        f"scoring: {scoring['rows']} rows of {scoring['seq_length']} tokens on "
        f"{counted(scoring['devices'], 'device')}"
    )
    yield from _report_program(scoring, limit)
    yield from _report_changes(plan, limit)
    for assumption in plan["assumptions"]:
        yield f"note: {assumption}"


def _report_changes(plan: dict[str, Any], limit: int | None) -> Iterator[str]:
    for tried in plan.get("tried", ()):
        yield f"tried {_join(tried['change'])}: {_outcome(tried, limit)}"
    scoring = plan["scoring"]
    if plan.get("change"):
        scoring = plan["tried"][-1]["scoring"]
        fits = "that fits" if scoring["fits"] else "with which the training step fits"
        yield f"nearest change {fits}: {_join(plan['change'])}"
    elif "change" in plan:
        if plan.get("stopped"):
            yield "the search ran out of time before it found a change; raise --search-seconds"
        else:
            yield "no change fits; use more devices or a smaller seq_length"
    if scoring and scoring["fits"] is False:
        yield f"scoring does not fit: {scoring['what_helps']}"


def _report_program(program: dict[str, Any], limit: int | None) -> Iterator[str]:
    unit = _unit(program)
    yield f"  {_outcome(program, limit)}"
    known = ("parameters", "optimizer_state", "batch")
    sizes: dict[str, float] = {key: program[key] for key in known if key in program}
    if memory := program.get("memory"):
        outputs = memory["outputs"] - memory["outputs_in_arguments"]
        sizes |= {"temporaries": memory["temporaries"], "outputs": outputs, "code": memory["code"]}
        if parts := program.get("estimate"):
            sizes = {key: size for key, size in sizes.items() if size and key != "temporaries"}
            sizes |= parts
    notes = {
        "temporaries": " (activations, gradients)",
        "outputs": " (not in the memory of the inputs)",
        "compute_copy": " (parameters in the precision of the products)",
        "head": " (logits of a chunk of targets)",
    }
    for key, size in sizes.items():
        yield f"    {key.replace('_', ' '):<17}{_format_size(size, unit)}{notes.get(key, '')}"
    for kind, found in program.get("collectives", {}).items():
        yield f"  {kind:<19}{_format_size(found['bytes'], unit)}, {found['count']} per step"
    if seconds := program["seconds"].items():
        yield "  " + ", ".join(f"{_STAGES[name]} {_format_seconds(took)}" for name, took in seconds)


def _outcome(program: dict[str, Any], limit: int | None) -> str:
    unit = _unit(program)
    if "memory" in program:
        available = f" of {_format_size(limit, 'GiB')}" if limit else ""
        return f"{_format_size(program['memory']['total'], unit)}{available} per device"
    refusal = program["refusal"]
    if "needed" not in refusal:
        return f"rejected: {refusal['message']}"
    needed, available = (_format_size(refusal[key], unit) for key in ("needed", "available"))
    return f"rejected: needs {needed} of {available}"


def _join(change: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in change.items())


def _unit(program: dict[str, Any]) -> str:
    """Choose one unit for all sizes of a program."""
    needed = program["memory"]["total"] if "memory" in program else math.inf
    return "GiB" if needed >= _UNITS["GiB"] else "MiB"


def _format_size(size: float, unit: str) -> str:
    return f"{size / _UNITS[unit]:.{3 if unit == 'GiB' else 2}f} {unit}"


def _format_seconds(seconds: float) -> str:
    """Format a time in its most readable unit.

    >>> _format_seconds(0.0123), _format_seconds(7.25), _format_seconds(190)
    ('12.3 ms', '7.2 s', '3 min 10 s')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
