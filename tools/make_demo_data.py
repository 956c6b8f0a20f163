"""Build the demo's paragraphs (mlmjax/assets/openstax) from a collection of OpenStax textbooks.

    python tools/make_demo_data.py openstax_ccby.jsonl.zst mlmjax/assets/openstax

The collection has one object per line: `source` (the book's GitHub repository), `path` (the module
inside it) and `text` (one line per paragraph). The same input gives the same files, byte for byte.
"""

import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

SEED = 0
TRAIN_PER_SUBJECT = 250
TEST_PER_SUBJECT = 63
TEST_MODULES = 0.25
WORDS = range(40, 121)
RUN = 10

# Books of each subject: repository under github.com/openstax -> the titles made from it.
SUBJECTS = {
    "astronomy": {"osbooks-astronomy": ["Astronomy 2e"]},
    "biology": {
        "osbooks-anatomy-physiology": ["Anatomy and Physiology 2e"],
        "osbooks-microbiology": ["Microbiology"],
    },
    "chemistry": {"osbooks-chemistry-bundle": ["Chemistry 2e", "Chemistry: Atoms First 2e"]},
    "economics": {
        "osbooks-principles-economics-bundle": [
            "Principles of Economics 3e",
            "Principles of Macroeconomics 3e",
            "Principles of Microeconomics 3e",
            "Principles of Macroeconomics for AP® Courses 2e",
            "Principles of Microeconomics for AP® Courses 2e",
        ]
    },
    "history": {
        "osbooks-life-liberty-and-pursuit-happiness": [
            "Life, Liberty, and the Pursuit of Happiness"
        ],
        "osbooks-us-history": ["U.S. History"],
        "osbooks-world-history": ["World History, Volume 1", "World History, Volume 2"],
    },
    "mathematics": {
        "osbooks-college-algebra-bundle": [
            "College Algebra 2e",
            "College Algebra 2e with Corequisite Support",
            "Algebra and Trigonometry 2e",
            "Precalculus 2e",
        ],
        "osbooks-contemporary-mathematics": ["Contemporary Mathematics"],
        "osbooks-prealgebra-bundle": [
            "Prealgebra 2e",
            "Elementary Algebra 2e",
            "Intermediate Algebra 2e",
        ],
    },
    "philosophy": {"osbooks-introduction-philosophy": ["Introduction to Philosophy"]},
    "physics": {
        "osbooks-college-physics-bundle": [
            "College Physics 2e",
            "College Physics for AP® Courses 2e",
        ],
        "osbooks-university-physics-bundle": [
            "University Physics Volume 1",
            "University Physics Volume 2",
            "University Physics Volume 3",
        ],
    },
}

# Headings, exercises, sentences about the book itself, and gaps left by removed references.
UNWANTED = re.compile(
    r"OpenStax|Rice University|©|https?:|www\.|Learning Objectives|Key Terms|Solution\b"
    r"|\b(?:[Tt]his|[Tt]he) (?:text)?book\b|\b[Tt]extbook|\b[Cc]hapters?\b|\b[Tt]his module\b"
    r"|\b[Tt]his (?:sub)?section\b|\b(?:Figure|Table|Example|Equation|Try It|Exercise)s?\b"
    r"|\b[Ww]atch (?:this|the)\b|\b[Vv]isit (?:this|the)\b|\b[Cc]lick\b|\b[Rr]eadiness quiz\b"
    r"|\s[,.;:)]|\(\s*[,;)]|\b(?:in|see|from|by) (?:and|is|are|has|have|represent|shows?|gives?)\b"
    r"|\b(?:in|see|and|consider|from|of|by)[.,;]"
    r"|[\[\]{}<>|_\\\u2000-\u200f\ue000-\uf8ff]|\.\.\.|…"
)
OPENING = re.compile(r"[A-Z“\"]")
CLOSING = re.compile(r"[.?!][”\")]?$")
PLAIN = re.compile(r"[A-Za-z ,.;’'“”-]")


