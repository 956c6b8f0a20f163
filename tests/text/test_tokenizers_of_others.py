"""Tokenizers of other models: the ids of transformers, whatever their files say."""

import json
import logging

import pytest
from other_tokenizers import BERT, GEMMA, JAPANESE, KINDS, LLAMA, byte_level, template, write
from tiny_models import transformers
from tokenizers import processors

from mlmjax.errors import InputError
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer

MASK, ANCHOR = "[MASK]", "[unused0]"
FLAGS = [
    *({"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}),
    *({"single_word": True}, {"normalized": True}),
]
WHOLE = [
    "the cat [unused0][MASK] sat",
    "ANSWER:\nAnswer: [unused0] [MASK]",
    "Answer:\n [unused0] \u3000 [MASK]  .",
    "[unused0] [MASK]",
    "  the. [unused0]\n[MASK], dog",
]


def roles_of(backend):
    names = (BERT, JAPANESE, GEMMA, LLAMA)
    return next(
        n for n in names if all(backend.token_to_id(name) is not None for name in n.values())
    )


def endings(backend, roles):
    """Return post-processors of every kind by their names; None puts no tokens."""
    cls, sep = ((roles[role], backend.token_to_id(roles[role])) for role in ("cls", "sep"))
    ends = template(backend, f"{cls[0]} $A {sep[0]}")
    return {
        "none": None,
        "cls and sep": ends,
        "before": template(backend, f"{cls[0]} $A"),
        "after": template(backend, f"$A {sep[0]}"),
        "others": template(backend, f"{cls[0]} {roles['pad']} $A {roles['unk']}"),
        "no tokens": template(backend, "$A"),
        "BERT": processors.BertProcessing(sep, cls),
        "RoBERTa": processors.RobertaProcessing(sep, cls),
        "byte level": processors.ByteLevel(trim_offsets=True),
        "sequence": processors.Sequence([processors.ByteLevel(), ends]),
    }


def both(folder):
    """Return our tokenizer and that of transformers, which takes the class of a ModernBERT."""
    (folder / "config.json").write_text('{"model_type": "modernbert"}')
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def check(ours, theirs, wholes=WHOLE):
    """Compare the ids of prompts, and count those in which both find anchor and mask."""
    found = 0
    for whole in wholes:
        has_anchor = ours.anchor_id is not None
        whole = whole if has_anchor else whole.replace(ANCHOR, "")
        before, after = whole.split(MASK)
        anchored = before.split(ANCHOR)
        parts = [anchored[0], *([ours.anchor_id, anchored[1]] if has_anchor else [])]
        parts += [ours.mask_id, after]
        expected = theirs(whole.replace(MASK, ours.names["mask"]))["input_ids"]
        if not {ours.mask_id, *([ours.anchor_id] if has_anchor else [])} <= {*expected}:
            # It would be found only between words.
            with pytest.raises(InputError, match="is not read as one token where it is"):
                ours.encode_parts_batch([parts])
            continue
        assert ours.wrap(ours.encode_parts_batch([parts])[0]) == expected
        if has_anchor:
            ids, slot = Template(whole).encode(ours, {}, 512)
            assert ids == expected
            assert ids[slot] == ours.mask_id
        found += 1
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_prompt_are_those_of_transformers(kind, tmp_path):
    backend = KINDS[kind]()
    roles = roles_of(backend)
    for name, ending in endings(backend, roles).items():
        if ending is not None:
            backend.post_processor = ending
        ours, theirs = both(write(tmp_path / name, backend, roles))
        assert check(ours, theirs) == len(WHOLE)
        assert ours.wrap([]) == theirs("")["input_ids"]
    for number, flags in enumerate(FLAGS):
        folder = write(tmp_path / str(number), backend, roles, {roles["mask"]: flags})
        assert check(*both(folder)) >= 3


@pytest.mark.parametrize("flags", [{}, *FLAGS])
def test_added_tokens_may_have_any_flags(flags, tmp_path):
    names = ("<br>", "dog", "  ", "the", ". ")
    backend = byte_level(spare=(*names, ANCHOR))
    backend.post_processor = template(backend, "[CLS] $A [SEP]")
    texts = ["the dog [unused0] [MASK] <br> ", "<br>  [unused0]  [MASK]", "a[unused0][MASK]dog the"]
    for name in (*names, MASK, ANCHOR):
        for mask in ({"lstrip": True}, {}):
            folder = write(tmp_path / "model", backend, BERT, {MASK: mask, name: flags})
            check(*both(folder), [*texts, *WHOLE])


def test_the_companions_name_add_and_change_tokens_as_in_transformers(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    backend = byte_level(spare=(ANCHOR,))
    backend.post_processor = template(backend, "[CLS] $A [SEP]")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    mask = plain | {"content": MASK, "lstrip": True, "special": True}
    number = str(backend.token_to_id(MASK))
    cases = {
        "flags": {"added_tokens_decoder": {number: mask}},
        "without a mark": {"added_tokens_decoder": {number: mask | {"special": False}}},
        "object": {"mask_token": mask | {"__type": "AddedToken"}},
        "more": {"extra_special_tokens": ["<one>"], "image_token": "<two>"},
        "old name": {"additional_special_tokens": ["<one>", "<two>"]},
        "named": {"extra_special_tokens": {"first_token": "<one>"}},
    }
    for name, settings in cases.items():
        ours, theirs = both(write(tmp_path / name, backend, BERT, **settings))
        assert check(ours, theirs) == len(WHOLE)
        for text in ("<one>", "<two>"):
            expected = theirs(text)["input_ids"][1:-1]
            if text in json.dumps(settings):
                assert {*expected} <= ours.special_ids
                assert len(ours.encode_plain(text)) > 1
            else:
                assert ours.encode_plain(text) == expected
    assert "gives other flags to [MASK] than tokenizer.json" in caplog.text


def test_split_special_tokens_is_what_texts_get_anyway(tmp_path, caplog):
    backend = byte_level()
    backend.post_processor = endings(backend, BERT)["cls and sep"]
    folder = write(tmp_path / "model", backend, BERT)
    path = folder / "tokenizer_config.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(table | {"split_special_tokens": True}))
    ours, theirs = both(folder)
    assert "split_special_tokens is true" in caplog.text
    for text in ("the [MASK] cat", "[CLS][SEP] [PAD]"):
        assert ours.wrap(ours.encode_plain(text)) == theirs(text)["input_ids"]
    path.write_text(json.dumps(table | {"split_special_tokens": "yes"}))
    with pytest.raises(InputError, match="split_special_tokens is 'yes'; expected true or false"):
        Tokenizer.from_pretrained(folder)


def test_names_may_be_in_either_companion(tmp_path):
    roles = BERT | {"cls": "<s>", "sep": "</s>"}
    folder = write(tmp_path / "model", byte_level(roles=roles), {})
    names = {f"{role}_token": name for role, name in roles.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    ours, theirs = both(folder)
    assert (ours.cls_id, ours.sep_id) == (theirs.cls_token_id, theirs.sep_token_id)
    assert ours.names["cls"] == "<s>"
    write(folder, byte_level(roles=roles), BERT)
    with pytest.raises(InputError, match=r"cls_token is '<s>'; expected .*, one name in all files"):
        both(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_makes_a_special_token(kind, tmp_path):
    backend = KINDS[kind]()
    ours = Tokenizer.from_pretrained(write(tmp_path / "model", backend, roles_of(backend)))
    names = [ours.backend.id_to_token(i) for i in ours.special_ids]
    texts = [*names, *(f"the{name} cat {name}" for name in names)]
    for ids in ours.encode_plain_batch(texts):
        assert (
            not ours.special_ids.intersection(ids)
            - {backend.token_to_id("<unk>")}
            - {backend.token_to_id("[UNK]")}
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_token": 3}, "mask_token is 3; expected the text of a token"),
        ({"added_tokens_decoder": [1]}, r"added_tokens_decoder is \[1\]; expected an object"),
        ({"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder is"),
        ({"added_tokens_decoder": {"1": {"lstrip": True}}}, "expected an object with content"),
        ({"added_tokens_decoder": {"1": {"content": "a", "lstrip": 1}}}, "true or false for"),
        ({"cls_token": MASK}, r"\[MASK\] and \[CLS\] are one token"),
        ({"mask_token": ANCHOR}, r"\[MASK\] and the anchor \[unused0\] are one token"),
        ({"anchor": 3}, "anchor is 3; expected the text of a token"),
        ({"anchor": "<unused0>"}, r"'<unused0>' is not a token .* spare tokens: \[unused0\], \["),
    ],
)
def test_companions_of_strangers_are_checked(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Tokenizer.from_pretrained(write(tmp_path / "model", byte_level(), BERT, **settings))


def test_a_tokenizer_that_repeats_a_text_is_rejected(tmp_path):
    backend = byte_level()
    backend.post_processor = template(backend, "[CLS] $A [SEP] $A")
    with pytest.raises(InputError, match="expected it to put tokens before and after them"):
        Tokenizer.from_pretrained(write(tmp_path / "model", backend, BERT))
