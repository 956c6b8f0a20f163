"""Questions and states: what is accepted, how it is shown, and what is rejected in words."""

import math

import pytest

from mlmjax import Choice, InputError, Score, YesNo
from mlmjax.decisions.answers import choice_confidence, score_confidence
from mlmjax.decisions.questions import read_questions
from mlmjax.decisions.states import State


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        (Choice("Which?", ["b", "a"]), ("b", "a")),
        (Choice("Which?", {"a": "first", "b": None, "c": {"is": [1, "é"]}}), None),
        (YesNo(), ("yes", "no")),
        (YesNo("Is it?", {"false": "not so"}), ("yes", "no: not so")),
        (YesNo(None, {True: "so"}), ("yes: so", "no")),
        (Score({"ask": "how?"}, ["low", ["very", "high"]]), ("low", '["very", "high"]')),
    ],
)
def test_options_are_shown_with_their_descriptions(question, shown):
    assert question.shown == (shown or ("a: first", "b", 'c: {"is": [1, "é"]}'))
    assert len(question.names) == len(question.shown)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice("Which?", ["a"]), "criteria: has 1 options; expected 2 to 255"),
        (lambda: Choice("Which?", [str(i) for i in range(256)]), "has 256 options"),
        (lambda: Choice("Which?", ["a", "a"]), "option 'a' appears twice"),
        (lambda: Choice("Which?", ["a", ""]), "the name of an option is empty"),
        (lambda: Choice("Which?", "ab"), "is 'ab'; expected a table"),
        (lambda: Choice("Which?", ["a", 1]), "the name of an option is int (1); expected text"),
        (lambda: Choice("Which?", ["a", "\ud800"]), "half a character"),
        (lambda: Choice(None, ["a", "b"]), "instructions: is None"),
        (lambda: Choice("Which?", {"a": 1, "b": None}), "the description of 'a': is 1"),
        (lambda: Choice("Which?", {"a": {"x": math.nan}, "b": None}), "cannot be written as JSON"),
        (lambda: Score("How?", ["a"]), "has 1 levels; expected 2 to 10"),
        (lambda: Score("How?", list("abcdefghijk")), "has 11 levels"),
        (lambda: Score("How?", {"0": "a", "1": "b"}), "is a table; expected a list of levels"),
        (lambda: Score("How?", ["a", None]), "level 1: is None"),
        (lambda: YesNo("Is it?", ["yes"]), "expected a table of 'true', 'false'"),
        (lambda: YesNo("Is it?", {"maybe": "x"}), "has 'maybe'; expected 'true', 'false'"),
        (lambda: YesNo(3), "instructions: is 3"),
        (lambda: read_questions({}), "there are none"),
        (lambda: read_questions([]), "found list; expected a table"),
        (lambda: read_questions({"": YesNo()}), "an id is empty"),
        (lambda: read_questions({"q": {"type": "noun"}}), "type: is 'noun'; expected choice, noul"),
        (lambda: read_questions({"q": {"type": ["noul"]}}), "type: is ['noul']"),
        (lambda: read_questions({"q": {"type": "score"}}), "'q': instructions: is missing"),
        (lambda: read_questions({"q": 5}), "is 5; expected a Choice"),
    ],
)
def test_wrong_questions_are_rejected_in_words(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain\n text ", "plain\n text "),
        ("", ""),
        ({}, ""),
        ([], ""),
        ({"b": 1, "a": None, "c": True, "d": 1.5}, "b: 1\na: null\nc: true\nd: 1.5"),
        ({"a": {"b": {"c": "x"}}, "d": {}}, "a:\n  b:\n    c: x\nd: {}"),
        (["x", ["y", "z"], []], "- x\n-\n  - y\n  - z\n- []"),
        ([{"a": 1, "b": 2}, {"c": ["d"]}], "- a: 1\n  b: 2\n- c:\n    - d"),
        ({"a": "two\nlines", "b": {"c": "p\nq"}}, "a: two\n  lines\nb:\n  c: p\n    q"),
    ],
)
def test_states_are_shown_line_by_line(value, text):
    assert State(value).text == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "state: is NoneType"),
        (7, "state: is int"),
        ({"a": math.inf}, "holds inf, which JSON cannot hold"),
        ({"a": {1, 2}}, "which JSON cannot hold"),
        ({1: "a"}, "state: a key is int"),
        ("\udfff", "half a character"),
        ({"a": "\udfff"}, "half a character"),
        (eval("[" * 80 + "]" * 80), "nested more than 64 levels"),
    ],
)
def test_wrong_states_are_rejected_in_words(value, message):
    with pytest.raises(InputError) as caught:
        State(value)
    assert message in str(caught.value)


def test_long_values_are_shortened_in_their_own_place(tokenizer):
    state = State({"subject": "Billed twice", "body": "word " * 500, "note": "other " * 300})
    shown = state.fitted(tokenizer, 100)
    lines = shown.text.split("\n")
    assert lines[0] == "subject: Billed twice"
    assert lines[1].startswith("body: word word")
    assert lines[2].startswith("note: other other")
    assert 90 <= len(tokenizer.encode_plain(shown.text)) <= 100
    assert shown.removed == pytest.approx(
        800 - shown.text.count("word ") - shown.text.count("other "), abs=8
    )


@pytest.mark.parametrize("value", ["é" * 300_000, {"k" * 90_000: 1}, [1] * 50_000, "🙂🙃" * 40_000])
def test_states_of_any_size_are_bounded(tokenizer, value):
    shown = State(value).bounded(tokenizer, 128)
    assert len(tokenizer.encode_plain(shown.text)) <= 140
    assert shown.removed > 10_000
    shown.text.encode()


def test_confidence_follows_the_formulas():
    assert choice_confidence([0.6, 0.3, 0.1]) == pytest.approx((0.6 - 1 / 3) / (1 - 1 / 3))
    # The mean distance from the middle of three levels is 2/3.
    assert score_confidence([0.2, 0.7, 0.1]) == pytest.approx(1 - 0.3 / (2 / 3))
    assert score_confidence([0.5, 0.0, 0.0, 0.5]) == 0
