"""README and guide are true: code runs, tables are complete, links and anchors exist."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from flax import nnx
from processes import free_port
from pydantic_core import PydanticUndefined

import mlmjax
from mlmjax.config.data import SourceConfig
from mlmjax.config.run import RunConfig, parse_config
from mlmjax.config.tables import StrictTable, decode
from mlmjax.config.task import Task

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = (
    *("guide", "data", "rows", "training", "runs", "evaluation", "suites"),
    *("scoring", "calibration", "weights", "custom_loop"),
)
"""The pages of the guide, in its order."""
TEXTS = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in PAGES}
GUIDE = "\n".join(TEXTS.values())
PODS = (ROOT / "docs" / "pods.md").read_text()
HUB_MODEL = "answerdotai/ModernBERT-Large-Instruct"


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def rows(table, prefix=""):
    """The beginning of the line that a table of keys has for each key: its name and default."""
    for name, field in table.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, StrictTable):
            yield from rows(kind, f"{prefix}{name}.")
            continue
        if field.default is PydanticUndefined:
            shown = "required"
        else:
            shown = "none" if field.default is None else f"`{json.dumps(field.default)}`"
        yield f"| `{prefix}{name}` | {shown} |"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A working directory that has what the README takes for granted, but small."""
    folder = tmp_path_factory.mktemp("readme")
    config = mlmjax.ModelConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = mlmjax.ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
    mlmjax.save_pretrained(model, tokenizer, folder / "HF_FOLDER")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "tools").symlink_to(ROOT / "tools")
    with (folder / "my.jsonl").open("w") as file:
        for number in range(600):
            answer = ("yes", "no")[number % 2]
            line = {"prompt": f"{number}: Is {answer} the answer? " * 3, "answer": answer}
            file.write(json.dumps(line) + "\n")
    return folder


def test_python_blocks_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        assert HUB_MODEL in block
        exec(compile(block.replace(HUB_MODEL, "HF_FOLDER"), "README.md", "exec"), {})
    assert (folder / "my-classifier" / "model.safetensors").is_file()


def test_texts_of_the_guide_are_scored_and_filled(capsys):
    (block,) = blocks("python", TEXTS["scoring"])
    names = {}
    exec(compile(block, "scoring.md", "exec"), names)
    assert [len(answers) for answers in names["masks"]] == [3, 3]
    assert capsys.readouterr().out.count("(' cat', ") == 2


def test_loop_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parts = blocks("python", TEXTS["custom_loop"])
    assert len(parts) + 1 == len(blocks("python", GUIDE))  # no other page has a program
    names = {}
    exec(compile("\n".join(parts), "custom_loop.md", "exec"), names)
    assert float(names["metrics"]["loss_sum"]) < 2.0  # of two targets, 21 before
    assert "nan" not in capsys.readouterr().out
    model, _ = mlmjax.load_pretrained("my-model")
    assert isinstance(model, mlmjax.ModernBertForMaskedLM)


def test_files_of_the_guide_are_read():
    run, task = map(tomllib.loads, blocks("toml", GUIDE))
    assert len(parse_config(run).data.sources) == 2
    template = decode(Task, task, "guide").prompt
    assert template == run["data"]["sources"][1]["prompt"]  # asked as it was trained


@pytest.mark.parametrize("table", [RunConfig, SourceConfig, Task])
def test_tables_of_the_guide_have_every_key_and_default(table):
    missing = [row for row in rows(table) if f"\n{row} " not in GUIDE]
    assert not missing
    known = {row for known in (RunConfig, SourceConfig, Task) for row in rows(known)}
    found = re.findall(r"^(\| `[\w.]+` \| (?:required|none|`[^`]*`) \|)", GUIDE, flags=re.MULTILINE)
    assert set(found) == known


def test_commands_run(folder):
    """Every line of the command-line section, with fewer steps and a smaller network."""
    section = README.split("## Command line")[1]
    script = re.search(r"```bash\n(.*?)```", section, flags=re.DOTALL)[1]
    assert "steps=500" in script
    small = "steps=2 model.hidden_size=16 model.num_attention_heads=2 data.validation_rows=2"
    script = script.replace("steps=500", small)
    questions = ROOT / "tests" / "data" / "mmlu_500.jsonl"
    script = script.replace("mmlu_test.parquet", f"{questions} --limit 8")
    done = run_script(script, folder)
    assert json.loads((folder / "results" / "results.json").read_text())["n"] == 8
    assert '"label"' in done.stdout
    assert (folder / "runs" / "atp-tiny" / "export" / "model.safetensors").is_file()
    assert (folder / "ORBAX_FOLDER" / "config.json").is_file()


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


def test_two_processes_of_the_pods_page_run(folder, tmp_path):
    """With a smaller network; standard output has nothing of the libraries."""
    section = PODS.split("## Two processes on one machine")[1]
    script = re.search(r"```bash\n(.*?)```", section, flags=re.DOTALL)[1]
    script = script.replace("127.0.0.1:8476", f"127.0.0.1:{free_port()}")
    small = "model.hidden_size=16 model.num_attention_heads=2 model.num_hidden_layers=1"
    script = script.replace(
        "steps=20", f"steps=2 {small} data.validation_rows=2 data.seq_length=64"
    )
    script = script.replace("--topology", f"{small} --topology")
    for name in ("configs", "my.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    done = run_script(script, tmp_path, JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="true")
    assert "cpu:2: no verdict" in done.stdout
    assert "export: runs/atp-tiny/export" in done.stdout
    assert "Gloo" not in done.stdout
    assert "Gloo" in done.stderr  # or it prints no more, and need not be kept away


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/pods.md", "docs/classifier.md", "docs/preparing.md"]
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
