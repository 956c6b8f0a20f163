"""Build instruction data with one-token answers, for a small model that may be redistributed.

    python tools/make_small_data.py --out instruct_choose.jsonl.zst \\
        single_token_instruct.jsonl.zst niv2_raw_0.parquet niv2_raw_1.parquet

The tool drops data that such a model may not be trained on (below), and these rows:

- rows marked as sharing a task or text with an evaluation set
- machine translations
- repetitions
- rows with an answer of more than one token
- rows with an answer that is not in the prompt: a small network can learn to choose, not to know

Each object of the result has `prompt`, `answer` and `task`. The same input gives the same file.
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

# Parts of task names whose data is research-only, non-commercial or of unclear licence.
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
    """An instruction, its answer and its task."""

    prompt: str
    answer: str
    task: str


def main() -> None:
    """Write the rows to keep of all files into one, and print why the others were dropped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("files", type=Path, nargs="+")
    chosen = parser.parse_args()
    if chosen.out.resolve() in {path.resolve() for path in chosen.files}:
        raise SystemExit(f"{chosen.out}: is among the files to read; give another in --out")
    tokenizer = Tokenizer.from_pretrained()
    # Only a complete file gets the final name.
    partial = chosen.out.with_name(f"{chosen.out.name}.partial")
    seen: set[bytes] = set()
    counts: Counter[str] = Counter()
    with open_zst(partial, "w") as out:
        for path in chosen.files:
            for example, refusal in read_or_exit(path):
                reason = refusal or find_problem(example, tokenizer, seen)
                counts[reason or "kept"] += 1
                if reason is None:
                    out.write(json.dumps(example._asdict(), ensure_ascii=False) + "\n")
    partial.replace(chosen.out)
    for reason, count in counts.most_common():
        print(f"{count:8,} {reason}")


def read_or_exit(path: Path) -> Iterator[tuple[Example, str | None]]:
    """Yield what `read_examples` does; a file that cannot be read ends the program."""
    number = 0
    try:
        for number, found in enumerate(read_examples(path), start=1):  # noqa: B007
            yield found
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SystemExit(
            f"{path}: cannot be read after row {number} ({type(error).__name__}: {error}); "
            "expected a whole .jsonl.zst or .parquet with the columns that this tool names"
        ) from error


def read_examples(path: Path) -> Iterator[tuple[Example, str | None]]:
    """Yield the rows of a file, each with the reason not to use it, or None."""
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(columns=["inputs", "targets", "_task_name"]):
            for row in batch.to_pylist():
                example = Example(row["inputs"].strip(), row["targets"].strip(), row["_task_name"])
                refusal = "not for shipped models" if NOT_SHIPPED.search(example.task) else None
                yield example, "translated" if "-translated-" in example.task else refusal
        return
    with open_zst(path, "r") as lines:
        for line in lines:
            row = json.loads(line)
            prompt = "\n".join(filter(None, (row["definition"].strip(), row["input"].strip())))
            example = Example(prompt, row["target"].strip(), row["task"])
            if row["eval_overlap"] or row["eval_hit"]:
                yield example, "shares a task or text with an evaluation set"
            elif not is_shippable(row["component"], row["task"]):
                yield example, "not for shipped models"
            else:
                yield example, None


def open_zst(path: Path, mode: Literal["r", "w"]) -> io.TextIOWrapper:
    """Open a `.zst` file of lines; reading a truncated one raises `OSError`."""
    open_stream = pa.input_stream if mode == "r" else pa.output_stream
    return io.TextIOWrapper(open_stream(str(path), compression="zstd"), encoding="utf-8")


def is_shippable(component: str, task: str) -> bool:
    """Return whether a redistributed model may be trained on a task.

    >>> is_shippable("niv2", "task475_yelp_polarity_classification")
    False
    >>> is_shippable(TEMPLATED, "boolq"), is_shippable(TEMPLATED, "qqp")
    (True, False)
    """
    if component == COT:
        return True
    return task in SHIPPED_TEMPLATED if component == TEMPLATED else not NOT_SHIPPED.search(task)


def find_problem(example: Example, tokenizer: Tokenizer, seen: set[bytes]) -> str | None:
    """Return why an example is not used, or None and add it to `seen`."""
    if not example.prompt or len(tokenizer.encode_plain(f" {example.answer}")) != 1:
        return "the answer is not one token"
    if example.answer.lower() not in example.prompt.lower():
        return "the answer is not in the prompt"
    known = hashlib.sha256("\0".join(example[:2]).encode()).digest()
    if known in seen:
        return "a repetition"
    seen.add(known)
    return None


if __name__ == "__main__":
    main()
