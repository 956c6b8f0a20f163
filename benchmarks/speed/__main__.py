"""Compare mlmjax and transformers on the same inputs and weights.

    python benchmarks/speed --data FOLDER --out FOLDER

Both sides run alternately, each in its own process. `--data` holds `eval`, `instruct` and
`tokenizer`. A table, the figures as JSON and a picture go to `--out`. The cores must be idle.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # `inputs` loads jax

from cases import CASES, GROWTH, STREAM
from inputs import write_inputs
from measure import LETTERS, Figures, read
from report import compare, write_report

HERE = Path(__file__).parent
SETTINGS = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PIPELINE = """
import json, sys
import torch, transformers
ask = transformers.pipeline("fill-mask", model=sys.argv[1], dtype=torch.float32)
print(json.dumps(ask(open(sys.argv[2]).read(), targets=sys.argv[3:])[0]))
"""
"""The program that a user of transformers writes for one text."""


def command(side: str, function: str, inputs: Path) -> list[str]:
    """Return the command that measures a function; `fresh` is the command that users run."""
    model, text, prompt = (str(inputs / name) for name in ("base", "text.txt", "prompt.txt"))
    if function == "fresh" and side == "ours":
        options = ["--model", model, "--labels", ",".join(LETTERS)]
        return [sys.executable, "-m", "mlmjax", "classify", *options, text]
    if function == "fresh":
        return [sys.executable, "-c", PIPELINE, model, prompt, *(f" {x}" for x in LETTERS)]
    return [sys.executable, str(HERE / f"{side}.py"), function, str(inputs)]


def measure(side: str, function: str, inputs: Path) -> Figures:
    """Run a function in its own process; `process` is the time of the whole process."""
    environment = {**os.environ, **SETTINGS, "XDG_CACHE_HOME": str(inputs / "cache")}
    start = time.perf_counter()
    done = subprocess.run(
        command(side, function, inputs), env=environment, stdout=subprocess.PIPE, check=True
    )
    seconds = time.perf_counter() - start
    last = json.loads(done.stdout.decode().strip().splitlines()[-1])
    return {"side": side, "function": function, "process": seconds, **last}


def plan(names: list[str]) -> list[tuple[str, str]]:
    """Return the (side, function) pairs of a round, alternating sides, without repetition."""
    turns = dict.fromkeys(
        turn
        for name in names
        for turn in (("ours", CASES[name].ours), ("theirs", CASES[name].theirs))
    )
    return list(turns)


def at_least_one(text: str) -> int:
    """Read a number from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}; expected a whole number from 1 on")
    return int(text)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--questions", type=at_least_one, default=200)
    parser.add_argument(
        "--few", type=at_least_one, help="questions of the case bfloat16_both (default: as many)"
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    chosen = parser.parse_args()
    if not (chosen.data / "tokenizer").is_dir():
        parser.error(f"--data {chosen.data}: holds no folder tokenizer")
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder)
        few = chosen.questions if chosen.few is None else min(chosen.few, chosen.questions)
        write_inputs(chosen.data, inputs, questions=chosen.questions, few=few)
        asked = read(inputs, "mmlu")
        (inputs / "text.txt").write_text(" ".join(asked["rows"][0]["question"].split()) + "\n")
        (inputs / "prompt.txt").write_text(asked["prompts"][0])
        os.sync()  # so that writing to disk does not slow the first round
        runs: list[Figures] = []
        if "fresh" in chosen.only:
            measure("ours", "fresh", inputs)  # fills the cache of compiled programs
        turns = [(n, *turn) for n in range(chosen.rounds) for turn in plan(chosen.only)]
        if chosen.only == list(CASES):
            turns += [(0, "ours", GROWTH[1]), (0, "ours", STREAM)]
        with (chosen.out / "runs.jsonl").open("w") as log:
            for number, side, function in turns:
                run: Figures = {"round": number, "load": os.getloadavg()[0]}
                run |= measure(side, function, inputs)
                runs.append(run)
                kept = {name: value for name, value in run.items() if name != "answers"}
                print(json.dumps(kept), file=log, flush=True)
                print(f"round {number + 1} {side} {function}", flush=True)
    rows = [
        compare(name, CASES[name], runs, questions=chosen.questions, few=few)
        for name in chosen.only
    ]
    write_report(chosen.out, rows, runs)


if __name__ == "__main__":
    main()
