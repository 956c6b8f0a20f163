"""The programs of a run, compiled for a described machine, and what they need there.

`python -m mlmjax.training.planning.programs` reads a request as JSON on standard input and writes
the answer.
"""

import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlmjax.config.run import RunConfig, parse_config
from mlmjax.data.batch import Batch, LabelBatch
from mlmjax.data.manifest import MANIFEST, Manifest, read_manifest
from mlmjax.data.preparing.prepare import check_same
from mlmjax.data.schedule import row_schedule, target_width
from mlmjax.errors import InputError
from mlmjax.model.attention import automatic, check_platform, splash_block
from mlmjax.parallel import sharding as partition
from mlmjax.scoring.engine import as_computed, rows_of
from mlmjax.scoring.scorers import Scorer
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import Verbalizer
from mlmjax.training.flops import BACKWARD, forward_flops, peak_flops
from mlmjax.training.optimizer import make_optimizer
from mlmjax.training.planning.topology import Topology, devices_of, parse_topology
from mlmjax.training.run.initial_model import PUBLISHED, describe_start, load_tokenizer
from mlmjax.training.run.train import micro_batches
from mlmjax.training.step import (
    HEADS,
    abstract_train_state,
    make_eval_step,
    make_train_step,
    split_parameters,
)

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


PROGRAMS = ("training", "scoring")


# The shortest examples: [CLS], a word, [unused0], [MASK], [SEP]; and of plain text without a slot.
_SHORTEST, _SHORTEST_TEXT = 5, 3


def check_run(config: RunConfig, topology: Topology) -> Any:
    """Refuse, without a compiler or a device, what a run would refuse there; return its model.

    The model has shapes and no weights. Raises `InputError`.
    """
    if config.parallel != "pjit":
        raise InputError("parallel: a plan is for 'pjit'; set parallel = 'pjit'")
    check_platform(config.attention, topology.platform)
    sizes = partition.mesh_shape(config.mesh, topology.devices)
    start = row_schedule(config.data, config.steps).start
    partition.check_rows(sizes, config.data.batch_size, config.data.accumulate)
    partition.check_rows(sizes, start, micro_batches(config, start))
    model = describe_start(config)
    partition.parameter_specs(sizes, split_parameters(model)[1])
    return model


def compile_run(
    config: RunConfig, topology: Topology, programs: Sequence[str] = PROGRAMS
) -> dict[str, Any]:
    """Compile the training step of a run for a machine, and its scoring, or one of the two.

    Returns plain values, bytes being those of one device: `machine`, what was asked of `training`
    and `scoring`, and `assumptions`, the sentences that the figures rest on. A program `fits` or
    not; None says that its devices have no memory of their own to judge by. Raises `InputError`
    for what a run would refuse before its first step, and for a machine that cannot be described
    here.
    """
    model = check_run(config, topology)
    devices = devices_of(topology)
    mesh = partition.make_mesh(config.mesh, devices)
    compiler = "jaxlib" if topology.platform == "cpu" else "libtpu"
    machine = {
        "topology": topology.name,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "used": mesh.size,
        "attention": config.attention,
        "attention_chosen": _attention(config, topology),
        "splash_blocks": _splash_blocks(config, topology),
        "mesh": dict(mesh.shape),
        "memory": None if topology.memory is None else int(topology.memory),
        "peak_flops": peak_flops(devices[0].device_kind, config.dtype),
        "jax": jax.__version__,
        "compiler": f"{compiler} {version(compiler)}",
    }
    assumptions: list[str] = []
    compile_one = {"training": _training, "scoring": _scoring}
    found = {
        name: compile_one[name](config, model, mesh, machine, assumptions) for name in programs
    }
    for program in found.values():
        if "memory" in program and machine["memory"] is not None:
            program["fits"] = program["memory"]["total"] <= machine["memory"]
    return {"machine": machine, **found, "assumptions": assumptions}


def _attention(config: RunConfig, topology: Topology) -> str:
    return automatic(topology.platform) if config.attention == "auto" else config.attention


