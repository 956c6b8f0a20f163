"""Data files: every format read alike; every kind of damage refused with file and line."""

import doctest
import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlmjax import InputError
from mlmjax.config import SourceConfig
from mlmjax.data import files
from mlmjax.data.files import Record, read_file
from mlmjax.data.sources import read_source, source_files

ROWS = [
    {"text": "one, two", "label": "a"},
    {"text": 'say "yes"\nand go', "label": "b"},
    {"text": "naïve 日本", "label": "a"},
]


def test_examples_in_the_documentation():
    assert doctest.testmod(files).failed == 0


def test_importing_the_package_does_not_import_jax():
    code = "import sys, mlmjax.data.prepare, mlmjax.data.loader; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def jsonl(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CSV = 'text,label\n"one, two",a\n"say ""yes""\nand go",b\nnaïve 日本,a\n'.encode()
TSV = 'text\tlabel\none, two\ta\n"say ""yes""\nand go"\tb\nnaïve 日本\ta\n'.encode()


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", jsonl()),
        ("a.ndjson", b"\xef\xbb\xbf" + jsonl().replace(b"\n", b"\r\n\n")),
        ("a.jsonl.zst", zstd(jsonl()[:40]) + zstd(jsonl()[40:])),
        ("a.JSON.gz", gzip.compress(jsonl()[:40]) + gzip.compress(jsonl()[40:])),
        ("a.csv", CSV),
        ("b.v2.csv", b"\xef\xbb\xbf" + CSV),
        ("a.csv.zst", zstd(CSV)),
        ("a.tsv", TSV),
    ],
)
def test_text_formats_agree(tmp_path, name, data):
    records = list(read_file(write(tmp_path, name, data), ["text", "label"]))
    assert [record.fields for record in records] == ROWS
    assert f"{tmp_path / name} line " in records[0].where


def test_lines_are_counted_as_an_editor_does(tmp_path):
    path = write(tmp_path, "a.csv", CSV)
    assert [record.where.split()[-1] for record in read_file(path)] == ["2", "3", "5"]
    path = write(tmp_path, "a.jsonl", b"\n" + jsonl())
    assert [record.where.split()[-1] for record in read_file(path)] == ["2", "3", "4"]


