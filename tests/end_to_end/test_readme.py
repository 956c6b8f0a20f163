"""README and guide are true: code runs, tables are complete, links and anchors exist."""

import io
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib

import pytest
from pages import ROOT, blocks, commands
from processes import free_port
from pydantic_core import PydanticUndefined
from small_models import small_model
from tables import labelled_rows, write_table

import mlmjax
from mlmjax.cli import main
from mlmjax.cli.commands import cli
from mlmjax.config.data import SourceConfig
from mlmjax.config.run import AdapterConfig, RunConfig, load_config, parse_config
from mlmjax.config.suite import Entry, Missing, Part, Suite
from mlmjax.config.tables import StrictTable, decode
from mlmjax.config.task import Task

README = (ROOT / "README.md").read_text()
PAGES = (
    *("guide", "data", "rows", "training", "runs", "evaluation", "suites"),
    *("scoring", "texts", "calibration", "weights", "sharing", "custom_loop", "research"),
)
"""The pages of the guide, in its order."""
TEXTS = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in PAGES}
GUIDE = "\n".join(TEXTS.values())
PODS = (ROOT / "docs" / "pods.md").read_text()
HUB_MODEL = "answerdotai/ModernBERT-Large-Instruct"
SMALL = (
    "steps=2 model.hidden_size=16 model.num_attention_heads=2 model.num_hidden_layers=1 "
    "data.validation_rows=2 data.seq_length=64"
)


TABLES = (RunConfig, SourceConfig, Task, Suite, Entry, Missing, Part)
HUB = ("hub", "subset", "folder", "revision")


def rows(table, prefix=""):
    """The beginning of the line that a table of keys has for each key: its name and default."""
    for name, field in table.model_fields.items():
        kind = field.annotation
        if kind is Part or (table is Part and name in HUB):  # described by sentences
            continue
        if kind == AdapterConfig | None:
            kind = AdapterConfig
        if isinstance(kind, type) and issubclass(kind, StrictTable):
            yield from rows(kind, f"{prefix}{name}.")
            continue
        if field.default is PydanticUndefined:
            shown = "required"
        elif table is RunConfig and name == "steps":
            shown = "required"  # or epochs in its place
        else:
            shown = "none" if field.default is None else f"`{json.dumps(field.default)}`"
        yield f"| `{prefix}{name}` | {shown} |"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer):
    """What the README takes for granted, but small: a model and training data."""
    folder = tmp_path_factory.mktemp("inputs")
    model = small_model(num_hidden_layers=1, max_position_embeddings=8192)
    mlmjax.save_pretrained(model, tokenizer, folder / "HF_FOLDER")
    with (folder / "my.jsonl").open("w") as file:
        for number in range(200):
            answer = ("yes", "no")[number % 2]
            line = {"prompt": f"{number}: Is {answer} the answer? " * 3, "answer": answer}
            file.write(json.dumps(line) + "\n")
    return folder


def link_inputs(inputs, folder):
    """Make a folder what the README's working directory is; return it."""
    for path in (*inputs.iterdir(), ROOT / "configs", ROOT / "tools"):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def folder(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return link_inputs(inputs, tmp_path)


@pytest.fixture(scope="module")
def shared_folder(inputs, tmp_path_factory):
    """A folder for commands that use what the commands before them wrote."""
    return link_inputs(inputs, tmp_path_factory.mktemp("shared"))


PROGRAMS = blocks("python", README)


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_python_blocks_run(folder, number):
    name = HUB_MODEL if number else "mlmjax-small"
    assert name in PROGRAMS[number]
    program = PROGRAMS[number].replace(name, "HF_FOLDER")
    exec(compile(program, "README.md", "exec"), {})


@pytest.mark.long
def test_the_first_program_learns_offline_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(PROGRAMS[0], "README.md", "exec"), names)
    assert capsys.readouterr().out == f"{names['answers']}\n"
    assert f"print(answers)  # {names['answers']}" in PROGRAMS[0]
    assert not set(names["classes"]) & set(names["texts"])
    assert len(names["gold"]) == len(names["texts"]) > len(names["classes"])
    before = mlmjax.Classifier("mlmjax-small", names["classes"], answer="words")
    assert set(before.predict(names["texts"])) == {"account"}  # as the text above it says
    assert names["classifier"].score(names["texts"], names["gold"]) == 1.0
    assert (tmp_path / "my-classifier" / "model.safetensors").is_file()