def _splash_blocks(config: RunConfig, topology: Topology) -> list[int] | None:
    """Return the blocks the kernels of global and local layers really take; None without them."""
    if _attention(config, topology) != "splash":
        return None
    return [splash_block(config.data.seq_length, wanted) for wanted in config.splash_blocks]


def _training(
    config: RunConfig, model: Any, mesh: Mesh, machine: dict[str, Any], assumptions: list[str]
) -> dict[str, Any]:
    data, architecture = config.data, model.config
    graphdef, params = split_parameters(model)
    optimizer = make_optimizer(config.optimizer, config.schedule, config.steps)
    state = abstract_train_state(params, optimizer, mesh)
    step = make_train_step(
        graphdef, optimizer, accumulate=data.accumulate, loss=HEADS[config.head].loss
    )
    batch = _abstract_batch(config, mesh, assumptions)
    answers = _answers(config, assumptions)
    flops = BACKWARD * forward_flops(
        architecture,
        np.full(data.batch_size, data.seq_length),
        answers,
        architecture.num_labels if config.head == "classification" else architecture.vocab_size,
    )
    assumptions.append("model FLOPs: every row full, of one text")
    peak = machine["peak_flops"]
    found = _compile(step.__wrapped__, mesh, state, batch)  # type: ignore[attr-defined]
    return {
        "rows": data.batch_size,
        "seq_length": data.seq_length,
        "accumulate": data.accumulate,
        "remat": config.remat,
        "tokens_per_device": data.batch_size * data.seq_length // mesh.size,
        "model_flops": flops,
        "seconds_at_peak": flops / (peak * mesh.size) if peak else None,
        "parameters": _bytes_per_device(state.params),
        "optimizer_state": _bytes_per_device((state.step, state.opt_state)),
        "batch": _bytes_per_device(batch),
        **found,
    }


def _scoring(
    config: RunConfig, model: Any, mesh: Mesh, machine: dict[str, Any], assumptions: list[str]
) -> dict[str, Any]:
    """Compile the widest bucket of the `Scorer` for one device; of a head, its validation."""
    if config.head == "classification":
        rows, length = config.data.batch_size // config.data.accumulate, config.data.seq_length
        graphdef, params = split_parameters(model)
        program = make_eval_step(graphdef, HEADS[config.head].evaluate).__wrapped__  # type: ignore[attr-defined]
        params = abstract_params(params, mesh)
        arguments: tuple[Any, ...] = (params, _abstract_batch(config, mesh, [], rows))
        assumptions.append("scoring: the validation step, on the whole mesh")
        helps = "take a larger data.accumulate or a shorter data.seq_length"
    else:
        first = np.array(mesh.devices.flat[:1]).reshape((1,) * len(partition.AXES))
        mesh = Mesh(first, mesh.axis_names, axis_types=mesh.axis_types)
        letters = Verbalizer.letters(["a", "b", "c", "d"])
        scorer = Scorer(model, _tokenizer(config), Template("{text}"), letters)
        length = scorer.engine.buckets[-1]
        rows = rows_of(length, mesh.devices.flat[0].platform)
        rounded = jax.eval_shape(partial(as_computed, model), nnx.split(model)[1])
        params = abstract_params(rounded, mesh)
        whole = partition.replicated_sharding(mesh)
        arrays = [
            jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)
            for shape in ((rows, length), (rows, length), (rows,), (rows,))
        ]
        program, arguments = scorer.engine.jitted, (params, *arrays)
        helps = "give fewer rows at a time (batch_size; without it they are halved until they fit)"
        helps += ", or shorter prompts"
        assumptions.append(
            f"scoring: one device, the longest prompts ({length} tokens), four labels; in bfloat16 "
            "the model itself, in float32, is in memory beside what is counted"
        )
    found = _compile(program, mesh, *arguments)
    return {
        "rows": rows,
        "seq_length": length,
        "devices": mesh.size,
        "what_helps": helps,
        "parameters": _bytes_per_device(params),
        **found,
    }


