"""The speed benchmark: ratios round by round, no table if answers differ, and both sides run."""

import importlib
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import ROOT
from pictures import has_named_axes, read_picture
from task_files import read_lines

SPEED = ROOT / "benchmarks" / "speed"
BENCHMARKS = ROOT / "docs" / "benchmarks"
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50368,
}


@pytest.fixture
def load(monkeypatch):
    """Import modules of the benchmark, which is not a package."""
    monkeypatch.syspath_prepend(str(SPEED))
    yield importlib.import_module
    for path in SPEED.glob("*.py"):
        if path.stem != "__main__":
            sys.modules.pop(path.stem, None)


@pytest.fixture
def report(load):
    return load("report")


def runs(ours, theirs, answers=((0.25, 0.75),), **more):
    """Seconds of both sides, round by round, as `__main__` records them."""
    sides = {"ours": ("questions", ours), "theirs": ("padded", theirs)}
    return [
        {
            "side": side,
            "function": function,
            "round": number,
            "seconds": value,
            "peak_mib": value * 100,
            "gemm_gflops": 300.0,
            "answers": [list(row) for row in answers],
            **more,
        }
        for side, (function, seconds) in sides.items()
        for number, value in enumerate(seconds)
    ]


def test_ratios_are_of_the_same_round(report):
    found = runs([1.0, 2.0, 4.0], [2.0, 5.0, 4.0])
    row = report.compare("padded", report_case(report), found, questions=8)
    assert row["ratios"] == [2.0, 2.5, 1.0]
    assert row["ratio"] == 2.0
    assert (row["ours"], row["theirs"]) == (2.0, 4.0)
    assert report.find_goal(row) == "goal"
    (line,) = report.table([row]).splitlines()[2:]
    assert "2.00 (1.00 to 2.50)" in line
    assert "8 MMLU questions" in line


def test_smaller_memory_is_better(report):
    case = report_case(report, figure="peak_mib", goal=0.5, stretch=0.25)
    row = report.compare("memory", case, runs([1.0, 1.0], [4.0, 2.0]), questions=8)
    assert row["ratios"] == [0.25, 0.5]
    assert report.find_goal(row) == "goal"
    assert report.find_goal({**row, "ratio": 0.2}) == "stretch"
    assert report.find_goal({**row, "ratio": 0.6}) == "**behind**"


def test_no_table_where_the_sides_answer_differently(report):
    found = runs([1.0], [1.0])
    found[1]["answers"] = [[0.26, 0.74]]
    with pytest.raises(SystemExit, match=r"padded: the sides differ by 0\.01"):
        report.compare("padded", report_case(report), found, questions=8)


def test_a_table_figures_and_a_picture_are_written(report, tmp_path, capsys):
    row = report.compare("padded", report_case(report), runs([1.0], [2.0]), questions=8)
    report.write_report(tmp_path, [row], runs([1.0], [2.0]))
    assert {path.name for path in tmp_path.iterdir()} == {"speed.json", "speed.md", "speed.svg"}
    assert "**" not in capsys.readouterr().out
    assert "1 = equal" in read_picture((tmp_path / "speed.svg").read_text())


def test_ratios_are_drawn_on_log_axes_and_memory_by_itself(report):
    rows = json.loads((BENCHMARKS / "avx2.json").read_text())["rows"]
    figure = report.picture(rows)
    speed, memory = figure.axes
    assert (speed.get_xscale(), memory.get_xscale()) == ("log", "log")
    assert "fast" in speed.get_xlabel()
    assert "memory" in memory.get_xlabel()
    assert has_named_axes(figure)
    bars = [(bar.get_x(), bar.get_width()) for axes in figure.axes for bar in axes.patches]
    ordered = sorted(rows, key=lambda row: row["figure"] == "peak_mib")
    assert bars == [(1, pytest.approx(row["ratio"] - 1)) for row in ordered]
    for axes in figure.axes:
        (equal,) = [line for line in axes.lines if list(line.get_ydata()) == [0, 1]]
        assert list(equal.get_xdata()) == [1, 1]
    only = [row for row in rows if row["figure"] == "peak_mib"]
    assert len(report.picture(only).axes) == 1


def test_the_picture_in_the_documents_is_that_of_the_figures_next_to_it(report, tmp_path):
    drawn = tmp_path / "avx2.svg"
    source = str(BENCHMARKS / "avx2.json")
    subprocess.run([sys.executable, SPEED / "report.py", source, drawn], check=True)
    assert drawn.read_bytes() == (BENCHMARKS / "avx2.svg").read_bytes()
    assert read_picture(drawn.read_text())


def write_data(folder):
    """Write a small data folder of the benchmark."""
    for name in ("eval", "instruct", "tokenizer"):
        (folder / name).mkdir(parents=True)
    (folder / "tokenizer" / "config_base.json").write_text(json.dumps(TINY))
    questions = read_lines(ROOT / "tests" / "data" / "mmlu_500.jsonl")
    pq.write_table(pa.Table.from_pylist(questions), folder / "eval" / "mmlu_test.parquet")
    row = {"definition": "Answer yes or no. " * 20, "input": "Is it?", "target": "yes"}
    path = str(folder / "instruct" / "single_token_instruct.jsonl.zst")
    with pa.output_stream(path, compression="zstd") as out:
        out.write((json.dumps(row) + "\n").encode() * 200)


@pytest.mark.long
def test_both_sides_run_on_a_tiny_model(load, tmp_path, monkeypatch):
    measure = load("measure")
    monkeypatch.setattr(measure, "LONG", 512)
    monkeypatch.setattr(measure, "INSTRUCT_LENGTH", 128)
    cases, inputs, ours, theirs, report = map(load, ("cases", "inputs", "ours", "theirs", "report"))
    monkeypatch.setattr(inputs, "DRAWN", 1.0)
    monkeypatch.setattr(ours, "STREAM", 200)
    write_data(tmp_path / "data")
    inputs.write_inputs(tmp_path / "data", tmp_path, questions=4, few=2)
    runs = [
        {"side": side.__name__, "function": name, "peak_mib": 1.0} | function(tmp_path)
        for side in (ours, theirs)
        for name, function in side.FUNCTIONS.items()
    ]
    del cases.CASES["fresh"]  # that one is a command
    for name, case in cases.CASES.items():
        assert report.compare(name, case, runs, questions=4, few=2)["ratio"] > 0


def report_case(report, **changes):
    case = report.Case("{questions} MMLU questions", "questions", "padded", 1.6, 2.5)
    return case._replace(**changes)
