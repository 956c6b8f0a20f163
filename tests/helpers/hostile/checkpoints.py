"""Checkpoints that are damaged or from strangers, and the tool that converts them."""

import json
import random
import shutil
from functools import partial

from hostile.case import Case, all_of, change, change_json, cut, remove, update_json, words, write
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


def pop(key):
    """Remove the last entry of a table of the record."""
    return change_json(RECORD, lambda table: table[key].popitem())


def numbers(table):
    """Put a number in the place of every array."""
    table["arrays"] = dict.fromkeys(table["arrays"], 7)


record = partial(update_json, RECORD)
DAMAGED = f"{STEP}: the checkpoint of step 2 is damaged"
NO_RUN = "its checkpoints are not those of a training run"
OTHER = "is the checkpoint of another model"
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
    "of nobody's run": (record(metadata={}), NO_RUN),
    "with an identity of text": (record("metadata", identity="x"), NO_RUN),
    "with an identity of nothing": (record("metadata", identity={}), NO_RUN),
    "without learning rates": (
        change_json(RECORD, lambda table: table["metadata"]["identity"].pop("rates")),
        NO_RUN,
    ),
    "with learning rates of text": (record("metadata", "identity", rates="x"), NO_RUN),
    "with a schedule of text": (record("metadata", "identity", "rates", schedule="x"), NO_RUN),
    "with sums of text": (record("metadata", "interval", loss_sum="x"), NO_RUN),
    "of a tree of other arrays": (pop("arrays"), OTHER),
    "with arrays of text": (change_json(RECORD, numbers), OTHER),
    "with a fingerprint missing": (pop("fingerprints"), DAMAGED),
    "with a fingerprint of text": (record("fingerprints", step="x"), DAMAGED),
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
MODEL, CONFIG = "checkpoint/checkpoint.json", "checkpoint/config.json"
TO_HF, TO_JAX, CHECK = "to-hf checkpoint new", "to-jax model new", "check model checkpoint"
NO_FOLDER, BRACKET = "absent: there is no such folder", "cannot lie under a name with '['"
PICKLES = all_of(remove(WEIGHTS), write("model/pytorch_model.bin", "x"))
PICKLED = all_of(remove(WEIGHTS), write(INDEX, json.dumps({"weight_map": {NORM: "a.bin"}})))
CONVERSIONS = {
    "of a folder that is not there": ("to-jax ./absent new", remove(), NO_FOLDER),
    "of a checkpoint as a model": ("to-jax checkpoint new", remove(), "Orbax checkpoint already"),
    "of a model as a checkpoint": ("to-hf model new", remove(), "no checkpoint that to-jax wrote"),
    "to a file": (TO_JAX, write("new", "precious"), "new: is a file"),
    "to somebody's folder": (TO_HF, write("new/thesis.txt", "precious"), "new: holds files"),
    "to a name in brackets": ("to-jax model new[1]", remove(), BRACKET),
    "to a name with a star": ("to-jax model new*", remove(), "cannot lie under a name with '*'"),
    "from a name in brackets": ("to-hf old[1] new", renamed("checkpoint", "old[1]"), BRACKET),
    "of pickles": (TO_JAX, PICKLES, "can run code"),
    "of shards that lead outside": (TO_JAX, shards({NORM: "../x.safetensors"}), "no plain *.s"),
    "of weights with a NaN": (TO_JAX, put(NORM, float("nan"), 3), f"{NORM}: 1 of 16 values"),
    "of a broken tokenizer": (TO_JAX, write("model/tokenizer.json", "{}"), "tokenizer.json"),
    "of a record of nothing": (TO_HF, write(MODEL, "{}"), "is not a record of format"),
    "of a record cut short": (TO_HF, change(MODEL, cut(0.5)), "checkpoint.json: is not valid JSON"),
    "of a record with other dtypes": (
        TO_HF,
        update_json(MODEL, "source_dtypes", **{NORM: "object"}),
        "checkpoint.json: expected dtypes",
    ),
    "of a record with arrays of text": (TO_HF, change_json(MODEL, numbers), OTHER),
    "of a record without fingerprints": (TO_HF, update_json(MODEL, fingerprints={}), "is damaged"),
    "of arrays with bits flipped": (TO_HF, arrays(flip, "checkpoint/params"), "is damaged"),
    "of arrays cut short": (TO_HF, arrays(cut(0.5), "checkpoint/params"), "is damaged"),
    "of no arrays": (TO_HF, remove("checkpoint/params"), "is damaged"),
    "of another configuration": (TO_HF, update_json(CONFIG, hidden_size=32), OTHER),
    "of an unknown class": (TO_HF, update_json(CONFIG, architectures=["X"]), "architectures"),
    "and a comparison with nothing": ("check model ./absent", remove(), NO_FOLDER),
    "and a comparison with an index of pickles": (CHECK, PICKLED, "no plain *.s"),
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
        command = words(f"convert_weights.py {command}")
        yield Case(f"conversion {name}", command, 2, says, ("model", "checkpoint"), spoil)


OUT = tuple(
    f"out/{name}"
    for name in ("checkpoints/[0-9]*", "config.json", "export", "*.json*", ".lock", "events.*")
)