def test_the_first_program_on_classifiers_runs_as_written(folder):
    program = blocks("python", (ROOT / "docs" / "classifier.md").read_text())[0]
    names = {}
    exec(compile(program.replace("mlmjax-small", "HF_FOLDER"), "classifier.md", "exec"), names)
    assert len(names["train_texts"]) == len(names["train_labels"])
    assert mlmjax.Classifier.from_pretrained("my-classifier").settings_.max_length == 128


def test_texts_of_the_guide_are_scored_and_filled(capsys):
    (block,) = blocks("python", TEXTS["texts"])
    names = {}
    exec(compile(block, "texts.md", "exec"), names)
    assert [len(answers) for answers in names["masks"]] == [3, 3]
    assert capsys.readouterr().out.count("(' cat', ") == 2
    assert sorted(token.step for token in names["text"].tokens) == [0, 1, 2]


def test_loop_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parts = blocks("python", TEXTS["custom_loop"])
    assert len(parts) + 1 == len(blocks("python", GUIDE))  # no other page has a program
    names = {}
    exec(compile("\n".join(parts), "custom_loop.md", "exec"), names)
    assert names["loss"] < 0.3  # 10 before
    assert capsys.readouterr().out.endswith("[[0.9 0.1]\n [0.1 0.9]]\n")
    model, _ = mlmjax.load_pretrained("my-model")
    assert isinstance(model, mlmjax.ModernBertForMaskedLM)


def test_files_of_the_guide_are_read():
    run, task = map(tomllib.loads, blocks("toml", GUIDE))
    assert len(parse_config(run).data.sources) == 2
    template = decode(Task, task, "guide").prompt
    assert template == run["data"]["sources"][1]["prompt"]  # asked as it was trained


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_the_guide_have_every_key_and_default(table):
    missing = [row for row in rows(table) if f"\n{row} " not in GUIDE]
    assert not missing
    known = {row for known in TABLES for row in rows(known)}
    found = re.findall(r"^(\| `[\w.]+` \| (?:required|none|`[^`]*`) \|)", GUIDE, flags=re.MULTILINE)
    assert set(found) == known


def script_of(text, heading):
    """Return the first shell script below a heading."""
    return blocks("bash", re.split(f"\n##+ {re.escape(heading)}\n", text)[1])[0]


def readme_script():
    """Return the command-line section with fewer steps, a smaller network and two questions."""
    script = script_of(README, "Training and evaluation")
    assert "steps=500" in script
    questions = ROOT / "tests" / "data" / "mmlu_500.jsonl"
    script = script.replace("mmlu_test.parquet", f"{questions} --limit 2")
    return script.replace("steps=500", f"{SMALL} mesh.data=1")


CHECKS = (  # what each command leaves behind or prints
    lambda folder, out: (folder / "runs" / "atp-tiny" / "export" / "model.safetensors").is_file(),
    lambda folder, out: json.loads((folder / "results" / "results.json").read_text())["n"] == 2,
    lambda folder, out: '"label"' in out,
    lambda folder, out: (folder / "ORBAX_FOLDER" / "config.json").is_file(),
)


CALLS = commands(readme_script())


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_commands_run(shared_folder, number, monkeypatch, capsys):
    """In this process, which has imported and compiled before; each needs those before it."""
    command = CALLS[number]
    monkeypatch.chdir(shared_folder)
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(command.stdin.encode())))
    )
    run, arguments = main.run, command.arguments
    if command.program == "python":
        script, *arguments = arguments
        run = runpy.run_path(script)["run"]
    assert run(arguments) == 0, capsys.readouterr().err
    assert CHECKS[number](shared_folder, capsys.readouterr().out)


def test_a_table_becomes_answers_as_written(folder):
    rows = [
        {"ticket": row["id"], "body": row["text"], "team": row["label"]}
        for row in labelled_rows(40)
    ]
    write_table(folder / "tickets.csv", rows)
    write_table(folder / "new.csv", rows[:5])
    fit, classify = commands(script_of(README, "From a table to a classifier"))
    assert main.run([*fit.arguments, "--model", "HF_FOLDER", "--epochs", "1"]) == 0
    assert (folder / "tickets-classifier" / "report" / "report.html").is_file()
    assert main.run(classify.arguments) == 0
    header, *answers = (folder / "answers.csv").read_text().splitlines()
    assert header == "id,label,probability,probability_money,probability_sports"
    assert [line.split(",")[0] for line in answers] == [f"T{i}" for i in range(5)]


