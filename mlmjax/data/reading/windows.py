"""Cut a long document into windows, at any token or where a sentence ends."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

_CLOSERS = re.escape("\"'”’»›)]}」』】〉》）］")
_SPACED = re.escape(".!?…‼⁇⁈⁉؟۔։።፧")
_UNSPACED = re.escape("。｡！？।॥")
# Possessive, and starts only at the first of a run, so that hostile text takes linear time.
_SENTENCE = re.compile(
    rf"((?<![{_SPACED}])[{_SPACED}]++[{_CLOSERS}]*+(?=\s|\Z)|[{_UNSPACED}]++[{_CLOSERS}]*+)\s*+"
)
_PARAGRAPH = re.compile("(?:\n[^\\S\n]*+\n|\u2029)\\s*+")
_LAST_WORD = re.compile(r"(?:^|[\s(\[\"'“‘])([^\W\d_]\w*(?:\.\w+)*)\.\Z")
_ABBREVIATION = re.compile(
    r"mrs?|ms|dr|prof|st|sr|jr|gen|col|sgt|capt|lt|rev|hon|vs|cf|viz|e\.g|i\.e|al|figs?|eq|vol"
    r"|ch|sec|pp|eds?",
    re.IGNORECASE,
)
_LONGEST_ABBREVIATION = 8


def sentence_ends(text: str) -> list[tuple[int, int]]:
    """Return `(end, next)` for every sentence: the characters where it ends and the next begins.

    A blank line ends a sentence. So does a terminator, with the quotes and brackets that close
    after it, if white space follows (not needed in Chinese, Japanese and Hindi). It does not before
    a lower-case letter, and a full stop does not after an initial or a common abbreviation. The
    idea is that of Unicode's sentence boundaries (UAX 29, rule SB8), plus some abbreviations. The
    time is linear in the length of any text.

    >>> text = 'Dr. B. Lee paid 3.50. "Why?" she asked. No end\\n\\nA title'
    >>> [text[:end].rsplit(" ", 1)[-1] for end, _ in sentence_ends(text)]
    ['3.50.', 'asked.', 'end']
    """
    gaps = []
    for match in _SENTENCE.finditer(text):
        end, after = match.end(1), match.end()
        if not (end < after and text[after : after + 1].islower()) and not (
            match[1] == "." and _is_abbreviation(text, end)
        ):
            gaps.append((end, after))
    for match in _PARAGRAPH.finditer(text):
        end = match.start()
        while end and text[end - 1].isspace():
            end -= 1
        gaps.append((end, match.end()))
    return sorted({gap for gap in gaps if gap[0]})


def sentence_cuts(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the numbers of the tokens that begin a sentence, int64.

    `offsets` are those of the tokens in characters. White space between two sentences goes with the
    first if its tokens allow. A sentence that begins inside a token has no cut.

    >>> sentence_cuts("Hi. The\\n\\nEnd.", [(0, 2), (2, 3), (3, 7), (7, 9), (9, 12), (12, 13)])
    array([2, 4])
    """
    spans = np.array(offsets, np.int64).reshape(-1, 2)
    gaps = np.array(sentence_ends(text), np.int64).reshape(-1, 2)
    # No cut can separate tokens that share one character.
    whole = np.flatnonzero(spans[:-1, 1] <= spans[1:, 0]) + 1
    begins = spans[whole, 0]
    last = np.searchsorted(begins, gaps[:, 1], "right") - 1
    found = last >= 0
    found[found] = begins[last[found]] >= gaps[found, 0]
    return np.unique(whole[last[found]])


def windows(
    ids: Sequence[int], width: int, cuts: np.ndarray | Sequence[int] = ()
) -> Iterator[Sequence[int]]:
    """Cut a document into windows of at most `width` tokens, without losing any.

    Each is as long as possible: it ends at the last of the `cuts` (token numbers, sorted) within
    reach, or is full if there is none, as in a sentence longer than a window.

    >>> list(windows("abcdefghij", 4, [3, 5, 6]))
    ['abc', 'def', 'ghij']
    >>> list(windows("abcdefghij", 4))
    ['abcd', 'efgh', 'ij']
    """
    start = 0
    while start < len(ids):
        end = start + width
        if end < len(ids):
            at = int(np.searchsorted(cuts, end, "right")) - 1
            if at >= 0 and cuts[at] > start:
                end = int(cuts[at])
        yield ids[start:end]
        start = end


def _is_abbreviation(text: str, end: int) -> bool:
    """Tell whether the full stop before `end` follows an initial or an abbreviation."""
    match = _LAST_WORD.search(text[max(0, end - _LONGEST_ABBREVIATION) : end])
    return match is not None and (
        (len(match[1]) == 1 and match[1].isupper() and match[1] != "I")
        or _ABBREVIATION.fullmatch(match[1]) is not None
    )
