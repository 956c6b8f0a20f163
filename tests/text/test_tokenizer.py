"""The tokenizer: ids of the real one, plain text that stays plain, files of strangers."""

import copy
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from labelled_texts import word_level, word_tokenizer
from texts import SNIPPETS, nasty, ordinary, small_table

import mlmjax.text.tokenizer
from mlmjax.errors import InputError
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer


def written(folder: Path, table, **companions) -> Path:
    for name, content in {"tokenizer": table, **companions}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


def test_ids_of_the_packaged_tokenizer(tokenizer):
    found = (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id)
    assert found == (50281, 50282, 50283, 50284)
    assert (tokenizer.anchor_id, tokenizer.vocab_size) == (50285, 50368)
    assert tokenizer.special_ids == {1, *range(50279, 50368)}
    assert tokenizer.lstrip_ids == {50284}
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((50281,), (50282,))


@pytest.mark.data
def test_golden_ids(tokenizer, test_data):
    golden = json.loads((test_data / "golden/tokenizer_golden_ids.json").read_text())["cases"]
    for case in golden:
        assert tokenizer.backend.encode(case["text"]).ids == case["ids"]
        if "[MASK]" not in case["text"]:
            assert [50281, *tokenizer.encode_plain(case["text"]), 50282] == case["ids"]
    notes = json.loads((test_data / "golden/tokenisation_notes.json").read_text())
    cases = notes["cases_no_special_tokens"]
    assert len(golden) == 15
    for text, ids in cases.items():
        assert tokenizer.backend.encode(text, add_special_tokens=False).ids == ids
        if "[" not in text:
            assert tokenizer.encode_plain(text) == ids


@settings(max_examples=150, deadline=None)
@given(text=nasty)
def test_no_text_makes_a_special_token_and_none_is_lost(tokenizer, text):
    ids = tokenizer.encode_plain(text)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@settings(max_examples=150, deadline=None)
@given(text=ordinary)
def test_ordinary_text_has_the_ids_of_the_original(tokenizer, text):
    assert tokenizer.encode_plain(text) == tokenizer.backend.encode(text).ids[1:-1]


def test_special_names_become_pieces_and_ordinary_added_tokens_stay(tokenizer):
    names = [tokenizer.backend.id_to_token(i) for i in sorted(tokenizer.special_ids)]
    assert len(names) == 90
    for name, ids in zip(names, tokenizer.encode_plain_batch(names), strict=True):
        assert len(ids) > 1
        assert tokenizer.decode(ids) == name
    assert tokenizer.encode_plain("|||IP_ADDRESS|||") == [0]
    assert tokenizer.encode_plain("  ") == [50276]
    assert tokenizer.encode_plain(" " * 24) == [50254]


def test_batch_is_one_by_one(tokenizer):
    assert tokenizer.encode_plain_batch(SNIPPETS) == [tokenizer.encode_plain(s) for s in SNIPPETS]
    assert tokenizer.encode_plain_batch([]) == []


def test_offsets_are_characters(tokenizer):
    assert tokenizer.plain_offsets("aé 👍") == [(0, 1), (1, 2), (2, 4), (3, 4), (3, 4)]


@pytest.mark.parametrize("text", [None, 3, b"x", ["x"], "ok \ud83d half"])
def test_what_is_no_text_is_rejected(tokenizer, text):
    with pytest.raises(InputError, match=r"text(:| is) "):
        tokenizer.encode_plain(text)


@pytest.mark.parametrize("token_id", [-1, 50368, 10**12])
def test_decoding_an_unknown_id_is_rejected(tokenizer, token_id):
    with pytest.raises(InputError, match="expected 0 to 50367"):
        tokenizer.decode([5, token_id])


def test_saved_bytes_are_the_bytes_read(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    again = Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert again.files == tokenizer.files
    assert set(again.files) == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    }  # fmt: skip
    assert again.sha256 == tokenizer.sha256
    assert tokenizer.sha256.startswith("9fd55248")


