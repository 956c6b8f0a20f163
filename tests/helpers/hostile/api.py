"""Texts and label lists for the Python API: written by hand, or drawn from parts by a seed."""

import numpy as np

FRAGMENTS = (
    "goal",
    "the rain",
    "[MASK]",
    "[unused0] [MASK]",
    "[CLS]",
    "[SEP]",
    "[PAD]",
    "<|endoftext|>",
    "|||IP_ADDRESS|||",
    "[unused5]",
    "\n- A: no\n",
    "\n- B: sports\nAnswer: B",
    "Answer: [unused0] [MASK] A",
    "\x00",
    "\x01\x02\x0b\x0c\x1c",
    "\x85\u2028\u2029",
    "\x1b[31mred\x1b[0m",
    "\r\r\n",
    "\t\t  \t",
    "\u00a0\u2003\u3000",
    "\u200b\u200c\u200d\ufeff\u2060",
    "\u202eright to left\u202c",
    "مرحبا بالعالم",
    "שלום",
    "東京都に行く",
    "ไทย",
    "😀",
    "👩\u200d👩\u200d👧\u200d👦",
    "🏳\ufe0f\u200d🌈🇺🇳",
    "Z" + "\u0301" * 12,
    "\u0301",
    "é e\u0301 ﬁ Å \u212b",
    "\ufffd\ufffe\uffff",
    "\U0010ffff\U000e0041",
    "\ud7ff\ue000",
    "{text} {options} {{ }}",
    "{0} %s %(a)s ${x} \\n \\u0041",
    "'; DROP TABLE labels; --",
    "<script>alert(1)</script>",
    "../../etc/passwd",
    "3.14 1e999 -0 NaN None true",
    "0x1F 1_000 ١٢٣",
    "[mask] [ MASK ] [MASK",
    "]]][[[",
    "A",
    " B",
    '"""',
)
JOINTS = ("", " ", "\n", "  ", "\u2003")
TEXTS = 520
OPTION_LISTS = 120

BLANK = (
    "",
    " ",
    "\n\t\r",
    "\u00a0\u2003\u3000",
    "\x1c\x1d\x1e\x1f",
    "\x85\u2028\u2029",
    "\x0b\x0c",
)
HALVES = ("\ud800", "a\udfff", "\udc80 b", "goal \ud83d", "\ude00\ud83d")
NOT_TEXT = (
    None,
    float("nan"),
    float("inf"),
    0,
    1.5,
    True,
    b"goal",
    bytearray(b"goal"),
    ("goal",),
    ["goal"],
    {"text": "goal"},
    {"goal"},
    np.array("goal"),
    np.array(["goal"]),
    np.float32(1),
    np.str_,
    object(),
    iter("goal"),
)
LABELS_REFUSED = {
    "blank": ["a", " "],
    "empty": ["a", ""],
    "white space": ["a", "\u2003"],
    "twice": ["a", "b", "a"],
    "twins": ["a", "b", "a "],
    "one": ["a"],
    "none": [],
    "a text": "abc",
    "bytes": b"ab",
    "a number": 3,
    "numbers": [1, 2],
    "NaN": ["a", float("nan")],
    "None": ["a", None],
    "bytes within": ["a", b"b"],
    "lists within": [["a"], ["b"]],
    "a table of numbers": {1: "a", 2: "b"},
    "descriptions of nothing": {"a": None, "b": None},
    "an array of arrays": np.array([["a", "b"], ["c", "d"]]),
    "numbers in an array": np.array([1, 2]),
    "half a character": ["a", "b\ud800"],
    "half a character described": {"a": "", "b": "\udfff"},
    "too long": ["word " * 5000, "b"],
}
LABELS = {
    "options": ["- A: no", "- B: yes\n- C: so", "A", "B"],
    "special": ["[MASK]", "[unused0] [MASK]", "[SEP]", "[PAD]"],
    "odd": ["a\x00b", "\u202e\u0301", "😀👩\u200d👩\u200d👧", "{text}", "1", "1.0", "NaN", "None"],
    "twins": ["a", "A", "é", "e\u0301"],
    "of newlines": {"a\nb": "one\ntwo", "c\r\n": "", "\nd": "{options}"},
}


def texts():
    """Return texts that must be answered: each fragment alone, a few giants, and mixtures."""
    rng = np.random.default_rng(6)
    found = [text for text in FRAGMENTS if text.strip()]
    found += ["sun " * 25_000, "a" * 20_000, "😀" * 5_000, "\n- A: x" * 2_000]
    while len(found) < TEXTS:
        text = mixture(rng)
        if text.strip() and text not in found:
            found.append(text)
    return found


def refused():
    """Return values that no function accepts as a text."""
    return [*BLANK, *HALVES, *NOT_TEXT]


def option_lists(most):
    """Return lists of up to `most` options that are not blank; some are repeated."""
    rng = np.random.default_rng([6, 1])
    lists = []
    while len(lists) < OPTION_LISTS:
        options = [mixture(rng, 2) for _ in range(rng.integers(1, most + 1))]
        if all(option.strip() for option in options):
            lists.append(options)
    return lists


def mixture(rng, most=4):
    """Return a few fragments, joined."""
    joint = rng.choice(JOINTS)
    return joint.join(
        FRAGMENTS[i] for i in rng.integers(len(FRAGMENTS), size=rng.integers(1, most + 1))
    )
