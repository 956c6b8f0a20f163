"""CSV dialects: found and said, or set; in doubt, and for merged lines, an error."""

import re

import pytest

from mlmjax import InputError
from mlmjax.config.data import CsvDialect, Location
from mlmjax.config.tables import decode
from mlmjax.data.reading.files import read_file
from mlmjax.data.reading.sources import read_source

TWO = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]


@pytest.fixture
def fields(tmp_path):
    """Return the fields of the records of a file with this text."""

    def read(text, name="a.csv", columns=("text", "label"), **dialect):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        csv = CsvDialect(**dialect) if dialect else None
        return [record.fields for record in read_file(path, columns, csv=csv)]

    return read


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "\ufefftext;label\r\ngood;yes\r\nbad;no\r\n", "separated by semicolons"),
        ("a.csv", "text\tlabel\ngood\tyes\nbad\tno\n", "separated by tabs"),
        ("a.csv", "text|label\ngood|yes\nbad|no\n", "separated by vertical bars"),
        ("a.tsv", "text,label\ngood,yes\nbad,no\n", "separated by commas"),
        ("a.csv", "text,label\rgood,yes\rbad,no\r", "carriage return"),
        ("a.csv", "text;label\rgood;yes\rbad;no", "carriage return"),
        ("a.csv", "'text','label'\n'good','yes'\n'bad','no'\n", "quoted by '"),
        ("a.csv", "sep=;\ntext;label\ngood;yes\nbad;no\n", "names the separator ';'"),
        ("a.csv", '"SEP=^"\r\ntext^label\r\ngood^yes\r\nbad^no\r\n', "names the separator '^'"),
        ("a.csv", '"text", "label"\ngood, "yes"\n"bad", "no"\n', "spaces between a separator"),
        ("a.jsonl", '{"text":"good","label":"yes"}\r{"text":"bad","label":"no"}\r', "carriage"),
    ],
)
def test_an_unusual_dialect_is_found_and_said(fields, caplog, name, text, said):
    assert fields(text, name) == TWO
    assert said in caplog.text
    assert name in caplog.text


def test_spaces_and_first_lines_that_are_text_stay(fields, tmp_path):
    said = {"text": "he said", "label": ' "go" now'}
    assert fields('text,label\nhe said, "go" now\n') == [said]
    assert fields('text,label\nhe said, "go"\nhe said, "go" now\n')[1] == said
    assert fields('text,label\n" ""go""", no\n') == [{"text": ' "go"', "label": " no"}]
    assert fields('text, label\n"a, b", "x, y"\n') == [{"text": "a, b", "label": "x, y"}]
    assert fields("sep=,\n", columns=["sep="], separator=",") == []
    path = tmp_path / "a.csv"
    path.write_text("sep=;\ntext;label\ngood;yes\nbad\n")
    with pytest.raises(InputError, match="line 4: has 1 fields"):
        list(read_file(path))


def test_a_usual_file_says_nothing(fields, caplog):
    assert fields("text,label\ngood,yes\nbad,no\n") == TWO
    assert fields("text\nsome; text\n", columns=["text"]) == [{"text": "some; text"}]
    assert fields('text,label;x\n"a, b",yes\n', columns=["text"])[0]["text"] == "a, b"
    assert fields('text,label\nit is 5" long,yes\n')[0]["text"] == 'it is 5" long'
    assert not caplog.records


def test_old_lines_are_read_whatever_their_length(fields):
    text = "word " * 20_000
    rows = "".join(f"{text}{i},yes\r" for i in range(3))
    assert [one["text"][-1] for one in fields("text,label\r" + rows)] == ["0", "1", "2"]


def test_a_separator_in_doubt_is_refused_and_can_be_set(fields):
    text = "text;a,label;b\ngood;1,yes;2\nbad;3,no;4\n"
    with pytest.raises(InputError, match=r"line 1: .* separated by commas or semicolons; expected"):
        fields(text, columns=None)
    set_to = fields(text, columns=None, separator=",")
    assert set_to[0] == {"text;a": "good;1", "label;b": "yes;2"}
    assert fields(text, columns=["a,label"]) == fields(text, columns=None, separator=";")


def test_quotes_and_escapes_can_be_set(fields):
    assert fields('text,label\n"good,yes\n', quote="")[0] == {"text": '"good', "label": "yes"}
    assert fields('text,label\n"a \\"b\\"",yes\n', escape="\\")[0]["text"] == 'a "b"'


MERGED = 'text,label\n"5 inch,yes\nbad,no\n7 inch",yes\n'
SPANNING = 'text,label\n"line one\nline two",yes\nbad,no\n'


def test_merged_lines_are_refused_or_a_stated_choice(fields, caplog):
    with pytest.raises(InputError, match=r"a\.csv line 2: .* ends only on line 4, so 3 lines"):
        fields(MERGED)
    assert len(fields(MERGED, merged_lines="allow")) == 1
    assert len(fields(MERGED, quote="")) == 3
    assert fields(SPANNING)[0]["text"] == "line one\nline two"
    said = "a.csv: 1 record of several lines (quoted line breaks), the first on lines 2 to 3; "
    assert f'{said}csv.merged_lines = "refuse" rejects them' in caplog.text
    with pytest.raises(InputError, match=r"line 2: .* 2 lines make one record; close the quote"):
        fields(SPANNING, merged_lines="refuse")


def test_a_trailing_separator_is_refused_by_its_line(fields):
    with pytest.raises(InputError, match=r"line 2: has 3 fields, the header has 2: text, label"):
        fields("text,label\ngood,yes,\nbad,no\n")


def test_the_key_csv_reaches_every_file_of_a_source(tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("text;a,label\ngood;1,yes\n")
    table = {"path": str(tmp_path / "*.csv"), "csv": {"separator": ","}}
    records = read_source(decode(Location, table, "x"))
    assert [list(one.fields) for one in records] == [["text;a", "label"]] * 2


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ({"separator": "::"}, "csv.separator"),
        ({"separator": '"'}, "expected different characters"),
        ({"quote": "\n"}, "expected one ASCII character"),
        ({"seperator": ";"}, "did you mean 'separator'?"),
    ],
)
def test_a_dialect_that_cannot_be_is_refused(csv, message):
    with pytest.raises(InputError, match=re.escape(message)):
        decode(Location, {"path": "x", "csv": csv}, "x")
