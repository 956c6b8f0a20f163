"""Data files: every format read alike; every kind of damage rejected with file and line."""

import gzip
import json
import re

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from row_files import stored

from mlmjax import InputError
from mlmjax.config.data import DataConfig, Location, SourceConfig
from mlmjax.config.tables import decode
from mlmjax.data.preparing.prepare import prepare
from mlmjax.data.reading import files
from mlmjax.data.reading.files import Record, read_file
from mlmjax.data.reading.sources import read_source, source_files

ROWS = [
    {"text": "one, two", "label": "a"},
    {"text": 'say "yes"\nand go', "label": "b"},
    {"text": "naïve 日本", "label": "a"},
]


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def gzipped(data):
    # Without the time of day: tests are named after their parameters, alike in every process.
    return gzip.compress(data, mtime=0)


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
        ("a.JSON.gz", gzipped(jsonl()[:40]) + gzipped(jsonl()[40:])),
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
    for name, data, numbers in (("a.csv", CSV, "235"), ("a.jsonl", b"\n" + jsonl(), "234")):
        path = write(tmp_path, name, data)
        assert [record.where for record in read_file(path)] == [f"{path} line {n}" for n in numbers]


def test_parquet_gives_needed_columns_and_class_names(tmp_path):
    path = tmp_path / "a.parquet"
    features = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    columns = [("text", pa.large_string()), ("label", pa.int64()), ("other", pa.list_(pa.int8()))]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(columns, metadata=metadata)
    pq.write_table(pa.table([["x", "y"], [1, 0], [[], [3]]], schema=schema), path)
    assert list(read_file(path, ["text", "label"])) == [
        Record({"label": 1, "text": "x"}, f"{path} row 1"),
        Record({"label": 0, "text": "y"}, f"{path} row 2"),
    ]
    named = [record.fields for record in read_file(path, ["label"], named=["label"])]
    assert named == [{"label": "yes"}, {"label": "no"}]
    assert next(iter(read_file(path))).fields == {"text": "x", "label": 1, "other": []}


def test_a_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    text = "".join(f"line {i}.\n" + "\n" * (i % 300 == 299) for i in range(18_000))
    records = list(read_file(write(tmp_path, "a.txt", text.encode()), ["text"]))
    *parts, last = [record.fields["text"] for record in records]
    assert "".join(parts) + last == text
    assert len(parts) > 1
    assert all(len(part) >= files.TEXT_BLOCK and part.endswith("\n\n") for part in parts)
    assert records[1].where.endswith(f"line {parts[0].count(chr(10)) + 1}")


@pytest.mark.parametrize("name", ["my a.json", "b.jsonl.gz"])
@pytest.mark.parametrize(
    ("data", "found", "way"),
    [
        (json.dumps(ROWS, indent=2), "one JSON list", ".[]"),
        (json.dumps(ROWS), "one JSON list", ".[]"),
        (json.dumps(ROWS[0], indent=2), "JSON over several lines", "."),
    ],
)
def test_json_that_is_not_one_record_per_line_says_how_to_convert_it(
    tmp_path, name, data, found, way
):
    content = gzipped(data.encode()) if name.endswith(".gz") else data.encode()
    path = write(tmp_path, name, content)
    with pytest.raises(InputError) as error:
        list(read_file(path))
    shown = f"'{path}'" if " " in name else path
    new = "'my a.jsonl'" if " " in name else "b.jsonl"
    command = f"jq -c '{way}' {shown} > {new}"
    message = f"expected one object per line; a file that is {found} is converted by {command}"
    assert error.value.message.endswith(message)
    assert error.value.message.startswith(f"{path} line 1: ")


def test_records_before_the_damage_were_already_given(tmp_path):
    stream = read_file(write(tmp_path, "a.jsonl", jsonl() + b"x"))
    assert [next(stream).fields for _ in range(3)] == ROWS
    with pytest.raises(InputError, match="line 4"):
        next(stream)


def source(path, **settings):
    return SourceConfig(path=str(path), prompt="{text}", answer="label", **settings)


def test_a_glob_reads_files_in_sorted_order_up_to_the_limit(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl"):
        write(tmp_path, name, jsonl([{"text": f"{name}{i}", "label": "x"} for i in range(2)]))
    (tmp_path / "folder.jsonl").mkdir()
    found = source_files(source(tmp_path / "*.jsonl"))
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl", "c[1].jsonl"]
    texts = [r.fields["text"] for r in read_source(source(tmp_path / "*.jsonl", limit=3))]
    assert texts == ["a.jsonl0", "a.jsonl1", "b.jsonl0"]
    assert source_files(source(found[2])) == found[2:]


@pytest.fixture
def hub(tmp_path):
    """A folder that `datasets` reads as it reads a dataset of the hub."""
    classes = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features(text=datasets.Value("string"), label=classes)
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features)
    rows.to_parquet(tmp_path / "dataset" / "data" / "train-0.parquet")
    return tmp_path / "dataset"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_source(hub, **settings):
    recipe = {"prompt": "{text}", "answer": "label"}
    return SourceConfig(hub=str(hub), **({"revision": COMMIT} | recipe | settings))


