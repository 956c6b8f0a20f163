"""Prompts: the ids of the whole string, a slot no text can move, shortening."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import SAFE, nasty, ordinary, small_table

from mlmjax.errors import InputError
from mlmjax.text.prompts import MASKED, WHITE_SPACE, Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import Verbalizer

CLS, SEP, MASK, ANCHOR = 50281, 50282, 50284, 50285
OWN = {"[CLS]": CLS, "[SEP]": SEP, "[MASK]": MASK, "[unused0]": ANCHOR}
MMLU = (
    "You will be given a question as well as a list of options. Read the question carefully and "
    "select the right answer from the list.\nQUESTION:\n{question}\nCHOICES:\n{options}\nANSWER:\n"
    "Answer: [unused0] [MASK]"
)
LONG = 10**6
AFTER = "is not directly after"


def mmlu_whole(row) -> str:
    """The published prompt, written out by hand."""
    pairs = zip("ABCD", row["choices"], strict=True)
    lines = "".join(f"- {letter}: {choice}\n" for letter, choice in pairs)
    return MMLU.replace("{question}", row["question"].strip()).replace("{options}", lines)


def check_mmlu(tokenizer, rows):
    fields = [{"question": r["question"].strip(), "options": r["choices"]} for r in rows]
    prompts = Template(MMLU).render_batch(tokenizer, fields, 8192)
    whole = tokenizer.backend.encode_batch_fast([mmlu_whole(row) for row in rows])
    for prompt, encoding in zip(prompts, whole, strict=True):
        assert prompt.ids == encoding.ids
        assert prompt.ids[prompt.slot - 1 :] == [ANCHOR, MASK, SEP]
        assert prompt.shortened == {}


def test_ids_of_500_questions_are_the_whole_strings(tokenizer):
    text = (Path(__file__).parents[1] / "data" / "mmlu_500.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.strip().split("\n")]
    assert len(rows) == 500
    assert len({row["subject"] for row in rows}) == 57
    check_mmlu(tokenizer, rows)


@pytest.mark.long
@pytest.mark.data
def test_ids_of_all_of_mmlu_are_the_whole_strings(tokenizer, test_data):
    from pyarrow import parquet

    assert (test_data / "prompts/mmlu.txt").read_text(encoding="utf-8") == MMLU
    rows = parquet.read_table(test_data / "eval/mmlu_test.parquet").to_pylist()
    assert len(rows) == 14042
    check_mmlu(tokenizer, rows)


@pytest.mark.data
def test_published_prompts(tokenizer, test_data):
    row = {"question": "Is it?", "options": ["yes", "no"]}
    card = (test_data / "prompts/model_card.txt").read_text(encoding="utf-8")
    whole = (
        "You will be given a question and options. Select the right answer.\nQUESTION: Is it?\n"
        "CHOICES:\n- A: yes\n- B: no\nANSWER: [unused0] [MASK]"
    )
    ids = tokenizer.backend.encode(whole).ids
    assert Template(card).encode(tokenizer, row, 512) == (ids, len(ids) - 2)


# Templates as lists of parts, so that what the whole string is needs no parser.
literal = nasty.map(lambda text: ("text", text))
part = st.one_of(
    literal,
    st.sampled_from([("field", "a"), ("field", "b c"), ("field", "a")]),
    st.sampled_from([("token", "[SEP]"), ("token", "[CLS]"), ("token", "[unused0]")]),
)
space = st.sampled_from(["", " ", "  ", "\n", " \u00a0\u2028", "\t"])
slot_parts = space.map(lambda s: [("token", "[unused0]"), ("text", s), ("token", "[MASK]")])
templates = st.tuples(st.lists(part, max_size=6), slot_parts, st.lists(part, max_size=3)).map(
    lambda three: [p for group in three for p in group]
)


def template_text(parts) -> str:
    escaped = {"text": lambda t: t.replace("{", "{{").replace("}", "}}"), "token": str}
    return "".join(
        "{" + value + "}" if kind == "field" else escaped[kind](value) for kind, value in parts
    )


def stretches(parts, row) -> tuple[list[str], list[str]]:
    """The text around the template's own tokens, and those tokens."""
    texts, tokens = [""], []
    for kind, value in parts:
        if kind == "token":
            tokens.append(value)
            texts.append("")
        else:
            texts[-1] += row[value] if kind == "field" else value
    return texts, tokens


