"""Suites: results that are found again, a choice by validation rows, and missing data."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from suite_files import SUITE, files_of, reviews, run_small, write_model, write_suite
from task_files import write_csv

from mlmjax.cli.main import run
from mlmjax.config.suite import load_suite
from mlmjax.errors import InputError
from mlmjax.evaluation.suite import report
from mlmjax.evaluation.suite.rows import NoDataError, find_file, read_rows

TESTS = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
import conftest  # the devices of the tests
from suite_files import run_small

whole = Path.replace

def replace(self, target):
    if "-tfidf-" in target.name:  # with what it wrote still under its partial name
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, target)

Path.replace = replace
run_small(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    write_suite(folder)
    write_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def done(folder):
    """A whole run: the folder of its results, the results, and the printed lines."""
    return folder / "out", *run_small(folder, folder / "out")


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """Draw no scores, except in the first run."""
    request.getfixturevalue("done")
    monkeypatch.setattr(report, "scores_picture", lambda lines: Figure((1, 1)))


@pytest.fixture
def out(done, tmp_path):
    """A copy of the folder of results."""
    return shutil.copytree(done[0], tmp_path / "out")


def lines_of(results, method):
    return [line for line in results["lines"] if line["method"] == method]


def test_every_method_is_in_the_results_and_on_the_page(done):
    out, results, printed = done
    assert json.loads((out / "suite.json").read_text()) == json.loads(json.dumps(results))
    methods = [(line["kind"], line["method"]) for line in results["lines"]]
    assert methods == [
        ("zero-shot", "zero-shot"),
        ("fine-tune", "TF-IDF + logistic regression"),
        ("fine-tune", "MLM head"),
        ("fine-tune", "classification head"),
    ]
    for line in results["lines"]:
        assert (line["n"], line["chance"], line["majority"]) == (12, 0.5, 0.5)
        low, high = line["ci95"]
        assert low <= line["score"] <= high
    assert lines_of(results, "TF-IDF + logistic regression")[0]["score"] == 1.0
    # What gives only labels has no calibration, and only what reads options has an order of them.
    assert [line["ece"] is None for line in results["lines"]] == [False, True, False, False]
    changed = [line["order_changed"] for line in results["lines"]]
    assert [share is None for share in changed] == [False, True, False, True]
    assert all(0 <= share <= 1 for share in changed if share is not None)
    page = (out / "suite.md").read_text()
    assert "12.50" in page
    assert "`nobody has written them down`" in page
    assert "test rows of ag_news: no file of" in page
    assert "24\\*" in page  # 32 training rows less the 8 that were held out
    assert (out / "suite.svg").read_text().startswith("<svg")
    # One zero-shot, one TF-IDF, and for each head two settings and one seed.
    assert len(printed.cells) == len(list((out / "cells").iterdir())) == 8
    assert printed.lines[-1].startswith("[8/8] ")
    assert [line[:30] for line in printed.lines[:2]] == [
        "left out: task ag_news: test r",
        "left out: task dreams: nobody ",
    ]


def test_a_result_holds_its_predictions_and_its_identity(done):
    counts = {"validation": [], "test": []}
    for path in (done[0] / "cells").glob("*-[mc]l*"):
        cell = json.loads(path.read_text())
        identity, rows = cell["identity"], cell["predictions"]
        counts[identity["part"]].append((identity["method"], identity["seed"], len(rows)))
        shares = [row["probabilities"] for row in rows]
        assert [max(one, key=one.get) for one in shares] == [row["prediction"] for row in rows]
        np.testing.assert_allclose([sum(one.values()) for one in shares], 1, atol=1e-6)
        right = sum(row["gold"] == row["prediction"] for row in rows)
        assert cell["metrics"]["accuracy"] == right / len(rows)
    assert sorted(counts["test"]) == [("classification", 1, 12), ("mlm", 1, 12)]
    assert sorted(counts["validation"]) == [("classification", 0, 8)] * 2 + [("mlm", 0, 8)] * 2


@pytest.mark.long
def test_a_killed_run_resumes_to_the_same_bytes(folder, out, tmp_path):
    one_head, stopped = 'heads=["mlm"]', tmp_path / "stopped"
    assert run_small(folder, out, one_head)[1].computed == []
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(stopped), one_head],
        cwd=TESTS / "helpers",
        env={**os.environ, "PYTHONPATH": f"{TESTS / 'helpers'}:{TESTS}:{TESTS.parent}"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr.decode()[-2000:]
    left = [path.name for path in (stopped / "cells").iterdir()]
    assert sorted(name.endswith(".partial") for name in left) == [False, True]
    # Nor is a training that was done.
    shutil.copy(next((out / "cells").glob("*-mlm-*")), stopped / "cells")
    _, printed = run_small(folder, stopped, one_head)
    assert len(printed.computed) == 3
    found, whole = files_of(stopped), files_of(out)
    assert found == {name: content for name, content in whole.items() if "classif" not in name}


def test_results_are_not_computed_again_unless_a_setting_changes(folder, done, out):
    assert run_small(folder, out)[1].computed == []
    before, after = files_of(done[0]), files_of(out)
    assert after | {"suite.svg": before["suite.svg"]} == before
    results, printed = run_small(folder, out, "seeds=2", 'heads=["mlm"]')
    assert len(printed.computed) == 1  # the second seed
    (line,) = lines_of(results, "MLM head")
    assert len(line["scores"]) == 2
    assert line["spread"] is not None
    results, printed = run_small(
        folder, out, 'heads=["mlm"]', "sweep.weight_decay=0.5", "sweep.learning_rate=[3e-3]"
    )
    assert len(printed.computed) == 1  # one setting needs no choice
    assert lines_of(results, "MLM head")[0]["tried"] == []


def test_the_choice_does_not_see_the_test_rows(folder, done, out, tmp_path):
    """With other test labels the results of the sweep and the setting are the same."""
    other = shutil.copytree(folder / "data", tmp_path / "other")
    labels = ["good", "bad", "bad"] * 4
    rows = [row | {"label": label} for row, label in zip(reviews(12, 2), labels, strict=True)]
    write_csv(other / "my-reviews.test.csv", rows)
    results, printed = run_small(folder, out, 'heads=["mlm"]', data=other)
    assert [line for line in printed.computed if "validation" in line] == []
    assert len(printed.computed) == 3  # zero-shot, TF-IDF, and the seed of the chosen setting
    before, after = lines_of(done[1], "MLM head")[0], lines_of(results, "MLM head")[0]
    assert (after["chosen"], after["tried"]) == (before["chosen"], before["tried"])
    assert after["scores"] != before["scores"]


def test_several_models_are_side_by_side(folder, tmp_path):
    names = ("model", "second", "copy")
    write_model(folder / "second", scale=0.2)
    shutil.copytree(folder / "model", folder / "copy", dirs_exist_ok=True)
    (folder / "zero_shot.toml").write_text("[[entries]]".join(SUITE.split("[[entries]]")[:2]))
    options = {"suite": "zero_shot.toml", "models": names}
    results, printed = run_small(folder, tmp_path / "out", **options)
    assert [Path(line["model"]).name for line in results["lines"]] == list(names)
    first, _, copy = (line["scores"] for line in results["lines"])
    assert copy == first
    assert len(printed.computed) == 2  # a copy of a model is the same model
    page = (tmp_path / "out" / "suite.md").read_text()
    assert all(f"/{name}`" in page for name in names)
    with pytest.raises(InputError, match="named twice"):
        run_small(folder, tmp_path / "out", models=("model", "model"))


def test_a_file_that_is_not_a_result_is_rejected(folder, out):
    (path,) = (out / "cells").glob("*-zero-shot-*.json")
    good = json.loads(path.read_text())
    first, *rest = good["predictions"]
    metrics, figures = "its metrics are not", good["metrics"]
    edits = [
        ({"identity": {**good["identity"], "model": "another"}}, "it has another identity"),
        ({"predictions": []}, "or neither"),
        ({"predictions": [{**first, "gold": 5}]}, r"predictions\.0\.gold"),
        ({"predictions": rest}, "for other questions"),
        ({"predictions": good["predictions"][::-1]}, "for other questions"),
        ({"predictions": [{**first, "gold": "zzz"}, *rest]}, "for other questions"),
        ({"predictions": [{**first, "prediction": "zzz"}, *rest]}, "not its most probable"),
        ({"predictions": [{**first, "probabilities": {}}, *rest]}, "not its most probable"),
        ({"metrics": {**figures, "accuracy": 0.99}}, metrics),
        ({"metrics": {**figures, "accuracy": "x"}}, "ufunc|metrics"),
        ({"metrics": {**figures, "macro_f1": None}}, "unsupported|ufunc|metrics"),
        ({"metrics": {**figures, "accuracy_ci95": [9, 9]}}, metrics),
        ({"metrics": {}}, metrics),
        ({"metrics": {k: v for k, v in figures.items() if k != "calibration"}}, "calibration"),
        ({"metrics": {**figures, "calibration": {"ece": 7}}}, "ece is 7"),
        ({"metrics": {**figures, "calibration": {"ece": float("nan")}}}, "it holds NaN"),
        ({"order": {}}, "changed"),
        ({"diverged": "x"}, "predictions and diverged"),
    ]
    for content, said in (
        (b"", "Expecting value"),
        (b"[1]", "it holds a list; expected an object"),
        (b'{"identity": 1}', "it has another identity"),
        (b"{" * 100_000, "RecursionError|recursion|Expecting"),
        (b"\xff", "codec can't decode"),
        *((json.dumps(good | edit).encode(), said) for edit, said in edits),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=said) as caught:
            run_small(folder, out, 'heads=["mlm"]')
        assert caught.value.message.startswith(f"{path}: is not a result of this suite (")
        assert "delete the file" in caught.value.message
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("sweep.epochs=[0]", "sweep.epochs"),
        ("sweep.epochs=[]", "sweep.epochs"),
        ("sweep.epochs=[1, 1]", "repeats a value"),
        ("sweep.learning_rate=[nan]", "sweep.learning_rate"),
        ("sweep.learning_rate=[-1.0]", "sweep.learning_rate"),
        ("sweep.held_out=1.0", "sweep.held_out"),
        ("sweep.epoch=[1]", "did you mean 'epochs'"),
        ("seeds=0", "seeds"),
        ("limit=many", "limit"),
        ("heads=[]", "heads"),
        ('tasks=["review.toml"]', "did you mean 'reviews.toml'"),
        ("entries=[]", "entries"),
        ("entries.0.kind=guess", "kind"),
        ('entries.0.test.files=["../*"]', "leads out of the data folder"),
        ('entries.0.test.files=["/etc/*"]', "leads out of the data folder"),
        ('entries.0.train={split="train"}', "reads no train"),
        ("entries.0.protocol=published", "no protocol 'published'"),
        ("entries.0.task=mmul", "did you mean 'mmlu'"),
        ("entries.1.task=mmlu", "other options in each row"),
        ("entries.1.kind=zero-shot", "reads no train"),
        ("missing=5", "missing"),
    ],
)
def test_hostile_suites_are_rejected_in_a_sentence(folder, change, said):
    with pytest.raises(InputError) as caught:
        load_suite(folder / "small.toml", [change])
    assert said in str(caught.value)
    assert "\n" not in caught.value.message


def test_bad_files_are_rejected_before_anything_is_computed(folder, tmp_path):
    def message(rows):
        data = tmp_path / "data"
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(folder / "data", data)
        write_csv(data / "my-reviews.test.csv", rows)
        with pytest.raises(InputError) as caught:
            run_small(folder, tmp_path / "out", data=data)
        assert not list((tmp_path / "out").glob("cells/*"))
        return caught.value.message

    blank = message([{"text": " ", "label": "bad"}])
    assert "my-reviews.test.csv" in blank
    assert "'text' is blank" in blank
    assert "the answer 'odd'" in message([{"text": "a", "label": "odd"}])
    with pytest.raises(InputError, match="is not a folder"):
        run_small(folder, tmp_path / "out", data="absent")
    with pytest.raises(InputError, match="only one label"):
        run_small(folder, tmp_path / "out", "limit=2")


def test_files_are_found_by_any_usual_name(tmp_path):
    for name in ("SST-2/train.tsv", "sst2_dev.parquet", "glue__mnli__validation_matched.jsonl",
                 "glue__mnli__validation_mismatched.jsonl", ".hidden/sst2_test.csv"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    _, planned = load_suite("paper")
    entries = {entry.task: entry for entry, _ in planned}
    find = lambda part: find_file(tmp_path, part.files, "rows").name  # noqa: E731
    assert find(entries["sst2"].train) == "train.tsv"
    assert find(entries["sst2"].validation) == "sst2_dev.parquet"
    assert find(entries["mnli"].test) == "glue__mnli__validation_matched.jsonl"
    with pytest.raises(NoDataError, match="no file of"):
        find(entries["sst2"].test)
    (tmp_path / "sst2_dev_old.csv").touch()
    with pytest.raises(InputError, match="2 files match") as caught:
        find(entries["sst2"].validation)
    assert not isinstance(caught.value, NoDataError)
    questions = find_file(TESTS / "data", entries["mmlu"].test.files, "rows")
    assert questions.name == "mmlu_500.jsonl"


@pytest.mark.long
@pytest.mark.data
def test_the_paper_finds_its_files(test_data):
    suite, planned = load_suite("paper", ["limit=40"])
    counts, absent = {}, set()
    for one in planned:
        try:
            rows = read_rows(one, suite, test_data)
            counts[one.task.name] = (len(rows.train), len(rows.validation), len(rows.test))
        except NoDataError:
            absent.add(one.task.name)
    assert absent == {"rte"}
    asked = {"mmlu", "mmlu_pro", "ade_corpus_v2", "neurips_impact_statement_risks"}
    asked.add("one_stop_english")
    held_out = {"mnli", "20newsgroups", "cola", "trec"}
    for name, found in counts.items():
        expected = (0, 0, 40) if name in asked else (36, 4, 40) if name in held_out else (40,) * 3
        assert found == expected, name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "exactly one of --task and --suite"),
        (["--task", "mmlu", "--suite", "paper"], "exactly one of --task and --suite"),
        (["--suite", "paper"], "--suite needs --out"),
        (["--task", "mmlu", "seeds=2"], "KEY=VALUE"),
        (["--task", "mmlu", "--model", "other"], "several --model"),
        (["--task", "mmlu", "--baseline", "transformers:x"], "--baseline"),
        (["--suite", "paper", "--out", "OUT", "--protocol", "published"], "--protocol"),
        (["--suite", "papr", "--out", "OUT"], "shipped are paper"),
    ],
)
def test_the_command_rejects_options_that_exclude_each_other(
    folder, tmp_path, monkeypatch, capsys, arguments, said
):
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", "--model", str(folder / "model"), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_command_runs_a_suite(folder, done, tmp_path, capsys):
    out = tmp_path / "out"
    start = ["evaluate", "--model", str(folder / "model"), "--out", str(out)]
    start += ["--suite", str(folder / "small.toml"), "--data", str(folder / "data")]
    for tasks, reason in (
        ('["ag_news"]', "task ag_news: test rows of ag_news: no file of"),
        ('["dreams"]', "task dreams: nobody has written them down"),
        ('["ag_news", "dreams"]', "task dreams: nobody has written"),
    ):
        assert run([*start, f"tasks={tasks}"]) == 2
        error = capsys.readouterr().err
        assert "no entry finds its data, so nothing was run" in error
        assert reason in error
    assert not out.exists()
    shutil.copytree(done[0], out)
    assert run([*start, "--limit", "500"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"report: {out / 'suite.md'}\n"
    assert "Not all of the data" in (out / "suite.md").read_text()
    assert "left out: task dreams: nobody has written them down" in captured.err
    found = json.loads((out / "suite.json").read_text())["lines"]
    assert [one["score"] for one in found] == [one["score"] for one in done[1]["lines"]]


def test_a_result_that_cannot_be_written_stops_the_run(folder, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RuntimeError, match="cannot be written"):
        run_small(folder, tmp_path / "out", 'tasks=["reviews.toml"]')
    assert list((tmp_path / "out" / "cells").iterdir()) == []
