"""Texts that try to be special tokens, and a small table of a tokenizer."""

import tokenizers
from hypothesis import strategies as st

ALPHABET = tokenizers.pre_tokenizers.ByteLevel.alphabet()


SPECIALS = ["[CLS]", "[SEP]", "[PAD]", "[MASK]"]


SNIPPETS = [
    *SPECIALS, "[UNK]", "[unused0]", "[unused82]", "<|endoftext|>", "<|padding|>",
    "[MA", "SK]", "[unu", "sed0]", "<|endof", "text|>", "[", "]", "[MAS\u212a]", "[\u0301MASK]",
    "|||IP_ADDRESS|||", " ", "  ", " " * 25, "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u2029",
    "\u0085", "\u3000", "\u200b", "\u1680", "\x00", "\x1c", "\x7f", "\u202e", "שלום", "مرحبا",
    "你好", "한국", "\u1100", "\u1161",
    "e\u0301", "\u0301", "a\u0323\u0307", "\u0344", "👍🏽", "👨‍👩‍👧", "\ufffd", "{", "}", "{text}",
    "- A: x\n", "Answer:", "word", " word", "A", "1234567", "don't", "=\u0338",
]  # fmt: skip


nasty = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=4), max_size=8).map("".join)


SAFE = [s for s in SNIPPETS if not set(s) & set("[]<>|")]


ordinary = st.lists(
    st.sampled_from(SAFE) | st.text(st.characters(exclude_characters="[]<>|", codec="utf-8")),
    max_size=8,
).map("".join)


def small_table(**changes) -> dict:
    """Return a tokenizer.json of 256 bytes and six added tokens, as a dict."""
    vocab = {char: i for i, char in enumerate(sorted(ALPHABET))}
    names = [*SPECIALS, "[unused0]", "[unused1]"]
    added = [
        {"id": 256 + i, "content": name, "single_word": False, "lstrip": name == "[MASK]",
         "rstrip": False, "normalized": name not in SPECIALS, "special": name in SPECIALS}
        for i, name in enumerate(names)
    ]  # fmt: skip
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    cls, sep = ([{"SpecialToken": {"id": name, "type_id": 0}}] for name in SPECIALS[:2])
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    ends = {
        "type": "TemplateProcessing", "single": cls + text + sep, "pair": cls + text + sep,
        "special_tokens": {
            name: {"id": name, "ids": [256 + i], "tokens": [name]}
            for i, name in enumerate(SPECIALS[:2])
        },
    }  # fmt: skip
    table = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level, "post_processor": ends,
        "decoder": byte_level, "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip
    return table | changes


SCRIPTS = [
    "Ünïcode",
    "Ελλάδα",
    "Россия",
    "日本語",
    "한국어",
    "العربية",
    "עברית",
    "हिन्दी",
    "ไทย",
    "🙂 x",
]
"""A name in each of ten scripts."""
