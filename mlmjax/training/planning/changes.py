"""Changes of a run that need less memory, in the order of the time that they cost."""

import json
from collections.abc import Iterator
from typing import Any

from mlmjax.config.run import RunConfig, parse_config
from mlmjax.config.tables import override

RECOMPUTED = {"none": 1.0, "dots": 1.05, "layer": 4 / 3}
"""What an update computes with each `remat`: the layers' products are 1 part forward and 2 back."""
ENOUGH, ENOUGH_SHARDED = 256, 2048
"""Tokens whose products take as long as to read the parameters: a chip's FLOP/s over the bytes that
its memory, or its links to other chips, move in a second."""


def changes(config: RunConfig, mesh: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield changes that make a training step smaller, the cheapest in time first.

    They are other activation checkpointing, smaller micro-batches, and both, then the same with
    twice as many devices for `fsdp` again and again. Those that cost the same time start with the
    fewest micro-batches. See `relative_time`.
    """
    levels = tuple(RECOMPUTED)[tuple(RECOMPUTED).index(config.remat) :]
    data, shards = config.data, mesh["data"] * mesh["fsdp"]
    parts = [data.accumulate]
    while data.batch_size % (shards * parts[-1] * 2) == 0:
        parts.append(parts[-1] * 2)
    fsdp, rest = mesh["fsdp"], mesh["data"]
    while True:
        tokens = data.batch_size * data.seq_length / (shards * mesh["tensor"])
        times = {
            (remat, count): relative_time(remat, tokens / count, is_sharded=fsdp > 1)
            for remat in levels
            for count in parts
        }
        sharded = {} if fsdp == mesh["fsdp"] else {"mesh.fsdp": fsdp, "mesh.data": rest}
        for remat, count in sorted(times, key=lambda one: (times[one], one[1])):
            other = {} if remat == config.remat else {"remat": remat}
            smaller = {} if count == data.accumulate else {"data.accumulate": count}
            if change := {**other, **smaller, **sharded}:
                yield change
        if rest % 2:
            return
        fsdp, rest = fsdp * 2, rest // 2


def relative_time(remat: str, tokens: float, *, is_sharded: bool) -> float:
    """Return about how long an update takes, relative to one that nothing slows down.

    `tokens` is the size of a micro-batch on one device. Checkpointing computes again, and a small
    micro-batch computes for less time than its parameters take to arrive, from other devices if
    they are sharded.

    >>> relative_time("none", 4096, is_sharded=True), relative_time("dots", 1024, is_sharded=True)
    (1.0, 2.1)
    """
    least = ENOUGH_SHARDED if is_sharded else ENOUGH
    return RECOMPUTED[remat] * max(1.0, least / tokens)


def apply_change(config: RunConfig, change: dict[str, Any]) -> RunConfig:
    """Return the configuration with other values of dotted keys."""
    table = config.model_dump(mode="json")
    for key, value in change.items():
        override(table, f"{key}={json.dumps(value)}")
    return parse_config(table)
