"""A larger vocabulary: old rows and logits stay, new words are tokens, transformers agrees."""

import json
import logging
import unicodedata
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from noisy_models import run_jitted
from small_models import small_model
from tiny_models import torch, transformers
from training import write_tokenizer

import mlmjax
import mlmjax.text.words
from mlmjax import InputError, ModernBertForMaskedLM, Tokenizer, Verbalizer
from mlmjax import resize_token_embeddings as resize
from mlmjax.model.modernbert import parameters
from mlmjax.text.words import add_words
from mlmjax.weights.model_checkpoint import load_model, save_model
from mlmjax.weights.pretrained import EMBEDDING, load_pretrained, save_pretrained

make_model = partial(small_model, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
WORDS = ["angioplasty", "IL-6R", "myocardial infarction", "naïvetoid", "血管造影"]
TEXT = (
    "After myocardial infarction, angioplasty (IL-6R) was done.\n\nAngioplasty naïvetoid 血管造影"
)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def larger(model, tokenizer):
    return resize(model, tokenizer, WORDS)


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """A tokenizer of a few hundred ids."""
    folder = tmp_path_factory.mktemp("little") / "tokenizer"
    write_tokenizer(folder)
    return Tokenizer.from_pretrained(folder)


def table(model, name=EMBEDDING):
    return np.asarray(parameters(model)[name])


def test_old_rows_stay_and_new_ones_start_from_their_pieces(model, tokenizer, larger):
    bigger, with_words = larger
    assert bigger.config.vocab_size == 50432  # the next multiple of 64: every old row has a token
    assert (tokenizer.vocab_size, with_words.vocab_size) == (50368, 50373)
    ordinary = np.setdiff1d(np.arange(50368), sorted(tokenizer.special_ids))
    for name in (EMBEDDING, "decoder.bias"):
        old, new = table(model, name), table(bigger, name)
        np.testing.assert_array_equal(new[:50368], old)
        for at, word in enumerate(WORDS, 50368):
            pieces = tokenizer.encode_plain(f" {word}")
            assert len(pieces) > 1
            np.testing.assert_allclose(new[at], old[pieces].mean(0), atol=1e-6)
        spare = np.broadcast_to(old[ordinary].mean(0), new[50373:].shape)
        np.testing.assert_allclose(new[50373:], spare, atol=1e-6)
    for name, value in parameters(model).items():
        if name not in (EMBEDDING, "decoder.bias"):
            np.testing.assert_array_equal(value, parameters(bigger)[name])
    assert model.config.vocab_size == 50368
    assert table(model).shape == (50368, 16)


def test_a_decoder_of_its_own_grows_from_its_own_rows(little):
    model = make_model(vocab_size=384, tie_word_embeddings=False, pad_token_id=little.pad_id)
    bigger, with_words = resize(model, little, ["angioplasty"], size=448)
    pieces = little.encode_plain(" angioplasty")
    for name in (EMBEDDING, "decoder.weight"):
        old, new = table(model, name), table(bigger, name)
        np.testing.assert_array_equal(new[: little.vocab_size], old[: little.vocab_size])
        at = with_words.vocab_size - 1
        np.testing.assert_allclose(new[at], old[pieces].mean(0), atol=1e-6)
        assert new.shape == (448, 16)
    assert not np.array_equal(table(bigger), table(bigger, "decoder.weight"))


def test_old_words_keep_their_logits_and_their_share(model, tokenizer, larger):
    bigger, _ = larger
    ids = np.array([tokenizer.encode_plain("The plain text of a patient's record, as it was.")])
    old, new = (np.asarray(run_jitted(one, ids)) for one in (model, bigger))
    np.testing.assert_allclose(new[..., :50368], old, atol=1e-6)
    # A row at the mean has at most the average of all words' probabilities (Jensen).
    spare = np.exp(new[..., 50373:]).sum(-1)
    ordinary = np.exp(new[..., :50280]).sum(-1)
    assert (spare / ordinary < (50432 - 50373) / 50270).all()


def test_new_words_are_one_token_in_any_place(tokenizer, larger):
    _, with_words = larger
    for at, word in enumerate(WORDS, 50368):
        for text in (word, f" {word}", f"\n{word}"):
            assert with_words.encode_plain(text) == [at]
        assert with_words.encode_plain(f"an {word}.") == [266, at, 15]
        assert at not in with_words.special_ids
        assert with_words.encode_plain(f"x{word}x") == tokenizer.encode_plain(f"x{word}x")
    ids = with_words.encode_plain(TEXT)
    assert {*range(50368, 50373)} < set(ids)
    assert ids == with_words.backend.encode(TEXT, add_special_tokens=False).ids
    assert with_words.encode_plain(with_words.decode(ids)) == ids
    assert with_words.decode(with_words.encode_plain("an angioplasty")) == "an angioplasty"
    assert with_words.encode_plain("[MASK] [unused0]") == tokenizer.encode_plain("[MASK] [unused0]")


def test_text_without_new_words_keeps_its_ids(tokenizer, larger):
    @settings(max_examples=200, deadline=None)
    @given(text=st.text(max_size=40))
    def check(text):
        assume(not any(word in unicodedata.normalize("NFC", text) for word in WORDS))
        assert larger[1].encode_plain(text) == tokenizer.encode_plain(text)

    check()


def test_scripts_without_spaces(tokenizer):
    text = "病人接受了血管造影检查"
    assert 50368 not in add_words(tokenizer, ["血管造影"]).encode_plain(text)
    assert 50368 in add_words(tokenizer, ["血管造影"], whole_words=False).encode_plain(text)


def test_words_are_added_again_and_again(model, tokenizer):
    first = resize(model, tokenizer, ["vasospasm", "angioplasty"])
    second, both = resize(*first, ["coronary vasospasm"])
    assert both.encode_plain("coronary vasospasm, vasospasm") == [50370, 13, 50368]
    assert second.config.vocab_size == 50432  # spare rows are used first
    np.testing.assert_array_equal(table(second)[:50370], table(first[0])[:50370])
    np.testing.assert_array_equal(table(second)[50371:], table(first[0])[50371:])
    pieces = first[1].encode_plain(" coronary vasospasm")
    assert pieces[-1] == 50368
    np.testing.assert_allclose(table(second)[50370], table(first[0])[pieces].mean(0), atol=1e-6)


def test_where_rows_start(model, tokenizer):
    ordinary = np.setdiff1d(np.arange(50368), sorted(tokenizer.special_ids))
    by_mean, _ = resize(model, tokenizer, ["angioplasty"], start="mean")
    np.testing.assert_allclose(table(by_mean)[50368], table(model)[ordinary].mean(0), atol=1e-6)
    given_text = {"angioplasty": " widening of a vessel", "IL-6R": " receptor"}
    by_text, _ = resize(model, tokenizer, given_text)
    for at, text in enumerate(given_text.values(), 50368):
        pieces = tokenizer.encode_plain(text)
        np.testing.assert_allclose(table(by_text)[at], table(model)[pieces].mean(0), atol=1e-6)


def test_sizes(little):
    used = little.vocab_size
    model = make_model(vocab_size=used + 7, pad_token_id=little.pad_id, decoder_bias=True)
    same, tokenizer = resize(model, little)
    assert (same.config.vocab_size, tokenizer) == (used + 7, little)
    filled, _ = resize(model, little, ["zebra", "yak"])
    assert filled.config.vocab_size == used + 7  # free rows are used before new ones are made
    np.testing.assert_array_equal(table(filled)[used + 2 :], table(model)[used + 2 :])
    for size, multiple in ((used, 1), (used + 1, 1), (1000, 8)):
        resized, _ = resize(model, little, size=size, multiple=multiple)
        kept = min(size, used + 7)
        for name in (EMBEDDING, "decoder.bias"):
            assert len(table(resized, name)) == size
            np.testing.assert_array_equal(table(resized, name)[:kept], table(model, name)[:kept])
    assert resize(model, little, size=1000)[0].config.vocab_size == 1024
    assert resize(model, little, size=used)[0].config.vocab_size % 64 == 0
    for size in (used + 1, 0, -1, 2.5, True, 2**23):
        with pytest.raises(InputError):
            resize(model, little, ["zebra", "yak"], size=size, multiple=1)
    with pytest.raises(InputError, match=f"{used + 1} rows are too few for {used + 2} ids"):
        resize(model, little, ["zebra", "yak"], size=used + 1)
    with pytest.raises(InputError, match="multiple: is 0; expected a whole number above 0"):
        resize(model, little, multiple=0)


def test_without_a_decoder_bias_and_for_a_classifier(little):
    for cls in (ModernBertForMaskedLM, mlmjax.ModernBertForSequenceClassification):
        model = make_model(cls, vocab_size=384, pad_token_id=little.pad_id, decoder_bias=False)
        bigger, tokenizer = resize(model, little, [f"zq{n}" for n in range(70)])
        assert isinstance(bigger, cls)
        assert parameters(bigger).keys() == parameters(model).keys()
        np.testing.assert_array_equal(
            table(bigger)[: little.vocab_size], table(model)[: little.vocab_size]
        )
        ids = np.array([tokenizer.encode_plain("zq0 zq69")])
        assert np.isfinite(run_jitted(bigger, ids)).all()


SPECIAL = "holds the text of the special token "
NO_WORDS = {
    "new word 'the': is one token already": [["the"]],
    "is one token already": [["|||IP_ADDRESS|||"]],
    "is blank": [[""], [" \n"]],
    "outer white space; write 'angioplasty'": [[" angioplasty"]],
    SPECIAL + r"\[MASK\]": [["a[MASK]b"], ["[MAS\u212a]"]],  # the second one by NFC
    SPECIAL + r"<\|endoftext\|>": [["<|endoftext|>"]],
    SPECIAL + r"\[unused0\]": [["[unused0]"]],
    SPECIAL + r"\[unused4711\]": [["x[unused4711]"]],
    "is repeated": [["angio", "angio"], ["naïvetoid", "nai\u0308vetoid"]],
    "control characters": [[f"angio{x}plasty"] for x in ("\x00", "\n", "\u202e", "\u00a0", "  ")],
    "half a character": [["angio\ud800"]],
    "is int": [[7], {"angio": 3}],
    "is NoneType": [[None]],
    "found one str; expected a list of words": ["angio"],
    "knows no part of the text": [{"angio": ""}],
}


@pytest.mark.parametrize("message", NO_WORDS)
def test_what_is_no_new_word(model, tokenizer, message):
    for words in NO_WORDS[message]:
        with pytest.raises(InputError, match=message) as caught:
            resize(model, tokenizer, words)
        assert "\n" not in caught.value.message


def test_every_bad_word_is_named(model, tokenizer):
    with pytest.raises(InputError) as caught:
        resize(model, tokenizer, ["angioplasty", "the", "", "[SEP]"])
    assert len([caught.value.message, *caught.value.details]) == 3
    with pytest.raises(InputError, match="start: is 'zero'"):
        resize(model, tokenizer, ["angioplasty"], start="zero")


def test_a_tokenizer_that_is_not_the_models(tokenizer, little):
    model = make_model(vocab_size=384, pad_token_id=little.pad_id)
    with pytest.raises(InputError, match="50368 ids, the model 384 rows"):
        resize(model, tokenizer, ["angioplasty"])


def test_a_new_word_answers(larger):
    """As a label, a trained answer and an option's text."""
    model, tokenizer = larger
    verbalizer = Verbalizer.words(["angioplasty", "IL-6R"])
    assert verbalizer.ids(tokenizer) == [(50368,), (50369,)]
    scorer = mlmjax.Scorer(model, tokenizer, mlmjax.Template("{text} It was"), verbalizer)
    log_probs = scorer.log_probs([{"text": "A vessel was widened."}])
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1, rtol=1e-5)
    with pytest.raises(InputError, match="each form must be one token"):
        verbalizer.ids(Tokenizer.from_pretrained())