@pytest.fixture
def calls(monkeypatch, hub):
    """The calls of `load_dataset`, which reads the local folder whatever the id."""
    calls = []
    load_dataset = datasets.load_dataset

    def load(name, *arguments, **options):
        calls.append((name, *arguments, options))
        return load_dataset(str(hub), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_a_hub_dataset_is_streamed_at_its_commit(calls, caplog):
    source = hub_source("some/one", columns={"text": ("sentence", "text")})
    records = list(read_source(source, ["text", "label"], named=["label"]))
    found = [record.fields for record in records]
    assert found == [{"text": "x", "label": "good"}, {"text": "y", "label": "bad"}]
    assert records[1].where.endswith("train row 2")
    options = {"data_dir": None, "split": "train", "revision": COMMIT, "streaming": True}
    assert calls == [("some/one", None, options)]
    assert [r.fields["label"] for r in read_source(hub_source("some/one", limit=1))] == [1]
    assert not caplog.text


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12], COMMIT.upper(), COMMIT + "0"])
def test_a_hub_source_without_a_commit_is_rejected(revision):
    table = {"hub": "some/one", "prompt": "{text}", "answer": "label"}
    table |= {"revision": revision} if revision else {}
    message = r"hub dataset some/one has .*; give a commit of 40 hexadecimal digits.* revision ="
    with pytest.raises(InputError, match=message):
        decode(SourceConfig, table, "run.toml: data.sources.0")


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_location_without_a_commit_is_read_with_a_warning(calls, caplog, revision):
    records = list(read_source(Location(hub="some/one", revision=revision)))
    assert [r.fields for r in records] == [{"text": "x", "label": 1}, {"text": "y", "label": 0}]
    assert f"revision is {revision!r}, not a commit" in caplog.text


@pytest.mark.parametrize(
    ("settings", "names", "message"),
    [
        ({}, ["texts"], "has no column 'texts'; did you mean 'text'"),
        ({"columns": {"text": "txt"}}, ["text"], "has no column 'txt'; did you mean 'text'"),
        ({"split": "no"}, None, "cannot be read"),
        ({"subset": "no"}, None, "cannot be read"),
    ],
)
def test_a_hub_dataset_that_does_not_fit_is_rejected(hub, settings, names, message):
    with pytest.raises(InputError, match=message):
        list(read_source(hub_source(hub, **settings), names))


WIDE = [
    {"sentence": "It rains.", "title": "Rain", "meta": {"topic": "weather"}, "label": "a"},
    {"sentence": "It snows.", "title": "Snow", "meta": {"topic": "weather"}, "label": "b"},
]


def table_of(folder, kind, rows):
    """Write rows as JSONL, CSV or parquet; return the path."""
    path = folder / f"a.{kind}"
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        path.write_bytes(jsonl(rows))
    else:
        (pq.write_table if kind == "parquet" else pa.csv.write_csv)(table, path)
    return path


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("sentence", "It rains."),
        ("{title}: {sentence}", "Rain: It rains."),
        ("{title} ({meta.topic})", "Rain (weather)"),
        ("meta.topic", "weather"),
        (("text", "{body}", "sentence"), "It rains."),
        (("{title} {body}", "{title}"), "Rain"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_field_is_read_from_what_columns_says(tmp_path, kind, column, expected):
    described = source(table_of(tmp_path, kind, WIDE), columns={"text": column})
    first, _ = read_source(described, ["text", "label"])
    assert first.fields == {"text": expected, "label": "a"}


def test_what_a_struct_lacks_names_the_row(tmp_path):
    path = write(tmp_path, "a.jsonl", jsonl([*WIDE, {"meta": {}, "label": "a"}]))
    with pytest.raises(InputError, match=r"a.jsonl line 3: has no column 'meta.topic'"):
        list(read_source(source(path, columns={"text": "meta.topic"}), ["text", "label"]))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("sentense", r".*: has no column 'sentense'; did you mean 'sentence'\? columns: .*sente"),
        ("{title}: {body}", ".*: has no column 'body'; columns: .*sentence"),
        (("text", "{title} {body}"), ".* no column 'text' or '{title} {body}'; columns: .*title"),
    ],
)
def test_a_column_that_is_not_there_lists_those_that_are(tmp_path, kind, column, message):
    rows = [{name: row[name] for name in ("sentence", "title", "label")} for row in WIDE]
    described = source(table_of(tmp_path, kind, rows), columns={"text": column})
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/a.{kind}") + message):
        list(read_source(described, ["text", "label"]))


