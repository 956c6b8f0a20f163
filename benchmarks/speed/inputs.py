"""Write what both sides read: weights, questions and training rows, equal on every run."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from measure import INSTRUCT_LENGTH, LONG, write

from mlmjax import ModelConfig, ModernBertForMaskedLM, Tokenizer, save_pretrained
from mlmjax.config.task import load_task
from mlmjax.data.packing import pack
from mlmjax.text.prompts import Template, option_lines

TRAIN_ROWS, TRAIN_LENGTH, MASKED = 8, 128, 0.3
DRAWN = 0.01


def write_inputs(data: Path, folder: Path, *, questions: int, few: int, seed: int = 0) -> None:
    """Write a model of base size with random weights, all texts and token ids to `folder`.

    The smaller set has the first `few` questions.
    """
    rng = np.random.default_rng(seed)
    config = ModelConfig.from_hf(json.loads((data / "tokenizer" / "config_base.json").read_text()))
    tokenizer = Tokenizer.from_pretrained()
    save_pretrained(ModernBertForMaskedLM(config, rngs=nnx.Rngs(seed)), tokenizer, folder / "base")
    rows = pq.read_table(data / "eval" / "mmlu_test.parquet").to_pylist()
    chosen = [rows[i] for i in rng.choice(len(rows), questions, replace=False)]
    template = load_task("mmlu").prompt
    asked = [
        {"question": row["question"].strip(), "options": list(row["choices"])} for row in chosen
    ]
    prompts = [
        template.replace("{options}", option_lines(row["options"])).replace(
            "{question}", row["question"]
        )
        for row in asked
    ]
    for name, count in (("mmlu", questions), ("few", few)):
        kept = {"rows": asked[:count], "prompts": prompts[:count], "template": template}
        write(folder, name, kept)
    words = rng.integers(1000, 50000, LONG - 3).tolist()
    write(folder, "long", [tokenizer.cls_id, *words, tokenizer.mask_id, tokenizer.sep_id])
    write(folder, "train", masked_tokens(rng, tokenizer.mask_id))
    write(folder, "instruct", instruct_rows(data, tokenizer, rng))


def masked_tokens(rng: np.random.Generator, mask_id: int) -> dict[str, Any]:
    """Return rows of random tokens, 30 % of them masked."""
    ids = rng.integers(1000, 50000, (TRAIN_ROWS, TRAIN_LENGTH))
    masked = rng.random(ids.shape) < MASKED
    labels = np.where(masked, ids, -100)
    return {"ids": np.where(masked, mask_id, ids).tolist(), "labels": labels.tolist()}


def instruct_rows(data: Path, tokenizer: Tokenizer, rng: np.random.Generator) -> dict[str, Any]:
    """Return real instruction rows of at most 512 tokens, and how they are packed."""
    template = Template("{definition}\n{input}\nAnswer: [unused0] [MASK]")
    examples = []
    path = data / "instruct" / "single_token_instruct.jsonl.zst"
    with io.TextIOWrapper(pa.input_stream(str(path), compression="zstd"), "utf-8") as lines:
        records = [json.loads(line) for line in lines if rng.random() < DRAWN]
    for i in rng.permutation(len(records)):
        answer = tokenizer.encode_plain(f" {records[i]['target'].strip()}")
        if len(answer) != 1:
            continue
        prompt = template.render(tokenizer, records[i], 1 << 20)
        if len(prompt.ids) <= INSTRUCT_LENGTH:
            examples.append({"ids": prompt.ids, "slot": prompt.slot, "answer": answer[0]})
        if len(examples) == 200:
            break
    packed = pack([example["ids"] for example in examples], INSTRUCT_LENGTH)
    return {"examples": examples, "packed": [packed[i] for i in rng.permutation(len(packed))]}