def literal_runs(parts) -> list[str]:
    """Neighbouring literal texts, which the template reads as one."""
    return stretches([p if p[0] == "text" else ("token", "") for p in parts], {})[0]


def own_token_in_literal(parts) -> bool:
    return any(name in run for run in literal_runs(parts) for name in OWN)


@settings(max_examples=80, deadline=None)
@given(
    parts=templates, a=ordinary, b=ordinary, x=st.sampled_from(["", "[", "]", "<|", "|>", "[MA"])
)
def test_ids_are_the_whole_strings_for_ordinary_text(tokenizer, parts, a, b, x):
    row = {"a": a + x, "b c": b + "!"}
    texts, tokens = stretches(parts, row)
    names = [tokenizer.backend.id_to_token(i) for i in tokenizer.special_ids]
    if own_token_in_literal(parts) or any(name in text for text in texts for name in names):
        return
    whole = "".join(t + token for t, token in zip(texts, [*tokens, ""], strict=True))
    fields = {value for kind, value in parts if kind == "field"}
    if fields and not any(row[name].strip() for name in fields):
        return
    ids, slot = Template(template_text(parts)).encode(tokenizer, row, 8192)
    assert ids == tokenizer.backend.encode(whole).ids
    assert ids[slot] == MASK


@settings(max_examples=80, deadline=None)
@given(parts=templates, a=nasty, b=nasty)
def test_no_text_moves_the_slot_or_adds_a_token(tokenizer, parts, a, b):
    row = {"a": a + ".", "b c": b + "."}
    if own_token_in_literal(parts):
        return
    texts, tokens = stretches(parts, row)
    template = Template(template_text(parts))
    prompt = template.render(tokenizer, row, 8192)
    own = [OWN[name] for name in tokens]
    assert [i for i in prompt.ids if i in tokenizer.special_ids] == [CLS, *own, SEP]
    assert prompt.ids[prompt.slot - 1 : prompt.slot + 1] == [ANCHOR, MASK]
    # Between the template's tokens stands every character of the text, and nothing else.
    pieces = [[]]
    for token_id in prompt.ids[1:-1]:
        if token_id in tokenizer.special_ids:
            pieces.append([])
        else:
            pieces[-1].append(token_id)
    for piece, text, token in zip(pieces, texts, [*tokens, ""], strict=True):
        kept = text.rstrip(WHITE_SPACE) if token == "[MASK]" else text
        assert tokenizer.decode(piece) == unicodedata.normalize("NFC", kept)


@pytest.mark.parametrize("name", [*OWN, "[PAD]", "[UNK]", "[unused7]", "<|endoftext|>"])
@pytest.mark.parametrize("at", range(1, 13))
def test_a_special_token_split_over_fields_stays_text(tokenizer, name, at):
    row = {"a": "x " + name[:at], "b": name[at:] + " y"}
    for text in ("{a}{b}", "{a}" + name[at:] + " {b}", name[:at] + "{b}{a}"):
        if any(own in text for own in OWN):
            continue
        ids, slot = Template(text + "\nAnswer:").encode(tokenizer, row, 512)
        assert [i for i in ids if i in tokenizer.special_ids] == [CLS, ANCHOR, MASK, SEP]
        assert slot == len(ids) - 2


