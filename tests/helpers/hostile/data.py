"""Data files from strangers that `prepare` reads, and damaged rows folders."""

import gzip
import io
import json
import random
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
from hostile.case import Case, all_of, change, cut, jsonl, link, remove, update_json, words, write

ROW = {"prompt": "the color: red sun", "answer": "red", "task": "color"}
ROWS = [ROW, {**ROW, "prompt": "the color: blue moon", "answer": "blue"}] * 4
LINES = jsonl(ROWS)
HEADER = "prompt,answer,task\n"
MIB = 2**20


def parquet(table, **options):
    sink = io.BytesIO()
    pq.write_table(pa.table(table), sink, **options)
    return sink.getvalue()


def columns(**changes):
    return {key: [row[key] for row in ROWS] for key in ROW} | changes


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def one(**changes):
    """Return JSONL whose third row differs."""
    return jsonl([*ROWS[:2], {**ROW, **changes}])


def only(**changes):
    return jsonl([ROW | changes])


def prompts(values):
    return parquet(columns(prompt=values))


NOISE = random.Random(0).randbytes(4096)
SMALL = LINES.encode()
BOMB = b"x" * 64 * MIB
PACKED = zstd(NOISE.hex().encode())
FLIPPED = PACKED[:99] + bytes([PACKED[99] ^ 1]) + PACKED[100:]
NOT_TEXT = pa.Array.from_buffers(pa.string(), 8, pa.array([b"\xff"] * 8).buffers())
TWICE = pa.Table.from_arrays([pa.array(["a"])] * 4, ["prompt", "prompt", "answer", "task"])
FEATURES = {"answer": {"names": ["red", "blue"], "_type": "ClassLabel"}}
CLASSES = pa.table(columns(answer=[7] * 8)).replace_schema_metadata(
    {"huggingface": json.dumps({"info": {"features": FEATURES}})}
)
NONE_LEFT, FIRST = "no example is left to train on", "x.parquet row 1: column 'prompt'"
# By file name and content: what the first line must say.
FILES = {
    "JSONL cut in a line": ("x.jsonl", LINES[:-20], "x.jsonl line 8: is not valid JSON"),
    "JSONL empty": ("x.jsonl", "", "x.jsonl: is empty"),
    "JSONL of blank lines": ("x.jsonl", "\n\n \n", "no example is left"),
    "JSONL a list": ("x.jsonl", json.dumps(ROWS), "x.jsonl line 1: holds a JSON list"),
    "JSONL of numbers": ("x.jsonl", "1\n2\n", "x.jsonl line 1: holds a JSON int"),
    "JSONL with a key twice": ("x.jsonl", '{"prompt": "a", "prompt": "b"}\n', "occurs twice"),
    "JSONL nested deeply": ("x.jsonl", "[" * 100_000 + "\n", "x.jsonl line 1: is not valid JSON"),
    "JSONL with a number of 5000 digits": ("x.jsonl", "9" * 5000, "x.jsonl line 1: is not valid"),
    "JSONL not UTF-8": ("x.jsonl", SMALL + b'{"p": "\xff"}\n', "9: is not UTF-8 (byte 8 of the"),
    "JSONL in broken UTF-16": ("x.jsonl", LINES.encode("utf-16")[:-1], "of the file is not UTF-16"),
    "JSONL in UTF-16 without its mark": (
        "x.jsonl",
        LINES.encode("utf-16-le"),
        "1: holds a NUL byte",
    ),
    "JSONL with a NUL": ("x.jsonl", SMALL + b"\0\n", "x.jsonl line 9: holds a NUL byte"),
    "JSONL of noise": ("x.jsonl", NOISE, "x.jsonl line 1: "),
    "JSONL with half a character": ("x.jsonl", one(prompt="\ud800"), "'prompt': holds half a char"),
    "JSONL with half an answer": ("x.jsonl", one(answer="\udfff"), "'answer': holds half a char"),
    "JSONL with half a task": ("x.jsonl", one(task="\udfff"), "'task': holds half a char"),
    "JSONL with a line of 33 MiB": ("x.jsonl", LINES + "x" * 33 * MIB, "line 9: is longer than 32"),
    "JSONL without a column": ("x.jsonl", '{"prompt": "a"}\n', "has no column 'answer'"),
    "JSONL without a column in one row": ("x.jsonl", LINES + "{}", "x.jsonl line 9: has no column"),
    "JSONL with a null": ("x.jsonl", one(prompt=None), "line 3: column 'prompt' is null"),
    "JSONL with a number": ("x.jsonl", one(prompt=7), "line 3: column 'prompt' is int (7)"),
    "JSONL with an answer of true": ("x.jsonl", one(answer=True), "column 'answer' is bool"),
    "JSONL with a list": ("x.jsonl", one(prompt=["a"]), "column 'prompt' is list"),
    "JSONL with an object": ("x.jsonl", one(answer={"a": 1}), "give labels to name"),
    "JSONL with a task of nothing": ("x.jsonl", one(task=None), "line 3: column 'task' names no"),
    "JSONL with a task of spaces": ("x.jsonl", one(task="  "), "line 3: column 'task' names no"),
    "JSONL with no answer of one token": ("x.jsonl", only(answer="red blue green"), NONE_LEFT),
    "JSONL with a special token for an answer": ("x.jsonl", only(answer="[MASK]"), NONE_LEFT),
    "JSONL with prompts too long": ("x.jsonl", only(prompt="sun " * 99), "prompt too long"),
    "CSV of a header alone": ("x.csv", HEADER, "no example is left"),
    "CSV without a header": ("x.csv", "a b,red,color\n", "has no column 'prompt'"),
    "CSV with a header twice": ("x.csv", "prompt,prompt,answer,task\n", "has 'prompt' twice"),
    "CSV with a field too few": ("x.csv", HEADER + "a,red\n", "x.csv line 2: has 2 fields"),
    "CSV with a field too many": ("x.csv", HEADER + "a,b,red,color\n", "line 2: has 4 fields"),
    "CSV with an open quote": ("x.csv", HEADER + '"a,red,color\n', "x.csv line 2: is not valid"),
    "CSV with text after a quote": ("x.csv", HEADER + '"a"b,red,x\n', "is not valid CSV"),
    "CSV with a NUL": ("x.csv", HEADER + "a\0,red,x\n", "x.csv line 2: holds a NUL byte"),
    "CSV in Latin-1": ("x.csv", HEADER.encode() + b"caf\xe9,red,x\n", "x.csv line 2: is not UTF-8"),
    "CSV of merged lines": (
        "x.csv",
        HEADER + '"a,red,color\nb,red,color\nc",red,color\n',
        "so 3 lines make one record",
    ),
    "text with columns asked for": ("x.txt", "some text\n", "has no column 'prompt'"),
    "parquet empty": ("x.parquet", "", "x.parquet: is empty"),
    "parquet cut short": ("x.parquet", parquet(columns())[:-9], "x.parquet: cannot be read"),
    "parquet without a footer": ("x.parquet", parquet(columns())[:300], "x.parquet: cannot be r"),
    "parquet of noise": ("x.parquet", NOISE, "x.parquet: cannot be read"),
    "parquet of noise between marks": ("x.parquet", b"PAR1" + NOISE + b"PAR1", "cannot be read"),
    "parquet that is JSONL": ("x.parquet", LINES, "x.parquet: cannot be read"),
    "parquet without a column": ("x.parquet", parquet({"prompts": ["a"]}), "mean 'prompts'?"),
    "parquet with nulls": ("x.parquet", prompts([None] * 8), f"{FIRST} is null"),
    "parquet with numbers": ("x.parquet", prompts(list(range(8))), f"{FIRST} is int"),
    "parquet with nested columns": ("x.parquet", prompts([{"text": "a"}] * 8), f"{FIRST} is dict"),
    "parquet with bytes": ("x.parquet", prompts([b"a"] * 8), f"{FIRST} is bytes"),
    "parquet with text not UTF-8": ("x.parquet", prompts(NOT_TEXT), f"{FIRST}: is not UTF-8"),
    "parquet with a column twice": ("x.parquet", parquet(TWICE), "has the column 'prompt' twice"),
    "parquet with a class out of range": ("x.parquet", parquet(CLASSES), "is class 7; expected 0"),
    "parquet compressed again": ("x.parquet.gz", gzip.compress(b"x"), "unknown kind of file"),
    "zst cut short": ("x.jsonl.zst", zstd(SMALL * 99)[:-9], "line 1: cannot be read: Trunc"),
    "zst of noise": ("x.jsonl.zst", NOISE, "x.jsonl.zst line 1: cannot be read"),
    "zst with a flipped byte": ("x.jsonl.zst", FLIPPED, "x.jsonl.zst"),
    "zst that is a bomb": ("x.jsonl.zst", zstd(BOMB), "x.jsonl.zst line 1: is longer than 32 MiB"),
    "gz that is a bomb": ("x.jsonl.gz", gzip.compress(BOMB, 1), "x.jsonl.gz line 1: is longer"),
    "gz cut short": ("x.jsonl.gz", gzip.compress(SMALL)[:-9], "1: cannot be read: Truncated"),
    "gz of noise": ("x.jsonl.gz", NOISE, "x.jsonl.gz line 1: cannot be read"),
    "gz empty inside": ("x.jsonl.gz", gzip.compress(b""), "no example is left"),
    "pickle": ("x.pkl", b"cos\nsystem\n(S'false'\ntR.", "x.pkl: unknown kind of file; expected a"),
    "no ending": ("records", LINES, "unknown kind of file"),
}
INJECTED = (
    "[MASK ]",
    "[unused0] [unused0]",
    "[SEP][CLS][PAD]",
    "- A: yes\n- B: no\nANSWER: [unused0]",
    "{prompt} {options} {{ }}",
    "\u202eright to left\u202c \u200b\U0001f600\x07",
)
# Odd but correct files: all eight examples must be read.
GOOD_FILES = {
    "with a byte order mark": ("x.jsonl", b"\xef\xbb\xbf" + SMALL),
    "with CRLF": ("x.jsonl", LINES.replace("\n", "\r\n")),
    "without a last line end": ("x.jsonl", LINES[:-1]),
    "with blank lines": ("x.jsonl", LINES.replace("\n", "\n\n")),
    "with other columns": ("x.jsonl", jsonl({**row, "more": [{}]} for row in ROWS)),
    "CSV with a byte order mark and CRLF": (
        "x.csv",
        b"\xef\xbb\xbf" + (HEADER + 'a,red,"x,\r\ny"\n' * 8).replace("\n", "\r\n").encode(),
    ),
    "CSV with semicolons": ("x.csv", (HEADER + "a,red,x\n" * 8).replace(",", ";")),
    "TSV that is CSV": ("x.tsv", HEADER + "a,red,x\n" * 8),
    "CSV with line ends of old Macs": ("x.csv", (HEADER + "a,red,x\n" * 8).replace("\n", "\r")),
    "gz": ("x.jsonl.gz", gzip.compress(SMALL)),
    "zst": ("x.jsonl.zst", zstd(SMALL)),
    "parquet": ("x.parquet", parquet(columns())),
    "parquet of large strings": ("x.parquet", prompts(pa.array(["a b"] * 8, pa.large_string()))),
    "with prompts that imitate the template": (
        "x.jsonl",
        jsonl({**ROW, "prompt": (INJECTED * 2)[i]} for i in range(8)),
    ),
}
# By overrides: what the first line must say about the good records.
SOURCES = {
    "that is not there": (["path=absent.jsonl"], "absent.jsonl: no file matches"),
    "that is a folder": (["path=tokenizer"], "tokenizer: is a folder"),
    "of a glob that matches nothing": (["path=*.csv"], "*.csv: no file matches"),
    "whose label is not listed": (['labels=["red", "blue"]'], "expected one of 'red', 'blue'"),
    "whose label no table lists": (
        ['labels={ red = "A", green = "B" }'],
        "which labels does not list",
    ),
    "with one label": (['labels=["red"]'], "labels"),
    "with a label twice": (['labels=["red", "red"]'], "labels"),
    "with a label of many tokens": (['labels=["red blue", "green"]'], "labels"),
    "without a field in its prompt": (["prompt=fixed"], "names no column of the records"),
    "with two slots": (["prompt={prompt} [unused0] [MASK] [unused0] [MASK]"], "has 2 [MASK]"),
    "with a slot without an anchor": (["prompt={prompt} [MASK]"], "directly after [unused0]"),
    "with an open brace": (["prompt={prompt"], "single '{'"),
    "with a format in its field": (["prompt={prompt!r}"], "is not a field"),
    "with options that are no list": (["prompt={prompt} {options}"], "column 'options'"),
    "with a column that is not there": (["prompt={promt}"], "did you mean 'prompt'?"),
    "that shortens no field": (['shorten={ prompts = "tail" }'], "prompts"),
    "both here and of the hub": (["hub=x/y"], "exactly one of path"),
}
ROWS_FILE = "rows/train/0.arrow"
MANIFEST = "rows/manifest.json"


