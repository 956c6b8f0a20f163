"""Probe the layers of a model: what can a linear classifier read from a word's hidden state?

    python examples/probe.py --data notes.jsonl --model answerdotai/ModernBERT-base

The task is to tell function words (the, of, and) from content words. The control task gives every
word a random label instead. A probe can learn it only by heart, so its accuracy shows how much of
the task's accuracy may be memory of words. The difference is the selectivity of the probe (Hewitt
and Liang 2019, arXiv 1909.03368).
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
from common import HERE, load, read_text, run
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlmjax import InputError, hidden_states

FUNCTION_WORDS = """
a an the this that these those of in on at to from for with by as and or but nor so if than i you he
she it we they me him her us them my your his its our their who which what is are was were be been
am do does did have has had will would can could not no
"""


def read_texts(path: Path) -> list[str]:
    """Read the column text of a JSON lines file."""
    try:
        return [json.loads(line)["text"] for line in read_text(path).splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected JSON lines, each with a text ({error})") from error


def accuracy(vectors: np.ndarray, labels: np.ndarray, is_train: np.ndarray) -> float:
    """Return the accuracy of a linear probe on words that it was not trained on."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    probe.fit(vectors[is_train], labels[is_train])
    return float(probe.score(vectors[~is_train], labels[~is_train]))


def main() -> None:
    """Print the accuracy of task and control for each layer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE / "notes.jsonl", help="JSON lines")
    parser.add_argument("--model", help="a folder or a Hub id (default: the packaged model)")
    arguments = parser.parse_args()
    texts = read_texts(arguments.data)
    model, tokenizer = load(arguments.model)

    # With many texts, `save_hidden_states` writes them to a file, part by part.
    layers = range(model.config.num_hidden_layers + 1)
    states = hidden_states(model, tokenizer, texts, layers=layers, at="tokens")
    words = [tokenizer.decode([token]).strip().lower() for token in states.tokens.tolist()]
    is_word = np.array([word.isalpha() for word in words])
    words = [word for word in words if word.isalpha()]
    task = np.array([word in FUNCTION_WORDS.split() for word in words])
    control = np.array([zlib.crc32(word.encode()) % 2 for word in words])
    # Whole texts are held out, each third one.
    is_train = states.texts[is_word] % 3 > 0
    print(f"{is_train.sum()} words to train on, {(~is_train).sum()} to test on")
    majority = max(task[~is_train].mean(), 1 - task[~is_train].mean())
    print(f"the more frequent kind: {majority:.3f}")
    for layer in layers:
        vectors = states.vectors[is_word, layer]
        own, other = (accuracy(vectors, labels, is_train) for labels in (task, control))
        print(f"layer {layer}: task {own:.3f}, control {other:.3f}, selectivity {own - other:.3f}")


if __name__ == "__main__":
    run(main)