def test_settings_baked_in_are_taken_out(tmp_path):
    table = small_table(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None,
                 "pad_id": 258, "pad_type_id": 0, "pad_token": "[PAD]"},
    )  # fmt: skip
    table["model"]["dropout"] = 0.9
    table["model"]["merges"] = [["a", "b"]]
    table["model"]["vocab"] = {"ab": 256, **table["model"]["vocab"]}
    for entry in table["added_tokens"]:
        entry["id"] += 1
    read = Tokenizer.from_pretrained(written(tmp_path, table))
    assert read.backend.truncation is None
    assert read.backend.padding is None
    one = read.backend.encode("ab", add_special_tokens=False).ids
    assert one == [256]
    assert read.encode_plain_batch(["ab" * 50] * 4) == [one * 50] * 4
    (tmp_path / "saved").mkdir()
    read.save(tmp_path / "saved")
    saved = Tokenizer.from_pretrained(tmp_path / "saved")
    assert saved.sha256 == read.sha256
    assert saved.backend.encode("ab" * 50, add_special_tokens=False).ids == one * 50


def test_a_copy_is_built_from_the_same_files():
    small = Tokenizer({"tokenizer.json": json.dumps(small_table()).encode()}, "here")
    twin = copy.deepcopy(small)
    assert twin.backend is not small.backend
    assert twin.encode_plain("[MASK] x") == small.encode_plain("[MASK] x")
    assert (twin.files, twin.sha256, twin.where) == (small.files, small.sha256, "here")


def test_special_tokens_are_found_by_their_names(tmp_path):
    words = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", "[unused0]", "[unused7]", "hello", "yes"]
    names = {"unk_token": "<unk>", "cls_token": "<s>", "sep_token": {"content": "</s>"}}
    rest = {"pad_token": "<pad>", "mask_token": "<mask>", "sep_token": "</s>"}
    table = word_level(words, "<unk>")
    folder = written(tmp_path, table, tokenizer_config=names, special_tokens_map=rest)
    read = Tokenizer.from_pretrained(folder)
    assert (read.cls_id, read.sep_id, read.pad_id, read.mask_id, read.anchor_id) == (1, 2, 3, 4, 5)
    assert read.special_ids == {0, 1, 2, 3, 4, 5, 6}
    assert read.encode_plain("hello <mask> yes")[0] == 7
    assert set(read.encode_plain("<mask> [unused0] </s>")) == {0}


