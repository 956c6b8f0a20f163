"""The good inputs that every case starts from: tiny, and the same on every machine."""

import contextlib
import io
import shutil
from pathlib import Path
from string import ascii_uppercase

from flax import nnx
from training import TASKS, WORDS, write_records, write_tokenizer

from mlmjax import ModelConfig, ModernBertForMaskedLM, Tokenizer, save_pretrained
from mlmjax.cli.main import run
from mlmjax.weights.model_checkpoint import save_model

RUN = """out = "out"
steps = 2
tokenizer = "tokenizer"

[model]
hidden_size = 16
intermediate_size = 12
num_hidden_layers = 1
num_attention_heads = 2

[data]
rows = "rows"
seq_length = 32
batch_size = 4

[[data.sources]]
path = "records.jsonl"
prompt = "{prompt}"
answer = "answer"
task = "task"

[schedule]
warmup = 0
decay = 0

[checkpoint]
every = 1

[log]
every = 1

[mesh]
data = 1
"""

TASK = {
    "name": '"colors"',
    "data": '"data.jsonl"',
    "prompt": '"Q: {text}\\n{options}ANSWER: [unused0] [MASK]"',
    "labels": '["red", "blue"]',
    "answer": '"label"',
}
ROW = {
    "text": "the sun",
    "label": "red",
    "number": 5,
    "nothing": None,
    "two": ["a", "b"],
    "one": ["a"],
    "index": 1,
}


def write_good(folder: Path) -> None:
    """Write `tokenizer/`, `model/` (Hugging Face), `checkpoint/` (Orbax), and a finished run."""
    write_tokenizer(folder / "tokenizer", [*WORDS, *ascii_uppercase])
    write_records(folder / "records.jsonl", count=60)
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    config = ModelConfig(
        vocab_size=384,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.cls_id,
        eos_token_id=tokenizer.sep_id,
        cls_token_id=tokenizer.cls_id,
        sep_token_id=tokenizer.sep_id,
    )
    model = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
    save_pretrained(model, tokenizer, folder / "model")
    save_model(folder / "checkpoint", model, tokenizer)
    (folder / "texts.txt").write_text("the sun\nthe moon\n")
    (folder / "labels.txt").write_text("\n".join(TASKS["color"]) + "\n")
    (folder / "run.toml").write_text(RUN)
    with contextlib.chdir(folder), quiet() as said:
        code = run(["train", "run.toml"])
    assert code == 0, said.getvalue()
    for events in (folder / "out").glob("events.*"):
        events.unlink()
    (folder / "out" / ".lock").unlink()
    shutil.copytree(folder / "out", folder / "unfinished")
    shutil.rmtree(folder / "unfinished" / "checkpoints" / "2")
    for name in ("export", "validation.json"):
        path = folder / "unfinished" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def quiet():
    """Collect what the block prints in the yielded buffer."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said
