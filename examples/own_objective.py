"""Your own training loop with your own objective: choose among the answers only.

    python examples/own_objective.py --data reviews.csv --model answerdotai/ModernBERT-base

Answer token prediction compares the answer with all 50,368 tokens. Here the loss is the
cross-entropy over the label tokens only, with label smoothing.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from common import HERE, load, read_labelled, run
from flax import nnx

from mlmjax import (
    Batch,
    Scorer,
    Template,
    Tokenizer,
    Verbalizer,
    create_train_state,
    make_train_step,
    save_pretrained,
)

LENGTH = 64
TEMPLATE = Template("REVIEW: {text}\nCHOICES:\n{options}ANSWER:", shorten={"text": "tail"})


def make_loss(answers: list[int], smoothing: float):
    """Return the loss that `make_train_step` takes: `(model, batch) -> (loss sum, metrics)`."""
    answer_ids = np.array(answers)

    def loss(model, batch):
        hidden = model.encode(batch.input_ids, batch.segment_ids, batch.position_ids)
        at_slot = jnp.take_along_axis(hidden, batch.target_positions[..., None], axis=1)
        logits = model.mlm_logits(at_slot, vocabulary_ids=answer_ids)  # [rows, 1, labels]
        is_gold = batch.target_ids[..., None] == jnp.asarray(answer_ids)[None, None, :]
        wanted = is_gold * (1 - smoothing) + smoothing / len(answers)
        losses = optax.softmax_cross_entropy(logits, wanted)
        right = jnp.take_along_axis(is_gold, logits.argmax(-1)[..., None], axis=-1)
        # Return sums: the step divides once, over all micro-batches and devices.
        metrics = {
            "loss_sum": losses.sum(),
            "loss_count": jnp.float32(losses.size),
            "right": right.sum(dtype=jnp.float32),
        }
        return metrics["loss_sum"], metrics

    return loss


def make_batch(rows: list[dict], labels: list[str], answers: list[int], tokenizer: Tokenizer):
    """Return rows as a batch: one padded prompt each, with its slot as the only target."""
    input_ids = np.full((len(rows), LENGTH), tokenizer.pad_id, np.int32)
    segment_ids = np.zeros_like(input_ids)  # 0 is padding
    position_ids = np.tile(np.arange(LENGTH, dtype=np.int32), (len(rows), 1))
    slots = np.zeros((len(rows), 1), np.int32)
    targets = np.zeros((len(rows), 1), np.int32)
    for at, row in enumerate(rows):
        ids, slot = TEMPLATE.encode(tokenizer, {**row, "options": labels}, LENGTH)
        input_ids[at, : len(ids)] = ids
        segment_ids[at, : len(ids)] = 1
        slots[at], targets[at] = slot, answers[labels.index(row["label"])]
    return Batch(input_ids, segment_ids, position_ids, slots, targets, np.zeros_like(targets))


def main() -> None:
    """Train, print the loss every 10 steps, and export."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE / "reviews.csv", help="text, label")
    parser.add_argument("--model", help="a folder or a Hub id (default: the packaged model)")
    parser.add_argument("--out", type=Path, default=Path("own-objective"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--smoothing", type=float, default=0.1)
    arguments = parser.parse_args()
    rows = read_labelled(arguments.data)
    labels = sorted({row["label"] for row in rows})

    model, tokenizer = load(arguments.model)
    verbalizer = Verbalizer.letters(labels)
    answers = [ids[0] for ids in verbalizer.ids(tokenizer)]
    optimizer = optax.adamw(arguments.learning_rate)
    graphdef, state = create_train_state(model, optimizer)
    step = make_train_step(graphdef, optimizer, loss=make_loss(answers, arguments.smoothing))
    for number in range(1, arguments.steps + 1):
        # The step number decides the batch, so a run can be repeated or resumed.
        drawn = np.random.default_rng([0, number]).integers(len(rows), size=arguments.batch_size)
        chosen = [rows[at] for at in drawn]
        state, metrics = step(state, make_batch(chosen, labels, answers, tokenizer))
        if number % 10 == 0 or number == arguments.steps:
            loss, right = (float(metrics[k] / metrics["loss_count"]) for k in ("loss_sum", "right"))
            print(f"step {number}: loss {loss:.4f}, right {right:.2f}")

    model = nnx.merge(graphdef, state.params)
    scorer = Scorer(model, tokenizer, TEMPLATE, verbalizer)
    log_probs = scorer.log_probs([{"text": row["text"], "options": labels} for row in rows])
    found = [labels[best] for best in log_probs.argmax(axis=1)]
    share = np.mean([label == row["label"] for label, row in zip(found, rows, strict=True)])
    save_pretrained(model, tokenizer, arguments.out)
    print(f"{arguments.out}: answers {share:.0%} of what it was trained on")


if __name__ == "__main__":
    run(main)
