"""Write the corpus of hostile inputs: one folder per case, and a list of them in `cases.json`.

    python tests/helpers/hostile/generate.py FOLDER

Each case is a command to run in its folder, the exit code it must have, and a text that the first
line of its error must contain (with exit code 0, its output). The cases are always the same.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

HELPERS = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(HELPERS), str(HELPERS.parents[1])) if path not in sys.path]

from hostile import checkpoints, data, models, runs, tasks, texts, weights  # noqa: E402
from hostile.case import Case  # noqa: E402
from hostile.good import write_good  # noqa: E402

KINDS = (weights, models, data, runs, checkpoints, tasks, texts)


def all_cases() -> dict[str, Case]:
    """Return every case by the name of its folder."""
    cases = [case for kind in KINDS for case in kind.cases()]
    named = {re.sub(r"[^\w.]+", "-", case.name).strip("-"): case for case in cases}
    if len(named) < len(cases):
        raise ValueError("two cases have one name")
    return named


def write_cases(good: Path, folder: Path, cases: Mapping[str, Case]) -> None:
    """Write cases, made from the good inputs, and `cases.json` into a folder."""
    table = []
    for name, case in cases.items():
        case.write(good, folder / name)
        facts = {key: getattr(case, key) for key in ("command", "stdin", "exit", "says")}
        table.append({"folder": name} | facts)
    (folder / "cases.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    corpus = Path(sys.argv[1])
    (corpus / "good").mkdir(parents=True)
    write_good(corpus / "good")
    found = all_cases()
    write_cases(corpus / "good", corpus, found)
    print(f"{len(found)} cases in {corpus}")