LABELLED = {"prompt": "{text} {options}", "labels": ["a", "b"]}
PLAIN = {"prompt": None, "answer": None, "text": "text"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cut": "sentence"}, r"cut is for plain text"),
        (PLAIN | {"normalize": ["lower"]}, "normalize is for answers"),
        ({"columns": {"txt": "sentence"}}, "'txt' is not a field of the prompt; its fields: text"),
        ({"columns": {"text": "{title"}}, "unpaired braces"),
        ({"columns": {"text": "{}"}}, "braces without a plain column name"),
        ({"columns": {"text": []}}, "at least 1 item"),
        ({"columns": {"text": "a"}, "answer": "text"}, "is also the column of answer or task"),
        ({"columns": {"text": "a"}, "task": "text"}, "is also the column of answer or task"),
        (LABELLED | {"columns": {"options": "o"}}, "'options' is not a field"),
        (PLAIN | {"columns": {"text": "body"}}, "columns are for a prompt"),
        ({"answer": "{label"}, "unpaired braces"),
    ],
)
def test_settings_that_cannot_be_meant_are_rejected(settings, message):
    table = {"path": "a.csv", "prompt": "{text}", "answer": "label"} | settings
    with pytest.raises(InputError, match=message):
        decode(SourceConfig, {k: v for k, v in table.items() if v is not None}, "run.toml")


def test_paths_may_be_many(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.ndjson"):
        write(tmp_path, name, jsonl([{"text": name, "label": "x"}]))
    paths = [str(tmp_path / "c.ndjson"), str(tmp_path / "*.jsonl")]
    table = {"path": paths, "prompt": "{text}", "answer": "label"}
    many = decode(SourceConfig, table, "run.toml")
    assert [r.fields["text"] for r in read_source(many)] == ["c.ndjson", "a.jsonl", "b.jsonl"]
    assert many.title == ", ".join(paths)
    twice = decode(SourceConfig, table | {"path": [*paths, str(tmp_path / "a.jsonl")]}, "run.toml")
    with pytest.raises(InputError, match=r"a\.jsonl also matches another path"):
        source_files(twice)
    with pytest.raises(InputError, match="at least 1 item"):
        decode(SourceConfig, table | {"path": []}, "run.toml")


def test_sources_of_other_columns_become_the_same_rows(tmp_path, calls, tokenizer):
    """From the run file to the rows: local files, and a streamed dataset with class names."""
    rows = [{"sentence": f"It is {w}.", "meta": {"gold": w}} for w in ("good", "bad") * 20]
    path = str(write(tmp_path, "mapped.jsonl", jsonl(rows)))
    rows = [{"text": row["sentence"], "label": row["meta"]["gold"]} for row in rows]
    plain = str(write(tmp_path, "plain.jsonl", jsonl(rows)))
    mapped = {"path": path, "prompt": "{text}", "answer": "meta.gold"}
    remote = {"hub": "some/one", "revision": COMMIT, "prompt": "{sentence}", "answer": "label"}
    sources = {
        "plain": {"prompt": "{text}", "path": plain, "answer": "label"},
        "mapped": mapped | {"columns": {"text": ["content", "sentence"]}},
        "hub": remote | {"columns": {"sentence": "It is {text}."}},
        "prose": {"path": path, "text": "{sentence} Is it {meta.gold}?"},
    }

    def make(name, table):
        config = {"rows": str(tmp_path / name), "seq_length": 32, "sources": [table]}
        return prepare(decode(DataConfig, config, "run.toml"), tokenizer)

    found = {}
    for name, table in sources.items():
        folder = make(name, table)
        assert make(name, table) == folder
        examples = sorted((one for _, one in stored(folder, "train")), key=lambda one: one.index)
        found[name] = [(tokenizer.decode(one.ids), one.answer_position) for one in examples]
    assert found["plain"] == found["mapped"]
    assert len(found["plain"]) == 40
    answers = [f"[CLS]It is {x}. [unused0] {y}[SEP]" for x, y in (("x", "good"), ("y", "bad"))]
    assert [text for text, _ in found["hub"]] == answers
    assert found["prose"][1] == ("[CLS]It is bad. Is it bad?[SEP]", -1)
    with pytest.raises(InputError, match=r"line 1: has no column 'content'; .*columns: sentence"):
        make("no", mapped | {"columns": {"text": "content"}})
