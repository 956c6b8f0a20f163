"""Start a network from embeddings in which similar words are close, before pretraining.

    python tools/make_small_start.py --model untrained --rows rows/small-mlm --out start

The tool counts the neighbours of every token in the training rows, which hold no text that the
network is tested on. It weights the counts by positive pointwise mutual information, and takes the
leading factors of that matrix as embeddings (Levy, Goldberg and Dagan, "Improving Distributional
Similarity with Lessons Learned from Word Embeddings", 2015). Ten million tokens are too few to
train millions of random embeddings, and counting takes minutes. Special tokens and tokens that are
not in the rows keep the model's embeddings. `training_manifest.json` of the result names the files.
The same input gives the same factors on one machine.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

from mlmjax import load_pretrained, save_pretrained
from mlmjax.data.contamination import training_manifest
from mlmjax.data.manifest import read_manifest
from mlmjax.data.rows import open_rows
from mlmjax.errors import InputError
from mlmjax.storage import TRAINING

WINDOW = 8
"""Tokens to each side that count as neighbours."""

SMOOTHING = 0.75
"""Power of the neighbours' frequencies; below 1, rare neighbours count for less."""


def main() -> None:
    """Read the model and the rows, replace the embeddings, write the model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    model, tokenizer = load_pretrained(chosen.model)
    sources = open_rows(chosen.rows, "train")
    if {source.tokenizer_sha256 for source in sources} != {tokenizer.sha256}:
        raise SystemExit(f"{chosen.rows}: was made with another tokenizer than {chosen.model}'s")
    blocks = ((tokens, lengths) for source in sources for tokens, lengths, *_ in source.blocks())
    counts = count_neighbours(blocks, model.config.vocab_size)
    ordinary = np.ones(model.config.vocab_size, np.float32)
    ordinary[list(tokenizer.special_ids)] = 0.0
    only = sparse.diags_array(ordinary, format="csr")
    weighted = weight_counts(only @ counts @ only)
    print(f"{counts.nnz:,} pairs of neighbours, {weighted.nnz:,} above chance", flush=True)
    table = model.model.embeddings.tok_embeddings.weight
    table[...] = jnp.asarray(make_embeddings(weighted, np.asarray(table[...])))
    save_pretrained(model, tokenizer, chosen.out)
    manifest = training_manifest(None, read_manifest(chosen.rows), None)
    (chosen.out / TRAINING).write_text(manifest.text(), encoding="utf-8")


def count_neighbours(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int, window: int = WINDOW
) -> sparse.csr_array:
    """Count how often two tokens are within a window of one example: `[vocab, vocab]`, symmetric.

    `blocks` are tokens `[tokens]` and the lengths of their examples `[examples]`.

    >>> counts = count_neighbours([(np.array([0, 1, 2, 2]), np.array([3, 1]))], 3, window=1)
    >>> counts.toarray().astype(int).tolist()
    [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    """
    shape = (vocab_size, vocab_size)
    total = sparse.csr_array(shape, dtype=np.float32)
    for tokens, lengths in join_blocks(blocks):
        example = np.repeat(np.arange(len(lengths)), lengths)
        left, right = [], []
        for distance in range(1, window + 1):
            together = example[:-distance] == example[distance:]
            left.append(tokens[:-distance][together])
            right.append(tokens[distance:][together])
        pairs = np.concatenate(left), np.concatenate(right)
        ones = np.ones(len(pairs[0]), np.float32)
        total = total + sparse.coo_array((ones, pairs), shape=shape).tocsr()
    return (total + total.T).tocsr()


def join_blocks(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], tokens: int = 2_000_000
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Join blocks up to a number of tokens, because each sum of counts is slow."""
    held: list[tuple[np.ndarray, np.ndarray]] = []
    for block in blocks:
        held.append((block[0].astype(np.int32), block[1]))
        if sum(len(one) for one, _ in held) >= tokens:
            yield np.concatenate([one for one, _ in held]), np.concatenate([one for _, one in held])
            held = []
    if held:
        yield np.concatenate([one for one, _ in held]), np.concatenate([one for _, one in held])


def weight_counts(counts: sparse.csr_array) -> sparse.csr_array:
    """Return log P(a, b) / (P(a) P(b)) of the pairs where it is above 0, with P(b) smoothed.

    >>> counts = sparse.csr_array(np.array([[0.0, 8.0], [8.0, 8.0]]))
    >>> weight_counts(counts).toarray().astype(float).round(2).tolist()
    [[0.0, 0.47], [0.29, 0.0]]
    """
    pairs = counts.tocoo()
    of_token = counts.sum(axis=1, dtype=np.float64)
    smoothed = of_token**SMOOTHING
    smoothed /= smoothed.sum()
    left, right = pairs.coords
    kept = pairs.data > 0
    left, right, found = left[kept], right[kept], pairs.data[kept]
    information = np.log(found / (of_token[left] * smoothed[right]))
    above = information > 0
    data = information[above].astype(np.float32)
    return sparse.coo_array((data, (left[above], right[above])), shape=counts.shape).tocsr()


def make_embeddings(weighted: sparse.csr_array, before: np.ndarray) -> np.ndarray:
    """Return factors as embeddings `[vocab, hidden]` of the mean length of those before.

    A token without a pair keeps its embedding.
    """
    left, strength, _ = randomized_svd(weighted, before.shape[1], n_iter=2, random_state=0)
    factors = (left * np.sqrt(strength)).astype(np.float32)
    lengths = np.linalg.norm(factors, axis=1, keepdims=True)
    usual = np.linalg.norm(before, axis=1).mean()
    known = np.diff(weighted.indptr)[:, None] > 0
    return np.where(known, usual * factors / np.maximum(lengths, 1e-12), before)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
