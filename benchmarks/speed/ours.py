"""Measure mlmjax as its users call it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measure import GEMM, INSTRUCT_LENGTH, LETTERS, LONG, Figures, gemm_gflops, main, read, timed

from mlmjax import ModelConfig, ModernBertForMaskedLM, Tokenizer, load_pretrained
from mlmjax.config.run import OptimizerConfig, ScheduleConfig
from mlmjax.data.batch import ATP, MLM, UNUSED, Batch
from mlmjax.model.attention import attend
from mlmjax.scoring.scorers import Scorer
from mlmjax.text.prompts import Template
from mlmjax.text.verbalizer import Verbalizer
from mlmjax.training.optimizer import make_optimizer
from mlmjax.training.step import create_train_state, make_train_step

RATE = 1e-4
STREAM = 10_000


def questions(
    folder: Path, dtype: str = "float32", normalize: Any = "labels", asked: str = "mmlu"
) -> Figures:
    """Score all questions of a set with a `Scorer`."""
    content = read(folder, asked)
    model, tokenizer = load_pretrained(folder / "base", dtype=dtype)
    template = Template(content["template"])
    scorer = Scorer(model, tokenizer, template, Verbalizer.letters(LETTERS), normalize=normalize)
    figures, answers = timed(partial(scorer.log_probs, content["rows"]))
    return {
        **figures,
        "tokens": scorer.engine.real_tokens // 2,
        "padding": scorer.padding_share,
        "answers": np.exp(answers).tolist(),
    }


def local_attention(folder: Path, length: int = LONG) -> Figures:
    """Compute attention within a window of 64 to each side for one row."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, (1, 12, length, 64)) for key in keys]
    jitted = jax.jit(partial(attend, window=64))
    segments = jnp.ones((1, length), jnp.int32)
    return timed(lambda: jitted(*inputs, segments).block_until_ready(), repeats=5)[0]


def encode_long(folder: Path) -> Figures:
    """Run the encoder on one row of 8192."""
    model, _ = load_pretrained(folder / "base")
    graphdef, state = nnx.split(model)
    encode = jax.jit(lambda state, ids: nnx.merge(graphdef, state).encode(ids))
    ids = np.array([read(folder, "long")], np.int32)
    return timed(lambda: encode(state, ids).block_until_ready())[0]


def score_long(folder: Path) -> Figures:
    """Score the mask of one text of 8192."""
    model, tokenizer = load_pretrained(folder / "base")
    verbalizer = Verbalizer.letters(LETTERS)
    scorer = Scorer(model, tokenizer, Template("{text}"), verbalizer, batch_size=1)
    ids = read(folder, "long")
    slots, counts = np.array([len(ids) - 2], np.int32), np.array([4], np.int32)
    return timed(lambda: scorer.engine.run([ids], slots, counts))[0]


def updater(folder: Path) -> Callable[[Batch], None]:
    """Return a function that makes one AdamW update, as the training loop does."""
    model, _ = load_pretrained(folder / "base")
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=RATE, clip=0.0), ScheduleConfig(warmup=0, decay=0), 1000
    )
    graphdef, state = create_train_state(model, optimizer)
    step = make_train_step(graphdef, optimizer)

    def update(batch: Batch) -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return update


def training(folder: Path) -> Figures:
    """Make an update on 8 rows of 128 tokens."""
    content = read(folder, "train")
    ids, labels = (np.array(content[name], np.int32) for name in ("ids", "labels"))
    targets = np.full((3, *ids.shape), UNUSED, np.int32)
    for row, of_row in enumerate(labels):
        (places,) = np.nonzero(of_row != UNUSED)
        targets[:, row, : len(places)] = places, of_row[places], np.full(len(places), MLM)
    rows = np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))
    batch = Batch(ids, np.ones_like(ids), rows, *targets)
    return timed(partial(updater(folder), batch), repeats=5)[0]


def instruct(folder: Path) -> Figures:
    """Train on instruction rows packed into rows of 512, 8 at a time; time one instruction row."""
    content = read(folder, "instruct")
    packed = content["packed"]
    assert len(packed) >= 24
    batches = [
        lay_out([[content["examples"][i] for i in row] for row in packed[start : start + 8]])
        for start in (0, 8, 16)
    ]
    update = updater(folder)
    figures, _ = timed(
        lambda: [update(batch) for batch in batches[1:]], warm_up=lambda: update(batches[0])
    )
    rows = sum(len(row) for row in packed[8:24])
    real = sum(int((batch.segment_ids > 0).sum()) for batch in batches[1:])
    return {
        "seconds": figures["seconds"] / rows,
        "padding": 1 - real / (16 * INSTRUCT_LENGTH),
        "rows": rows,
    }


def lay_out(rows: list[list[dict[str, Any]]]) -> Batch:
    """Lay out packed examples, each with one target."""
    shape = len(rows), INSTRUCT_LENGTH
    ids, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    width = max(map(len, rows))
    targets = np.full((3, len(rows), width), UNUSED, np.int32)
    for row, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples):
            stop = start + len(example["ids"])
            ids[row, start:stop] = example["ids"]
            segments[row, start:stop] = number + 1
            positions[row, start:stop] = np.arange(stop - start)
            targets[:, row, number] = start + example["slot"], example["answer"], ATP
            start = stop
    return Batch(ids, segments, positions, *targets)


def stream(folder: Path) -> Figures:
    """Count compilations while 10,000 texts of random lengths come in groups of random size.

    The model is tiny, because its size does not change how often programs are compiled.
    """
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=1024,
    )  # fmt: skip
    model, tokenizer = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0)), Tokenizer.from_pretrained()
    scorer = Scorer(model, tokenizer, Template("{text}"), Verbalizer.letters(LETTERS))
    rng = np.random.default_rng(0)
    for bucket in scorer.buckets:
        scorer.log_probs([{"text": "a " * (bucket - 10)}] * 2)
    compiled: list[str] = []

    def heard(event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    texts = [{"text": "a " * int(n)} for n in np.exp(rng.uniform(0, np.log(1000), STREAM))]
    done = 0
    while done < len(texts):
        count = int(rng.integers(1, 200))
        scorer.log_probs(texts[done : done + count])
        done += count
    return {"compilations": len(compiled), "programs": scorer.compilations, "texts": STREAM}


def gemm() -> float:
    """Return XLA's GFLOP/s of a plain product."""
    rows, inputs, outputs = GEMM
    x, w = jnp.ones((rows, inputs)), jnp.ones((inputs, outputs))
    multiply = jax.jit(jnp.matmul)
    return gemm_gflops(lambda: multiply(x, w).block_until_ready())


FUNCTIONS = {
    "questions": questions,
    "questions_vocabulary": partial(questions, normalize="vocabulary"),
    "questions_bfloat16": partial(questions, dtype="bfloat16"),
    "few_bfloat16": partial(questions, dtype="bfloat16", asked="few"),
    "local_attention": local_attention,
    "local_attention_512": partial(local_attention, length=512),
    "encode_long": encode_long,
    "score_long": score_long,
    "training": training,
    "instruct": instruct,
    "stream": stream,
}


if __name__ == "__main__":
    main(FUNCTIONS, gemm)
