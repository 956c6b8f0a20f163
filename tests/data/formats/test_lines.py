"""Encodings: found by the first bytes and said, or set; a byte that does not fit is named."""

import codecs
import gzip
import json

import pytest

from mlmjax import InputError
from mlmjax.cli.tables.inputs import read_labels, read_lines
from mlmjax.config.data import Location, SourceConfig
from mlmjax.config.task import Task
from mlmjax.data.reading.files import read_file
from mlmjax.data.reading.labelled import read_labelled
from mlmjax.evaluation.questions import read_questions

TEXTS = ["naïve café", "Größe, übel", "日本語 text"]
WESTERN = TEXTS[:2]


def content(name, texts=TEXTS):
    if name.endswith(".jsonl"):
        rows = [json.dumps({"text": one, "label": "a"}, ensure_ascii=False) for one in texts]
        return "".join(f"{row}\r\n" for row in rows)
    return "text;label\r\n" + "".join(f"{one};a\r\n" for one in texts)


NAMES = ["a.csv", "a.jsonl"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_is_read_and_said(tmp_path, caplog, name, encoding):
    path = tmp_path / name
    path.write_bytes(content(name).encode(encoding))
    assert [one.fields["text"] for one in read_file(path, ["text"])] == TEXTS
    assert (f"read as {encoding.upper()}, which its first bytes name" in caplog.text) == (
        encoding != "utf-8-sig"
    )
    big = codecs.BOM_UTF16_BE + content(name).encode("utf-16-be")
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(big))
    assert [one.fields["text"] for one in read_file(tmp_path / f"{name}.gz")] == TEXTS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("encoding", "texts"),
    [("latin-1", WESTERN), ("cp1252", WESTERN), ("utf-16-le", TEXTS), ("shift_jis", TEXTS[2:]),
     ("utf-8", TEXTS), ("utf-16", TEXTS)],
)  # fmt: skip
def test_an_encoding_that_is_set_is_used_everywhere(tmp_path, caplog, name, encoding, texts):
    path = tmp_path / name
    path.write_bytes(content(name, texts).encode(encoding))
    source = Location(path=str(path), encoding=encoding)
    assert [one.fields["text"] for one in read_file(path, encoding=source.encoding)] == texts
    task = Task.from_dict(
        {"name": "t", "prompt": "{text} {options}", "answer": "label", "labels": ["a", "b"]}
    ).model_copy(update={"encoding": encoding})
    questions, _ = read_questions(task, path, None)
    assert [one.row["text"] for one in questions] == texts
    assert "first bytes" not in caplog.text


def test_long_files_are_decoded_piece_by_piece(tmp_path):
    texts = [f"{number} Größe 日本" for number in range(9000)]
    path = tmp_path / "a.txt"
    path.write_bytes("\n".join(texts).encode("utf-16"))
    assert list(read_lines(str(path))) == texts
    path.write_bytes("\n".join(texts).encode("shift_jis", "ignore"))
    assert list(read_lines(str(path), "shift_jis"))[-1] == "8999 Gre 日本"


LATIN = content("a.csv", WESTERN).encode("latin-1")
ADVICE = 'say how it is encoded, as in encoding = "latin-1" (--encoding latin-1), or convert it'


@pytest.mark.parametrize(
    ("data", "encoding", "message"),
    [
        (LATIN, None, "a.csv line 2: is not UTF-8 (byte 3 of the line is 0xef); " + ADVICE),
        (content("a.csv").encode("utf-16-le"), None, "a.csv line 1: holds a NUL byte"),
        (content("a.csv").encode("utf-16-be"), None, "(--encoding utf-16-be)"),
        (content("a.csv").encode("utf-16")[:-1], None, "a.csv: byte 107 of the file is not UTF-16"),
        (b"text,label\nx,a\ny\x81,b\n", "cp1252", "a.csv: byte 17 of the file is not CP1252 text"),
        (b"text,label\nx,a\ny\xd8,b\n", "ascii", "a.csv: byte 17 of the file is not ASCII text"),
    ],
)
def test_a_byte_that_does_not_fit_is_named_with_the_way_out(tmp_path, data, encoding, message):
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        list(read_file(path, encoding=encoding))
    assert message in caught.value.message
    assert "encoding" in caught.value.message
    with pytest.raises(InputError) as caught:
        list(read_labelled(path, encoding=encoding))
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"text,label\n", mtime=0), "ends in .gz"),
        (b"PAR1\x15\0", "ends in .parquet"),
        (b"PK\x03\x04\0", "save it as CSV"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path, data, message):
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"a.csv: by its first bytes it is .*{message}"):
        list(read_file(path))


def test_several_marks_at_the_start_are_left_out(tmp_path):
    (tmp_path / "a.csv").write_text("\ufeff\ufefftext,label\na,\ufeffb\n")
    (record,) = read_file(tmp_path / "a.csv")
    assert record.fields == {"text": "a", "label": "\ufeffb"}


@pytest.mark.parametrize("name", ["base64", "latin2x", "rot13", "idna", "undefined", "", "\0"])
def test_an_unknown_encoding_is_rejected(name):
    with pytest.raises(InputError, match=r"encoding is '.*expected an encoding of text"):
        SourceConfig.from_dict({"path": "a", "text": "text", "encoding": name})


def test_texts_and_labels_in_other_encodings(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_bytes("\n".join(TEXTS).encode("utf-16"))
    assert list(read_lines(str(path))) == TEXTS
    assert read_labels(str(path)) == TEXTS
    path.write_bytes("\n".join(WESTERN).encode("latin-1"))
    assert list(read_lines(str(path), "latin-1")) == WESTERN
    with pytest.raises(
        InputError, match=r"a.txt line 1: is not UTF-8 \(byte 3 of the line is 0xef"
    ):
        list(read_lines(str(path)))


def test_what_was_found_is_logged_once_for_several_readings(tmp_path, caplog):
    path = tmp_path / "a.csv"
    text = 'text;label\r"one\rtwo";a\rother;a\rsome;b\rmore;b\r'
    path.write_bytes(text.encode("utf-16"))
    read_labelled(path)
    assert len(caplog.records) == 4  # encoding, line ends, separator, merged lines
    caplog.clear()
    noted = set()
    for _ in range(2):
        assert len(list(read_file(path, noted=noted))) == 4
    assert len(caplog.records) == 4
