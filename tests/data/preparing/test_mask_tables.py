"""Tables for masking: counted from texts, written, and read from strangers."""

import json
import math

import numpy as np
import pytest

from mlmjax import InputError
from mlmjax.config.data import Location
from mlmjax.data.masking.maskers import MaskTable
from mlmjax.data.preparing.mask_tables import (
    Document,
    find_phrases,
    read_documents,
    read_mask_table,
    weigh_by_frequency,
    weigh_by_label,
    weigh_by_tfidf,
    write_mask_table,
)


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_table_is_read_in_every_format(tmp_path, tokenizer):
    expected = MaskTable("word", {"cat": 2.0, "New": 0.5}, 0.25)
    csv = 'word,weight\n"",0.25\ncat,2\nNew,5e-1\n'
    rows = [("cat", 2), ("New", 0.5)]
    lines = jsonl({"word": "", "weight": 0.25}, *({"word": w, "weight": n} for w, n in rows))
    for name, text in (("a.csv", csv), ("a.tsv", csv.replace(",", "\t")), ("a.jsonl", lines)):
        (tmp_path / name).write_text(text)
        assert read_mask_table(tmp_path / name, tokenizer) == expected
    phrases = MaskTable("phrase", {"New York": 1.0})
    (tmp_path / "p.csv").write_text("phrase,score\nNew York,7\n")
    assert read_mask_table(tmp_path / "p.csv", tokenizer) == phrases


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "word,weight\ncat,-1\n", "line 2: weight is '-1'; expected a number from 0"),
        ("a.csv", "word,weight\ncat,1\ndog,nan\n", "line 3: weight is 'nan'"),
        ("a.csv", "word,weight\ncat,1e999\n", "line 2: weight is '1e999'"),
        ("a.csv", "word,weight\ncat,\n", "line 2: weight is ''"),
        ("a.jsonl", '{"word": "cat", "weight": Infinity}\n', "line 1: weight is inf"),
        ("a.jsonl", '{"word": "cat", "weight": true}\n', "line 1: weight is True"),
        ("a.jsonl", '{"word": ["cat"], "weight": 1}\n', "line 1: word is list"),
        ("a.jsonl", jsonl(*[{"word": "a", "weight": 1}, {"weight": 1}, {"weight": 2}]), "line 3"),
        ("a.csv", "word,weight\ncat,1\ncat,2\n", "line 3: repeats the word 'cat'"),
        ("a.csv", "word,weight\n  ,1\n", "line 2: word is '  ', which is blank"),
        ("a.csv", "token,weight\n cat,1\n", "line 2: token ' cat' is not in the vocabulary; as te"),
        ("a.csv", "token,weight\n[MASK],1\n", r"line 2: token '\[MASK\]' is special and never"),
        ("a.csv", "token,weight\n[unused0],1\n", "is special and never masked"),
        ("a.csv", "phrase\n \n", "line 2: phrase is ' ', which is blank"),
        ("a.csv", "word,weight\n", "has no rows"),
        ("a.csv", "word,weight\ncat,0\n", "has no weight above 0"),
        ("a.csv", "name,weight\ncat,1\n", "line 2: has the columns 'name', 'weight'; expected tok"),
        ("a.csv", "word,token,weight\ncat,cat,1\n", "has the columns 'word', 'token', 'weight'"),
        ("a.csv", "word\ncat\n", "line 2: has the columns 'word'; expected token and weight"),
        ("a.csv", "", "is empty"),
        ("a.txt", "cat 1\n", "has the columns 'text'"),
        ("a.pkl", "cat", "unknown kind of file"),
    ],
)
def test_a_hostile_table_is_rejected_by_its_line(tmp_path, tokenizer, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_mask_table(tmp_path / name, tokenizer)
    assert name in caught.value.message


def documents(*texts):
    return [Document(text.split(), label) for label, text in texts]


def test_weights_by_label_are_their_largest_mutual_information():
    texts = [("good", "fine film"), ("good", "fine"), ("bad", "poor film"), ("bad", "film dull")]
    weights, others = weigh_by_label(documents(*texts), least=2)
    assert others == 0
    assert weights.keys() == {"fine", "film"}
    assert weights["fine"] == pytest.approx(math.log(2))
    assert weights["film"] == pytest.approx(math.log(4 / 3))
    rare, _ = weigh_by_label(documents(*texts), least=1)
    assert rare["dull"] == pytest.approx(math.log(2))


def test_weights_by_tfidf_are_those_of_terms_in_few_texts():
    weights, others = weigh_by_tfidf(documents(("", "a b b"), ("", "a c"), ("", "a")))
    assert weights["a"] == 0
    assert weights["b"] == pytest.approx(2 * math.log(2))
    assert weights["c"] == others == pytest.approx(math.log(2))


def test_phrases_are_words_that_belong_together():
    """The score of three words is the smallest over all ways to divide them."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(300):
        words = rng.choice(list("abcdefgh"), 6).tolist()
        if rng.random() < 0.5:
            words[2:2] = ["new", "york", "city"]
        elif rng.random() < 0.5:
            words[2:2] = ["new", "york"]
        texts.append(("", " ".join([*words, ".", "z", "z"])))
    found = find_phrases(documents(*texts), least=20, longest=3)
    assert list(found)[:2] == ["new york", "new york city"] or list(found)[:2] == [
        *("new york city", "new york")
    ]
    counts = {"new york city": 0, "new york": 0}
    for _, text in texts:
        for phrase in counts:
            counts[phrase] += phrase in text
    assert min(counts.values()) > 100
    assert not any("." in phrase for phrase in found)
    assert len(find_phrases(documents(*texts), least=20, most=1)) == 1


def test_what_is_counted_is_written_and_read_back(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    path.write_text(jsonl({"body": "The cat saw the untokenizable cat."}, {"body": "A cat"}))
    source = Location(path=str(path))
    read = list(read_documents(source, tokenizer, text="body", label=None, unit="word"))
    assert read[0].names == ["The", "cat", "saw", "the", "untokenizable", "cat", "."]
    weights, others = weigh_by_frequency(read, least=2)
    assert weights["cat"] == 3**-0.5
    assert weights["saw"] == others == 2**-0.5
    table = MaskTable("word", weights, others)
    write_mask_table(tmp_path / "table.jsonl", table)
    again = read_mask_table(tmp_path / "table.jsonl", tokenizer)
    assert again.unit == "word"
    assert again.weights == pytest.approx(table.weights, rel=1e-5)
    assert again.others == pytest.approx(others, rel=1e-5)
    tokens = list(read_documents(source, tokenizer, text="body", label=None, unit="token"))
    assert tokens[1].names == ["A", "Ġcat"]


def test_a_text_that_is_no_text_is_named(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    path.write_text(jsonl({"body": "fine", "team": "a"}, {"body": "fine", "team": 3.5}))
    source = Location(path=str(path))
    with pytest.raises(InputError, match="line 2: team is float"):
        list(read_documents(source, tokenizer, text="body", label="team", unit="word"))