def main(collection: str, folder: str) -> None:
    """Write train.jsonl, test.jsonl and ATTRIBUTION.md into `folder`."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    train, test = choose(read(Path(collection)))
    for name, rows in (("train", train), ("test", test)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{name}: {len(rows)} paragraphs of {len({row['module'] for row in rows})} modules")
    (out / "ATTRIBUTION.md").write_text(attribution(train + test), encoding="utf-8", newline="\n")


def read(path: Path) -> dict[str, dict[tuple[str, str], list[str]]]:
    """Return clean paragraphs by subject, then by (book, module)."""
    subject_of = {book: subject for subject, books in SUBJECTS.items() for book in books}
    pages: dict[str, dict[tuple[str, str], list[str]]] = {subject: {} for subject in SUBJECTS}
    with io.TextIOWrapper(pa.input_stream(str(path), compression="zstd"), "utf-8") as lines:
        for line in lines:
            page = json.loads(line)
            book = page["source"].removeprefix("openstax/")
            module = page["path"].split("/")[1]
            if book in subject_of and "About OpenStax" not in page["text"]:
                paragraphs = list(clean(page["text"].split("\n")))
                if paragraphs:
                    # Two books may use the same module name, so the key has both.
                    pages[subject_of[book]][book, f"{book}/{module}"] = paragraphs
    return pages


def clean(paragraphs: Iterable[str]) -> Iterator[str]:
    """Yield whole paragraphs of prose with normalized spaces.

    >>> list(clean(["Too short.", "Cells divide. " * 30, "See , for cells. " * 20]))[0][:14]
    'Cells divide. '
    """
    for paragraph in paragraphs:
        text = " ".join(paragraph.split())
        if (
            len(text.split()) in WORDS
            and OPENING.match(text)
            and CLOSING.search(text)
            and not UNWANTED.search(text)
            and len(PLAIN.findall(text)) >= 0.95 * len(text)
        ):
            yield text


def choose(
    pages: dict[str, dict[tuple[str, str], list[str]]],
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Choose as many paragraphs of each subject, and use no ten words in a row twice."""
    rng = np.random.default_rng(SEED)
    used: set[str] = set()
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for subject, modules in pages.items():
        names = sorted(modules)
        names = [names[i] for i in rng.permutation(len(names))]
        cut = round(TEST_MODULES * len(names))
        for rows, part, wanted in (
            (test, names[:cut], TEST_PER_SUBJECT),
            (train, names[cut:], TRAIN_PER_SUBJECT),
        ):
            shuffled = [(name, list(rng.permutation(modules[name]))) for name in part]
            rows += take_in_turn(subject, shuffled, wanted, used)
    return (
        [train[i] for i in rng.permutation(len(train))],
        [test[i] for i in rng.permutation(len(test))],
    )


def take_in_turn(
    subject: str,
    modules: list[tuple[tuple[str, str], list[str]]],
    wanted: int,
    used: set[str],
) -> list[dict[str, str]]:
    """Take the last paragraph of each module in turn until there are enough rows."""
    rows: list[dict[str, str]] = []
    while len(rows) < wanted:
        if not any(left for _, left in modules):
            raise SystemExit(f"{subject}: only {len(rows)} paragraphs; {wanted} are needed")
        for (book, module), left in modules:
            if not left or len(rows) == wanted:
                continue
            text = str(left.pop())
            runs = word_runs(text)
            if runs & used:
                continue
            used |= runs
            rows.append({"text": text, "label": subject, "book": book, "module": module})
    return rows


def word_runs(text: str) -> set[str]:
    """Return every run of ten words, in lower case and without punctuation.

    >>> sorted(word_runs("One two three, four five six seven eight nine ten eleven."))[1]
    'two three four five six seven eight nine ten eleven'
    """
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}


def attribution(rows: list[dict[str, str]]) -> str:
    """Return the page that names every book, its licence and what was changed."""
    table = []
    for subject, books in SUBJECTS.items():
        for book, titles in books.items():
            number = sum(row["book"] == book for row in rows)
            source = f"[{book}](https://github.com/openstax/{book})"
            table.append(f"| {'; '.join(titles)} | {subject} | {number} | {source} |")
    return ATTRIBUTION.format(table="\n".join(table), per_module=len({r["module"] for r in rows}))


ATTRIBUTION = """\
# Attribution of the demo's texts

`train.jsonl` and `test.jsonl` hold paragraphs of textbooks published by OpenStax, Rice University.
Each paragraph's `module` names its source as BOOK/MODULE:
`https://github.com/openstax/BOOK/tree/main/modules/MODULE`.

Copyright: Rice University, OpenStax, and the authors and contributors named in each book.
Licence: Creative Commons Attribution 4.0 International (CC BY 4.0),
<https://creativecommons.org/licenses/by/4.0/>. The books can be read for free at
<https://openstax.org>. No warranties are given; see section 5 of the licence.

| books (one source may serve several) | subject here | paragraphs | source |
|---|---|---|---|
{table}

## Changes

- Single paragraphs of running prose (40 to 120 words) were taken out of {per_module} modules;
  headings, exercises, captions, formulas on their own lines and notes about the books were left
  out, as was every paragraph from which a cross-reference was missing.
- White space was normalised. The wording was not changed.
- Each paragraph was labelled with a subject by the book it comes from. The labels are those of this
  project, not of OpenStax.
- The selection was made by `tools/make_demo_data.py`.

OpenStax and Rice University do not endorse this project or its use of the texts. Rice University,
OpenStax and the book titles are names of their owners and are not covered by the licence.
"""


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python tools/make_demo_data.py COLLECTION.jsonl.zst OUT_FOLDER")
    main(sys.argv[1], sys.argv[2])
