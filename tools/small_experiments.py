"""Train the small model, compare mixtures of objectives and heads, and make tables and a picture.

    python tools/small_experiments.py --data DATA --work WORK --out docs/experiments

DATA is a folder with the texts (`text/`), instructions (`instruct/`) and evaluation sets (`eval/`)
that docs/experiments/README.md names. Every step is a command of mlmjax, which is printed before it
runs and goes on from where it was stopped; WORK holds what they write. `--stages` runs some of
them: start (embeddings from counts of neighbours), pretrain, instruct, ship (put the model into the
package), mix (three mixtures, three seeds each), ask (table 1), fit (table 3), tables.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from flax import nnx
from matplotlib.figure import Figure

from mlmjax import ModernBertForMaskedLM, load_config, load_pretrained, save_pretrained
from mlmjax.start import load_start

STAGES = ("start", "pretrain", "instruct", "ship", "mix", "ask", "fit", "tables")
MIXTURES = {
    "atp": ["objective.dummy_mlm_share=0.0"],
    "atp-mlm": ["objective.dummy_mlm_share=0.0", "objective.mlm_share=0.2"],
    "atp-dummy": [],
}
NAMES = {"atp": "ATP alone", "atp-mlm": "80 ATP + 20 MLM", "atp-dummy": "80 ATP + 20 dummy"}
SEEDS = (0, 1, 2)
MLMJAX = [sys.executable, "-m", "mlmjax"]
MIX = ["steps=122", "evaluation.every=61"]  # of 4,096 tokens: half a million
PRETRAINED, INSTRUCTED = "runs/small-mlm/export", "runs/small-atp/export"
SHIPPED, UNTRAINED, START = "mlmjax-small", "untrained", "start"
FITTED = ("small_fine_tune", "small_from_scratch")
ROOT = Path(__file__).resolve().parents[1]
CONFIGS, ASSETS = ROOT / "configs", ROOT / "mlmjax" / "assets" / "small"


def main() -> None:
    """Run the stages that are asked for, one command after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    chosen = parser.parse_args()
    data, work, out = chosen.data.resolve(), chosen.work.resolve(), chosen.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    places = {"corpus": data / "text", "eval": data / "eval", "configs": CONFIGS}
    places["mlmjax"] = ROOT / "mlmjax"
    for name, target in places.items():
        if not (work / name).exists():
            (work / name).symlink_to(target)
    for stage in (stage for stage in STAGES if stage in chosen.stages):
        if stage == "ship":
            ship(work / INSTRUCTED)
        elif stage == "tables":
            write_tables(work, out)
        else:
            for command in commands(stage, data, work):
                run(command, work)


def commands(stage: str, data: Path, work: Path) -> Iterator[list[str]]:
    """Yield the commands of a stage."""
    if stage == "start":
        save_untrained(work / UNTRAINED)
        yield [*MLMJAX, "prepare", "configs/small_mlm.toml"]
        tool = str(Path(__file__).with_name("make_small_start.py"))
        places = ["--model", UNTRAINED, "--rows", "rows/small-mlm", "--out", START]
        yield [sys.executable, tool, *places]
    elif stage == "pretrain":
        yield [*MLMJAX, "train", "configs/small_mlm.toml", f"init_from={START}", "model={}"]
    elif stage == "instruct":
        if not (work / "instruct_choose.jsonl.zst").exists():
            tool = str(Path(__file__).with_name("make_small_data.py"))
            names = ("single_token_instruct.jsonl.zst", "niv2_raw_0.parquet", "niv2_raw_1.parquet")
            files = [str(data / "instruct" / name) for name in names]
            yield [sys.executable, tool, "--out", "instruct_choose.jsonl.zst", *files]
        # The best of the mixtures on held-out answers.
        yield [*MLMJAX, "train", "configs/small_atp.toml", *MIXTURES["atp"]]
    elif stage == "mix":
        for seed, mixture in product(SEEDS, MIXTURES):
            own = [f"out=runs/small-{mixture}-{seed}", f"seed={seed}"]
            changes = [*own, *MIX, *MIXTURES[mixture]]
            yield [*MLMJAX, "train", "configs/small_atp.toml", *changes]
    elif stage == "ask":
        mixed = [export(*one) for one in product(MIXTURES, SEEDS)]
        there = [folder for folder in mixed if (work / folder).exists()]
        yield evaluation("small_zero_shot", [PRETRAINED, SHIPPED, *there])
    else:
        yield evaluation("small_fine_tune", [SHIPPED])
        yield evaluation("small_from_scratch", [UNTRAINED])


