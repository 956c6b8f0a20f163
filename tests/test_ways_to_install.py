"""The workflow, the container and the commands of README name what exists."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import yaml
from systems import files_that_need_posix

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MACHINES = ("cpu", "cuda", "tpu")


def test_the_workflow_runs_the_script_on_every_system_and_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert matrix["python"] == [f"3.{minor}" for minor in range(11, 15)]
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    for step in job["steps"]:
        if command := step.get("run"):
            program, script = command.split()
            assert program == job["defaults"]["run"]["shell"] == "bash"
            assert (ROOT / script).is_file()
        else:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])


def test_the_scripts_parse_and_may_run():
    for script in sorted((ROOT / ".ci").iterdir()):
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True)


def test_the_ends_say_which_interpreters_are_missing(tmp_path):
    script = (ROOT / ".ci" / "ends").read_text()
    script = re.sub(r"python3\.1\d", "python-of-nobody", script)
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "ends").write_text(script)
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    command = ["bash", tmp_path / ".ci" / "ends"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not tested, because this machine has none of: python-of-nobody") == 2


def test_every_package_has_a_lowest_version_that_can_be_installed_alone():
    for line in PROJECT["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", line), line  # .ci/ends turns >= into ==


def test_machines_have_an_extra_each_and_the_container_takes_it():
    assert set(MACHINES) <= EXTRAS.keys()
    container = (ROOT / "Dockerfile").read_text()
    assert "ARG EXTRA=cpu\n" in container
    assert '".[serve,$EXTRA]"' in container
    readme = (ROOT / "README.md").read_text()
    for extra in MACHINES[1:]:
        assert f"EXTRA={extra}" in container
        assert f"pip install '.[{extra}]'" in readme


def test_extras_of_documents_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for names in re.findall(r"(?:mlmjax|/|'\.)\[([\w,]+)\]", page.read_text()):
            assert set(names.split(",")) <= EXTRAS.keys(), f"{page}: {names}"


def test_files_that_need_posix_are_known_by_their_text():
    known = {path.name for path in files_that_need_posix()}
    assert {"test_forks.py", "test_full_disk.py", "test_resume.py"} <= known
    assert not known & {"test_prompts.py", "test_verbalizer.py", "test_predictor.py"}