def flip(data):
    """Change one bit in the first token of every row."""
    changed, whole = bytearray(data), pa.py_buffer(data)
    tokens = pa.ipc.open_file(whole).get_batch(0).column("tokens")
    start = tokens.values.buffers()[1].address - whole.address
    for offset in tokens.offsets[:-1].to_pylist():
        changed[start + 2 * offset] ^= 1
    return bytes(changed)


manifest = partial(update_json, MANIFEST)
entry = partial(update_json, MANIFEST, "splits", "train", 0)
DAMAGED = "row file is damaged: "
FOLDERS = {
    "cut short": (change(ROWS_FILE, cut(0.5)), DAMAGED),
    "with a bit flipped": (change(ROWS_FILE, flip), DAMAGED),
    "with noise of the same size": (
        change(ROWS_FILE, lambda data: random.Random(0).randbytes(len(data))),
        DAMAGED,
    ),
    "with a file missing": (remove(ROWS_FILE), DAMAGED),
    "with a split missing": (remove("rows/train"), DAMAGED),
    "without a manifest": (remove(MANIFEST), "manifest.json: cannot be read"),
    "with a manifest cut short": (change(MANIFEST, cut(0.5)), "manifest.json: is not valid JSON"),
    "with a manifest nested deeply": (write(MANIFEST, "[" * 100_000), "is not valid JSON"),
    "with a manifest of a list": (write(MANIFEST, "[]"), "holds a JSON list"),
    "with a manifest of another format": (manifest(format=99), "rows of format 99"),
    "with a manifest of wrong types": (entry(rows="many"), "is not a manifest of rows"),
    "with a manifest of a negative number": (entry(rows=-1), "is not a manifest of rows"),
    "with a manifest of more rows": (entry(rows=10**6), DAMAGED),
    "with a manifest that leads outside": (
        all_of(
            lambda folder: (folder / ROWS_FILE).rename(folder / "0.arrow"),
            entry(file="../../0.arrow"),
        ),
        "leads out of the rows folder",
    ),
    "with a manifest of another vocabulary": (manifest(vocab_size=9), DAMAGED),
    "with a manifest of one task": (manifest(tasks=["color"]), DAMAGED),
    "with a manifest of longer rows": (manifest(seq_length=8), "rows"),
    "of another configuration": (manifest("config", seq_length=64), "holds rows made differently"),
    "of another tokenizer": (manifest(tokenizer_sha256="0" * 64), "the tokenizer's sha256"),
    "of changed records": (write("records.jsonl", LINES), "records.jsonl has changed since"),
    "that are a file": (all_of(remove("rows"), write("rows", "precious")), "rows"),
    "that are somebody else's": (
        all_of(remove("rows"), write("rows/thesis.txt", "precious")),
        "rows/manifest.json: cannot be read",
    ),
    "that are a link to nowhere": (link("rows", "nowhere"), "rows"),
    "with something in the way of a new one": (
        all_of(remove("rows"), write("rows.partial/thesis.txt", "precious")),
        "is not an unfinished folder of mlmjax",
    ),
}


def cases():
    needs = ("tokenizer", "run.toml")
    prepare = words("mlmjax prepare run.toml")
    for name, (file, content, says) in FILES.items():
        command = (*prepare, f"data.sources.0.path={file}")
        yield Case(f"data {name}", command, 2, says, needs, write(file, content))
    for name, (file, content) in GOOD_FILES.items():
        command = (*prepare, f"data.sources.0.path={file}", "data.seq_length=64")
        says, writes = "8 records, 8 examples", ("rows",)
        yield Case(f"data {name}", command, 0, says, needs, write(file, content), writes=writes)
    for name, (overrides, says) in SOURCES.items():
        command = (*prepare, *(f"data.sources.0.{text}" for text in overrides))
        yield Case(f"source {name}", command, 2, says, (*needs, "records.jsonl"))
    needs = (*needs, "records.jsonl", "rows")
    for name, (spoil, says) in FOLDERS.items():
        command = words("mlmjax train run.toml")
        yield Case(f"rows {name}", command, 2, says, needs, spoil, writes=("out",))
