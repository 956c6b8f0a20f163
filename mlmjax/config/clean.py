"""Text cleanings that a task asks for by name."""

import re
from collections.abc import Callable
from typing import Literal

Cleaning = Literal["newsgroup"]

_HEADER_LINE = re.compile(r"[!-9;-~]+:|[ \t]")  # RFC 1036: a name and a colon, or a continuation
_QUOTED = re.compile(r"^[>|]|^In article|^Quoted from|writes in|writes:|wrote:|says:|said:")


def newsgroup(post: str) -> str:
    """Remove header, signature and quoted lines of a newsgroup post.

    A post with its header loses the header (up to the first blank line), then its last paragraph
    (from the last line that is blank or made of hyphens), then every line that quotes or introduces
    a quotation: what `fetch_20newsgroups(remove=("headers", "footers", "quotes"))` of scikit-learn
    leaves. A text without a header is taken as already cleaned and stays as it is, because doing it
    twice would take a paragraph of its own each time.

    >>> newsgroup("From: a@b\\nSubject: cars\\n\\nc@d writes:\\n> Why?\\nThe red one.\\n\\n--\\nA")
    'The red one.\\n'
    >>> newsgroup("The red one.\\n")
    'The red one.\\n'
    """
    header, _, body = post.partition("\n\n")
    lines = header.split("\n")
    names = {line.partition(":")[0] for line in lines}
    if not (all(map(_HEADER_LINE.match, lines)) and {"From", "Subject"} <= names):
        return post
    lines = body.strip().split("\n")
    gaps = [number for number, line in enumerate(lines) if not line.strip().strip("-")]
    if gaps and gaps[-1] > 0:
        body = "\n".join(lines[: gaps[-1]])
    return "\n".join(line for line in body.split("\n") if not _QUOTED.search(line))


CLEANINGS: dict[Cleaning, Callable[[str], str]] = {"newsgroup": newsgroup}