def test_white_space_is_what_the_mask_swallows(tokenizer):
    chars = [chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000]
    chars += [
        c for c in map(chr, range(0x10000, 0x110000)) if unicodedata.category(c) in "ZsZlZpCc"
    ]
    encoded = tokenizer.backend.encode_batch_fast([f"!{c}[MASK]" for c in chars])
    swallowed = {c for c, e in zip(chars, encoded, strict=True) if e.ids == [CLS, 2, MASK, SEP]}
    assert swallowed == set(WHITE_SPACE)
    assert len(WHITE_SPACE) == 25


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("{x}", "T [unused0] [MASK]"),
        ("{x}\nAnswer:", "T\nAnswer: [unused0] [MASK]"),
        ("{x}\nAnswer: ", "T\nAnswer: [unused0] [MASK]"),
        ("{x}\nAnswer:\n", "T\nAnswer:\n[unused0] [MASK]"),
        ("{x} [unused0]", "T [unused0] [MASK]"),
        ("{x} [unused0] \n", "T [unused0] [MASK]"),
        ("{x}[SEP]", "T[SEP] [unused0] [MASK]"),
        ("[unused0] [MASK] {x}", "[unused0] [MASK] T"),
        ("[unused0]\u2028 [MASK]\n{x}[SEP] y", "[unused0][MASK]\nT[SEP] y"),
        ("{{{x}}} {{x}} }}{{", "{T} {x} }{ [unused0] [MASK]"),
        ("", "[unused0] [MASK]"),
    ],
)
def test_where_the_slot_stands(tokenizer, text, whole):
    ids, slot = Template(text).encode(tokenizer, {"x": "T"}, 64)
    assert ids == tokenizer.backend.encode(whole).ids
    assert ids[slot - 1 : slot + 1] == [ANCHOR, MASK]


def test_a_training_row_is_the_prompt_with_the_answer_in_the_slot(tokenizer):
    ids, slot = Template("{x}\nAnswer:").encode(tokenizer, {"x": "Is it?"}, 64)
    [(spaced,), _] = Verbalizer.letters(["yes", "no"]).ids(tokenizer)
    trained = tokenizer.backend.encode("Is it?\nAnswer: [unused0] A").ids
    assert [*ids[:slot], spaced, *ids[slot + 1 :]] == trained


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a { b", r"single '\{' at character 3"),
        ("a } b", r"single '\}' at character 3"),
        ("{a}}", r"single '\}' at character 4"),
        ("{{a}", r"single '\}' at character 4"),
        ('{"a": {x}}', r"single '\{' at character 1"),
        ("{}", r"'\{\}' at character 1 is not a field"),
        *[(text, "is not a field") for text in ("{ }", "{x:>10}", "{x!r}")],
        ("[unused0] [MASK] {x} [unused0] [MASK]", "has 2"),
        ("[unused0] [MASK][MASK]", "has 2"),
        *[(text, AFTER) for text in ("[MASK]", "{x} [MASK]", "[MASK] [unused0]")],
        *[(f"[unused0]{text}[MASK]", AFTER) for text in ("{x}", ".", "\u200b")],
        ("half \ud83d", "lone surrogate"),
        (None, "expected text"),
    ],
)
def test_a_malformed_template_is_rejected(text, message):
    with pytest.raises(InputError, match="^template:? .*" + message):
        Template(text)


