"""The table of the speed benchmark: ratios round by round, and no table where answers differ."""

import importlib
import sys
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(SPEED))
    yield importlib.import_module("report")
    for path in SPEED.glob("*.py"):
        if path.stem != "__main__":
            sys.modules.pop(path.stem, None)


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
    assert report.reached(row) == "goal"
    (line,) = report.table([row]).splitlines()[2:]
    assert "2.00 (1.00 to 2.50)" in line
    assert "8 MMLU questions" in line


def test_memory_should_be_the_smaller(report):
    case = report_case(report, figure="peak_mib", goal=0.5, stretch=0.25)
    row = report.compare("memory", case, runs([1.0, 1.0], [4.0, 2.0]), questions=8)
    assert row["ratios"] == [0.25, 0.5]
    assert report.reached(row) == "goal"
    assert report.reached({**row, "ratio": 0.2}) == "stretch"
    assert report.reached({**row, "ratio": 0.6}) == "**behind**"


def test_no_table_where_the_sides_answer_differently(report):
    found = runs([1.0], [1.0])
    found[1]["answers"] = [[0.26, 0.74]]
    with pytest.raises(SystemExit, match=r"padded: the sides differ by 0\.01"):
        report.compare("padded", report_case(report), found, questions=8)


def test_files_lie_beside_each_other(report, tmp_path, capsys):
    row = report.compare("padded", report_case(report), runs([1.0], [2.0]), questions=8)
    report.write_report(tmp_path, [row], runs([1.0], [2.0]))
    assert {path.name for path in tmp_path.iterdir()} == {"speed.json", "speed.md", "speed.png"}
    assert "**" not in capsys.readouterr().out


def report_case(report, **changes):
    case = report.Case("{questions} MMLU questions", "questions", "padded", 1.6, 2.5)
    return case._replace(**changes)
