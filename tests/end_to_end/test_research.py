"""The page on research is true: its settings decode, its commands parse and run."""

import shlex

import pytest
from pages import ROOT, blocks, commands

from mlmjax.cli.commands import cli
from mlmjax.cli.main import run
from mlmjax.config.run import ObjectiveConfig, load_config

PAGE = (ROOT / "docs" / "research.md").read_text()
SECTION = PAGE.split("\n## Published work as settings\n")[1].split("\n## ")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")][:2]
    for line in SECTION.splitlines()
    if line.startswith("| ")
][1:]
USUAL = load_config(ROOT / "configs" / "mlm_pretrain.toml").objective


@pytest.mark.parametrize(("work", "arguments"), ROWS)
def test_the_settings_of_a_work_are_read(work, arguments):
    overrides = shlex.split(arguments.strip("`"))
    objective = load_config(ROOT / "configs" / "mlm_pretrain.toml", overrides).objective
    changed = {override.partition("=")[0].removeprefix("objective.") for override in overrides}
    assert changed <= ObjectiveConfig.model_fields.keys()
    differs = {key for key in changed if getattr(objective, key) != getattr(USUAL, key)}
    assert differs == changed - {"mlm_rate"} or differs == changed


CALLS = [call for script in blocks("bash", PAGE) for call in commands(script)]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: " ".join(call.arguments))
def test_a_command_of_the_page_parses(call, monkeypatch):
    name, *rest = call.arguments
    given = cli.commands[name].make_context(name, rest).params
    if name == "train":
        monkeypatch.chdir(ROOT / "examples")
        config = load_config(given["config"], given["overrides"])
        assert {one.partition(":")[0] for one in config.objective.code} == set(given["code"])


def test_the_page_names_the_tables_that_its_commands_write():
    written = {call.arguments[call.arguments.index("--out") + 1] for call in CALLS[:-1]}
    assert len(written) == 4
    assert not [name for name in written if f"objective.mask_table={name}" not in SECTION]


def test_tables_of_the_commands_are_made_from_shipped_texts(tmp_path, monkeypatch, capsys):
    """With files that are here, and the least count that they allow."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jsonl").symlink_to(ROOT / "examples" / "notes.jsonl")
    (tmp_path / "reviews.csv").symlink_to(ROOT / "examples" / "reviews.csv")
    for call in CALLS[:-1]:
        assert run([*call.arguments, "--least", "2"]) == 0, capsys.readouterr().err
        assert "0 " not in capsys.readouterr().err.split(":")[1][:3]
