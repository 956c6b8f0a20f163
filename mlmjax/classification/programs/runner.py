"""Answer with an exported program; needs only jax, numpy and tokenizers.

As a script: python run.py texts.txt (one text per line; a JSON line for each).
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import tokenizers
from jax import export


class Program:
    """Load the folder that holds this file, or another one."""

    def __init__(self, folder: str | Path = Path(__file__).parent):
        folder = Path(folder)
        self.settings = json.loads((folder / "program.json").read_text(encoding="utf-8"))
        self.labels: list[str] = self.settings["labels"]
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        with np.load(folder / "weights.npz", allow_pickle=False) as weights:
            self.weights = jax.device_put({name: weights[name] for name in weights.files})
        files = {length: folder / f"{length}.stablehlo" for length in self.settings["lengths"]}
        self.programs = {
            length: jax.jit(export.deserialize(bytearray(file.read_bytes())).call)
            for length, file in files.items()
        }

    def log_probs(self, texts: list[str]) -> np.ndarray:
        """Return log probabilities of the labels, float64 `[texts, labels]`.

        Raises `ValueError` for a blank text and one that no program has room for.
        """
        prompts = [self._prompt(number, text) for number, text in enumerate(texts)]
        result = np.empty((len(texts), len(self.labels)))
        size = self.settings["batch_size"]
        for length, members in self._by_length(prompts).items():
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                scores = self._run(length, [prompts[number] for number in batch])
                result[batch] = scores[: len(batch)]
        if self.settings["bias"] is not None:
            result -= np.array(self.settings["bias"])
        result /= self.settings["temperature"]
        return result - np.logaddexp.reduce(result, axis=1, keepdims=True)

    def predict_proba(self, texts: list[str]) -> np.ndarray:
        """Return the probabilities of the labels, `[texts, labels]`."""
        return np.exp(self.log_probs(texts))

    def _prompt(self, number: int, text: str) -> list[int]:
        own = self.settings
        if not text.strip():
            raise ValueError(f"text {number + 1} is blank; leave it out")
        encoded = self.tokenizer.encode(text.join(own["around"]), add_special_tokens=False).ids
        ids = [*own["prefix_ids"], *encoded, *own["suffix_ids"]]
        special = set(own["special_ids"])
        if [i for i in ids if i in special] != own["prompt_special_ids"]:
            raise ValueError(f"text {number + 1} holds a special token; remove it")
        if len(ids) > own["lengths"][-1]:
            raise ValueError(
                f"the prompt of text {number + 1} has {len(ids)} tokens, and the longest program "
                f"reads {own['lengths'][-1]}; shorten the text, or export a longer program"
            )
        return ids

    def _by_length(self, prompts: list[list[int]]) -> dict[int, list[int]]:
        """Return the numbers of the prompts by the length of the program that reads them."""
        groups: dict[int, list[int]] = {}
        for number, ids in enumerate(prompts):
            length = next(one for one in self.settings["lengths"] if one >= len(ids))
            groups.setdefault(length, []).append(number)
        return groups

    def _run(self, length: int, prompts: list[list[int]]) -> np.ndarray:
        shape = (self.settings["batch_size"], length)
        ids = np.full(shape, self.settings["pad_id"], np.int32)
        segment_ids = np.zeros(shape, np.int32)
        slots = np.zeros(shape[0], np.int32)
        for row, own in enumerate(prompts):
            ids[row, : len(own)] = own
            segment_ids[row, : len(own)] = 1
            if self.settings["slot_id"] is not None:
                slots[row] = own.index(self.settings["slot_id"])
        return np.asarray(self.programs[length](self.weights, ids, segment_ids, slots), np.float64)


if __name__ == "__main__":
    program = Program()
    with open(sys.argv[1], encoding="utf-8") as file:
        lines = file.read().splitlines()
    for found in program.predict_proba(lines):
        best = int(found.argmax())
        shown = dict(zip(program.labels, found.tolist(), strict=True))
        print(json.dumps({"label": program.labels[best], "probabilities": shown}))