def test_round_trips(larger, tmp_path):
    model, tokenizer = larger
    save_pretrained(model, tokenizer, tmp_path / "hf", dtype="source")
    save_model(tmp_path / "orbax", model, tokenizer)
    for again, words in (load_pretrained(tmp_path / "hf"), load_model(tmp_path / "orbax")):
        assert again.config.vocab_size == 50432
        assert words.sha256 == tokenizer.sha256
        assert words.encode_plain(TEXT) == tokenizer.encode_plain(TEXT)
        for name, value in parameters(model).items():
            np.testing.assert_array_equal(parameters(again)[name], value)


def test_dtypes_of_the_source_are_kept(little, tmp_path):
    ids = {f"{role}_token_id": getattr(little, f"{role}_id") for role in ("pad", "cls", "sep")}
    model = make_model(vocab_size=little.vocab_size, **ids)
    save_pretrained(model, little, tmp_path / "in", dtype="bfloat16")
    resized = resize(*load_pretrained(tmp_path / "in"), ["angioplasty"])
    save_pretrained(*resized, tmp_path / "out", dtype="source")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    old, new = (load_pretrained(tmp_path / name)[0] for name in ("in", "out"))
    np.testing.assert_array_equal(table(new)[: little.vocab_size], table(old))


def test_transformers_reads_the_export(larger, tmp_path, caplog):
    model, tokenizer = larger
    save_pretrained(model, tokenizer, tmp_path)
    with caplog.at_level(logging.WARNING):
        theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert not any(info.values())
    assert len(their_tokenizer) == tokenizer.vocab_size
    texts = (TEXT, "naïvetoid", "no new word", "x angioplasty-like 血管造影")
    rows = [[tokenizer.cls_id, *tokenizer.encode_plain(t), tokenizer.sep_id] for t in texts]
    assert [their_tokenizer(text)["input_ids"] for text in texts] == rows
    ids, mask = np.zeros((2, len(rows), max(map(len, rows))), int)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    found = np.asarray(run_jitted(model, ids, mask))
    np.testing.assert_allclose(found[mask == 1], expected.numpy()[mask == 1], atol=1e-4)
    their_tokenizer.save_pretrained(tmp_path / "again")
    again = Tokenizer.from_pretrained(tmp_path / "again")
    assert again.encode_plain(TEXT) == tokenizer.encode_plain(TEXT)
