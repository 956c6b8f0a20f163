"""Small tokenizers of every kind that published relatives of ModernBERT have."""

import json

import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = """\
the cat sat on the mat and the dog ran to the red house under a blue sun
good bad yes no true false sports world money A B C D E 1 2 3 4 - : . , TEXT CHOICES ANSWER
Answer the text and select the right label from the list Guten Tag, wie geht es dir? Schön.
merhaba dünya çok güzel 今日の天気は 晴れ です 한국어 문장 입니다
"""
WORDS = TEXT.split()
CORPUS = [TEXT, *(" ".join(WORDS[at : at + 7]) for at in range(0, len(WORDS), 3))] * 3
BERT = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
GEMMA = {"pad": "<pad>", "unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "mask": "<mask>"}
GEMMA |= {"cls": "<bos>", "sep": "<eos>"}
LLAMA = {"unk": "<unk>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "mask": "<mask>"}
JAPANESE = {role: f"<{role.upper()}|LLM-jp>" for role in ("cls", "sep", "pad", "mask")}
JAPANESE |= {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}


def byte_level(roles=BERT, spare=("[unused0]", "[unused1]"), prefix=False):
    """Return a byte-level BPE, as in ModernBERT, Ettin, granite and Llama 3."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    return trained(backend, trainer, roles, spare)


def word_piece(roles=BERT, spare=("[unused0]",), lowercase=True):
    """Return a WordPiece, as in models that keep the vocabulary of BERT."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token=roles["unk"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=420, special_tokens=[*dict.fromkeys(roles.values()), *spare], show_progress=False
    )
    return trained(backend, trainer, roles, spare)


def unigram(roles=LLAMA, spare=(), scheme="always"):
    """Return a Unigram of SentencePiece, whose special tokens are pieces with scores."""
    names = list(dict.fromkeys(roles.values()))
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=names, unk_token=roles["unk"], show_progress=False
    )
    return trained(backend, trainer, roles, spare)


def byte_fallback(roles=GEMMA, spare=("<unused0>", "<unused1>"), metaspace=None):
    """Return a BPE of SentencePiece that falls back to bytes, as in Gemma and mmBERT.

    With `metaspace` it splits at spaces, as in sbintuitions' models; Gemma replaces them.
    """
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {name: i for i, name in enumerate([*dict.fromkeys(roles.values()), *pieces])}
    merges = []
    for word in dict.fromkeys(WORDS):
        piece = ""
        for character in f"▁{word}":
            vocabulary.setdefault(character, len(vocabulary))
            if piece and piece + character not in vocabulary:
                merges.append((piece, character))
                vocabulary[piece + character] = len(vocabulary)
            piece += character
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=roles["unk"], fuse_unk=True, byte_fallback=True)
    )
    if metaspace is None:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return trained(backend, None, roles, spare)


def trained(backend, trainer, roles, spare):
    """Train a tokenizer, and add its special and spare tokens."""
    if trainer is not None:
        backend.train_from_iterator(CORPUS, trainer)
    special = [AddedToken(name, normalized=False) for name in dict.fromkeys(roles.values())]
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(name, normalized=False) for name in spare])
    return backend


KINDS = {
    "byte level": byte_level,
    "byte level with a prefix space": lambda **names: byte_level(prefix=True, **names),
    "WordPiece": word_piece,
    "cased WordPiece": lambda **names: word_piece(lowercase=False, **names),
    "Unigram": unigram,
    "Unigram, first": lambda **names: unigram(scheme="first", **names),
    "byte fallback": byte_fallback,
    "byte fallback, never": lambda **names: byte_fallback(metaspace="never", **names),
    "byte fallback, first": lambda **names: byte_fallback(metaspace="first", **names),
}


def template(backend, single):
    """Return a post-processor of tokens around `$A`, whose names are apart by spaces."""
    names = [name for name in dict.fromkeys(single.split()) if not name.startswith("$")]
    special = [(name, backend.token_to_id(name)) for name in names]
    return processors.TemplateProcessing(single=single, special_tokens=special)


def write(folder, backend, roles, flags=None, **settings):
    """Write a tokenizer with the names of its roles, and with other flags of some tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    table = json.loads(backend.to_str())
    for entry in table["added_tokens"]:
        entry |= (flags or {}).get(entry["content"], {})
    (folder / "tokenizer.json").write_text(json.dumps(table, ensure_ascii=False))
    names = {f"{role}_token": name for role, name in roles.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | settings))
    return folder
