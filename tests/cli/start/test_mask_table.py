"""`mlmjax mask-table`: tables that a run can read, from the files that people have."""

import json

import pytest

from mlmjax.cli.main import run
from mlmjax.data.preparing.mask_tables import read_mask_table


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.csv"
    texts = [
        ("New York is a fine city", "good"),
        ("a fine day in New York", "good"),
        ("a dull day", "bad"),
        ("the day was dull", "bad"),
    ]
    path.write_text("body,team\n" + "".join(f"{text},{team}\n" for text, team in texts))
    return path


@pytest.mark.parametrize(
    ("options", "unit", "named"),
    [
        (("--by", "frequency"), "word", {"day": 3**-0.5, "York": 2**-0.5}),
        (("--by", "tfidf", "--unit", "token"), "token", {"Ġday": 0.223144}),
        (("--by", "pmi", "--label", "team"), "word", {"fine": 0.693147, "dull": 0.693147}),
        (("--by", "pmi"), "phrase", {"New York": 1.0}),
    ],
)
def test_a_table_is_written_that_a_run_reads(
    corpus, tmp_path, tokenizer, capsys, options, unit, named
):
    out = tmp_path / "table.jsonl"
    call = ["mask-table", str(corpus), "--text", "body", "--least", "2", *options, "--out"]
    assert run([*call, str(out)]) == 0
    table = read_mask_table(out, tokenizer)
    masking = "phrases" if unit == "phrase" else "weights"
    line = f'{out}: {len(table.weights)} {unit}s, for masking = "{masking}"\n'
    assert capsys.readouterr().err.endswith(line)
    assert table.unit == unit
    assert {name: table.weights[name] for name in named} == pytest.approx(named, rel=1e-5)
    first = out.read_bytes()
    assert run([*call, str(out)]) == 0
    assert out.read_bytes() == first
    assert {*json.loads(first.splitlines()[-1])} <= {unit, "weight", "score"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--by", "frequency", "--label", "team"), "--label belongs to --by pmi"),
        (("--by", "pmi", "--unit", "token"), "phrases are of words"),
        (("--by", "frequency", "--text", "text"), "has no column 'text'"),
        (("--by", "pmi", "--least", "9"), "holds no phrase that occurs 9 times; give more texts"),
        (("--by", "pmi", "--label", "team", "--least", "9"), "holds no word of a weight above 0"),
    ],
)
def test_what_cannot_be_counted_is_said(corpus, tmp_path, capsys, options, message):
    out = tmp_path / "table.jsonl"
    call = ["mask-table", str(corpus), "--text", "body", "--out", str(out), *options]
    assert run(call) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
