"""Checkpoints that are damaged or from strangers, and the tool that converts them."""

import json
import random
import shutil

from hostile.case import Case, all_of, change, change_json, cut, remove, words, write
from hostile.weights import INDEX, NORM, WEIGHTS, put, shards

STEP = "out/checkpoints/2"
RECORD = f"{STEP}/record/metadata"


def arrays(function, step=STEP):
    """Change every file that holds arrays."""

    def spoil(folder):
        for path in (folder / step).rglob("d/*"):
            path.write_bytes(function(path.read_bytes()))

    return spoil


def flip(data):
    """Change one bit in every part of 64 bytes."""
    changed = bytearray(data)
    for place in range(32, len(data), 64):
        changed[place] ^= 4
    return bytes(changed)


def noise(data):
    return random.Random(0).randbytes(len(data))


def renamed(old, new):
    return lambda folder: (folder / old).rename(folder / new)


DAMAGED = f"{STEP}: the checkpoint of step 2 is damaged"
STEPS = {
    "with its arrays cut": (arrays(cut(0.5)), DAMAGED),
    "with its arrays empty": (arrays(cut(0)), DAMAGED),
    "with its arrays of noise": (arrays(noise), DAMAGED),
    "with bits flipped": (arrays(flip), DAMAGED),
    "with its arrays gone": (remove(f"{STEP}/state/d"), DAMAGED),
    "with the arrays of another step": (
        lambda folder: (
            shutil.rmtree(folder / STEP / "state"),
            shutil.copytree(folder / "out/checkpoints/1/state", folder / STEP / "state"),
        ),
        DAMAGED,
    ),
    "without its index": (remove(f"{STEP}/state/manifest.ocdbt"), DAMAGED),
    "with its index cut": (change(f"{STEP}/state/manifest.ocdbt", cut(0.5)), DAMAGED),
    "without its description": (remove(f"{STEP}/state/_METADATA"), DAMAGED),
    "with its description cut": (change(f"{STEP}/state/_METADATA", cut(0.5)), DAMAGED),
    "with a description of nothing": (write(f"{STEP}/state/_METADATA", "{}"), DAMAGED),
    "without its record": (remove(RECORD), DAMAGED),
    "with its record cut": (change(RECORD, cut(0.5)), DAMAGED),
    "with a record of a list": (write(RECORD, "[]"), DAMAGED),
    "with a record of nothing": (write(RECORD, "{}"), DAMAGED),
    "with a record nested deeply": (write(RECORD, "[" * 100_000), DAMAGED),
    "of nobody's run": (
        change_json(RECORD, lambda table: table.update(metadata={})),
        "its checkpoints are not those of a training run",
    ),
    "with an identity of text": (
        change_json(RECORD, lambda table: table["metadata"].update(identity="x")),
        "its checkpoints are not those of a training run",
    ),
    "with an identity of nothing": (
        change_json(RECORD, lambda table: table["metadata"].update(identity={})),
        "its checkpoints are not those of a training run",
    ),
    "without learning rates": (
        change_json(RECORD, lambda table: table["metadata"]["identity"].pop("rates")),
        "its checkpoints are not those of a training run",
    ),
    "with learning rates of text": (
        change_json(RECORD, lambda table: table["metadata"]["identity"].update(rates="x")),
        "its checkpoints are not those of a training run",
    ),
    "with a schedule of text": (
        change_json(
            RECORD, lambda table: table["metadata"]["identity"]["rates"].update(schedule="x")
        ),
        "its checkpoints are not those of a training run",
    ),
    "with sums of text": (
        change_json(RECORD, lambda table: table["metadata"]["interval"].update(loss_sum="x")),
        "its checkpoints are not those of a training run",
    ),
    "of a tree of other arrays": (
        change_json(RECORD, lambda table: table["arrays"].popitem()),
        "is the checkpoint of another model",
    ),
    "with arrays of text": (
        change_json(
            RECORD, lambda table: table["arrays"].update(dict.fromkeys(table["arrays"], 7))
        ),
        "is the checkpoint of another model",
    ),
    "with a fingerprint missing": (
        change_json(RECORD, lambda table: table["fingerprints"].popitem()),
        DAMAGED,
    ),
    "with a fingerprint of text": (
        change_json(RECORD, lambda table: table["fingerprints"].update(step="x")),
        DAMAGED,
    ),
    "half deleted": (
        remove(f"{STEP}/record", f"{STEP}/_CHECKPOINT_METADATA"),
        f"{STEP}: is not a whole checkpoint; delete this folder, and the run resumes from step 1",
    ),
    "of nothing": (
        lambda folder: (folder / "out/checkpoints/5").mkdir(),
        "out/checkpoints/5: is not a whole checkpoint",
    ),
    "of a step it is not": (renamed(STEP, "out/checkpoints/3"), "past steps = 2"),
}
# Folders that are no checkpoints, and half an older one, do not stop a run from resuming.
GOOD_STEPS = {
    "after one half deleted": (
        all_of(remove("out/checkpoints/1/record", "out/validation.json"), remove("out/export")),
        "resumes from step 2",
    ),
    "beside foreign folders": (
        all_of(
            remove(STEP, "out/validation.json", "out/export"),
            write("out/checkpoints/notes/x.txt", "precious"),
            write("out/checkpoints/best/x.txt", "precious"),
        ),
        "resumes from step 1",
    ),
}
MODEL = "checkpoint/checkpoint.json"
TO_HF = words("convert_weights.py to-hf checkpoint new")
TO_JAX = words("convert_weights.py to-jax model new")
CHECK = words("convert_weights.py check model checkpoint")
CONVERSIONS = {
    "of a folder that is not there": (
        words("convert_weights.py to-jax ./absent new"),
        lambda folder: None,
        "absent: there is no such folder",
    ),
    "of a checkpoint as a model": (
        words("convert_weights.py to-jax checkpoint new"),
        lambda folder: None,
        "is an Orbax checkpoint already",
    ),
    "of a model as a checkpoint": (
        words("convert_weights.py to-hf model new"),
        lambda folder: None,
        "is no checkpoint that to-jax wrote",
    ),
    "to a file": (TO_JAX, write("new", "precious"), "new: is a file"),
    "to somebody's folder": (TO_HF, write("new/thesis.txt", "precious"), "new: holds files"),
    "to a name in brackets": (
        words("convert_weights.py to-jax model new[1]"),
        lambda folder: None,
        "cannot lie under a name with '['",
    ),
    "to a name with a star": (
        words("convert_weights.py to-jax model new*"),
        lambda folder: None,
        "cannot lie under a name with '*'",
    ),
    "from a name in brackets": (
        words("convert_weights.py to-hf old[1] new"),
        renamed("checkpoint", "old[1]"),
        "cannot lie under a name with '['",
    ),
    "of pickles": (
        TO_JAX,
        all_of(remove(WEIGHTS), write("model/pytorch_model.bin", "x")),
        "can run code",
    ),
    "of shards that lead outside": (TO_JAX, shards({NORM: "../x.safetensors"}), "no plain *.s"),
    "of weights with a NaN": (TO_JAX, put(NORM, float("nan"), 3), f"{NORM}: 1 of 16 values"),
    "of a broken tokenizer": (TO_JAX, write("model/tokenizer.json", "{}"), "tokenizer.json"),
    "of a record of nothing": (TO_HF, write(MODEL, "{}"), "is not a record of format"),
    "of a record cut short": (TO_HF, change(MODEL, cut(0.5)), "checkpoint.json: is not valid JSON"),
    "of a record with other dtypes": (
        TO_HF,
        change_json(MODEL, lambda table: table["source_dtypes"].update({NORM: "object"})),
        "checkpoint.json: expected dtypes",
    ),
    "of a record with arrays of text": (
        TO_HF,
        change_json(MODEL, lambda table: table["arrays"].update(dict.fromkeys(table["arrays"], 7))),
        "is the checkpoint of another model",
    ),
    "of a record without fingerprints": (
        TO_HF,
        change_json(MODEL, lambda table: table.update(fingerprints={})),
        "is damaged",
    ),
    "of arrays with bits flipped": (TO_HF, arrays(flip, "checkpoint/params"), "is damaged"),
    "of arrays cut short": (TO_HF, arrays(cut(0.5), "checkpoint/params"), "is damaged"),
    "of no arrays": (TO_HF, remove("checkpoint/params"), "is damaged"),
    "of another configuration": (
        TO_HF,
        change_json("checkpoint/config.json", lambda table: table.update(hidden_size=32)),
        "is the checkpoint of another model",
    ),
    "of an unknown class": (
        TO_HF,
        change_json("checkpoint/config.json", lambda table: table.update(architectures=["X"])),
        "architectures",
    ),
    "and a comparison with nothing": (
        words("convert_weights.py check model absent"),
        lambda folder: None,
        "absent: there is no such folder",
    ),
    "and a comparison with an index of pickles": (
        CHECK,
        all_of(remove(WEIGHTS), write(INDEX, json.dumps({"weight_map": {NORM: "a.bin"}}))),
        "no plain *.s",
    ),
    "and a comparison with flipped bits": (CHECK, arrays(flip, "checkpoint/params"), "is damaged"),
}


def cases():
    needs = ("tokenizer", "run.toml", "records.jsonl", "rows", "out")
    train = words("mlmjax train run.toml")
    for name, (spoil, says) in STEPS.items():
        yield Case(f"checkpoint {name}", train, 2, says, needs, spoil, writes=("out/.lock",))
    for name, (spoil, says) in GOOD_STEPS.items():
        yield Case(f"checkpoint {name}", train, 0, says, needs, spoil, writes=OUT)
    for name, (command, spoil, says) in CONVERSIONS.items():
        yield Case(f"conversion {name}", command, 2, says, ("model", "checkpoint"), spoil)


OUT = tuple(
    f"out/{name}"
    for name in ("checkpoints/[0-9]*", "config.json", "export", "*.json*", ".lock", "events.*")
)
