"""Broken shards: a line that names file and row, or skipped and counted, and nothing else lost."""

import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row_files import read

from mlmjax import InputError
from mlmjax.config.data import SourceConfig
from mlmjax.data.reading.examples import MOST_NAMED
from mlmjax.data.reading.files import BROKEN_FILE, BROKEN_RECORD, read_file
from mlmjax.storage import hash_value

GOOD = [{"input": f"Is {i} odd?", "answer": ["no", "yes"][i % 2], "task": "t"} for i in range(40)]


def noise(number):
    return f"{hash_value(number)[:24]} {hash_value(-number)[:24]}"


def lines(rows=GOOD):
    return [json.dumps(row).encode() + b"\n" for row in rows]


def source(path, **settings):
    columns = {"prompt": "{input}", "answer": "answer", "task": "task"}
    return SourceConfig(path=str(path), name="s", **columns | settings)


def changed(**fields):
    return json.dumps({**GOOD[0], **fields}).encode() + b"\n"


BROKEN_LINES = {
    "not JSON": b'{"input": "x"\n',
    "not an object": b"[1]\n",
    "deep": b"[" * 5000 + b"\n",
    "not UTF-8": b'{"input": "\xff", "answer": "yes", "task": "t"}\n',
    "NUL": b'{"input": "\0", "answer": "yes", "task": "t"}\n',
    "too long": b'{"input": "' + b"a" * 20000 + b'"}\n',
    "no column": b'{"input": "x", "task": "t"}\n',
    "null": changed(input=None),
    "a number": changed(input=3),
    "nested": changed(input=[[None, "x"], None]),
    "answer is null": changed(answer=None),
    "answer is a list": changed(answer=["yes", None]),
    "task is null": changed(task=None),
    "task is blank": changed(task=" "),
    "half a character": changed(input="\ud800"),
    "half a character in the task": changed(task="\udfff"),
}


@pytest.mark.parametrize("what", BROKEN_LINES)
def test_a_broken_line_stops_or_is_skipped(what, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("mlmjax.data.formats.lines.MAX_LINE_BYTES", 10_000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines()))
    expected = [one.ids.tolist() for one in read(source(path), tokenizer)[0]]
    mixed = lines()
    for at in (0, 17, 17, 43):
        mixed.insert(at, BROKEN_LINES[what])
    path.write_bytes(b"".join(mixed))
    with pytest.raises(InputError, match=r"a\.jsonl line 1: ") as caught:
        read(source(path), tokenizer)
    assert "\n" not in caught.value.message
    examples, counts = read(source(path, broken="skip"), tokenizer)
    assert [one.ids.tolist() for one in examples] == expected
    assert counts.dropped == {BROKEN_RECORD: 4}
    assert counts.records == len(GOOD) + 4
    assert [where.split(":")[0].split()[-1] for where in counts.broken] == ["1", "18", "19", "44"]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_mixture_of_broken_lines_leaves_the_rest(tmp_path_factory, tokenizer, data):
    """What is sound comes out whatever is between; nothing is counted twice."""
    kinds = sorted(BROKEN_LINES.keys() - {"too long", "deep"})
    drawn = data.draw(st.lists(st.sampled_from(["good", *kinds]), min_size=1, max_size=60))
    good = iter(lines() * 2)
    written = [next(good) if kind == "good" else BROKEN_LINES[kind] for kind in drawn]
    path = tmp_path_factory.mktemp("mixture") / "a.jsonl"
    path.write_bytes(b"".join(written))
    examples, counts = read(source(path, broken="skip"), tokenizer)
    bad = len(drawn) - drawn.count("good")
    assert (len(examples), counts.records) == (len(drawn) - bad, len(drawn))
    assert (counts.dropped[BROKEN_RECORD], len(counts.broken)) == (bad, min(bad, MOST_NAMED))


def parquet(rows=GOOD, **options):
    pq.write_table(pa.Table.from_pylist(rows), sink := io.BytesIO(), **options)
    return sink.getvalue()


def damaged_parquet():
    """Return four row groups; bytes within the pages of the last one are changed."""
    rows = [{**GOOD[0], "input": noise(i)} for i in range(2000)]
    data = parquet(rows, row_group_size=500, write_page_checksum=True)
    at = len(data) * 2 // 3
    return data[:at] + bytes(byte ^ 0x55 for byte in data[at : at + 400]) + data[at + 400 :]


