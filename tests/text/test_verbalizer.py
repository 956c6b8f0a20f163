"""Verbalizers: names of options, forms that are one token, and what is rejected."""

import pytest
from labelled_texts import word_level

from mlmjax.errors import InputError
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import Verbalizer, option_names


def test_option_names(tokenizer):
    assert option_names(4) == list("ABCD")
    assert option_names(0) == []
    names = option_names(457)
    assert names[:26] == [chr(65 + i) for i in range(26)]
    assert names[26:] == sorted(names[26:])
    assert len(set(names)) == 457
    assert {len(name) for name in names[26:]} == {2}
    ids = Verbalizer.letters([f"label {i}" for i in range(457)]).ids(tokenizer)
    assert ids[:3] == [(329,), (378,), (330,)]
    assert len({i for row in ids for i in row}) == 457
    with pytest.raises(InputError, match=r"458 options: .* at most 457"):
        option_names(458)
    assert option_names(557, "numbers") == list(map(str, range(1, 558)))
    with pytest.raises(InputError, match=r"558 options: .* at most 557"):
        option_names(558, "numbers")


def test_verbalizers(tokenizer):
    bare = Verbalizer.letters(["x", "y"], bare=True)
    assert bare.forms == {"x": (" A", "A"), "y": (" B", "B")}
    assert bare.ids(tokenizer) == [(329, 34), (378, 35)]
    words = ["positive", "negative", "neutral", "yes", "no", "true", "false", "sports"]
    assert [len(row) for row in Verbalizer.words(words).ids(tokenizer)] == [1] * 8
    numbers = [str(n) for n in range(1, 558)]
    verbalizer = Verbalizer.words(numbers)
    assert verbalizer.labels == tuple(numbers)
    assert len(set(verbalizer.ids(tokenizer))) == 557
    mixed = Verbalizer({"good": [" good", " great"], "bad": " bad"})
    assert mixed.labels == ("good", "bad")
    assert [len(row) for row in mixed.ids(tokenizer)] == [2, 1]
    assert mixed == Verbalizer({"good": (" good", " great"), "bad": [" bad"]})


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"a": [" a"]}, "found 1 label; expected at least two"),
        ({}, "found no label; expected at least two"),
        ([" a", " b"], "is list; expected label -> list of forms"),
        ({"a": [" a"], " ": [" b"]}, "label ' ' is blank"),
        ({"a": [" a"], "": [" b"]}, "label '' is blank"),
        ({"a": [" a"], 2: [" b"]}, "label 2 is int"),
        ({"a": [" a"], "b": []}, "label 'b': has no forms"),
        ({"a": [" a"], "b": None}, "label 'b': has no forms"),
        ({"a": [" a"], "b": [3]}, "label 'b': form 3 is int"),
        ({"a": [" a"], "b": [" "]}, "label 'b': form ' ' is blank"),
        ({"a": [" a"], "b": ["\ud800"]}, "holds half a character"),
    ],
)
def test_a_malformed_verbalizer_is_rejected(forms, message):
    with pytest.raises(InputError, match=message):
        Verbalizer(forms)


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ([" atheism"], r"label 'no': form ' atheism' is 2 tokens \(' athe' \+ 'ism'\); each form "),
        ([" Sci/Tech"], r"is 3 tokens \(' Sci' \+ '/' \+ 'Tech'\)"),
        ([" yes"], "form ' yes' is the same token as a form of label 'yes'"),
        ([" no", " no"], "is the same token as a form of label 'no'"),
        (["[MASK]"], r"form '\[MASK\]' is 3 tokens"),
        (["[unused0]"], r"form '\[unused0\]' is \d tokens"),
        ([" [unused0]"], r"form ' \[unused0\]' is \d tokens"),
    ],
)
def test_a_form_that_is_not_one_ordinary_token_is_rejected(tokenizer, forms, message):
    verbalizer = Verbalizer({"yes": [" yes"], "no": forms})
    with pytest.raises(InputError, match=message):
        verbalizer.ids(tokenizer)


def test_a_word_unknown_to_the_tokenizer_is_rejected():
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[unused0]", "yes"]
    small = Tokenizer({"tokenizer.json": word_level(words).encode()})
    with pytest.raises(InputError, match=r"form ' no' is the special token \[UNK\]"):
        Verbalizer.words(["yes", "no"]).ids(small)


@pytest.mark.parametrize("make", [Verbalizer.letters, Verbalizer.words])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b", "a"], "label 'a': is repeated"),
        (["a"], "found 1 label;"),
        (["a", " \n"], "is blank"),
        (["a", 3], "label 2 is int"),
        ("ab", "expected a list of labels"),
    ],
)
def test_bad_labels_are_rejected(make, labels, message):
    with pytest.raises(InputError, match=message):
        make(labels)
