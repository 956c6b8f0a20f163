"""`classify` reads tables and writes answers that name their row."""

import csv
import gzip
import json

import pyarrow.parquet as pq
import pytest
from tables import labelled_rows, write_table

from mlmjax import Classifier
from mlmjax.cli import main
from mlmjax.reporting import terminal

ROWS = labelled_rows(9)


@pytest.fixture(scope="module")
def model(word_folder):
    folder = word_folder.parent / "classifier"
    Classifier(word_folder, ["sports", "money"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def classify(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        assert main.run(["classify", "--model", model, *arguments]) == code
        out, err = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()] if code == 0 else (out, err)

    return run


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_a_table_without_a_column_is_rejected_with_the_way_out(classify, tmp_path, name):
    write_table(tmp_path / name, ROWS)
    out, err = classify(name, code=2)
    assert out == ""
    assert f"{name}: is a table, so its lines are not the texts; name the column" in err


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.csv.gz"])
def test_rows_of_a_table_are_answered_by_line_or_id(classify, model, tmp_path, name):
    write_table(tmp_path / name, ROWS)
    found = classify("--text", "text", name)
    first = 2 if ".csv" in name else 1
    assert [answer["line"] for answer in found] == list(range(first, first + len(ROWS)))
    assert list(found[0]) == ["line", "label", "probability", "probabilities"]
    named = classify("--text", "text", "--id", "id", "--echo", "--full", name)
    assert [(one["id"], one["text"]) for one in named] == [(r["id"], r["text"]) for r in ROWS]
    expected = Classifier.from_pretrained(model).predict_proba([row["text"] for row in ROWS])
    for row, full, short in zip(expected, named, found, strict=True):
        assert list(full["probabilities"].values()) == row.tolist()
        shown = [float(f"{value:.6g}") for value in row]
        assert list(short["probabilities"].values()) == shown
        assert short["probability"] == max(shown)
        assert short["label"] == full["label"] == ["sports", "money"][row.argmax()]


def test_lines_of_a_text_file_are_numbered(classify, tmp_path):
    (tmp_path / "a.txt").write_text("the goal\nthe bank\n")
    found = classify("--echo", "a.txt")
    assert [(one["line"], one["text"]) for one in found] == [(1, "the goal"), (2, "the bank")]


def test_answers_are_written_as_json_lines_csv_and_parquet(classify, tmp_path):
    write_table(tmp_path / "a.csv", ROWS)
    options = ("--text", "text", "--id", "id", "--echo", "a.csv")
    printed = classify(*options)
    for name in ("b.jsonl", "b.csv", "b.parquet"):
        assert classify("--out", name, *options) == []
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == printed
    flat = [
        {name: value for name, value in one.items() if name != "probabilities"}
        | {f"probability_{label}": value for label, value in one["probabilities"].items()}
        for one in printed
    ]
    with (tmp_path / "b.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{k: str(v) for k, v in one.items()} for one in flat]
    assert pq.read_table(tmp_path / "b.parquet").to_pylist() == flat
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", "b.jsonl", "b.csv", "b.parquet"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "txt", "a.csv"], "has no column 'txt'; did you mean 'text'?"),
        (["--id", "id", "a.txt"], "--id: names a column of a table; give --text"),
        (["--text", "text", "a.txt"], "a.txt: --text names a column of a table"),
        (["--text", "text", "-"], "standard input: --text names a column"),
        (["--text", "text", "--out", "b.xlsx", "a.csv"], "--out b.xlsx: expected a file that ends"),
        (["--text", "text", "--out", "a.csv", "a.csv"], "--out a.csv: is the file of the texts"),
        (["--csv", "quote=", "a.txt"], "--csv: says how a CSV file is written; a.txt is none"),
        (["--text", "text", "--csv", "separator=|", "a.csv"], "has no column 'text'"),
        (["--text", "text", "--out", "c/b.csv", "a.csv"], "c/b.csv: is a folder or in no folder"),
        (["--text", "text", "blank.csv"], "blank.csv line 3: column 'text' is blank"),
        (["--text", "text", "none.csv"], "none.csv: has no rows"),
        (["--text", "text", "absent.csv"], "absent.csv: cannot be read"),
    ],
)
def test_bad_options_and_rows_are_rejected_before_any_answer(classify, tmp_path, arguments, says):
    write_table(tmp_path / "a.csv", ROWS)
    (tmp_path / "a.txt").write_text("the goal\n")
    (tmp_path / "none.csv").write_text("text,label\n")
    (tmp_path / "blank.csv").write_text("text,label\na goal,sports\n ,money\n")
    before = {path.name for path in tmp_path.iterdir()}
    out, err = classify(*arguments, code=2)
    assert out == ""
    assert says in err.splitlines()[0]
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_broken_row_late_in_a_compressed_table_leaves_no_output(classify, tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "the goal"}\n' * 300 + '{"text": null}\n')
    (tmp_path / "b.csv").write_text("kept")
    _, err = classify("--text", "text", "--out", "b.csv", "a.jsonl.gz", code=2)
    assert "line 301: column 'text' is blank" in err
    assert (tmp_path / "b.csv").read_text() == "kept"


def test_long_work_shows_its_progress_and_keeps_stdout_clean(classify, tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "PATIENCE_SECONDS", 0.0)
    (tmp_path / "a.txt").write_text("the goal\n" * 300)
    shown = []
    monkeypatch.setattr(terminal, "say", shown.append)
    assert len(classify("a.txt")) == 300
    assert shown[-1].startswith("texts classified 300/300 | ")
    assert any("compiling, about " in line for line in shown)
