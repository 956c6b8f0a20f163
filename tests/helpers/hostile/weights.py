"""Weights from strangers: false headers, shards outside the folder, pickles."""

import functools
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
from hostile.case import Case, all_of, change, cut, link, remove, words, write
from safetensors.numpy import load_file, save_file

WEIGHTS, INDEX = "model/model.safetensors", "model/model.safetensors.index.json"
EMBEDDING, DECODER = "model.embeddings.tok_embeddings.weight", "decoder.weight"
NORM, DENSE = "model.final_norm.weight", "head.dense.weight"
CLASSIFY = words("mlmjax classify --model model --labels red,blue texts.txt")
PICKLE = b"cos\nsystem\n(S'false'\ntR."


def tensors(function):
    """Change the tensors of the model."""

    def spoil(folder):
        table = load_file(folder / WEIGHTS)
        function(table)
        save_file(table, folder / WEIGHTS)

    return spoil


def put(name, value, index=None):
    def function(table):
        if index is None:
            table[name] = value(table) if callable(value) else value
        else:
            table[name][index] = value

    return tensors(function)


def renamed(function):
    """Rename every tensor."""

    def change_names(table):
        names = {function(name): value for name, value in table.items()}
        table.clear()
        table.update(names)

    return tensors(change_names)


def cast(name, dtype):
    return put(name, lambda table: table[name].astype(dtype))


def header(function):
    """Rewrite the JSON header and its length; leave the data unchanged."""

    def rewrite(data):
        (length,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + length])
        table = function(table) or table
        text = table if isinstance(table, bytes) else json.dumps(table).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return change(WEIGHTS, rewrite)


def entry(**values):
    """Change what the header says about one tensor."""
    return header(lambda table: table[NORM].update(values))


def overlap(table):
    table[NORM]["data_offsets"] = table[EMBEDDING]["data_offsets"]


def key_twice(table):
    text = json.dumps(table)
    return (text[:-1] + f', "{NORM}": {json.dumps(table[NORM])}}}').encode()


def shards(weight_map=None, second=None, keep=False):
    """Split the weights into two shards, then spoil the index or a shard."""

    def spoil(folder):
        table = load_file(folder / WEIGHTS)
        if not keep:
            os.remove(folder / WEIGHTS)
        files = {n: "b.safetensors" if ".0." in n else "a.safetensors" for n in table}
        parts = {f: {n: x for n, x in table.items() if files[n] == f} for f in files.values()}
        if second:
            second(parts)
        for file, part in parts.items():
            save_file(part, folder / "model" / file)
        (folder / INDEX).write_text(json.dumps({"weight_map": files | (weight_map or {})}))

    return spoil


def outside(name, base=".."):
    """Move a file out of the model, and leave a link to it."""

    def spoil(folder):
        (folder / "outside").mkdir()
        shutil.move(folder / "model" / name, folder / "outside" / name)
        (folder / "model" / name).symlink_to(f"{base.format(folder=folder)}/outside/{name}")

    return spoil


def pickle_only(name):
    return all_of(remove(WEIGHTS), write(f"model/{name}", PICKLE))


def instead(make):
    """Put what `make` makes in the place of the weights."""
    return all_of(remove(WEIGHTS), lambda folder: make(folder / WEIGHTS))


