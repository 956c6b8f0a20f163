"""Build instruction data for a small model that may be given away, from one-token answers.

    python tools/make_small_data.py --out instruct_choose.jsonl.zst \\
        single_token_instruct.jsonl.zst niv2_raw_0.parquet niv2_raw_1.parquet

Keeps what a model that is given away may be trained on (below), leaves out rows that are marked as
sharing a task or text with an evaluation set, machine translations, answers of more than one token,
repetitions, and answers that do not stand in their prompt: what a small network can learn is to
choose, not to know. Each object of the result has `prompt`, `answer` and `task`. The same input
gives the same file.
"""

import argparse
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mlmjax import Tokenizer

# Research-only, non-commercial or of unclear licence, by what their tasks are called.
NOT_SHIPPED = re.compile(
    "amazon|yelp|yahoo|imdb|sst|sentiment140|trec|ag_news|agnews|twitter|tweet|reddit|qqp|quora"
    "|mrpc|msr|cola|wic|rocstories|storycloze|jeopardy|xsum|samsum|personachat|moviesqa|recipe"
    "|hatexplain|librispeech|ljspeech|ohsumed|reuters|detoxifying|hippocorpus",
    re.IGNORECASE,
)
TEMPLATED = "flan2021-templated"
SHIPPED_TEMPLATED = {
    "winogrande", "piqa", "boolq", "csqa", "openbookqa", "arc_easy", "arc_challenge", "mnli",
}  # fmt: skip
COT = "flan-cot"


class Example(NamedTuple):
    """An instruction, its answer, and where it is from."""

    prompt: str
    answer: str
    task: str


def main() -> None:
    """Read the files, keep what may be kept, write one file, and say what was left out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("files", type=Path, nargs="+")
    chosen = parser.parse_args()
    if chosen.out.resolve() in {path.resolve() for path in chosen.files}:
        raise SystemExit(f"{chosen.out}: is among the files to read; give another in --out")
    tokenizer = Tokenizer.from_pretrained()
    # Under its name a file is whole: what is stopped in between leaves none.
    partial = chosen.out.with_name(f"{chosen.out.name}.partial")
    seen: set[bytes] = set()
    counts: Counter[str] = Counter()
    with compressed(partial, "w") as out:
        for path in chosen.files:
            for example, refusal in readable(path):
                reason = refusal or unusable(example, tokenizer, seen)
                counts[reason or "kept"] += 1
                if reason is None:
                    out.write(json.dumps(example._asdict(), ensure_ascii=False) + "\n")
    partial.replace(chosen.out)
    for reason, count in counts.most_common():
        print(f"{count:8,} {reason}")


def readable(path: Path) -> Iterator[tuple[Example, str | None]]:
    """Yield what `examples` does; a file that cannot be read ends the program with a message."""
    number = 0
    try:
        for number, found in enumerate(examples(path), start=1):  # noqa: B007
            yield found
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SystemExit(
            f"{path}: cannot be read after row {number} ({type(error).__name__}: {error}); "
            "expected a whole .jsonl.zst or .parquet with the columns that this tool names"
        ) from error


def examples(path: Path) -> Iterator[tuple[Example, str | None]]:
    """Yield the rows of a file, each with the reason why it may not be used (None: it may)."""
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(columns=["inputs", "targets", "_task_name"]):
            for row in batch.to_pylist():
                example = Example(row["inputs"].strip(), row["targets"].strip(), row["_task_name"])
                refusal = "not for shipped models" if NOT_SHIPPED.search(example.task) else None
                yield example, "translated" if "-translated-" in example.task else refusal
        return
    with compressed(path, "r") as lines:
        for line in lines:
            row = json.loads(line)
            prompt = "\n".join(filter(None, (row["definition"].strip(), row["input"].strip())))
            example = Example(prompt, row["target"].strip(), row["task"])
            if row["eval_overlap"] or row["eval_hit"]:
                yield example, "shares a task or text with an evaluation set"
            elif not may_be_shipped(row["component"], row["task"]):
                yield example, "not for shipped models"
            else:
                yield example, None


def compressed(path: Path, mode: Literal["r", "w"]) -> io.TextIOWrapper:
    """Open a `.zst` file of lines; one that is cut short raises `OSError` at its end."""
    open_stream = pa.input_stream if mode == "r" else pa.output_stream
    return io.TextIOWrapper(open_stream(str(path), compression="zstd"), encoding="utf-8")


def may_be_shipped(component: str, task: str) -> bool:
    """Tell whether a model that is given away may be trained on a task.

    >>> may_be_shipped("niv2", "task475_yelp_polarity_classification")
    False
    >>> may_be_shipped(TEMPLATED, "boolq"), may_be_shipped(TEMPLATED, "qqp")
    (True, False)
    """
    if component == COT:
        return True
    return task in SHIPPED_TEMPLATED if component == TEMPLATED else not NOT_SHIPPED.search(task)


def unusable(example: Example, tokenizer: Tokenizer, seen: set[bytes]) -> str | None:
    """Return why an example cannot be trained on, None if it can; remember it in `seen`."""
    if not example.prompt or len(tokenizer.encode_plain(f" {example.answer}")) != 1:
        return "the answer is not one token"
    if example.answer.lower() not in example.prompt.lower():
        return "the answer does not stand in the prompt"
    known = hashlib.sha256("\0".join(example[:2]).encode()).digest()
    if known in seen:
        return "a repetition"
    seen.add(known)
    return None


if __name__ == "__main__":
    main()
