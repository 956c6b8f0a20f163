"""Windows of plain text: nothing is lost, and they end where sentences do."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import read

from mlmjax.config.data import SourceConfig
from mlmjax.data.reading.windows import sentence_cuts, sentence_ends, windows

PIECES = ["One", " two.", " It", ' "So?"', " e.g.", "\n", "\n\n", "  ", "日本。", "😀", "! "]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=40).map("".join)


def sentences(text):
    edges = [0, *(after for _, after in sentence_ends(text)), len(text)]
    return [text[a:b].strip() for a, b in pairwise(edges) if text[a:b].strip()]


@pytest.mark.parametrize(
    "expected",
    [
        ["Is it?", "It is!", "Well …", "Yes."],
        ['"Go."', "She went.", "(So it was.)", "Then?!"],
        ["Mr. A. Smith vs. J. R. Lee, e.g. that.", "It cost 3.50 then.", "So am I.", "No.", "End"],
        ["He said etc. and so on. and more.", "Fin"],
        ["日本です。", "はい！", "「いいえ。」", "終"],
        ["यह है।", "ठीक।"],
        ["هل هذا؟", "نعم."],
        ["Wait... What?", "No"],
    ],
)
def test_sentences_end_where_readers_would_say(expected):
    joined = " ".join(expected)
    assert sentences(joined) == [part for part in expected for part in sentences(part)]
    if "... " not in joined:
        assert sentences(joined) == expected


def test_a_blank_line_ends_a_paragraph():
    text = "A title\n\n  First line\nsecond line\r\n \r\nThird\u2029Fourth\n\n\n"
    assert sentences(text) == ["A title", "First line\nsecond line", "Third", "Fourth"]
    assert sentence_ends(text)[0] == (len("A title"), text.index("First"))
    assert sentence_ends("\n\nA") == []


@pytest.mark.parametrize("unit", [".", ")", ".)", "\n", " ", "a\n ", "。", "\n \n", "a. b", "A."])
def test_hostile_text_takes_linear_time(unit):
    began = time.process_time()
    sentence_ends(unit * 50_000 + "x")
    sentence_ends(unit * 50_000)
    assert time.process_time() - began < 2.0


@settings(deadline=None)
@given(text=TEXTS, width=st.integers(1, 12))
def test_no_token_is_lost_and_windows_end_at_sentences(tokenizer, text, width):
    ids, offsets = tokenizer.encode_plain(text), tokenizer.plain_offsets(text)
    cuts = sentence_cuts(text, offsets)
    parts = list(windows(ids, width, cuts))
    assert [token for part in parts for token in part] == ids
    assert all(0 < len(part) <= width for part in parts)
    ends = sentence_ends(text)
    for cut in cuts.tolist():
        # No character is divided, and the cut is at the end of a sentence.
        here = offsets[cut][0]
        assert offsets[cut - 1][1] <= here
        assert any(end <= here <= after for end, after in ends)
    at = 0
    for part in parts[:-1]:
        expected = max((cut for cut in cuts.tolist() if at < cut <= at + width), default=at + width)
        at += len(part)
        assert at == expected


def test_a_sentence_that_ends_has_a_cut(tokenizer):
    text = 'He said "Stop." Then (it seems) he left!\n\nChapter 2\n\nIt rained. 日本です。はい。'
    ids = tokenizer.encode_plain(text)
    cuts = [0, *sentence_cuts(text, tokenizer.plain_offsets(text)).tolist(), len(ids)]
    first, *rest = [tokenizer.decode(ids[a:b]) for a, b in pairwise(cuts)]
    assert first == 'He said "Stop."'
    assert rest[:2] == [" Then (it seems) he left!\n\n", "Chapter 2\n\n"]
    assert rest[2:] == ["It rained. ", "日本です。", "はい。"]


@pytest.mark.data
def test_books_are_cut_at_sentences(test_data, tokenizer):
    path = test_data / "text" / "openstax_ccby.jsonl.zst"
    plain, cut = (
        read(SourceConfig(path=str(path), text="text", limit=15, cut=cut), tokenizer, 256)[0]
        for cut in ("window", "sentence")
    )
    inner = [np.concatenate([one.ids[1:-1] for one in examples]) for examples in (plain, cut)]
    np.testing.assert_array_equal(*inner)
    enders = tuple('.!?”")\n:')
    for examples, low, high in ((plain, 0.0, 0.3), (cut, 0.9, 1.0)):
        texts = [tokenizer.decode(one.ids[1:-1]) for one in examples]
        share = np.mean([text.endswith(enders) for text in texts])
        assert low <= share <= high
    assert len(cut) < 1.15 * len(plain)
