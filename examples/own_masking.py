"""Your own masking and your own loss in a run file, with checkpoints and resuming.

    python examples/own_masking.py --text "corpus/*.jsonl" steps=2000 data.seq_length=1024

`own_masking.toml` names the two functions below. From this folder it is the same to run
`mlmjax train own_masking.toml --code own_masking`. Further arguments override keys of the run file.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import HERE, run

from mlmjax import load_config, run_training

LETTERS = 5
SMOOTHING = 0.1


def long_tokens(tokenizer):
    """Return a masker: tokens of several letters first, then the others, both in random order."""
    texts = [tokenizer.decode([number]).strip() for number in range(tokenizer.vocab_size)]
    is_long = np.array([len(text) >= LETTERS and text.isalpha() for text in texts])

    def masker(ids, maskable, count, rng):
        # The generator depends on seed, epoch and example, so use no other source of chance.
        shuffled = rng.permutation(maskable)
        long_first = np.argsort(~is_long[ids[shuffled]], kind="stable")
        return shuffled[long_first[:count]]

    return masker


def smoothed(tokenizer):
    """Return a loss: cross-entropy with a share of the right probability on all other tokens."""

    def loss(model, batch):
        is_target = batch.target_ids >= 0
        places = jnp.where(is_target, batch.target_positions, 0)
        right = jnp.where(is_target, batch.target_ids, 0)
        hidden = model.encode(batch.input_ids, batch.segment_ids, batch.position_ids)
        at_targets = jnp.take_along_axis(hidden, places[..., None], axis=1)
        log_probs = jax.nn.log_softmax(model.mlm_logits(at_targets))
        chosen = jnp.take_along_axis(log_probs, right[..., None], axis=-1)[..., 0]
        losses = -(1 - SMOOTHING) * chosen - SMOOTHING * log_probs.mean(axis=-1)
        # Return sums: the step divides once, over all micro-batches and devices.
        loss_sum = jnp.sum(jnp.where(is_target, losses, 0.0))
        count = jnp.sum(is_target, dtype=jnp.int32).astype(jnp.float32)
        return loss_sum, {"loss_sum": loss_sum, "loss_count": count}

    return loss


def main() -> None:
    """Train with both functions, and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default=HERE / "own_masking.toml", type=Path)
    parser.add_argument("--text", default=str(HERE / "notes.jsonl"), help="a file or a glob")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()

    text = f"data.sources.0.path={arguments.text}"
    config = load_config(arguments.config, [text, *arguments.overrides])
    run_training(config, code=["own_masking"])  # a run file alone never runs code
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if line["split"] == "train"]
    print(f"{config.out}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


if __name__ == "__main__":
    run(main)
