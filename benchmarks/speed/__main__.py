"""Both sides on the same inputs and weights, turn by turn, each in a process of its own.

    python benchmarks/speed --data FOLDER --out FOLDER

`--data` holds `eval`, `instruct` and `tokenizer`; the table, the figures as JSON and a picture go
to `--out`. The cores have to be idle.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
"""What a user of transformers writes for one text."""


def command(side: str, function: str, inputs: Path) -> list[str]:
    """Return the command that measures a function; of a fresh process it is what users run."""
    model, text, prompt = (str(inputs / name) for name in ("base", "text.txt", "prompt.txt"))
    if function == "fresh" and side == "ours":
        options = ["--model", model, "--labels", ",".join(LETTERS)]
        return [sys.executable, "-m", "mlmjax", "classify", *options, text]
    if function == "fresh":
        return [sys.executable, "-c", PIPELINE, model, prompt, *(f" {x}" for x in LETTERS)]
    return [sys.executable, str(HERE / f"{side}.py"), function, str(inputs)]


def measure(side: str, function: str, inputs: Path) -> Figures:
    """Run a function in a process of its own; `process` is how long all of it took."""
    environment = {**os.environ, **SETTINGS, "XDG_CACHE_HOME": str(inputs / "cache")}
    start = time.perf_counter()
    done = subprocess.run(
        command(side, function, inputs), env=environment, stdout=subprocess.PIPE, check=True
    )
    seconds = time.perf_counter() - start
    last = json.loads(done.stdout.decode().strip().splitlines()[-1])
    return {"side": side, "function": function, "process": seconds, **last}


def plan(names: list[str]) -> list[tuple[str, str]]:
    """Return what is measured in a round, ours and theirs by turns, nothing twice."""
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
        "--few", type=at_least_one, help="questions where both are in bfloat16 (default: as many)"
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
        os.sync()  # so that the disk is not still at it in the first round
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