def test_parquet_gives_needed_columns_and_class_names(tmp_path):
    path = tmp_path / "a.parquet"
    schema = pa.schema(
        [("text", pa.large_string()), ("label", pa.int64()), ("other", pa.list_(pa.int8()))],
        metadata={
            "huggingface": json.dumps(
                {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
            )
        },
    )
    pq.write_table(pa.table([["x", "y"], [1, 0], [[], [3]]], schema=schema), path)
    assert list(read_file(path, ["text", "label"])) == [
        Record({"label": 1, "text": "x"}, f"{path} row 1"),
        Record({"label": 0, "text": "y"}, f"{path} row 2"),
    ]
    assert [r.fields for r in read_file(path, ["label"], named=["label"])] == [
        {"label": "yes"},
        {"label": "no"},
    ]
    assert next(iter(read_file(path))).fields == {"text": "x", "label": 1, "other": []}


def test_a_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraphs = ["".join(f"line {i} of {p}.\n" for i in range(300)) + "\n" for p in range(60)]
    text = "".join(paragraphs)
    records = list(read_file(write(tmp_path, "a.txt", text.encode()), ["text"]))
    assert "".join(record.fields["text"] for record in records) == text
    assert len(records) > 2
    for record in records[:-1]:
        assert len(record.fields["text"]) >= files.TEXT_BLOCK
        assert record.fields["text"].endswith("\n\n")
    assert records[1].where.endswith(f"line {records[0].fields['text'].count(chr(10)) + 1}")


LONG = b'{"text": "' + b"a" * 2000 + b'"}\n'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: is empty"),
        ("a.jsonl", jsonl() + b'{"text": "x"', "a.jsonl line 4: is not valid JSON"),
        ("a.jsonl", b"[1, 2]\n", "a.jsonl line 1: is a JSON list; expected one object per line"),
        (
            "a.jsonl",
            b'{"text": "x", "text": "y"}',
            "line 1: is not valid JSON .key .text. stands twice",
        ),
        (
            "a.jsonl",
            b'{"text": "x", "labels": "a"}\n',
            "line 1: has no column 'label'; did you mean 'labels'?",
        ),
        (
            "a.jsonl",
            jsonl() + b'{"text": "\xff"}\n',
            "a.jsonl line 4: is not UTF-8 .byte 11 of the line is 0xff",
        ),
        ("a.jsonl", jsonl() + b"\0\0", "a.jsonl line 4: holds a NUL byte"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "a.jsonl line 1: holds a NUL byte"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1: is longer than"),
        ("a.jsonl", b"[" * 900, "a.jsonl line 1: is not valid JSON"),
        ("a.jsonl", LONG, "a.jsonl line 1: is longer than"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl line 1: is longer than"),
        ("a.jsonl.zst", zstd(jsonl())[:-2], "a.jsonl.zst: cannot be read: Truncated"),
        ("a.jsonl.gz", gzip.compress(jsonl())[:-9], "a.jsonl.gz: cannot be read: Truncated"),
        ("a.jsonl.zst", jsonl(), "a.jsonl.zst: cannot be read"),
        ("a.csv", b"text,label,text\n", "a.csv line 1: the header has 'text' twice"),
        ("a.csv", b"text,lable\n", "a.csv line 1: has no column 'label'; did you mean 'lable'"),
        ("a.csv", CSV + b"x\n", "a.csv line 6: has 1 fields, the header has 2: text, label"),
        ("a.csv", CSV + b'"x,a\n', "a.csv line 6: is not valid CSV"),
        ("a.csv", CSV + b"\xe9,a\n", "a.csv line 6: is not UTF-8"),
        ("a.txt", b"text", "a.txt: has no column 'label'"),
        ("a.parquet", b"PAR1 and so on PAR1", "a.parquet: cannot be read"),
        ("a.xlsx", b"x", "a.xlsx: unknown kind of file; expected a name that ends in .parquet"),
        ("a.parquet.zst", b"x", "unknown kind of file"),
        ("noname", b"x", "unknown kind of file"),
    ],
)
def test_damage_is_refused_by_file_and_line(tmp_path, monkeypatch, name, data, message):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
    with pytest.raises(InputError, match=message) as caught:
        list(read_file(write(tmp_path, name, data), ["text", "label"]))
    assert "\n" not in caught.value.message


def test_records_before_the_damage_were_already_given(tmp_path):
    stream = read_file(write(tmp_path, "a.jsonl", jsonl() + b"x"))
    assert [next(stream).fields for _ in range(3)] == ROWS
    with pytest.raises(InputError, match="line 4"):
        next(stream)


def test_parquet_text_that_is_not_utf8_names_the_row(tmp_path):
    path = tmp_path / "a.parquet"
    raw = pa.array([b"fine", b"\xff\xfe"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": text}), path)
    with pytest.raises(InputError, match="row 2: column 'text': is not UTF-8"):
        list(read_file(path))


def test_a_truncated_parquet_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(1000)]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read"):
        list(read_file(path))


def source(path, **settings):
    return SourceConfig(path=str(path), prompt="{text}", answer="label", **settings)


def test_a_glob_reads_files_in_sorted_order_up_to_the_limit(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        write(tmp_path, name, jsonl([{"text": f"{name}{i}", "label": "x"} for i in range(2)]))
    (tmp_path / "folder.jsonl").mkdir()
    found = source_files(source(tmp_path / "*.jsonl"))
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    texts = [r.fields["text"] for r in read_source(source(tmp_path / "*.jsonl", limit=3))]
    assert texts == ["a.jsonl0", "a.jsonl1", "b.jsonl0"]


def test_a_name_with_glob_characters_is_taken_as_it_is(tmp_path):
    path = write(tmp_path, "data[1].jsonl", jsonl())
    assert source_files(source(path)) == [path]


@pytest.mark.parametrize(("name", "message"), [("no*.csv", "no file matches"), ("", "is a folder")])
def test_a_path_without_files_is_refused(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        source_files(source(tmp_path / name))


@pytest.fixture
def hub(tmp_path):
    """A folder that `datasets` reads as it reads a dataset of the hub."""
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())])
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.table([["x", "y"], [1, 0]], schema=schema), folder / "data/train-0.parquet")
    readme = (
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n"
        "    dtype:\n      class_label:\n        names:\n          '0': bad\n          '1': good\n"
        "---\n"
    )
    (folder / "README.md").write_text(readme)
    return folder


def hub_source(hub, **settings):
    return SourceConfig(hub=str(hub), prompt="{text}", answer="label", **settings)


def test_a_hub_dataset_is_streamed(hub, caplog):
    records = list(read_source(hub_source(hub), ["text", "label"], named=["label"]))
    assert [r.fields for r in records] == [
        {"text": "x", "label": "good"},
        {"text": "y", "label": "bad"},
    ]
    assert records[1].where.endswith("train row 2")
    assert "no revision is set" in caplog.text
    assert [r.fields["label"] for r in read_source(hub_source(hub, limit=1))] == [1]


@pytest.mark.parametrize(
    ("settings", "columns", "message"),
    [
        ({}, ["texts"], "has no column 'texts'; did you mean 'text'"),
        ({"split": "no"}, None, "cannot be read"),
        ({"subset": "no"}, None, "cannot be read"),
    ],
)
def test_a_hub_dataset_that_does_not_fit_is_refused(hub, settings, columns, message):
    with pytest.raises(InputError, match=message):
        list(read_source(hub_source(hub, revision="main", **settings), columns))


def test_a_hub_dataset_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="hub dataset nobody/nothing: cannot be read"):
        list(read_source(hub_source("nobody/nothing", revision="main")))
