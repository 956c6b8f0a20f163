"""The commands and tables of docs/machines.md and docs/pods.md are those of plans."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from mlmjax.config.run import load_config
from mlmjax.parallel import sharding
from mlmjax.training.planning import plan
from mlmjax.training.planning.arithmetic import estimate
from mlmjax.training.planning.topology import FRACTION, GIB, parse_topology
from mlmjax.training.run.initial_model import describe_start

DOCS = Path(__file__).parents[3] / "docs"
PAGES = {name: (DOCS / name).read_text() for name in ("machines.md", "pods.md")}
COMMAND = re.compile(r"mlmjax (plan|train) (?:\S*/)?(configs/\w+\.toml)([^`\n#\"&|]*)")


def recipes(what):
    """Return page, run file, overrides and options of each command of the pages."""
    found = []
    for page, text in PAGES.items():
        for kind, path, rest in COMMAND.findall(text):
            words = shlex.split(rest)
            options = dict(pairwise(words))
            overrides = [word for word in words if re.match(r"[a-z_.0-9]+=", word)]
            if kind == what and "..." not in words:
                found.append((page, path, tuple(overrides), options.get("--topology")))
    return sorted(set(found), key=str)


def test_the_machines_that_people_have_a_recipe_for():
    planned = {parse_topology(topology).name for *_, topology in recipes("plan")}
    assert {
        "v5e:4x4", "v6e:2x4", "rtx4090-24g:1", "a100-80g:1", "v5e:16x16", "v6e:16x16", "v5p:4x4x4",
    } <= planned  # fmt: skip


@pytest.mark.parametrize("recipe", recipes("train"), ids=str)
def test_run_files_of_recipes_load(recipe):
    _, path, overrides, _ = recipe
    load_config(path, overrides)


@pytest.mark.parametrize("recipe", recipes("plan"), ids=str)
def test_recipes_fit_and_tables_have_their_figures(monkeypatch, recipe):
    """GPUs by their whole plan; TPUs by arithmetic, which was seen to be above the compiler."""
    monkeypatch.delenv(FRACTION, raising=False)
    monkeypatch.setattr(plan, "may_have_gpus", lambda: False)
    page, path, overrides, topology = recipe
    config, machine = load_config(path, overrides), parse_topology(topology)
    if machine.platform == "gpu":
        found = plan.make_plan(config, topology)
        assert found["fits"], "\n".join(plan.report(found))
        training = found["training"]
    else:
        sizes = sharding.mesh_shape(config.mesh, machine.devices)
        training = estimate(config, describe_start(config), sizes)["training"]
    if machine.memory is None:
        return
    total = training["memory"]["total"]
    assert total <= machine.memory
    if page == "machines.md":
        assert f"{total / GIB:.2f} of {machine.memory / GIB:.2f} GiB" in PAGES[page]