LIE = struct.pack("<Q", 2**60)
INDEX_NAME, OUTSIDE = "model.safetensors.index.json", "outside its folder"
TRUNCATED, NOT_WHOLE, NO_NAMES = "truncated or no safetensors", "not a whole safet", "no plain *.s"
SPOILS = {
    "truncated data": (change(WEIGHTS, lambda data: data[:-7]), NOT_WHOLE),
    "truncated header": (change(WEIGHTS, lambda data: data[:100]), TRUNCATED),
    "truncated length": (change(WEIGHTS, lambda data: data[:5]), TRUNCATED),
    "truncated in the middle": (change(WEIGHTS, cut(0.5)), NOT_WHOLE),
    "empty file": (write(WEIGHTS, b""), TRUNCATED),
    "length of the header a lie": (change(WEIGHTS, lambda data: LIE + data[8:]), TRUNCATED),
    "header no JSON": (header(lambda table: b"x" * 200), NOT_WHOLE),
    "header not UTF-8": (header(lambda table: b'{"\xff": 1}'), NOT_WHOLE),
    "header nested deeply": (header(lambda table: b"[" * 100_000), NOT_WHOLE),
    "header too long": (header(lambda table: b" " * (17 * 2**20)), "has a header of"),
    "header with a key twice": (header(key_twice), f"key '{NORM}' occurs twice"),
    "offsets beyond the file": (entry(data_offsets=[0, 2**40]), NOT_WHOLE),
    "offsets negative": (entry(data_offsets=[-64, 0]), NOT_WHOLE),
    "offsets backwards": (entry(data_offsets=[128, 64]), NOT_WHOLE),
    "offsets that overlap": (header(overlap), NOT_WHOLE),
    "shape of 10^12": (entry(shape=[10**12]), NOT_WHOLE),
    "shape that overflows": (entry(shape=[2**62, 4, 4]), NOT_WHOLE),
    "shape negative": (entry(shape=[-16]), NOT_WHOLE),
    "shape of text": (entry(shape="16"), NOT_WHOLE),
    "unknown dtype": (entry(dtype="F31"), NOT_WHOLE),
    "bytes after the end": (change(WEIGHTS, lambda data: data + b"evil"), NOT_WHOLE),
    "a pickle by another name": (write(WEIGHTS, PICKLE * 9), TRUNCATED),
    "missing tensor": (tensors(lambda table: table.pop(NORM)), f"{NORM}: is missing"),
    "unexpected tensor": (
        put("model.layers.7.mlp.Wi.weight", np.ones(3, "f4")),
        "model.layers.7.mlp.Wi.weight: is unexpected",
    ),
    "no tensors at all": (lambda folder: save_file({}, folder / WEIGHTS), "are missing for all"),
    "wrong shape": (put(NORM, np.ones(8, "f4")), f"{NORM}: has shape [8]; expected [16]"),
    "transposed": (
        put("model.layers.0.mlp.Wo.weight", np.ones((12, 16), "f4")),
        "mlp.Wo.weight: has shape [12, 16]; expected [16, 12]",
    ),
    "no dimensions": (put(NORM, np.ones((), "f4")), f"{NORM}: has shape []; expected [16]"),
    "int8": (cast(DENSE, "i1"), f"{DENSE}: has dtype I8"),
    "bool": (cast(DENSE, bool), f"{DENSE}: has dtype BOOL"),
    "NaN": (put(DENSE, np.nan, (3, 4)), f"{DENSE}: 1 of 256 values"),
    "infinite": (put(EMBEDDING, np.inf, (3, 4)), f"{EMBEDDING}: 1 of 6144 values are NaN or inf"),
    "decoder that differs": (
        put(DECODER, lambda table: table[EMBEDDING] + np.float32(1e-7)),
        "set tie_word_embeddings to false",
    ),
    "encoder alone": (
        tensors(lambda table: [table.pop(n) for n in [*table] if n[:6] != "model."]),
        "the weights of an encoder (ModernBertModel), which has no head",
    ),
    "decoder of another shape": (put(DECODER, np.ones((4, 16), "f4")), f"{DECODER}: has shape [4"),
    "index with a path": (shards({NORM: "../../x.safetensors"}), NO_NAMES),
    "index with an absolute path": (shards({NORM: "/etc/x.safetensors"}), NO_NAMES),
    "index with a Windows path": (shards({NORM: "c:\\x.safetensors"}), NO_NAMES),
    "index with a folder": (shards({NORM: "sub/a.safetensors"}), NO_NAMES),
    "index with a pickle": (shards({NORM: "a.bin"}), NO_NAMES),
    "index with a number": (shards({NORM: 7}), NO_NAMES),
    "index with an absent shard": (shards({NORM: "c.safetensors"}), "c.safetensors: is missing"),
    "index with the wrong shard": (shards({NORM: "b.safetensors"}), "is in a.safetensors, though"),
    "index with a tensor that is nowhere": (
        shards({"x.y": "b.safetensors"}),
        "x.y: is missing, th",
    ),
    "one tensor in two shards": (
        shards(second=lambda parts: parts["b.safetensors"].update({NORM: np.ones(16, "f4")})),
        f"{NORM}: is in both a.safetensors and b.safetensors",
    ),
    "index without a map": (all_of(shards(), write(INDEX, "{}")), "has no weight_map"),
    "index with a list": (all_of(shards(), write(INDEX, '{"weight_map": []}')), "has no weight_m"),
    "index no JSON": (all_of(shards(), write(INDEX, "{")), "is not valid JSON"),
    "index linked from outside": (all_of(shards(), outside(INDEX_NAME)), OUTSIDE),
    "shard linked from outside": (all_of(shards(), outside("a.safetensors")), OUTSIDE),
    "linked from outside": (outside("model.safetensors", "{folder}"), OUTSIDE),
    "linked by a relative path": (outside("model.safetensors"), OUTSIDE),
    "link in a circle": (link(WEIGHTS, "model.safetensors"), "model.safetensors: "),
    "dangling link": (link(WEIGHTS, "nowhere.safetensors"), "is missing"),
    "link to a device": (link(WEIGHTS, "/dev/zero"), OUTSIDE),
    "a folder": (instead(Path.mkdir), "is missing"),
    "a pipe": (instead(os.mkfifo), "is missing"),
    "none": (remove(WEIGHTS), "holds no weights"),
    "pickle only": (pickle_only("pytorch_model.bin"), "can run code"),
    "checkpoint pickle only": (pickle_only("last.ckpt"), "last.ckpt"),
    "msgpack only": (pickle_only("flax_model.msgpack"), "flax_model.msgpack"),
    "npz only": (pickle_only("weights.npz"), "weights.npz"),
}
GOOD = {
    "compiled by torch": renamed("_orig_mod.{}".format),
    "in two wrappers": renamed("module._orig_mod.{}".format),
    "compiled by layers": renamed(lambda name: name.replace(".attn.", ".attn._orig_mod.")),
    "part of a larger model": renamed("model.{}".format),
    "part of a model by another name": renamed("student.net.{}".format),
    "with an encoder without its prefix": renamed(lambda name: name.removeprefix("model.")),
    "with a pickle beside them": write("model/pytorch_model.bin", PICKLE),
    "in two shards": shards(),
    "with an evil index beside them": write(INDEX, '{"weight_map": {"a": "../evil.safetensors"}}'),
    "in half precision": functools.reduce(
        all_of, [cast(name, "f2") for name in (NORM, DENSE, EMBEDDING)]
    ),
}


def cases():
    needs = ("model", "texts.txt")
    for name, (spoil, says) in SPOILS.items():
        yield Case(f"weights {name}", CLASSIFY, 2, says, needs, spoil)
    for name, spoil in GOOD.items():
        yield Case(f"weights {name}", CLASSIFY, 0, '"label"', needs, spoil)
