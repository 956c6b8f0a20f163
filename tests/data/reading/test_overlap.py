"""Overlap with evaluation sets: what n words in a row find and what they do not, and how fast."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmjax.data.reading.overlap import MOST_TEXTS, SHORTEST, Hit, OverlapIndex, words_of

PASSAGE = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def naive(sets, text, n):
    """Return the names of the sets a text shares words with, found by comparing lists."""

    def runs(words, length):
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    return {
        name
        for name, texts in sets.items()
        for other in map(words_of, texts)
        if len(other) >= min(SHORTEST, n)
        and runs(other, min(n, len(other))) & runs(words_of(text), min(n, len(other)))
    }


text = st.lists(st.sampled_from(["a", "b", "c", "é", "日", "I'm"]), max_size=24).map(" ".join)
few = st.lists(text, max_size=MOST_TEXTS)


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({"x": few, "y": few}), text, st.sampled_from([3, 7, 9]))
def test_a_hit_is_what_comparing_all_words_finds(sets, text, n):
    index, expected = OverlapIndex(sets, n), naive(sets, text, n)
    hit = index.hit(text)
    assert (hit is None) == (not expected)
    if hit is not None:
        assert hit.name in expected
        assert naive({hit.name: sets[hit.name]}, hit.words, n)
        assert hit.words in " ".join(words_of(text))


def test_case_punctuation_and_space_do_not_count():
    for sets in ({}, {"set": []}, {"set": ["too short"]}):
        assert OverlapIndex(sets).hit(PASSAGE) is None
    index = OverlapIndex({"set": [PASSAGE]})
    shouted = "Context: " + PASSAGE.upper().replace(" ", ",\n  ") + "!"
    assert index.hit(shouted) == Hit("set", " ".join(PASSAGE.split()[:13]))
    assert index.hit(" ".join(PASSAGE.split()[:12])) is None
    assert index.hit(" ".join(PASSAGE.split()[2:])).words.startswith("three")
    assert index.hit(PASSAGE.replace("seven", "7")) is None
    assert index.hit("") is None


def test_a_short_text_is_found_whole_and_a_shorter_one_not_at_all():
    short = " ".join(PASSAGE.split()[:SHORTEST])
    index = OverlapIndex({"set": [short, "nine ten"]})
    assert index.hit(f"Q: {short}?").words == short
    assert index.hit(short.rsplit(" ", 1)[0] + " 6") is None
    assert index.hit("nine ten") is None


def test_the_wording_of_a_set_is_no_overlap():
    wording = "According to the passage above which of the following is it most reasonable to infer"
    rows = [f"{PASSAGE} {i}" for i in range(3)] + [f"{wording} {i}" for i in range(MOST_TEXTS)]
    assert OverlapIndex({"set": rows}).hit(wording)
    rows.append(f"{wording} at last")
    index = OverlapIndex({"set": rows})
    assert index.hit(wording) is None
    assert index.hit(f"{wording} 3 of these").words.endswith("3")
    assert index.hit(PASSAGE)  # whatever else is in the set
    # A passage that many rows ask about is one text; a short question of many rows is wording.
    assert OverlapIndex({"set": [PASSAGE] * 50}).hit(PASSAGE)
    question = "which of the following is right"
    assert OverlapIndex({"set": [question] * MOST_TEXTS}).hit(question)
    assert not OverlapIndex({"set": [question] * (MOST_TEXTS + 1)}).hit(question)


def test_words_of_two_sets_count_for_the_first():
    index = OverlapIndex({"pro": ["x y z"], "first": [PASSAGE], "second": [PASSAGE]})
    assert index.hit(PASSAGE).name == "first"
    assert len(index) == 3  # of 15 words


def test_a_long_document_is_searched_to_its_end():
    rng = random.Random(0)
    document = " ".join(str(rng.randrange(10**6)) for _ in range(50_000))
    index = OverlapIndex({"set": [PASSAGE]})
    assert index.hit(document) is None
    assert index.hit(f"{document} {PASSAGE}").name == "set"


@pytest.mark.data
def test_memory_is_bounded_by_the_evaluation_set(test_data):
    from mlmjax.config.data import ExcludeConfig
    from mlmjax.data.reading.exclusion import Exclusion

    data = {"task": "ag_news", "data": str(test_data / "eval" / "ag_news_test.parquet")}
    index = Exclusion(ExcludeConfig.model_validate({"overlap": (data,)})).index
    assert 100_000 < len(index) < 300_000
    before = [len(index._ids), index._runs.nbytes, index._powers.nbytes]
    for number in range(1000):
        assert index.hit(f"words {number} that no news has " * 3) is None
    assert [len(index._ids), index._runs.nbytes, index._powers.nbytes] == before
