"""The Dockerfile serves: what it copies exists and is enough, and its command is accepted."""

import json
import re
import shlex
import tomllib

import pytest
from click.testing import CliRunner
from pages import ROOT

from mlmjax.cli.main import cli

LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
COPIED = [source for line in LINES if line.startswith("COPY ") for source in line.split()[1:-1]]


def test_what_is_copied_exists_and_is_all_that_the_package_names():
    assert COPIED
    for source in COPIED:
        assert (ROOT / source).exists(), source
    project = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r"^(?:readme|license-files) = (.*)$", project, flags=re.MULTILINE)
    assert {one for value in named for one in re.findall(r'"([^"]+)"', value)} <= set(COPIED)
    # Links in the package lead to copied folders.
    for path in (ROOT / "mlmjax").rglob("*"):
        if path.is_symlink():
            assert path.resolve().relative_to(ROOT.resolve()).parts[0] in COPIED


def test_the_extras_that_it_installs_exist():
    (run,) = [line for line in LINES if line.startswith("RUN ")]
    usual = dict(line.split()[1].split("=") for line in LINES if line.startswith("ARG "))
    extras = re.sub(r"\$(\w+)", lambda found: usual[found[1]], re.search(r"\.\[(.+?)\]", run)[1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "serve" in extras.split(",")
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("more", [[], ["--model", "/model"]])
def test_its_command_is_accepted(more):
    (entry,) = [line for line in LINES if line.startswith("ENTRYPOINT ")]
    program, *arguments = json.loads(entry.removeprefix("ENTRYPOINT "))
    assert program == "mlmjax"
    found = CliRunner().invoke(cli, [*arguments, *more, "--help"])
    assert found.exit_code == 0, found.output


def test_its_comments_ask_with_the_key_that_the_command_reads():
    (entry,) = [line for line in LINES if line.startswith("ENTRYPOINT ")]
    name = json.loads(entry.removeprefix("ENTRYPOINT "))[-1]
    runs = [shlex.split(line) for line in LINES if line.startswith("# ") and "docker run" in line]
    assert any(f"{name}=" in part for run in runs for part in run)
