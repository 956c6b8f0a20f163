"""The figures of docs/machines.md come from the commands above them."""

import re

import pytest
from pages import ROOT, commands

from mlmjax.cli.commands import cli
from mlmjax.config.run import load_config
from mlmjax.training.planning.plan import make_plan
from mlmjax.training.planning.topology import parse_topology

PAGE = (ROOT / "docs" / "machines.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))


def given_by(section, name):
    """Decode the commands of one name in a section."""
    lines = re.findall(r"^mlmjax .*$", SECTIONS[section], flags=re.M)
    found = [one.arguments for one in commands("\n".join(lines)) if one.arguments[:1] == [name]]
    return [cli.commands[name].make_context(name, rest).params for _, *rest in found]


@pytest.mark.parametrize("section", ["One 24 GB GPU", "One 80 GB GPU"])
def test_tables_of_gpus_are_what_the_commands_print(section, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.chdir(ROOT)
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", SECTIONS[section], flags=re.M)
    table = {name.removeprefix("- "): values for name, *values in rows}
    for column, given in enumerate(given_by(section, "plan")):
        plan = make_plan(load_config(given["config"], given["overrides"]), given["topology"])
        training, limit = plan["training"], plan["machine"]["memory"]
        shown = {name: values[column] for name, values in table.items()}

        def gib(size):
            return f"{size / 2**30:.2f}"

        assert plan["fits"]
        assert shown["memory, of the limit"] == (
            f"{gib(training['memory']['total'])} of {gib(limit)} GiB"
        )
        assert shown["parameters"] == f"{gib(training['parameters'])} GiB"
        assert shown["optimizer state"] == f"{gib(training['optimizer_state'])} GiB"
        for part in ("gradients", "activations"):
            assert shown[part] == f"{gib(training['estimate'][part])} GiB"
        assert shown["`remat`"] == f"`{training['remat']}`"
        micro = training["rows"] // training["accumulate"]
        assert shown["rows of a micro-batch"] == str(micro)
        if speed := shown.get("arithmetic at the GPU's peak, for one update"):
            assert speed == f"{training['seconds_at_peak']:.1f} s"


def test_every_name_and_command_of_the_page_is_known(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = re.findall(r"`([^`]+)`", SECTIONS["Names"].partition("| simulated")[0])
    names = [name for name in names if " " not in name]
    assert len(names) >= 16
    for name in names:
        parse_topology(name)
    for section in SECTIONS:
        for kind in ("plan", "train"):
            for given in given_by(section, kind):
                assert load_config(given["config"], given["overrides"])
