"""Rank whole texts by their pseudo-log-likelihood: each option of a row is a text."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
from scipy.special import log_softmax

from mlmjax.config.task import OPTION
from mlmjax.errors import InputError
from mlmjax.model.modernbert import Model
from mlmjax.scoring.engine import Advance
from mlmjax.scoring.likelihood import Method, TextScorer, log_prob_of_target
from mlmjax.scoring.scorers import RowScorer, check_masked_lm
from mlmjax.text.checks import check_filled, check_row, for_each_row, name_rows
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer

Average = Literal["total", "token", "word"]
ROWS = 256
"""Rows that are scored together."""


class TextRanker(RowScorer):
    """Score rows whose options are texts, or complete one: `{option}` of the template.

    The score of an option is the pseudo-log-likelihood of the whole text, as `TextScorer` finds it,
    or its mean per token or word. `log_probs` returns the softmax of the scores over the options of
    a row, `scores` are those of the last call, `[rows, labels]`.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: Template,
        labels: Sequence[str],
        *,
        method: Method = "word_l2r",
        average: Average = "total",
        optional: Sequence[str] = (),
        **options: Any,
    ):
        check_masked_lm(model)
        super().__init__(
            model, tokenizer, template, labels, log_prob_of_target, optional=optional, **options
        )
        self.method, self.average = method, average
        self.scores = np.zeros((0, len(self.labels)))
        masked_lm: Any = model  # as checked
        self._texts = TextScorer(masked_lm, tokenizer, method=method, **options)
        self.engine = self._texts.engine

    def log_probs(
        self,
        rows: Iterable[Mapping[str, Any]],
        *,
        where: Sequence[str] | None = None,
        progress: Advance | None = None,
    ) -> np.ndarray:
        """Return the log probabilities of the options of rows, float32 `[rows, labels]`.

        Raises what `RowScorer.log_probs` raises, and `InputError` that lists each row with a text
        that is too long.
        """
        listed = list(rows)
        names = where or [name for name, _ in name_rows(listed)]
        texts = for_each_row(self._texts_of, zip(names, listed, strict=True))
        self.scores = np.full((len(listed), len(self.labels)), -np.inf)
        for first in range(0, len(listed), ROWS):
            own = texts[first : first + ROWS]
            found = iter(self._texts.score([text for each in own for text in each]))
            for row, each in enumerate(own, first):
                totals = [self._averaged(score) for score in islice(found, len(each))]
                self.scores[row, : len(each)] = totals
            self.scored += len(own)
            if progress:
                progress(len(own))
        return log_softmax(self.scores, axis=1).astype(np.float32)

    def _texts_of(self, row: Mapping[str, Any]) -> list[str]:
        """Return the text of each option of a row; raise `InputError` for one that is too long."""
        fields = [name for name in self.template.fields if name != OPTION]
        check_row(row, [*fields, "options"], len(self.labels), self.optional)
        texts = [option.join(self.template.around(OPTION, row)) for option in row["options"]]
        for number, text in enumerate(texts, 1):
            check_filled(text, f"the text of option {number}")
            length = len(self.tokenizer.encode_plain(text)) + self.tokenizer.outer
            if length > self.max_length:
                raise InputError(
                    f"the text of option {number} has {length} tokens with those around it, and at "
                    f"most {self.max_length} fit; shorten it, or leave the row out"
                )
        return texts

    def _averaged(self, score: Any) -> float:
        return float(
            score.total if self.average == "total" else getattr(score, f"per_{self.average}")
        )
