"""One file is read alike for training and evaluation: labels, blanks, what is left out."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from row_files import read

from mlmjax import InputError
from mlmjax.config.data import SourceConfig
from mlmjax.config.task import Task
from mlmjax.evaluation.questions import read_questions
from mlmjax.text.verbalizer import Verbalizer

PROMPT = "{text}\n{options}ANSWER: [unused0] [MASK]"


@pytest.fixture
def both(tokenizer):
    """Return the label numbers that training and evaluation read in a file, and their counts."""

    def labels(path, *, labels, prompt=PROMPT, answer="label", **keys):
        shared = {"prompt": prompt, "answer": answer, "labels": labels, **keys}
        source = SourceConfig(path=str(path), **shared)
        task = Task(name="t", data=str(path), **shared)
        letters = [ids for (ids,) in Verbalizer.letters(source.label_names).ids(tokenizer)]
        try:
            examples, counts = read(source, tokenizer, 128)
            trained = [letters.index(one.ids[one.answer_position]) for one in examples]
        except InputError as error:
            with pytest.raises(InputError) as other:
                read_questions(task, None, None)
            return error.message, other.value.message
        questions, left_out = read_questions(task, None, None)
        assert trained == [one.gold for one in questions]
        return trained, counts, left_out

    return labels


def csv(folder, text):
    path = folder / "a.csv"
    path.write_text(text)
    return path


def test_a_label_of_no_gold_is_left_out_of_both(both, tmp_path):
    classes = {"names": ["no", "yes"], "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": classes}}})}
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())], metadata=metadata)
    path = tmp_path / "snli.parquet"
    pq.write_table(pa.table([["a", "b", "c"], [0, -1, 1]], schema=schema), path)
    for message in both(path, labels=("no", "yes")):
        assert 'drop_labels = ["-1"] leaves such rows out' in message
    numbers, counts, left_out = both(path, labels=("no", "yes"), drop_labels=("-1",))
    assert numbers == [0, 1]
    assert (counts.dropped, left_out["dropped"]) == ({"left out by drop_labels": 1}, 1)


def test_class_numbers_without_a_name_are_left_out_without_labels(tmp_path, tokenizer):
    classes = {"names": ["no", "yes"], "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": classes}}})}
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())], metadata=metadata)
    path = tmp_path / "snli.parquet"
    pq.write_table(pa.table([["a", "b"], [-1, 1]], schema=schema), path)
    source = SourceConfig(path=str(path), prompt="{text}", answer="label")
    with pytest.raises(InputError, match=r'row 1: .* is class -1; .*drop_labels = \["-1"\]'):
        read(source, tokenizer)
    source = source.model_copy(update={"drop_labels": ("-1",)})
    examples, counts = read(source, tokenizer)
    assert (len(examples), counts.dropped) == (1, {"left out by drop_labels": 1})


def test_spaces_and_rules_are_the_same_in_both(both, tmp_path):
    path = csv(tmp_path, "text, label\nwet?, yes\ndry?, no \nhot?,(Yes).\n")
    numbers, *_ = both(
        path, answer=" label", labels=("no", "yes"), drop_labels=("(yes)",),
        normalize=("period", "lower"),
    )  # fmt: skip
    assert numbers == [1, 0]
    for message in both(path, labels=("no", "yes")):
        assert "label" in message


@pytest.mark.parametrize("blank", ["", "null"])
def test_a_blank_label_is_refused_or_left_out_by_both(both, tmp_path, blank):
    path = tmp_path / "a.jsonl"
    value = None if blank == "null" else " "
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": value}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for message in both(path, labels=("no", "yes")):
        assert "line 2" in message
        assert f'drop_labels = ["{blank}"]' in message
    assert both(path, labels=("no", "yes"), drop_labels=(blank,))[0] == [1]


def test_numbers_as_names_are_refused_by_both_where_they_may_be_positions(both, tmp_path):
    stars = tuple("12345")
    path = csv(tmp_path, "text,label\n" + "".join(f"x,{i}\n" for i in range(1, 6)))
    assert both(path, labels=stars)[0] == [0, 1, 2, 3, 4]
    path = csv(tmp_path, "text,label\n" + "".join(f"x,{i}\n" for i in range(5)))
    for message in both(path, labels=stars):
        assert "may be a name or a position" in message
    table = {str(i): name for i, name in enumerate(stars)}
    assert both(path, labels=table)[0] == [0, 1, 2, 3, 4]
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "label": 1}\n')
    for message in both(path, labels=stars):
        assert "may be a name or a position" in message


def blanks(folder, kind):
    rows = [{"text": "a", "input": "b", "label": "yes"}, {"text": "c", "label": "no"}]
    rows.append({"text": "d", "input": None, "label": "no"})
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("text,input,label\na,b,yes\nc,,no\nd,,no\n")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_an_optional_field_is_blank_where_there_is_none(both, tmp_path, kind):
    shared = {"labels": ("no", "yes"), "prompt": "{text}\n{input}\n{options}"}
    path = blanks(tmp_path, kind)
    if kind != "csv":
        for message in both(path, **shared):
            assert 'blank = ["input"]' in message
    numbers, counts, left_out = both(path, **shared, blank=("input",))
    assert numbers == [1, 0, 0]
    assert (counts.blanked["input"], left_out["blanked"]) == (2, {"input": 2})


def test_a_number_in_an_optional_field_is_still_refused(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    rows = {"text": ["a", "b"], "input": [None, 2.0], "label": ["yes", "no"]}
    pq.write_table(pa.table(rows), path)
    keys = {"prompt": "{text}\n{input}", "answer": "label", "blank": ("input",)}
    with pytest.raises(InputError, match=r"row 2: column 'input' is float \(2\.0\)"):
        read(SourceConfig(path=str(path), **keys), tokenizer)