def save_untrained(folder: Path) -> None:
    """Save the network as it is before pretraining."""
    described, tokenizer = load_start(load_config(CONFIGS / "small_mlm.toml"))
    model = ModernBertForMaskedLM(described.config, rngs=nnx.Rngs(0))
    save_pretrained(model, tokenizer, folder)


def ship(export: Path) -> None:
    """Put a model into the package in bfloat16, with the card that lies there."""
    model, tokenizer = load_pretrained(export)
    names = ("training_manifest.json",)
    save_pretrained(
        model,
        tokenizer,
        ASSETS,
        dtype="bfloat16",
        card=(ASSETS / "README.md").read_text(encoding="utf-8"),
        more_files={name: (export / name).read_text(encoding="utf-8") for name in names},
    )


def evaluation(suite: str, models: Sequence[str]) -> list[str]:
    """Return the command that runs a suite on models."""
    named = [word for model in models for word in ("--model", model)]
    files = [
        "--suite",
        f"configs/suites/{suite}.toml",
        "--data",
        "eval",
        "--out",
        f"results/{suite}",
    ]
    return [*MLMJAX, "evaluate", *files, *named]


def export(mixture: str, seed: int) -> str:
    """Return the folder of an instructed model."""
    return f"runs/small-{mixture}-{seed}/export"


def run(command: Sequence[str], work: Path) -> None:
    """Print a command and run it in the working folder; stop where it fails."""
    print("$", " ".join(command), flush=True)
    own = {"PYTHONPATH": str(ROOT)}  # the package that the model is put into
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ, **own}
    if code := subprocess.run(command, cwd=work, env=environment, check=False).returncode:
        raise SystemExit(code)


