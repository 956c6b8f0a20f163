"""The tables of the small model's experiments are those of the figures kept next to them."""

import json
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from pictures import read_picture

ROOT = Path(__file__).parents[3]
EXPERIMENTS = ROOT / "docs" / "experiments"
SPEC = spec_from_file_location("small_tables", ROOT / "tools" / "small_tables.py")
small_tables = module_from_spec(SPEC)
SPEC.loader.exec_module(small_tables)


def test_the_tables_are_made_of_the_kept_results(tmp_path):
    shutil.copy(EXPERIMENTS / "results.json", tmp_path)
    small_tables.write_tables(tmp_path / "no work", tmp_path)
    for name in ("results.json", "tables.md"):
        assert (tmp_path / name).read_bytes() == (EXPERIMENTS / name).read_bytes()
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn == (EXPERIMENTS / "curves.svg").read_text()
    assert {"ATP only", "held-out MLM loss"} <= set(read_picture(drawn))
    curves = json.loads((tmp_path / "results.json").read_text())["curves"]
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in small_tables.draw(curves).axes)


def test_a_mixture_is_summed_up_over_its_seeds():
    right, losses = (0.2, 0.25, 0.3), (4.0, 3.0, 2.0)
    ends = {
        f"small-atp-{seed}": {"n": 1_000, "accuracy": a, "losses": {"all": {"loss_atp": b}}}
        for seed, (a, b) in enumerate(zip(right, losses, strict=True))
    }
    others = {run: ends["small-atp-0"] for run in small_tables.mixed_runs() if run not in ends}
    _, _, first, *_ = small_tables.table_of_mixtures({**ends, **others}).splitlines()
    assert first == "| ATP only | 1,000 | 3.00 (2.00 to 4.00) | 25.0 (20.0 to 30.0) |"