@pytest.mark.parametrize(
    ("shorten", "message"),
    [
        ({"y": "head"}, "'y' cannot be shortened; fields here: x"),
        ({"options": "tail"}, "'options' cannot be shortened"),
        ({"x": "left"}, "x is 'left'; expected head, tail, middle"),
        ({"x": None}, "x is None"),
        ("x", "expected field -> side"),
    ],
)
def test_a_wrong_shorten_is_rejected(shorten, message):
    with pytest.raises(InputError, match=message):
        Template("{x} {options}", shorten=shorten)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"options": ["a"]}, r"has no field 'x', which the prompt needs; its fields: 'options'"),
        ({"x": None, "options": ["a"]}, "field 'x' is NoneType"),
        ({"x": 3, "options": ["a"]}, "field 'x' is int"),
        ({"x": ["t"], "options": ["a"]}, "field 'x' is list"),
        ({"x": b"t", "options": ["a"]}, "field 'x' is bytes"),
        ({"x": "\udfff", "options": ["a"]}, "field 'x': holds half a character"),
        ({"x": "t"}, "has no field 'options'"),
        ({"x": "t", "options": "ab"}, "field 'options': found one str; expected a list"),
        ({"x": "t", "options": {"a": "b"}}, "field 'options': found one dict; expected a list"),
        ({"x": "t", "options": {"a"}}, "field 'options': is a set, which has no order; expected"),
        ({"x": "t", "options": 3}, "field 'options': found one int; expected a list"),
        ({"x": "t", "options": []}, "field 'options' has no option"),
        ({"x": "t", "options": ["a", None]}, "option 2 is NoneType"),
        ({"x": "t", "options": ["a", 2]}, "option 2 is int"),
        ({"x": "t", "options": ["a"] * 458}, "458 options: .* give at most 457"),
        ({"x": " \n", "options": ["", "\t"]}, "field 'x', 'options' is blank"),
        ("t", r"is 't' \(str\); expected \{field: text\}"),
    ],
)
def test_a_bad_row_is_rejected_alone_and_by_number(tokenizer, row, message):
    template, good = Template("{x}\n{options}"), {"x": "t", "options": ["a"]}
    with pytest.raises(InputError, match="^" + message):
        template.render(tokenizer, row, 8192)
    with pytest.raises(InputError, match=r"^row 2 \(index 1\): " + message) as caught:
        template.render_batch(tokenizer, [good, row, good, row], 8192)
    assert len(caught.value.details) == 1
    assert caught.value.details[0].startswith("row 4 (index 3): ")


def test_options_are_lines_and_stay_text(tokenizer):
    options = ["one", "two\n- C: three", "[unused0] [MASK]", ""]
    ids, slot = Template("{x}\n{options}Answer:").encode(
        tokenizer, {"x": "", "options": options, "other": 3}, 512
    )
    text = "\n- A: one\n- B: two\n- C: three\n- C: [unused0] [MASK]\n- D: \nAnswer: "
    assert tokenizer.decode(ids[1 : slot - 1]) == text
    assert tokenizer.special_ids.isdisjoint(ids[1 : slot - 1])
    lines = Template("{options}").render(tokenizer, {"options": tuple("x" * 30)}, 512).ids
    assert "- Z: x\n- AA: x\n- AB: x\n" in tokenizer.decode(lines)


def test_fields_in_order():
    assert Template("{b}{a}{options}{b}{c d}").fields == ("b", "a", "options", "c d")
    assert Template("{a}") == Template("{a}")
    assert Template("{a}", shorten={"a": "head"}) != Template("{a}")


def test_batch_is_one_by_one(tokenizer):
    rows = [{"x": "word " * n, "y": "[MASK] " * (n % 7)} for n in range(1, 60)]
    template = Template("Q: {x} [SEP] {y}\nAnswer:", shorten={"x": "middle", "y": "tail"})
    batch = template.render_batch(tokenizer, rows, 40)
    assert batch == [template.render(tokenizer, row, 40) for row in rows]
    assert any(p.shortened for p in batch)
    assert template.render_batch(tokenizer, [], 40) == []


def test_a_small_tokenizer_with_its_own_flags():
    table = small_table()
    table["added_tokens"][1] |= {"lstrip": True, "rstrip": True}
    table["added_tokens"][3]["lstrip"] = False
    small = Tokenizer({"tokenizer.json": json.dumps(table).encode()})
    ids, slot = Template("{x} [SEP] \n{x} [unused0] [MASK] z").encode(small, {"x": "ab\u2028"}, 64)
    assert ids == small.backend.encode("ab\u2028 [SEP] \nab\u2028 [unused0] [MASK] z").ids
    assert ids[slot - 2 : slot + 1] == [small.anchor_id, *small.encode_plain(" "), small.mask_id]


# Shortening

