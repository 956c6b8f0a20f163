"""A run small enough for tests, with its own tokenizer and data: seconds on one core."""

import json
import random

import jax
import numpy as np
import tokenizers
from labelled_texts import cls_and_sep
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlmjax.config.run import parse_config

TASKS = {"color": ["red", "blue", "green"], "animal": ["cat", "dog"]}
OTHERS = ["house", "tree", "sun", "moon", "fish", "bird", "stone"]
WORDS = [*TASKS["color"], *TASKS["animal"], *OTHERS]
COLUMNS = {"prompt": "{prompt}", "answer": "answer", "task": "task"}
SIZES = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
SPECIALS = ["[CLS]", "[SEP]", "[PAD]", "[MASK]"]


def write_tokenizer(folder, words=WORDS):
    """Write a byte-level BPE of a few hundred tokens in which every word is one token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" " + " ".join(words)] * 9, trainer)
    backend.add_special_tokens(SPECIALS)
    backend.add_tokens(["[unused0]"])
    backend.post_processor = cls_and_sep(backend)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))


def write_records(path, count=300):
    """Write prompts of two tasks that name their answers."""
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            task = rng.choice(sorted(TASKS))
            answer = rng.choice(TASKS[task])
            words = " ".join(rng.choices(OTHERS, k=rng.randint(1, 6)))
            prompt = f"the {task}: {answer} {words}"
            file.write(json.dumps({"prompt": prompt, "answer": answer, "task": task}) + "\n")


def make_table(folder, **changes):
    """Return a run file with inputs in `folder` as a dict; `__` in `changes` nests keys."""
    table = {
        "out": str(folder / "out"),
        "steps": 8,
        "tokenizer": str(folder / "tokenizer"),
        "model": {**SIZES, "num_hidden_layers": 1, "num_attention_heads": 2},
        "data": {
            "rows": str(folder / "rows"),
            "seq_length": 64,
            "batch_size": 8,
            "validation_rows": 10,
            "sources": [{"path": str(folder / "records.jsonl"), **COLUMNS}],
        },
        "objective": {"dummy_mlm_share": 0.2},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup": 2, "decay": 2},
        "checkpoint": {"every": 4, "keep_last": 2, "keep_best": 1},
        "evaluation": {"every": 4},
        "log": {"every": 1},
        "mesh": {"data": 1},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = table
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return table


def make_config(folder, **changes):
    """Decode `make_table`, and write its inputs on first use."""
    if not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer")
        write_records(folder / "records.jsonl")
    return parse_config(make_table(folder, **changes))


def lines_of(out):
    """Return the lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def of_clock(key):
        return key.endswith("_per_second") or key.startswith(("seconds_", "productive_"))

    return [{k: v for k, v in line.items() if not of_clock(k)} for line in lines]


def assert_same(state, expected):
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        assert np.array_equal(np.asarray(a), np.asarray(b))
