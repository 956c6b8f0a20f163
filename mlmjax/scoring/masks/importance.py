"""How much each word of a row matters to an answer, and coloured text that shows it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from mlmjax.scoring.scorers import RowScorer
from mlmjax.text.prompts import MASKED
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.truncation import Span
from mlmjax.text.words import word_spans

STRONGEST = 0.75
"""The opacity of the colour of the most important word."""


class Word(NamedTuple):
    """A word, where it is in its text, and how much less probable the answer is without it."""

    text: str
    start: int
    end: int
    importance: float


def words_of(tokenizer: Tokenizer, text: str) -> list[Span]:
    """Return the spans of the words of a text that are not white space.

    >>> words_of(Tokenizer.from_pretrained(), "A  film.")
    [(0, 1), (3, 7), (7, 8)]
    """
    return [(start, end) for start, end in word_spans(tokenizer, text) if text[start:end].strip()]


def importance_in_rows(
    scorer: RowScorer, rows: Sequence[Mapping[str, Any]], columns: Sequence[int]
) -> list[dict[str, list[Word]]]:
    """Return for each row the importance of the words of each field but options.

    It is the log probability of the label in the row's column, less that with the word masked.
    """
    spans = [
        [
            (name, span)
            for name in scorer.template.fields
            if name != "options"
            for span in words_of(scorer.tokenizer, row[name])
        ]
        for row in rows
    ]
    variants = [
        row | {MASKED: {name: [span]}} if name else row
        for row, own in zip(map(dict, rows), spans, strict=True)
        for name, span in [("", (0, 0)), *own]
    ]
    found = iter(scorer.log_probs(variants).astype(np.float64))
    results = []
    for row, own, column in zip(rows, spans, columns, strict=True):
        whole = next(found)[column]
        fields: dict[str, list[Word]] = {name: [] for name, _ in own}
        for name, (start, end) in own:
            change = float(whole - next(found)[column])
            fields[name].append(Word(row[name][start:end], start, end, change))
        results.append(fields)
    return results


def coloured(text: str, words: Sequence[Word]) -> Markup:
    """Return a text as HTML, its words coloured by their importance.

    Words that support the answer have the class `for`, those that do not the class `against`. The
    most important word of the text is opaque.

    >>> str(coloured("so <b>", [Word("so", 0, 2, 1.0)]))
    '<mark class="for" style="--much:75%" title="+1.00">so</mark> &lt;b&gt;'
    """
    most = max((abs(word.importance) for word in words), default=0.0)
    html, done = Markup(), 0
    for word in words:
        much = round(100 * STRONGEST * abs(word.importance) / most) if most else 0
        side = "for" if word.importance > 0 else "against"
        html += text[done : word.start]
        # White space before a word is not coloured.
        bare = word.text.lstrip()
        html += word.text[: len(word.text) - len(bare)]
        html += Markup('<mark class="{}" style="--much:{}%" title="{:+.2f}">{}</mark>').format(
            side, much, word.importance, bare
        )
        done = word.end
    return html + text[done:]