KEEPS = {
    "head": lambda kept, text: text.endswith(kept),
    "tail": lambda kept, text: text.startswith(kept),
    "middle": lambda kept, text: any(
        text.startswith(kept[:n]) and text.endswith(kept[n:]) for n in range(len(kept) + 1)
    ),
}
# Whatever neighbours they get, normalisation leaves these as they are.
stable = [
    s
    for s in SAFE
    if s == unicodedata.normalize("NFC", s)
    and not any(unicodedata.combining(c) or "\u1100" <= c <= "\u11ff" for c in s)
]
long_text = st.lists(
    st.sampled_from([*stable, "[MASK]", "[unused0]", "- A: x\n", "supercalifragilistic"]),
    min_size=1,
    max_size=60,
).map(lambda pieces: "x" + "".join(pieces) + "y")


@settings(max_examples=80, deadline=None)
@given(text=long_text, side=st.sampled_from(sorted(KEEPS)), room=st.integers(8, 60))
def test_a_long_text_is_cut_at_its_side_and_nothing_else(tokenizer, text, side, room):
    template = Template("Q: {x}|\n{options}Answer:", shorten={"x": side})
    row = {"x": text, "options": ["one", "two"]}
    whole = template.render(tokenizer, row, LONG)
    bare = len(template.render(tokenizer, row | {"x": ""}, LONG).ids)
    limit = bare + room
    prompt = template.render(tokenizer, row, limit)
    assert len(prompt.ids) <= limit
    assert prompt == template.render(tokenizer, row, limit)
    decoded = tokenizer.decode(prompt.ids[1 : prompt.slot - 1])
    assert decoded.startswith("Q: ")
    kept, _, rest = decoded[3:].rpartition("|")
    assert rest == "\n- A: one\n- B: two\nAnswer: "
    assert KEEPS[side](kept, text)
    if len(whole.ids) <= limit:
        assert prompt == whole
        assert prompt.shortened == {}
    else:
        assert len(prompt.ids) >= limit - 6
        lost = len(whole.ids) - len(prompt.ids)
        assert abs(prompt.shortened["x"] - lost) <= 4


@settings(max_examples=60, deadline=None)
@given(a=nasty, b=nasty, times=st.integers(1, 30), room=st.integers(40, 120))
def test_nasty_texts_are_shortened_whole_characters_at_a_time(tokenizer, a, b, times, room):
    row = {"a": ("x" + a) * times, "b": ("y" + b) * times}
    if "\ufffd" in row["a"] + row["b"]:
        return
    template = Template("{a}[SEP]{b} {a}\nAnswer:", shorten={"a": "middle", "b": "head"})
    prompt = template.render(tokenizer, row, 8 + room)
    assert len(prompt.ids) <= 8 + room
    assert [i for i in prompt.ids if i in tokenizer.special_ids] == [CLS, SEP, ANCHOR, MASK, SEP]
    assert "\ufffd" not in tokenizer.decode(prompt.ids)


@pytest.mark.parametrize("side", KEEPS)
@pytest.mark.parametrize("limit", range(30, 34))
def test_the_tokens_of_a_cut_character_are_all_counted(tokenizer, side, limit):
    assert len(tokenizer.encode_plain("👍" * 100)) == 300
    template = Template("{x}\nAnswer:", shorten={"x": side})
    prompt = template.render(tokenizer, {"x": "👍" * 100}, limit)
    kept = tokenizer.decode(prompt.ids).count("👍")
    assert prompt.shortened == {"x": 300 - 3 * kept}
    assert limit - len(prompt.ids) <= 4


def test_the_longest_field_is_cut_first_down_to_one_level(tokenizer):
    template = Template("{a}|{b}|{c}", shorten={"a": "tail", "b": "head", "c": "tail"})
    row = {"a": "one two", "b": " word" * 500, "c": " time" * 900}
    prompt = template.render(tokenizer, row, 107)
    a, b, c = tokenizer.decode(prompt.ids[1 : prompt.slot - 1]).split("|")
    assert a == "one two"
    assert abs(b.count("word") - c.count("time")) <= 1
    assert 101 <= len(prompt.ids) <= 107
    assert prompt.shortened == {"b": 500 - b.count("word"), "c": 900 - c.count("time")}
    assert "a" not in prompt.shortened