def write_tables(work: Path, out: Path) -> None:
    """Write what was found: `results.json`, `tables.md` and `curves.png`.

    Curves and suites that WORK does not hold stay as they are in `results.json`.
    """
    known = out / "results.json"
    found = json.loads(known.read_text()) if known.exists() else {"curves": {}, "suites": {}}
    curves, suites = found["curves"], found["suites"]
    for name in ("small_zero_shot", *FITTED):
        path = work / "results" / name / "suite.json"
        if path.exists():
            suites[name] = json.loads(path.read_text())
    for name in (
        "small-mlm",
        "small-atp",
        *(f"small-{m}-{s}" for m, s in product(MIXTURES, SEEDS)),
    ):
        path = work / "runs" / name / "metrics.jsonl"
        if path.exists():
            curves[name] = curve(path)
    known.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    parts = []
    if "small_zero_shot" in suites:
        parts.append(table_1(suites["small_zero_shot"]["lines"]))
    if all(name in suites for name in FITTED):
        parts.append(table_3([line for name in FITTED for line in suites[name]["lines"]]))
    (out / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw(curves, out / "curves.png")


def curve(path: Path) -> list[dict[str, Any]]:
    """Return the losses of a run."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys = ("step", "split", "loss", "loss_atp", "loss_dummy", "loss_mlm", "answer_accuracy")
    return [{key: row[key] for key in keys if row.get(key) is not None} for row in rows]


def table_1(lines: Sequence[dict[str, Any]]) -> str:
    """Return the accuracy of every mixture on every task, as the mean over seeds and their range.

    The interval is of one seed's accuracy over the rows.
    """
    asked = {line["model"] for line in lines}
    mixtures = [mixture for mixture in MIXTURES if export(mixture, SEEDS[0]) in asked]
    head = ["task", "n", "chance", "majority", "un-instructed (95 %)"]
    head += [f"{NAMES[mixture]}: mean (range of seeds)" for mixture in mixtures]
    head += ["shipped (95 %)"]
    rows = []
    for task in dict.fromkeys(line["task"] for line in lines):
        own = {line["model"]: line for line in lines if line["task"] == task}
        plain, shipped = own[PRETRAINED], own[SHIPPED]
        row = [task, f"{plain['n']:,}", percent(plain["chance"]), percent(plain["majority"])]
        row.append(f"{percent(plain['score'])} ({interval(plain)})")
        for mixture in mixtures:
            scores = [own[one]["score"] for seed in SEEDS if (one := export(mixture, seed)) in own]
            low, high = percent(min(scores)), percent(max(scores))
            row.append(f"{percent(statistics.fmean(scores))} ({low} to {high})")
        rows.append([*row, f"{percent(shipped['score'])} ({interval(shipped)})"])
    return markdown(head, rows)


def table_3(lines: Sequence[dict[str, Any]]) -> str:
    """Return the accuracy of every method fine-tuned on every task, mean and deviation of seeds."""
    names = {SHIPPED: "mlmjax-small", UNTRAINED: "from scratch"}
    head = ["task", "method", "start", "trained on", "n", "accuracy (95 %)", "seeds ±", "chosen"]
    rows: list[list[str]] = []
    for line in lines:
        if not line["model"] and [row for row in rows if row[:2] == [line["task"], line["method"]]]:
            continue  # TF-IDF needs no network, and is in both suites
        chosen = line["chosen"]
        setting = f"{chosen['epochs']:g} x {chosen['learning_rate']:g}" if chosen else ""
        spread = "" if line["spread"] is None else percent(line["spread"])
        score = "diverged" if line["score"] is None else percent(line["score"])
        row = [line["task"], line["method"], names.get(line["model"], "")]
        row += [f"{line['train']:,}", f"{line['n']:,}", f"{score} ({interval(line)})"]
        rows.append([*row, spread, setting])
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    """Return a share as percent with one digit.

    >>> percent(0.1234)
    '12.3'
    """
    return f"{100 * share:.1f}"


def interval(line: dict[str, Any]) -> str:
    """Return the interval of a line of a suite."""
    return "–".join(percent(end) for end in line["ci95"]) if line["ci95"] else ""


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the held-out losses: of pretraining, of instruction, and of each mixture and seed."""
    mixed = {export(*one).split("/")[1]: one[0] for one in product(MIXTURES, SEEDS)}
    colours = dict(zip(MIXTURES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    pretraining, instruction, mixtures = figure.subplots(1, 3)
    for name, rows in curves.items():
        is_mlm = name.startswith("small-mlm")
        key = "loss_mlm" if is_mlm else "loss_atp"
        held_out = [row for row in rows if row["split"] == "validation" and key in row]
        points = zip(*((row["step"], row[key]) for row in held_out), strict=True)
        if mixture := mixed.get(name):
            label = NAMES[mixture] if name.endswith("-0") else None
            mixtures.plot(*points, marker=".", label=label, color=colours[mixture])
        else:
            axes = pretraining if is_mlm else instruction
            axes.plot(*points, marker=".", label=name)
    pretraining.set(title="held-out MLM loss", xlabel="updates of 2,048 tokens")
    instruction.set(title="held-out loss of answers", xlabel="updates of 4,096 tokens")
    mixtures.set(title="the same, three seeds a mixture", xlabel="updates of 4,096 tokens")
    for axes in (pretraining, instruction, mixtures):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
