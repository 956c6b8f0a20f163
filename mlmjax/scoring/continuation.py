"""Score labels of several tokens by their pseudo-log-likelihood at the slot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlmjax.errors import InputError
from mlmjax.model.modernbert import Model
from mlmjax.scoring.engine import Advance
from mlmjax.scoring.likelihood import log_prob_of_target, word_ends
from mlmjax.scoring.scorers import RowScorer, check_masked_lm
from mlmjax.text.checks import check_text
from mlmjax.text.prompts import Prompt, Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.words import word_starts

BLOCK = 64
"""The number of prompts whose sequences are in memory together."""


class ContinuationScorer(RowScorer):
    """Score labels of any number of tokens, each put in place of the slot.

    A label's score is the sum of the log probabilities of its tokens under the softmax over the
    whole vocabulary. Each token is masked in turn together with the later tokens of its word (Kauf
    and Ivanova 2023), so a row takes one forward pass for each token of each label. Scores are
    normalised over the labels. Longer labels are less probable only because of their length;
    calibration on a blank text corrects that.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: Template,
        labels: Sequence[str],
        **options: Any,
    ):
        check_masked_lm(model)
        for label in labels:
            check_text(label, f"label {label!r}")
        self._tokens = tokenizer.encode_plain_batch([f" {label}" for label in labels])
        seen: dict[tuple[int, ...], str] = {}
        for label, tokens in zip(labels, map(tuple, self._tokens), strict=True):
            if tokens in seen:
                raise InputError(
                    f"labels {seen[tokens]!r:.60} and {label!r:.60} are the same tokens; expected "
                    "labels that differ"
                )
            seen[tokens] = label
        super().__init__(model, tokenizer, template, labels, log_prob_of_target, **options)
        count, longest = max(zip(map(len, self._tokens), labels, strict=True))
        self.max_length -= count - 1
        if self.max_length < 1:
            raise InputError(
                f"label {longest!r:.60}: has {count} tokens, more than a prompt may have; give a "
                "shorter name"
            )
        starts = word_starts(tokenizer)
        self._masks = [word_ends(starts(np.array(tokens))).tolist() for tokens in self._tokens]

    def _score(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompts: Sequence[Prompt],
        progress: Advance | None,
    ) -> np.ndarray:
        results = []
        for start in range(0, len(prompts), BLOCK):
            block = prompts[start : start + BLOCK]
            results.append(self._block(block))
            if progress:
                progress(len(block))
        return np.concatenate(results)

    def _block(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return the log probabilities of a few prompts, `[prompts, labels]`."""
        sequences, positions, targets = [], [], []
        for prompt in prompts:
            before, after = prompt.ids[: prompt.slot], prompt.ids[prompt.slot + 1 :]
            for tokens, masks in zip(self._tokens, self._masks, strict=True):
                for at, stop in enumerate(masks):
                    hidden = [self.tokenizer.mask_id] * (stop - at)
                    sequences.append([*before, *tokens[:at], *hidden, *tokens[stop:], *after])
                    positions.append(len(before) + at)
                    targets.append(tokens[at])
        log_probs = self.engine.run(
            sequences, np.array(positions, np.int32), np.array(targets, np.int32)
        ).reshape(len(prompts), -1)
        ends = np.cumsum([len(tokens) for tokens in self._tokens])[:-1]
        scores = np.stack([part.sum(axis=1) for part in np.split(log_probs, ends, axis=1)], axis=1)
        return np.asarray(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
