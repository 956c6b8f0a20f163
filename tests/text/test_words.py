"""Words: found from the pieces alone, for whatever kind of tokenizer."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.words import add_words, word_starts


def words_of(tokenizer, text):
    """The words of a text as the text of their tokens."""
    ids = np.array(tokenizer.encode_plain(text))
    edges = np.flatnonzero(word_starts(tokenizer)(ids)).tolist()
    return [tokenizer.decode(ids[a:b]) for a, b in zip(edges, [*edges[1:], len(ids)], strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Untokenizable hypergraphs!", ["Untokenizable", " hypergraphs", "!"]),
        ("naïve Straßenbahnhaltestelle", ["naïve", " Straßenbahnhaltestelle"]),
        ("don't", ["don", "'t"]),
        ("x\n\n    y=17", ["x", "\n\n", "    ", "y", "=", "17"]),
        ("go 😀🫠 on", ["go", " 😀🫠", " on"]),
        ("हिन्दी शब्द", ["हिन्दी", " शब्द"]),
    ],
)
def test_words_of_byte_level_pieces(tokenizer, text, expected):
    assert words_of(tokenizer, text) == expected


def test_words_that_were_added_are_words(tokenizer):
    bigger = add_words(tokenizer, ["Zyxgene"])
    assert words_of(bigger, "the Zyxgene binds") == ["the", " Zyxgene", " binds"]


def test_a_special_token_stands_alone(tokenizer):
    ids = [tokenizer.cls_id, *tokenizer.encode_plain("izable"), tokenizer.anchor_id]
    ids += [tokenizer.mask_id, *tokenizer.encode_plain("izable"), tokenizer.sep_id]
    assert word_starts(tokenizer)(np.array(ids)).all()
    assert word_starts(tokenizer)(np.array([], int)).tolist() == []


def test_words_of_word_pieces(tmp_path):
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a", "un", "##do", "##ing", ".", "go"]
    vocabulary = {name: number for number, name in enumerate([*names, "[unused0]"])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(names[:5])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "[UNK]"}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    ids = np.array(tokenizer.encode_plain("undoing a go."))
    assert word_starts(tokenizer)(ids).astype(int).tolist() == [1, 0, 0, 1, 1, 1]