# Shards that end early or are none: ending of the name, content, and the records still read.
SHARDS = {
    "truncated": ("jsonl.gz", gzip.compress(b"".join(lines()), mtime=0)[:-9], 0),
    "empty": ("jsonl", b"", 0),
    "no parquet": ("parquet", b"PAR1 and so on PAR1", 0),
    "cut parquet": ("parquet", parquet()[:-30], 0),
    "wrong columns": ("parquet", parquet([{"inputs": "x", "targets": "yes"}]), 0),
    "damaged parquet": ("parquet", damaged_parquet(), None),
    "csv quote": ("csv", b'input,answer,task\nIs 3 odd?,yes,t\n"x,yes,t\n', 1),
    "csv UTF-8": ("csv", b"input,answer,task\nIs 3?,yes,t\nx\xff,yes,t\ny,yes,t\n", 1),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_a_broken_file_stops_or_is_left_where_it_breaks(kind, tokenizer, tmp_path):
    for name in ("a.jsonl", "c.jsonl"):
        (tmp_path / name).write_bytes(b"".join(lines()))
    ending, data, there = SHARDS[kind]
    (tmp_path / f"b.{ending}").write_bytes(data)
    with pytest.raises(InputError, match=r"[/\\]b\.") as caught:
        read(source(tmp_path / "*"), tokenizer)
    assert "\n" not in caught.value.message
    examples, counts = read(source(tmp_path / "*", broken="skip"), tokenizer)
    assert counts.dropped == {BROKEN_FILE: 1}
    if there is None:
        assert 0 < len(examples) - 2 * len(GOOD) < 2000
        assert "after row" in counts.broken_files[0]
    else:
        assert len(examples) == 2 * len(GOOD) + there
    assert (counts.broken_files, counts.broken) == ([caught.value.message], [])


def test_a_row_of_a_parquet_file_is_skipped_alone(tokenizer, tmp_path):
    path = tmp_path / "a.parquet"
    raw = pa.array([b"Is 1 odd?", b"\xff\xfe", b"Is 3 odd?"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    table = {"input": text, "answer": ["yes", "yes", None], "task": ["t"] * 3}
    pq.write_table(pa.table(table), path)
    examples, counts = read(source(path, broken="skip"), tokenizer)
    assert (len(examples), counts.dropped) == (1, {BROKEN_RECORD: 2})
    assert [where.split(":")[0].split()[-1] for where in counts.broken] == ["2", "3"]


def test_options_that_are_nested_or_null_are_named(tokenizer, tmp_path):
    path = tmp_path / "a.parquet"
    options = [["no", "yes"], ["no", None], None, ["no", "yes"]]
    rows = [{"q": f"Is {i} odd?", "options": o, "answer": "A"} for i, o in enumerate(options)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    settings = {"prompt": "{q}\n{options}", "task": None}
    with pytest.raises(InputError, match=r"a\.parquet row 2"):
        read(source(path, **settings), tokenizer)
    examples, counts = read(source(path, broken="skip", **settings), tokenizer)
    assert (len(examples), counts.dropped) == (2, {BROKEN_RECORD: 2})


def test_only_a_run_file_is_told_how_to_skip(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{nonsense\n" + b"".join(lines()).decode())
    with pytest.raises(InputError, match=r"line 1: is not valid JSON.* \(broken = 'skip' leaves"):
        read(source(path), tokenizer)
    with pytest.raises(InputError) as error:
        list(read_file(path))
    assert "broken" not in error.value.message
    assert "(broken" not in read(source(path, broken="skip"), tokenizer)[1].broken[0]


def test_plain_text_is_skipped_by_record(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"text": " "}\n{"text": "two"}\n')
    text = SourceConfig(path=str(path), text="text", name="s", broken="skip")
    examples, counts = read(text, tokenizer)
    assert (len(examples), counts.records) == (2, 4)
    assert counts.dropped == {BROKEN_RECORD: 1, "blank text": 1}


def test_a_huge_line_costs_no_memory(tmp_path):
    """A line of 200 MB is rejected, or passed over, in pieces."""
    path = tmp_path / "a.jsonl.zst"
    huge = pa.Codec("zstd").compress(b'{"input": "' + b"a" * 200_000_000 + b'"}\n', asbytes=True)
    small = pa.Codec("zstd").compress(b"".join(lines()), asbytes=True)
    path.write_bytes(small + huge + small)
    with pytest.raises(InputError, match="line 41: is longer than 32 MiB"):
        list(read_file(path))
    reported = []
    tracemalloc.start()
    records = list(read_file(path, broken=lambda what, error: reported.append(what)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(records), reported) == (80, [BROKEN_RECORD])
    assert records[-1].where.endswith("line 81")
    assert peak < 160e6


def test_a_fault_of_the_system_is_never_skipped(tmp_path):
    """What is not in the file may be there at the next try."""
    path = tmp_path / "a.jsonl"
    path.symlink_to(path)
    with pytest.raises(InputError, match="cannot be read: Too many levels of symbolic links"):
        list(read_file(path, broken=lambda what, error: None))


def test_messages_do_nothing_to_a_terminal_or_a_file(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a\\nfake: \\u001b[2J": 1}\n{"\\ud800": 1}\n' + b"".join(lines()))
    with pytest.raises(InputError, match=r"columns: a\\nfake: \\x1b\[2J"):
        read(source(path), tokenizer)
    _, counts = read(source(path, broken="skip"), tokenizer)
    assert len(counts.broken) == 2
    "\n".join(counts.broken).encode()


def test_what_decodes_before_a_cut_is_kept(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    many = [{**GOOD[0], "input": noise(i)} for i in range(3000)]
    data = gzip.compress(b"".join(lines(many)))
    path.write_bytes(data[: len(data) * 9 // 10])
    examples, counts = read(source(path, broken="skip"), tokenizer)
    assert 2400 < len(examples) < 2800
    assert f"line {len(examples) + 1}: cannot be read" in counts.broken_files[0]