def test_a_prompt_that_cannot_fit_is_rejected_with_the_numbers(tokenizer):
    row = {"x": "word " * 100, "options": ["a long option " * 20] * 2}
    with pytest.raises(InputError, match=r"has \d+ tokens and at most 64 fit; name the fields"):
        Template("{x}{options}").render(tokenizer, row, 64)
    template = Template("{x}{options}", shorten={"x": "tail"})
    fixed = len(template.render(tokenizer, row | {"x": ""}, LONG).ids)
    for limit in (1, 64, fixed - 1, fixed):
        with pytest.raises(InputError, match=f"has {fixed} tokens without x and at most {limit} f"):
            template.render(tokenizer, row, limit)
    assert len(template.render(tokenizer, row, fixed + 1).ids) <= fixed + 1
    with pytest.raises(InputError, match=rf"row 1 \(index 0\): the prompt has {fixed} tokens"):
        template.render_batch(tokenizer, [row], 64)
    with pytest.raises(InputError, match=f"has {fixed} tokens without x"):  # Half a character.
        template.render(tokenizer, row | {"x": "👍" * 9}, fixed + 1)


@pytest.mark.parametrize("piece", ["lorem ipsum, ", "a", " ", "👍🏽", "\n[MASK]"])
def test_a_long_text_is_read_twice_and_no_more(tokenizer, monkeypatch, piece):
    text = (piece * (60_000 // len(piece))) + "."
    read = []

    def count(function):
        return lambda given: (read.append(len("".join(given))), function(given))[1]

    for name in ("encode_plain_batch", "plain_offsets"):
        monkeypatch.setattr(tokenizer, name, count(getattr(tokenizer, name)))
    for side in KEEPS:
        read.clear()
        prompt = Template("{x}\nAnswer:", shorten={"x": side}).render(tokenizer, {"x": text}, 512)
        assert 500 <= len(prompt.ids) <= 512
        assert sum(read) < 2.4 * len(text)


@pytest.mark.parametrize("side", ["head", "tail", "middle"])
def test_masked_spans_are_masked_wherever_the_text_is_truncated(side, tokenizer):
    template = Template("REVIEW: {text}\nEND", shorten={"text": side})
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    text = " ".join(words)
    mask = tokenizer.mask_id
    for room in (60, 13):
        plain = template.render(tokenizer, {"text": text}, room)
        assert bool(plain.shortened) == (room == 13)
        seen = 0
        for word in words:
            start = text.index(word)
            row = {"text": text, MASKED: {"text": [(start, start + len(word))]}}
            (found,) = template.render_batch(tokenizer, [row], room)
            assert found == template.render(tokenizer, row, room)
            assert (found.slot, found.shortened) == (plain.slot, plain.shortened)
            changed = [at for at, one in enumerate(found.ids) if one != plain.ids[at]]
            assert [found.ids[at] for at in changed] == [mask] * len(changed)
            assert [tokenizer.decode([plain.ids[at]]).strip() for at in changed] in ([], [word])
            seen += len(changed)
        assert seen == (10 if room == 60 else 10 - plain.shortened["text"])
    both = {"text": text, MASKED: {"text": [(0, 3), (4, 7)]}}
    assert template.render(tokenizer, both, 60).ids.count(mask) == 3


def test_masked_spans_of_one_field_leave_the_others(tokenizer):
    template = Template("{a} {b}{a} {options}")
    row = {"a": "x y", "b": "", "options": ["x y", "x"]}
    plain = template.render(tokenizer, row, 60)
    found = template.render(tokenizer, row | {MASKED: {"a": [(0, 1)]}}, 60)
    changed = [at for at, one in enumerate(found.ids) if one != plain.ids[at]]
    assert [tokenizer.decode([plain.ids[at]]).strip() for at in changed] == ["x", "x"]
