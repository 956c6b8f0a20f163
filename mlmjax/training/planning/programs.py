"""The programs of a run, compiled for a described machine, and what they need there.

`python -m mlmjax.training.planning.programs` reads a request as JSON on standard input and writes
the answer.
"""

import json
import sys
import time
from collections.abc import Sequence
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
from mlmjax.data.preparing.prepare import check_same
from mlmjax.data.rows import MANIFEST, Manifest, read_manifest
from mlmjax.data.schedule import row_schedule, target_width
from mlmjax.errors import InputError
from mlmjax.model.attention import automatic, check_platform
from mlmjax.model.splash import splash_block
from mlmjax.parallel import sharding as partition
from mlmjax.scoring.engine import as_computed, rows_of
from mlmjax.scoring.scorers import Scorer
from mlmjax.text.prompts import Template, Verbalizer
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.flops import BACKWARD, forward_flops, peak_flops
from mlmjax.training.optimizer import make_optimizer
from mlmjax.training.planning import compiled
from mlmjax.training.planning.topology import Topology, devices_of, parse_topology
from mlmjax.training.run.initial_model import PUBLISHED, describe_start, load_tokenizer
from mlmjax.training.run.train import HEADS, micro_batches
from mlmjax.training.step import (
    abstract_train_state,
    make_eval_step,
    make_train_step,
    split_parameters,
)

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
            refused = compiled.refusal(error)
            if refused is None:
                raise InputError(
                    f"the compiler does not take this program: {str(error).partition(chr(10))[0]}"
                ) from error
            return {"fits": False, "refusal": refused, "seconds": seconds}
    return {
        "fits": None,
        "memory": compiled.memory(result),
        "collectives": compiled.collectives(result.as_text()),
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