def abstract_params(params: Any, mesh: Mesh) -> Any:
    """Return shapes, dtypes and shardings of (abstract) parameters on a mesh."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda p: p, params),
        partition.parameter_sharding(mesh, params),
    )


def _compile(program: Any, mesh: Mesh, *arguments: Any) -> dict[str, Any]:
    seconds = {}

    def timed(name: str, act: Any, *inputs: Any) -> Any:
        began = time.perf_counter()
        result = act(*inputs)
        seconds[name] = round(time.perf_counter() - began, 2)
        return result

    with jax.set_mesh(mesh):
        traced = timed("trace", program.trace, *arguments)
        lowered = timed("lower", traced.lower)
        try:
            result = timed("compile", lowered.compile)
        except jax.errors.JaxRuntimeError as error:
            refused = refusal(error)
            if refused is None:
                raise InputError(
                    f"the compiler does not take this program: {str(error).partition(chr(10))[0]}"
                ) from error
            return {"fits": False, "refusal": refused, "seconds": seconds}
    return {
        "fits": None,
        "memory": memory(result),
        "collectives": collectives(result.as_text()),
        "seconds": seconds,
    }


def _abstract_batch(
    config: RunConfig, mesh: Mesh, assumptions: list[str], rows: int | None = None
) -> Batch | LabelBatch:
    rows, length = rows or config.data.batch_size, config.data.seq_length
    sharding = partition.batch_sharding(mesh)

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if config.head == "classification":
        return LabelBatch(array(rows, length), array(rows, length), array(rows, dtype=jnp.float32))
    width = _target_width(config, assumptions)
    tokens, targets = (rows, length), (rows, width)
    return Batch(array(*tokens), array(*tokens), array(*tokens), *(array(*targets),) * 3)


def _target_width(config: RunConfig, assumptions: list[str]) -> int:
    """Bound the targets of a row as the loader does: by its rows, or by what rows there can be."""
    data, text = config.data, any(source.text for source in config.data.sources)
    manifest = _manifest(config, assumptions)
    if manifest is not None:
        files = [file for file in manifest.splits["train"] if file.rows]
        most = max((file.max_examples_per_row for file in files), default=1)
        text = any(file.text for file in files)
        says = f"as the rows in {data.rows} are"
    else:
        most = data.seq_length // (_SHORTEST_TEXT if text else _SHORTEST) if data.pack else 1
        says = "as many as there can be (no such rows there yet)"
    width = target_width(config.objective, data.seq_length, most, text)
    assumptions.append(f"targets: room for {width} in a row, at most {most} examples, {says}")
    return width


def _manifest(config: RunConfig, assumptions: list[str]) -> Manifest | None:
    """Read what the rows hold that `train` would take; rows it would refuse are left, and said."""
    rows = Path(config.data.rows)
    if not (rows / MANIFEST).exists():
        return None
    try:
        check_same(rows, config.data, _tokenizer(config), config.head)
        return read_manifest(rows)
    except InputError as error:
        assumptions.append(
            f"the rows that are there do not count, training refuses them: {error.message}"
        )
        return None


def _tokenizer(config: RunConfig) -> Tokenizer:
    """Load the tokenizer of a run; that of the `PUBLISHED` models is here without their folder."""
    name = config.init_from
    if config.tokenizer is None and name in PUBLISHED and not Path(name).is_dir():
        return Tokenizer.from_pretrained()
    return load_tokenizer(config)


def _answers(config: RunConfig, assumptions: list[str]) -> int:
    """Estimate the positions the head runs on in one update."""
    data, objective = config.data, config.objective
    if config.head == "classification":
        return data.batch_size
    plain = bool(data.sources) and all(source.text for source in data.sources)
    share = 1.0 if plain else objective.dummy_mlm_share + objective.mlm_share
    masked = share * objective.mlm_rate * data.batch_size * data.seq_length
    return round(masked + (1 - share) * data.batch_size)


def _bytes_per_device(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def main() -> int:
    """Answer one request: `{"config": ..., "topology": ..., "programs": [...]}`."""
    request = json.load(sys.stdin)
    try:
        config = parse_config(request["config"])
        topology = parse_topology(request["topology"])
        answer = compile_run(config, topology, request["programs"])
    except InputError as error:
        answer = {"error": [error.message, *error.details]}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
