"""Comparisons of two evaluations: the test, the intervals, the words, and what is rejected."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from mlmjax.cli.main import run
from mlmjax.errors import InputError
from mlmjax.evaluation.compare import compare_results
from mlmjax.statistics.comparison import mcnemar


def write(folder, gold, predicted, **changes):
    """Write a result folder as `evaluate` does."""
    folder.mkdir()
    results = {"task": "t", "protocol": "default", "n": len(gold), "seconds": 0.1, **changes}
    (folder / "results.json").write_text(json.dumps(results))
    lines = [
        {"index": 2 * i, "gold": g, "prediction": p, "probabilities": {g: 0.5, p: 0.5}}
        for i, (g, p) in enumerate(zip(gold, predicted, strict=True))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "predictions.jsonl").write_text(text)
    return folder


@pytest.fixture
def write_both(tmp_path):
    """Return a function that writes the result folders `a` and `b`."""
    return lambda gold, a, b: (write(tmp_path / "a", gold, a), write(tmp_path / "b", gold, b))


def answers(rows, accuracies):
    rng = np.random.default_rng(0)
    gold = rng.choice(["x", "y", "z"], size=rows)
    sides = [
        np.where(rng.random(rows) < share, gold, rng.choice(["x", "y", "z"], size=rows))
        for share in accuracies
    ]
    return gold, *sides


def plain_f1(gold, predicted):
    names = np.unique([gold, predicted])
    hits = [((gold == name) & (predicted == name)).sum() for name in names]
    sizes = [(gold == name).sum() + (predicted == name).sum() for name in names]
    return np.mean([2 * hit / size for hit, size in zip(hits, sizes, strict=True)])


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_exact_binomial_test(a, b):
    expected = binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_counts_differences_and_intervals(write_both):
    gold, a, b = answers(300, (0.8, 0.5))
    found = compare_results(*write_both(gold, a, b))
    right_a, right_b = a == gold, b == gold
    counts = (right_a & ~right_b, ~right_a & right_b, right_a & right_b, ~right_a & ~right_b)
    keys = ("only_a", "only_b", "both_right", "neither")
    assert [found[key] for key in keys] == [rows.sum() for rows in counts]
    assert found["n"] == 300
    assert found["a"]["accuracy"] == right_a.mean()
    assert found["b"]["macro_f1"] == pytest.approx(f1_score(gold, b, average="macro"))
    assert found["accuracy_difference"] == pytest.approx(right_a.mean() - right_b.mean())
    drawn = []
    rng = np.random.default_rng(9)
    for _ in range(2000):
        rows = rng.integers(300, size=300)
        f1_a, f1_b = (plain_f1(gold[rows], one[rows]) for one in (a, b))
        drawn.append((right_a[rows].mean() - right_b[rows].mean(), f1_a - f1_b))
    for name, (low, high) in zip(
        ("accuracy", "macro_f1"), np.quantile(drawn, [0.025, 0.975], axis=0).T, strict=True
    ):
        interval = found[f"{name}_difference_ci95"]
        assert np.abs(np.subtract(interval, (low, high))).max() < 0.1 * (high - low)
    assert found["mcnemar_p"] < 1e-4
    assert found["verdict"].startswith("A has ")
    json.dumps(found, allow_nan=False)


def test_neither_the_order_of_the_sides_nor_of_the_rows_matters(write_both):
    one, two = write_both(*answers(80, (0.6, 0.7)))
    there, back = compare_results(one, two), compare_results(two, one)
    assert (there["only_a"], there["only_b"]) == (back["only_b"], back["only_a"])
    assert there["accuracy_difference"] == pytest.approx(-back["accuracy_difference"])
    assert there["mcnemar_p"] == back["mcnemar_p"]
    file = two / "predictions.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert compare_results(one, two) == there


def test_a_byte_order_mark_does_not_matter(write_both):
    one, two = write_both("xyx", "xyy", "xxx")
    found = compare_results(one, two)
    for name in ("results.json", "predictions.jsonl"):
        (two / name).write_text((two / name).read_text(), encoding="utf-8-sig")
    assert compare_results(one, two) == found


def test_the_verdict_claims_no_more_than_there_is(write_both, tmp_path):
    gold, a, b = answers(30, (0.6, 0.55))
    one, two = write_both(gold, a, b)
    found = compare_results(one, two)
    assert found["mcnemar_p"] > 0.05
    assert "do not show which of the two is better" in found["verdict"]
    assert "No difference in accuracy" in compare_results(one, one)["verdict"]
    assert compare_results(one, one)["accuracy_difference_ci95"] == [0, 0]
    better = write(tmp_path / "c", gold, gold)
    worse = write(tmp_path / "d", gold, np.where(gold == "x", "y", "x"))
    for sides, winner in (((better, worse), "A"), ((worse, better), "B")):
        verdict = compare_results(*sides)["verdict"]
        assert verdict.startswith(f"{winner} has 30 more of 30 rows right")
        assert "100.0 points" in verdict
        assert "rows like these" in verdict


def test_macro_f1_may_show_what_accuracy_does_not(write_both):
    """One side has the rare label right and as many more of the common one wrong."""
    gold = ["common"] * 180 + ["rare"] * 20
    a = ["common"] * 165 + ["rare"] * 15 + ["rare"] * 20
    b = ["common"] * 180 + ["common"] * 15 + ["rare"] * 5
    one, two = write_both(gold, a, b)
    for found, winner in ((compare_results(one, two), "A"), (compare_results(two, one), "B")):
        assert found["mcnemar_p"] == 1
        assert "do not show which of the two is better" in found["verdict"]
        assert f"macro-F1 favours {winner}" in found["verdict"]
        assert "does not contain 0" in found["verdict"]


def test_macro_f1_may_show_what_the_same_right_rows_do_not(write_both):
    gold = ["x", "y"] * 100
    swapped = gold[:100] + ["y", "x"] * 50
    scattered = gold[:100] + [f"z{i % 10}" for i in range(100)]
    verdict = compare_results(*write_both(gold, swapped, scattered))["verdict"]
    assert verdict.startswith("A and B have the same 100 of 200 rows right. Accuracy does not")
    assert "macro-F1 favours A" in verdict


def linked(file):
    """Replace a file by a link out of its folder."""
    file.unlink()
    file.symlink_to(file.parents[1] / "a" / file.name)


def replaced(found, put):
    """Change the first place of a text in a file."""
    return lambda file: file.write_text(file.read_text().replace(found, put, 1))


def content(data):
    return lambda file: file.write_bytes(data)


HOSTILE = {
    "results.json": [
        (Path.unlink, r"has no file results\.json; give a folder"),
        (replaced("{", ""), r"results\.json: Invalid JSON"),
        (replaced('"task": "t", ', ""), r"results\.json: task: Field required"),
        (replaced('"n": 5', '"n": NaN'), r"results\.json: n:"),
        (replaced('"n": 5', '"n": true'), r"results\.json: n:"),
        (replaced('"n": 5', '"n": 6'), "names 6 rows and .* has 5; run the"),
        (replaced('"task": "', '"task": "\\ud800'), r"results\.json: Invalid JSON"),
        (replaced('"n": 5', '"n": 1e999'), r"results\.json: n:"),
        (replaced('{"task"', "[" * 9999 + '"task"'), "Invalid JSON"),
    ],
    "predictions.jsonl": [
        (Path.unlink, r"has no file predictions\.jsonl"),
        (linked, "is a link to"),
        (replaced("}}", "}"), r"predictions\.jsonl, line 1: .*JSON"),
        (replaced("0.5", "NaN"), r"line 1: probabilities\.\w+: .*finite"),
        (replaced("0.5", "-0.5"), r"line 1: probabilities\.\w+: .*greater"),
        (replaced('"gold"', '"golden"'), "line 1: gold: Field required"),
        (replaced('"index": 2', '"index": 0'), "line 2: repeats index 0"),
        (replaced('"index": 2', '"index": -2'), "line 2: index:"),
        (replaced('"index": 2', '"index": "2"'), "line 2: index:"),
        (replaced("{", "[" * 5000), "line 1: .*JSON"),
        (replaced("{", "\n{"), "line 1: .*JSON"),
        (replaced('"gold": "', '"gold": "\\ud800'), "line 1: "),
        (content(b"\xff\xfe"), "line 1: .*JSON"),
        (content(b" " * 2**21), "is longer than"),
        (content(b""), "5 rows and .* has 0"),
        (replaced('"index": 8', '"index": 9'), "2 rows in only .* index 8"),
    ],
}


@pytest.mark.parametrize(
    ("name", "break_it", "message"),
    [(name, *case) for name, cases in HOSTILE.items() for case in cases],
)
def test_hostile_files_are_rejected_in_a_sentence(write_both, name, break_it, message, capsys):
    one, two = write_both(*answers(5, (1, 1)))
    break_it(two / name)
    with pytest.raises(InputError, match=message):
        compare_results(one, two)
    assert run(["compare", str(one), str(two)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1


def test_other_rows_are_rejected(tmp_path):
    gold, a, b = answers(5, (1, 1))
    one, many = write(tmp_path / "a", gold, a), [str(i) for i in range(10_001)]
    for other, message in (
        (write(tmp_path / "b", gold, b, task="u"), "about the task t and .* about u; give two eva"),
        (write(tmp_path / "c", gold[:4], b[:4]), "different rows: 1 row in only .* index 8"),
        (write(tmp_path / "d", ["w", *gold[1:]], b), "different gold .* 1 row, .*index 0.*same"),
        (write(tmp_path / "e", many, many), "has 10001 labels"),
        (tmp_path / "a" / "results.json", r"results\.json: is a file; .* give .*"),
        (tmp_path / "nowhere", "nowhere: has no file"),
    ):
        with pytest.raises(InputError, match=message):
            compare_results(one, other)


def test_the_command_prints_lines_or_json(tmp_path, capsys):
    gold, a, b = answers(50, (0.9, 0.3))
    one = write(tmp_path / "a", gold, a, protocol="pub\x1b[2Jlished")
    two = write(tmp_path / "b", gold, b)
    assert run(["compare", str(one), str(two), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == compare_results(one, two)
    assert run(["compare", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "50 rows of t" in out
    assert "exact McNemar test" in out
    assert compare_results(one, two)["verdict"] in out
