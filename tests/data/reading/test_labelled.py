"""Labelled tables: every format gives the same rows, columns are found or asked for."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import labelled_rows, write_table

from mlmjax.data.reading.labelled import find_columns, read_labelled
from mlmjax.errors import InputError

ROWS = labelled_rows(12)
NAMES = ("a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz", "a.jsonl.gz")


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_rows_and_says_which_columns(tmp_path, name):
    table = read_labelled(write_table(tmp_path / name, ROWS))
    assert table.texts == [row["text"] for row in ROWS]
    assert table.labels == [row["label"] for row in ROWS]
    assert table.columns[:2] == ("text", "label")
    assert [line.split(" (")[0] for line in table.said] == [
        "column 'text' holds the texts",
        "column 'label' holds the labels",
    ]
    assert table.where[0].startswith(str(tmp_path / name))


def test_given_columns_are_used_and_not_spoken_of(tmp_path):
    path = write_table(tmp_path / "a.csv", ROWS)
    table = read_labelled(path, "{id}: {text}", "label")
    assert table.texts[0] == f"T0: {ROWS[0]['text']}"
    assert table.said == ()


@pytest.mark.parametrize(
    ("present", "given", "found"),
    [
        (["id", "Body", "Topic"], {}, ("Body", "Topic")),
        (["words", "team"], {"label": "team"}, ("words", "team")),
        (["words", "team"], {"text": "words"}, ("words", "team")),
        (["text", "body", "label"], {"text": "body"}, ("body", "label")),
        (["a", "text", "category"], {"label": "a"}, ("text", "a")),
        (["id", "data.text", "data.meta.label"], {}, ("data.text", "data.meta.label")),
    ],
)
def test_obvious_columns_are_found(present, given, found):
    assert find_columns("a.csv", present, **given)[:2] == found


@pytest.mark.parametrize(
    ("present", "given", "says"),
    [
        (["text"], {}, "has one column, text; expected one of texts and one of labels"),
        (["text", ""], {}, "columns: text, one without a name; give --label COLUMN"),
        (["a", "b"], {}, "which column holds the labels is not clear: no column has a usual"),
        (["text", "body", "label"], {}, "'text', 'body' may hold them; columns: text, body"),
        (["text", "label", "class"], {}, "'label', 'class' may hold them"),
        (["text", "label"], {"label": "lable"}, "no column 'lable'; did you mean 'label'?"),
        (["text", "label"], {"text": "text", "label": "text"}, "both name 'text'"),
    ],
)
def test_doubtful_columns_are_an_error_that_lists_them(present, given, says):
    with pytest.raises(InputError) as error:
        find_columns("a.csv", present, **given)
    assert says in str(error.value)


def test_rows_without_a_text_or_a_label_are_listed_or_left_out_and_counted(tmp_path):
    spoiled = [*ROWS, {"id": "x", "text": " ", "label": "sports"}]
    spoiled += [{"id": "y", "text": "the end", "label": ""}, ROWS[0]]
    path = write_table(tmp_path / "a.csv", spoiled)
    with pytest.raises(InputError, match=r"line 14: column 'text' is blank.*--skip-blank") as error:
        read_labelled(path)
    assert "line 15: column 'label' is blank" in error.value.details[0]
    table = read_labelled(path, skip_blank=True)
    assert len(table.texts) == len(ROWS)
    assert table.said[-2:] == (
        "left out 2 rows without a text or a label",
        "left out 1 row with an earlier text and label again",
    )


def test_missing_numbers_and_nulls_are_blank(tmp_path):
    rows = [{"text": f"text {i}", "label": [1.0, float("nan"), None, 2.0][i % 4]} for i in range(8)]
    path = write_table(tmp_path / "a.parquet", rows)
    with pytest.raises(InputError, match="row 2: column 'label' is blank"):
        read_labelled(path)
    assert set(read_labelled(path, skip_blank=True).labels) == {"1", "2"}


def test_columns_inside_an_object_are_found(tmp_path):
    rows = [{"id": i, "data": {"text": f"text {i}", "label": "ab"[i % 2]}} for i in range(8)]
    table = read_labelled(write_table(tmp_path / "a.jsonl", rows))
    assert table.columns[:2] == ("data.text", "data.label")
    assert table.texts[7] == "text 7"


def test_semicolons_are_found(tmp_path):
    (tmp_path / "a.csv").write_text("Body;Team\n" + "one, two;a\nthree;b\nfour;a\n")
    table = read_labelled(tmp_path / "a.csv", label="Team")
    assert list(zip(table.texts, table.labels, strict=True)) == [
        ("one, two", "a"),
        ("three", "b"),
        ("four", "a"),
    ]


def test_labels_are_names_even_if_they_are_numbers(tmp_path):
    rows = [{"text": f"text {i}", "label": [1, 2.0, True, -1][i % 4]} for i in range(16)]
    path = write_table(tmp_path / "a.jsonl", rows)
    assert set(read_labelled(path).labels) == {"1", "2", "true", "-1"}
    assert set(read_labelled(path, drop_labels=["-1"]).labels) == {"1", "2", "true"}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["Yes", "yes ", "no"], "'Yes', 'yes' are kept apart"),
        (["1", "01", "2"], "'01', '1' are kept apart"),
        (["1.0", "1", "-2"], "'1', '1.0' are kept apart"),
        (["caf\u00e9", "cafe\u0301", "bar"], r"'cafe\u0301', 'caf\xe9' are kept apart"),
        (["yes", "yes\u200b", "no"], r"'yes', 'yes\u200b' are kept apart"),
        (["a", "b", "NaN"], "the label 'NaN' of 3 rows may mean that there is none; --drop-label"),
        (["0", "1", "-1"], "the label '-1' of 3 rows may mean that there is none"),
        (["-1", "1"], None),
        (["low", "-1", "high"], None),
        (["2020", "2021", "1.5"], None),
    ],
)
def test_labels_that_may_be_one_or_none_are_a_warning(tmp_path, labels, said):
    rows = [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(9)]
    table = read_labelled(write_table(tmp_path / "a.csv", rows))
    assert set(table.labels) == {label.strip() for label in labels}
    if said is None:
        assert "warning" not in "".join(table.said)
    else:
        assert said in table.said[-1]


def test_rows_without_a_label_are_dropped_by_the_words_of_a_run_file(tmp_path):
    rows = [{"text": f"text {i}", "label": [1, None, -1, 2][i % 4]} for i in range(16)]
    path = write_table(tmp_path / "a.parquet", rows)
    table = read_labelled(path, drop_labels=["null", "-1"])
    assert set(table.labels) == {"1", "2"}
    assert "left out 8 rows with a label of --drop-label" in table.said


def test_an_absent_field_is_blank(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(8)]
    path = write_table(tmp_path / "a.jsonl", [*rows, {"text": "no label"}, {"label": "a"}])
    with pytest.raises(InputError, match="line 9: has no column 'label'"):
        read_labelled(path)
    table = read_labelled(path, skip_blank=True)
    assert len(table.texts) == 8
    assert "left out 2 rows without a text or a label" in table.said


@pytest.mark.parametrize("given", [{}, {"text": "text", "label": "label"}])
def test_the_first_field_may_be_absent(tmp_path, given):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(8)]
    path = write_table(tmp_path / "a.jsonl", [{"text": "no label"}, *rows])
    with pytest.raises(InputError, match=r"line 1: has no column 'label'.*; --skip-blank leaves"):
        read_labelled(path, **given)
    assert len(read_labelled(path, skip_blank=True, **given).texts) == 8


def test_a_class_without_a_name_is_left_out_by_the_option_of_the_command(tmp_path):
    features = {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    rows = [{"text": f"text {i}", "label": [0, 1, -1][i % 3]} for i in range(9)]
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
    pq.write_table(table, path)
    with pytest.raises(InputError, match=r"expected 0 to 1 .*; --drop-label -1 leaves such rows"):
        read_labelled(path)
    assert set(read_labelled(path, drop_labels=["-1"]).labels) == {"bad", "good"}


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (lambda i: "one", "has 1 distinct label \\(one\\); expected at least two"),
        (lambda i: f"row {i}", "9 distinct labels in 9 rows"),
        (lambda i: ["a", "b"], "expected one label"),
    ],
)
def test_a_column_that_holds_no_labels_is_rejected(tmp_path, label, says):
    rows = [{"text": f"text {i}", "label": label(i)} for i in range(9)]
    with pytest.raises(InputError, match=says):
        read_labelled(write_table(tmp_path / "a.jsonl", rows))


def test_a_text_that_is_a_number_is_rejected_by_row(tmp_path):
    rows = [{"text": 7, "label": "a"}, {"text": "x", "label": "b"}]
    with pytest.raises(InputError, match="line 1: column 'text' is int"):
        read_labelled(write_table(tmp_path / "a.jsonl", rows))


def test_a_spreadsheet_and_a_table_without_rows_are_rejected(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match="unknown kind of file; expected a name that ends in"):
        read_labelled(tmp_path / "a.xlsx")
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(InputError, match="has no rows"):
        read_labelled(tmp_path / "a.csv")
    with pytest.raises(InputError, match="is a folder; give a file"):
        read_labelled(tmp_path)
