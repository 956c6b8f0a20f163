"""Labelled texts that one word decides, and a tokenizer that knows their words."""

from string import ascii_uppercase, digits

import numpy as np
import tokenizers
from small_models import small_model
from tokenizers import models, pre_tokenizers, processors

from mlmjax.text.tokenizer import Tokenizer

SHORT = "{text}\n{options}[unused0] [MASK]"
FAST = {"epochs": 6, "learning_rate": 1e-2, "batch_size": 16}
WORDS = {"sports": ["goal", "match", "team"], "money": ["stock", "bank", "price"]}
OTHERS = ["the", "a", "new", "old", "rain", "cloud", "yes", "no", "text"]
SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
VOCABULARY = [
    *(*SPECIALS, "[unused0]", *ascii_uppercase, *digits, *"-:.{}", *OTHERS),
    *(*WORDS, *WORDS["sports"], *WORDS["money"]),
]


def examples(count, seed=0):
    """Return texts with one word that decides the label, and the labels."""
    rng = np.random.default_rng(seed)
    labels = [list(WORDS)[i % 2] for i in range(count)]
    texts = [
        " ".join(rng.permutation(["the", "a", "new", "old", rng.choice(WORDS[label])]))
        for label in labels
    ]
    return texts, labels


def word_level(words, unknown="[UNK]", split=pre_tokenizers.Whitespace):
    """Return a tokenizer.json of whole words, of which the first five are special.

    If [CLS] and [SEP] are among the words, they are put around a text.
    """
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = split()
    backend.add_special_tokens(words[:5])
    backend.add_tokens(["[unused0]"])
    if {"[CLS]", "[SEP]"} <= vocabulary.keys():
        backend.post_processor = cls_and_sep(backend)
    return backend.to_str()


def cls_and_sep(backend):
    """Return the post-processor that puts [CLS] and [SEP] around a text."""
    special = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    return processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)


def word_tokenizer(folder, more=()):
    """Write a tokenizer of a few words, with which models learn and are saved fast; load it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(word_level([*VOCABULARY, *more]))
    return Tokenizer.from_pretrained(folder)


def word_model(tokenizer, **changes):
    """Return a model of one layer that learns these words in a few epochs."""
    special = {"pad": tokenizer.pad_id, "cls": tokenizer.cls_id, "sep": tokenizer.sep_id}
    special |= {"bos": tokenizer.cls_id, "eos": tokenizer.sep_id}
    ids = {f"{name}_token_id": token for name, token in special.items()}
    # With this much noise the words differ enough to be learned fast.
    return small_model(
        **{"scale": 0.1, "vocab_size": 128, "num_hidden_layers": 1, **ids, **changes}
    )
