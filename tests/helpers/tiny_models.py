"""Model folders small enough for every test to write, by transformers, with a tokenizer."""

import json
from pathlib import Path

import pytest
from labelled_texts import word_level
from safetensors import safe_open

from mlmjax.storage import CONFIG

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # these models are too small for more
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[unused0]", *"ABCDEFGHIJ"]
SIZES = {
    "vocab_size": 18,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "bos_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
}
BIASES = ("norm_bias", "attention_bias", "mlp_bias", "decoder_bias", "classifier_bias")
CLASSES = {
    "ModernBertForMaskedLM": transformers.AutoModelForMaskedLM,
    "ModernBertForSequenceClassification": transformers.AutoModelForSequenceClassification,
}


def write_tokenizer(folder):
    (folder / "tokenizer.json").write_text(word_level(WORDS))


def torch_model(name="ModernBertForMaskedLM", dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    model = getattr(transformers, name)(transformers.ModernBertConfig(**{**SIZES, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def write_model(folder, *arguments, shard="5GB", **options):
    model = torch_model(*arguments, **options)
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return model


def tensors_of(folder):
    """Return every tensor of a folder, of any file, as (dtype, shape, bytes)."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                value = opened.get_tensor(name)
                assert name not in found
                found[name] = (str(value.dtype), value.shape, value.tobytes())
    return found


def change_config(folder, **values):
    path = folder / CONFIG
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (old | values).items() if v is not None}))