def test_the_page_on_tables_has_every_option():
    page = (ROOT / "docs" / "tables.md").read_text()
    everywhere = {option.opts[-1] for option in cli.params} | {"--version"}
    for name, heading in (("fit", "Fit"), ("classify", "Classify")):
        section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        for option in cli.commands[name].params:
            known = option.opts[0]
            shared = ("--revision", "--dtype", "--labels", "--batch-size", "--model")
            if known.startswith("--") and known not in shared and option.opts[-1] not in everywhere:
                assert f"\n| `{known}" in section, known


@pytest.mark.long
def test_commands_run_in_a_shell(folder):
    out = run_script(readme_script(), folder).stdout
    assert all(check(folder, out) for check in CHECKS)


def run_script(script, folder, **variables):
    shim = f'mlmjax() {{ "{sys.executable}" -m mlmjax "$@"; }}\n'
    shim += f'python() {{ "{sys.executable}" "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-euc", shim + script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


PODS_SCRIPT = script_of(PODS, "Two processes on one machine")


def test_commands_of_the_pods_page_parse(folder):
    found = [command.arguments for command in commands(PODS_SCRIPT)]
    parsed = [(name, cli.commands[name].make_context(name, rest).params) for name, *rest in found]
    assert sorted(name for name, _ in parsed) == ["plan", "train", "train"]
    assert {given["process"] for name, given in parsed if name == "train"} == {0, 1}
    for _, given in parsed:
        assert load_config(given["config"], given["overrides"])


@pytest.mark.long
def test_two_processes_of_the_pods_page_run(folder):
    """With a smaller network; standard output has nothing of the libraries."""
    script = PODS_SCRIPT.replace("127.0.0.1:8476", f"127.0.0.1:{free_port()}")
    script = script.replace("steps=20", SMALL).replace("--topology", f"{SMALL} --topology")
    done = run_script(script, folder, JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="true")
    assert "cpu:2: no verdict" in done.stdout
    assert "export: runs/atp-tiny/export" in done.stdout
    assert "Gloo" not in done.stdout
    assert "Gloo" in done.stderr  # otherwise it prints nothing, and need not be kept away


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/embedding.md",
        "docs/deploying.md",
        "docs/pods.md",
        "docs/machines.md",
        "docs/classifier.md",
        "docs/preparing.md",
    ]
    + [f"docs/{name}.md" for name in PAGES],
)
def test_links_lead_somewhere(page):
    here = ROOT / page
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", here.read_text()):
        if not target.startswith("http"):
            there = here.parent / target if target else here
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def test_the_guide_leads_to_all_its_pages():
    assert not [name for name in PAGES[1:] if f"]({name}.md" not in TEXTS["guide"]]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_the_guide_is_short(name):
    """At most 300 lines, and a heading at least every 40."""
    lines = TEXTS[name].splitlines()
    assert len(lines) <= 300
    headings = [number for number, line in enumerate(lines) if re.match("#+ ", line)]
    ends = [*headings[1:], len(lines)]
    gaps = zip(headings, ends, strict=True)
    assert not [lines[start] for start, end in gaps if end - start > 40]


def test_the_two_commands_are_those_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install '.[test]' && pytest" in README
    assert "'.[test]'" in ci
    assert re.search(r"^pytest$", ci, flags=re.MULTILINE)
    assert "mlmjax demo" in ci


def test_every_extra_that_is_named_can_be_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "mlmjax").rglob("*.py")]
    # A path such as /mnt/shared/mlmjax[tpu] names an extra of a clone.
    pattern = re.compile(r"(?<!/)mlmjax\[(\w+)\]")
    named = {name for file in files for name in pattern.findall(file.read_text())}
    clone = {name for file in files for name in re.findall(r"'\.\[(\w+)\]'", file.read_text())}
    assert named | clone <= project["optional-dependencies"].keys()
    table = dict(re.findall(r"^\| `pip install 'mlmjax\[(\w+)\]'` \| (.+) \|$", README, re.M))
    assert table.keys() == named  # the commands that name them lead to README
