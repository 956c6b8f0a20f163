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
from inputs import LETTERS, read, write_inputs
from measure import Figures
from report import compare, write_report

HERE = Path(__file__).parent
SETTINGS = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CLASSIFY = "import sys; from mlmjax.cli import main; sys.argv[0] = 'mlmjax'; main()"


def command(side: str, function: str, inputs: Path) -> list[str]:
    """Return the command that measures a function; ours of a fresh process is `mlmjax classify`."""
    if (side, function) == ("ours", "fresh"):
        labels = ",".join(LETTERS)
        return [sys.executable, "-c", CLASSIFY, "classify", "--model", str(inputs / "base"),
                "--labels", labels, str(inputs / "text.txt")]  # fmt: skip
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


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder)
        write_inputs(chosen.data, inputs, questions=chosen.questions)
        (inputs / "text.txt").write_text(read(inputs, "mmlu")["rows"][0]["question"] + "\n")
        runs: list[Figures] = []
        if "fresh" in chosen.only:
            measure("ours", "fresh", inputs)  # fills the cache of compiled programs
        for number in range(chosen.rounds):
            for side, function in plan(chosen.only):
                runs.append({"round": number, "load": os.getloadavg()[0]})
                runs[-1] |= measure(side, function, inputs)
                print(f"round {number + 1} {side} {function}", flush=True)
        if chosen.only == list(CASES):
            for function in (GROWTH[1], STREAM):
                runs.append({"round": 0, **measure("ours", function, inputs)})
    rows = [compare(name, CASES[name], runs) for name in chosen.only]
    write_report(chosen.out, rows, runs, questions=chosen.questions)


if __name__ == "__main__":
    main()
