"""Compile the training step and the scoring of a run for a described machine.

`python -m mlmjax.training.planning.compilation` reads a request as JSON from standard input and
prints the answer.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from functools import cache, partial
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
from mlmjax.data.schedule import target_width
from mlmjax.errors import InputError, first_line
from mlmjax.model.attention import choose_implementation, splash_block
from mlmjax.parallel import sharding
from mlmjax.scoring.engine import as_computed, rows_per_device
from mlmjax.scoring.scorers import Scorer
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import Verbalizer
from mlmjax.training.adapters import split_trained, trained_patterns
from mlmjax.training.flops import peak_flops, update_flops
from mlmjax.training.optimizer import optimizer_of
from mlmjax.training.planning.compiled import count_collectives, measure_memory, read_refusal
from mlmjax.training.planning.topology import Topology, devices_of, parse_topology
from mlmjax.training.run.initial_model import PUBLISHED, describe_start, load_tokenizer
from mlmjax.training.run.resume import check_batches
from mlmjax.training.step import (
    HEADS,
    abstract_train_state,
    make_eval_step,
    make_train_step,
    split_parameters,
)

PROGRAMS = ("training", "scoring")

# The shortest examples between their outer tokens: a word, the anchor and the mask; or a word.
_SHORTEST, _SHORTEST_TEXT = 3, 1


def check_run(config: RunConfig, topology: Topology) -> Any:
    """Raise `InputError` for what a run would reject there; return its abstract model."""
    if config.parallel != "pjit":
        raise InputError("parallel: only 'pjit' can be planned; set parallel = 'pjit'")
    sizes = sharding.mesh_shape(config.mesh, topology.devices)
    check_batches(config, sizes)
    model = describe_start(config)
    chosen_attention(config, model, topology)
    sharding.parameter_specs(sizes, split_parameters(model)[1])
    return model


def chosen_attention(config: RunConfig, model: Any, topology: Topology) -> str:
    """Return the attention that the global layers of a run use there.

    Raises `InputError` for one that cannot run.
    """
    head_dim = model.config.head_dim
    return choose_implementation(config.attention, topology.platform, config.dtype, head_dim)


def compile_run(
    config: RunConfig, topology: Topology, programs: Sequence[str] = PROGRAMS
) -> dict[str, Any]:
    """Compile `"training"`, `"scoring"` or both for a machine.

    Returns plain values: `machine`, the programs, and `assumptions`, the sentences that the figures
    rest on. Bytes are those of one device. `fits` of a program is None for devices without a
    memory limit. Raises `InputError` for what a run would reject before its first step, and for a
    machine that cannot be described here.
    """
    model = check_run(config, topology)
    devices = devices_of(topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    compiler = "libtpu" if topology.platform == "tpu" else "jaxlib"
    attention = config.attention
    chosen = chosen_attention(config, model, topology)
    blocks = [splash_block(config.data.seq_length, wanted) for wanted in config.splash_blocks]
    machine = {
        "topology": topology.name,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "used": mesh.size,
        "attention": attention,
        "attention_chosen": chosen,
        "splash_blocks": blocks if chosen == "splash" else None,
        "mesh": dict(mesh.shape),
        "memory": None if topology.memory is None else int(topology.memory),
        "peak_flops": peak_flops(devices[0].device_kind, config.dtype),
        "jax": jax.__version__,
        "compiler": f"{compiler} {version(compiler)}",
        "memory_by": "compiler",
    }
    assumptions: list[str] = []
    make = {"training": _compile_training, "scoring": _compile_scoring}
    found = {name: make[name](config, model, mesh, assumptions) for name in programs}
    for program in found.values():
        if "memory" in program and machine["memory"] is not None:
            program["fits"] = program["memory"]["total"] <= machine["memory"]
    return {"machine": machine, **found, "assumptions": assumptions}


def _compile_training(
    config: RunConfig, model: Any, mesh: Mesh, assumptions: list[str]
) -> dict[str, Any]:
    data, architecture = config.data, model.config
    graphdef, params = split_parameters(model)
    loss = HEADS[config.head].loss
    if config.objective.loss != "cross_entropy":
        assumptions.append(f"loss: cross-entropy, in place of {config.objective.loss}")
    optimizer = optimizer_of(config)
    trained, frozen = split_trained(params, trained_patterns(model, config.optimizer.train))
    state = abstract_train_state(trained, optimizer, mesh)
    if frozen is not None:
        frozen = sharding.abstract_arrays(frozen, sharding.parameter_sharding(mesh, frozen))
    step = make_train_step(graphdef, optimizer, accumulate=data.accumulate, loss=loss)
    batch = _abstract_batch(config, mesh, data.batch_size, assumptions)
    flops = update_flops(
        architecture,
        np.full(data.batch_size, data.seq_length),
        count_answers(config),
        architecture.num_labels if config.head == "classification" else architecture.vocab_size,
        sharding.named_leaves(trained),
    )
    assumptions.append("model FLOPs: every row is full and holds one text")
    peak = peak_flops(mesh.devices.flat[0].device_kind, config.dtype)
    found = _compile(step.__wrapped__, mesh, state, batch, frozen)  # type: ignore[attr-defined]
    return {
        "rows": data.batch_size,
        "seq_length": data.seq_length,
        "accumulate": data.accumulate,
        "remat": config.remat,
        "tokens_per_device": data.batch_size * data.seq_length // mesh.size,
        "model_flops": flops,
        "seconds_at_peak": flops / (peak * mesh.size) if peak else None,
        "parameters": _bytes_per_device((state.params, frozen)),
        "optimizer_state": _bytes_per_device((state.step, state.opt_state)),
        "batch": _bytes_per_device(batch),
        **found,
    }


def _compile_scoring(
    config: RunConfig, model: Any, mesh: Mesh, assumptions: list[str]
) -> dict[str, Any]:
    """Compile the widest bucket of `Scorer` on one device, or the validation of a classifier."""
    if config.head == "classification":
        rows, length = config.data.batch_size // config.data.accumulate, config.data.seq_length
        graphdef, params = split_parameters(model)
        program = make_eval_step(graphdef, HEADS[config.head].evaluate).__wrapped__  # type: ignore[attr-defined]
        params = sharding.abstract_arrays(params, sharding.parameter_sharding(mesh, params))
        inputs: tuple[Any, ...] = (_abstract_batch(config, mesh, rows, []),)
        assumptions.append("scoring: the validation step, on the whole mesh")
        helps = "set a larger data.accumulate or a smaller data.seq_length"
    else:
        mesh = sharding.make_mesh({"data": 1}, mesh.devices.flatten().tolist()[:1])
        letters = Verbalizer.letters(["a", "b", "c", "d"])
        scorer = Scorer(model, _load_tokenizer(config), Template("{text}"), letters)
        length = scorer.engine.buckets[-1]
        rows = rows_per_device(length, mesh.devices.flat[0].platform)
        rounded = jax.eval_shape(partial(as_computed, model), nnx.split(model)[1])
        params = sharding.abstract_arrays(rounded, sharding.parameter_sharding(mesh, rounded))
        program = scorer.engine.jitted
        whole = sharding.replicated_sharding(mesh)
        inputs = tuple(
            jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)
            for shape in ((rows, length), (rows, length), (rows,), (rows,))
        )
        helps = (
            "give fewer rows at a time (batch_size; without it they are halved until they fit), or "
            "shorter prompts"
        )
        assumptions.append(
            f"scoring: one device, the longest prompts ({length} tokens), four labels; with "
            "dtype bfloat16 the float32 parameters take memory too, which is not counted"
        )
    found = _compile(program, mesh, params, *inputs)
    return {
        "rows": rows,
        "seq_length": length,
        "devices": mesh.size,
        "what_helps": helps,
        "parameters": _bytes_per_device(params),
        **found,
    }


def _compile(program: Any, mesh: Mesh, *arguments: Any) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    stage = program
    try:
        with jax.set_mesh(mesh):
            for name in ("trace", "lower", "compile"):
                began = time.perf_counter()
                stage = getattr(stage, name)(*(arguments if name == "trace" else ()))
                seconds[name] = round(time.perf_counter() - began, 2)
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(error)
        if refusal is None:
            raise InputError(f"the compiler rejects this program: {first_line(error)}") from error
        return {"fits": False, "refusal": refusal, "seconds": seconds}
    return {
        "fits": None,
        "memory": measure_memory(stage),
        "collectives": count_collectives(stage.as_text()),
        "seconds": seconds,
    }


def _abstract_batch(
    config: RunConfig, mesh: Mesh, rows: int, assumptions: list[str]
) -> Batch | LabelBatch:
    tokens = (rows, config.data.seq_length)
    where = sharding.batch_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    if config.head == "classification":
        return LabelBatch(array(tokens), array(tokens), array((rows,), jnp.float32))
    targets = (rows, bound_targets(config, assumptions))
    return Batch(*(array(tokens),) * 3, *(array(targets),) * 3)


def bound_targets(config: RunConfig, assumptions: list[str]) -> int:
    """Return the most targets a row can have, from its prepared rows or from its settings."""
    data, has_text = config.data, any(source.text for source in config.data.sources)
    if manifest := _read_rows(config, assumptions):
        files = [file for file in manifest.splits["train"] if file.rows]
        most = max((file.max_examples_per_row for file in files), default=1)
        has_text = any(file.text for file in files)
        source = f"from the rows in {data.rows}"
    else:
        shortest = _load_tokenizer(config).outer + (_SHORTEST_TEXT if has_text else _SHORTEST)
        most = data.seq_length // shortest if data.pack else 1
        source = "the most possible, because these rows are not prepared"
    width = target_width(config.objective, data.seq_length, most, has_text)
    assumptions.append(f"targets: {width} per row for at most {most} examples, {source}")
    return width


def _read_rows(config: RunConfig, assumptions: list[str]) -> Manifest | None:
    """Read the manifest of the prepared rows, unless `train` would reject them."""
    rows = Path(config.data.rows)
    if not (rows / MANIFEST).exists():
        return None
    try:
        check_same(rows, config.data, _load_tokenizer(config), config.head)
        return read_manifest(rows)
    except InputError as error:
        assumptions.append(f"rows ignored, because training would reject them: {error.message}")
        return None


def _load_tokenizer(config: RunConfig) -> Tokenizer:
    """Load the tokenizer of a run; that of a `PUBLISHED` model is packaged."""
    name = config.init_from
    if config.tokenizer is None and name in PUBLISHED and not Path(name).is_dir():
        return _packaged_tokenizer()
    return load_tokenizer(config)


@cache  # because a search for settings that fit needs it for each of them
def _packaged_tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained()


def count_answers(config: RunConfig) -> int:
    """Estimate the number of positions per update that the head runs on."""
    data, objective = config.data, config.objective
    if config.head == "classification":
        return data.batch_size
    is_plain = bool(data.sources) and all(source.text for source in data.sources)
    share = 1.0 if is_plain else objective.dummy_mlm_share + objective.mlm_share
    masked = share * objective.mean_rate * data.batch_size * data.seq_length
    return round(masked + (1 - share) * data.batch_size)


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def main() -> None:
    """Answer one request: `{"config": ..., "topology": ..., "programs": [...]}`."""
    request = json.load(sys.stdin)
    try:
        config = parse_config(request["config"])
        topology = parse_topology(request["topology"])
        answer = compile_run(config, topology, request["programs"])
    except InputError as error:
        answer = {"error": [error.message, *error.details]}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
