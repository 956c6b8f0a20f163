"""The data of the small model: a complete file or none."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "make_small_data.py"
TOOL = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def row(number):
    return {
        "definition": "Choose yes or no.",
        "input": f"Is {number} a number?",
        "target": "yes",
        "task": "task001_numbers",
        "component": "niv2",
        "eval_overlap": "",
        "eval_hit": "",
    }


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl.zst"
    with TOOL.open_zst(path, "w") as file:
        for number in range(3_000):
            file.write(json.dumps(row(number)) + "\n")
    return path


def make(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, words)])
    TOOL.main()


def test_what_may_be_kept_is_written(source, tmp_path, monkeypatch, capsys):
    make(monkeypatch, "--out", tmp_path / "out.jsonl.zst", source)
    assert capsys.readouterr().out == "   3,000 kept\n"
    with TOOL.open_zst(tmp_path / "out.jsonl.zst", "r") as lines:
        first = json.loads(next(lines))
    assert first == {
        "prompt": "Choose yes or no.\nIs 0 a number?",
        "answer": "yes",
        "task": "task001_numbers",
    }


def test_a_file_that_is_cut_short_gives_none(source, tmp_path, monkeypatch):
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(SystemExit, match=r"cannot be read after row .*(?i:truncated)"):
        make(monkeypatch, "--out", tmp_path / "out.jsonl.zst", source)
    assert not (tmp_path / "out.jsonl.zst").exists()


def test_a_row_without_a_column_is_named(tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl.zst"
    with TOOL.open_zst(path, "w") as file:
        file.writelines(json.dumps(row(1) | kept) + "\n" for kept in ({}, {"target": None}))
    with pytest.raises(SystemExit, match="after row 1 "):
        make(monkeypatch, "--out", tmp_path / "out.jsonl.zst", path)


def test_a_file_that_is_read_is_not_written(source, monkeypatch):
    before = source.read_bytes()
    with pytest.raises(SystemExit, match="among the files to read"):
        make(monkeypatch, "--out", source, source)
    assert source.read_bytes() == before
