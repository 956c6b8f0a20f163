"""Train the small model, compare mixtures of objectives, and write tables and a picture.

    python tools/small_experiments.py --data DATA --work WORK --out docs/experiments

DATA is a folder with the texts (`text/`), instructions (`instruct/`) and evaluation sets (`eval/`)
that docs/experiments/README.md names. Most steps are commands of mlmjax or tools/. The script
prints each before it runs, and they write to WORK. Run it again to resume. `--stages` selects:

- start: word vectors from counts of neighbours
- pretrain, instruct: train the small model
- ship: replace the model in the package
- mix: train three mixtures of objectives with three seeds each
- ask, fit: evaluate zero-shot, and fine-tune
- tables: write the tables and the picture
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from flax import nnx
from small_tables import PRETRAINED, SEEDS, SHIPPED, UNTRAINED, export, write_tables

from mlmjax import ModernBertForMaskedLM, load_config, load_pretrained, save_pretrained
from mlmjax.training.run.initial_model import load_start

STAGES = ("start", "pretrain", "instruct", "ship", "mix", "ask", "fit", "tables")
MIXTURES = {
    "atp": ["objective.dummy_mlm_share=0.0"],
    "atp-mlm": ["objective.dummy_mlm_share=0.0", "objective.mlm_share=0.2"],
    "atp-dummy": [],
}
MLMJAX = [sys.executable, "-m", "mlmjax"]
MIX = ["steps=122", "evaluation.every=61"]  # of 4,096 tokens: half a million
INSTRUCTED, START = "runs/small-atp/export", "start"
ROOT = Path(__file__).resolve().parents[1]
CONFIGS, ASSETS = ROOT / "configs", ROOT / "mlmjax" / "assets" / "small"


def main() -> None:
    """Run the chosen stages, one command after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    chosen = parser.parse_args()
    data, work, out = chosen.data.resolve(), chosen.work.resolve(), chosen.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    links = {"corpus": data / "text", "eval": data / "eval", "configs": CONFIGS}
    links["mlmjax"] = ROOT / "mlmjax"
    for name, target in links.items():
        if not target.is_dir():
            raise SystemExit(
                f"{target}: is not a folder; docs/experiments says what --data must hold"
            )
        link = work / name
        if link.is_symlink():
            link.unlink()
        elif link.exists():
            raise SystemExit(
                f"{link}: exists, but must become a link to {target}; give another --work"
            )
        link.symlink_to(target)
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
        folders = ["--model", UNTRAINED, "--rows", "rows/small-mlm", "--out", START]
        yield [sys.executable, tool, *folders]
    elif stage == "pretrain":
        yield [*MLMJAX, "train", "configs/small_mlm.toml", f"init_from={START}", "model={}"]
    elif stage == "instruct":
        if not (work / "instruct_choose.jsonl.zst").exists():
            tool = str(Path(__file__).with_name("make_small_data.py"))
            names = ("single_token_instruct.jsonl.zst", "niv2_raw_0.parquet", "niv2_raw_1.parquet")
            files = [str(data / "instruct" / name) for name in names]
            yield [sys.executable, tool, "--out", "instruct_choose.jsonl.zst", *files]
        # This mixture is the best one on held-out answers.
        yield [*MLMJAX, "train", "configs/small_atp.toml", *MIXTURES["atp"]]
    elif stage == "mix":
        for seed, mixture in product(SEEDS, MIXTURES):
            own = [f"out=runs/small-{mixture}-{seed}", f"seed={seed}"]
            changes = [*own, *MIX, *MIXTURES[mixture]]
            yield [*MLMJAX, "train", "configs/small_atp.toml", *changes]
    elif stage == "ask":
        mixed = [export(*one) for one in product(MIXTURES, SEEDS)]
        trained = [folder for folder in mixed if (work / folder).exists()]
        yield evaluation("small_zero_shot", [PRETRAINED, SHIPPED, *trained])
    else:
        yield evaluation("small_fine_tune", [SHIPPED])
        yield evaluation("small_from_scratch", [UNTRAINED])


def save_untrained(folder: Path) -> None:
    """Save the network before pretraining."""
    described, tokenizer, _ = load_start(load_config(CONFIGS / "small_mlm.toml"))
    model = ModernBertForMaskedLM(described.config, rngs=nnx.Rngs(0))
    save_pretrained(model, tokenizer, folder)


def ship(export: Path) -> None:
    """Put a model into the package in bfloat16, with the card that is there."""
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
    paths = ["--suite", f"configs/suites/{suite}.toml", "--data", "eval"]
    return [*MLMJAX, "evaluate", *paths, "--out", f"results/{suite}", *named]


def run(command: Sequence[str], work: Path) -> None:
    """Print a command and run it in the working folder; exit if it fails."""
    print("$", " ".join(command), flush=True)
    own = {"PYTHONPATH": str(ROOT)}  # the package that gets the model
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ, **own}
    if code := subprocess.run(command, cwd=work, env=environment, check=False).returncode:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