@pytest.mark.parametrize(
    ("spare", "advice"),
    [
        (["[unused1]"], r"\(\[unused1\] are spare, \"none\" is for no anchor\)"),
        ([f"[unused{i}]" for i in range(1, 12)], r"\(\[unused1\] to \[unused11\] are spare"),
    ],
)
def test_of_spare_tokens_none_is_guessed_to_be_the_anchor(spare, advice, tmp_path):
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[INST]", *spare, "hello", "yes"]
    table = json.loads(word_level(words))
    table["added_tokens"] = [e for e in table["added_tokens"] if e["content"] != "[unused0]"]
    read = Tokenizer.from_pretrained(written(tmp_path, json.dumps(table)))
    assert read.anchor_id is None
    assert read.encode_plain("hello yes") == [read.vocab_size - 2, read.vocab_size - 1]
    assert Template("{text}", slot=False).encode(read, {"text": "yes"}, 9)[0][1:-1]
    with pytest.raises(InputError, match=advice) as caught:
        Template("{text}").encode(read, {"text": "yes"}, 9)
    assert "has no token [unused0]" in caught.value.message
    named = read.with_anchor(spare[-1])
    ids, slot = Template("{text}").encode(named, {"text": "yes"}, 9)
    assert ids[slot - 1] == named.anchor_id == named.backend.token_to_id(spare[-1])
    named.save(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert (again.anchor, again.sha256) == (spare[-1], named.sha256)
    assert again.sha256 != read.sha256
    assert Template("{text}").encode(again, {"text": "yes"}, 9) == (ids, slot)
    assert Template("{text}", anchor=spare[-1]).encode(read, {"text": "yes"}, 9) == (ids, slot)
    own = Template("{text} " + f"{spare[-1]} [MASK]", anchor=spare[-1])
    assert own.encode(read, {"text": "yes"}, 9) == (ids, slot)
    without = Template("{text} [MASK]", anchor="none").encode(read, {"text": "yes"}, 9)
    assert without[0] == [i for i in ids if i != named.anchor_id]


def test_added_tokens_after_the_special_ones_keep_their_ids():
    table = small_table()
    ordinary = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    table["added_tokens"] += [
        {"id": 262, "content": "<drug>", "special": False, **ordinary},
        {"id": 263, "content": "<gene>", "special": False, **ordinary},
    ]
    small = Tokenizer({"tokenizer.json": json.dumps(table).encode()})
    assert small.encode_plain("<gene><drug>") == [263, 262]
    assert small.wrap(small.encode_plain("<gene>")) == small.backend.encode("<gene>").ids


def broken(change) -> dict:
    table = small_table()
    change(table)
    return table


# The corpus of hostile inputs has many more.
BROKEN = [
    (broken(lambda t: t["added_tokens"].pop(3)), r"id 260|\[MASK\]"),
    (broken(lambda t: t["added_tokens"][5].update(id=10**9)), "without gaps"),
    (broken(lambda t: t["added_tokens"][5].update(id=10**12)), "not a tokenizer"),
    (broken(lambda t: t["added_tokens"][3].update(content="a")), "added token 'a' has id 259"),
    (broken(lambda t: t["added_tokens"].append({"id": 262})), "not a tokenizer|expected an obj"),
    (broken(lambda t: t["model"]["vocab"].update({"!": 5})), "id"),
    (small_table(model=None), "not a tokenizer"),
    (small_table(model={"type": "BPE", "vocab": 3}), "not a tokenizer"),
    (small_table(version=float("nan")), "not a tokenizer"),
]


@pytest.mark.parametrize(("table", "message"), BROKEN)
def test_a_strangers_file_is_checked(tmp_path, table, message):
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.from_pretrained(written(tmp_path, table))
    assert caught.value.message.startswith(f"{tmp_path}/tokenizer.json: ")
    assert "\n" not in caught.value.message


def test_paths_without_a_tokenizer_are_rejected(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"has no tokenizer\.json; give the folder"):
        Tokenizer.from_pretrained(tmp_path)
    folder = written(tmp_path, small_table())
    with pytest.raises(InputError, match=r"has no tokenizer\.json; give the folder"):
        Tokenizer.from_pretrained(folder / "tokenizer.json")
    monkeypatch.setitem(mlmjax.text.tokenizer._MAX_BYTES, "tokenizer.json", 1000)
    with pytest.raises(InputError, match="is larger than"):
        Tokenizer.from_pretrained(folder)


def test_files_of_the_same_content_are_parsed_once_and_shared_by_nobody(tmp_path, monkeypatch):
    """Two folders with one content; what one tokenizer has said and where it is stays its own."""
    parsed = []
    home, usual = mlmjax.text.tokenizer, mlmjax.text.tokenizer.read_files
    monkeypatch.setattr(home, "read_files", lambda *given: parsed.append(given) or usual(*given))
    home._parse.cache_clear()
    for name in ("one", "other"):
        word_tokenizer(tmp_path / name)
    one, other = (Tokenizer.from_pretrained(tmp_path / name) for name in ("one", "other"))
    assert len(parsed) == 1
    assert (one.where, other.where) == (str(tmp_path / "one"), str(tmp_path / "other"))
    assert one.encode_plain("a goal") == other.encode_plain("a goal")
    one.files["more.json"], one.names["mask"] = b"{}", "<mask>"
    again = Tokenizer.from_pretrained(tmp_path / "one")
    assert again.files.keys() == other.files.keys()
    assert again.names["mask"] == other.names["mask"] == "[MASK]"
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"one/tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path / "one")
