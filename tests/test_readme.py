"""The README is true: its code runs, its commands run, its links lead somewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

import mlmjax

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
HUB_MODEL = "answerdotai/ModernBERT-Large-Instruct"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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


def test_commands_run(folder):
    """Every line of the command-line section, with fewer steps and a smaller network."""
    section = README.split("## Command line")[1]
    script = re.search(r"```bash\n(.*?)```", section, flags=re.DOTALL)[1]
    assert "steps=500" in script
    small = "steps=2 model.hidden_size=16 model.num_attention_heads=2 data.validation_rows=2"
    script = script.replace("steps=500", small)
    questions = ROOT / "tests" / "data" / "mmlu_500.jsonl"
    script = script.replace("mmlu_test.parquet", f"{questions} --limit 8")
    shim = f'mlmjax() {{ "{sys.executable}" -m mlmjax "$@"; }}\n'
    shim += f'python() {{ "{sys.executable}" "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-euc", shim + script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "results" / "results.json").read_text())["n"] == 8
    assert '"label"' in done.stdout
    assert (folder / "runs" / "atp-tiny" / "export" / "model.safetensors").is_file()
    assert (folder / "ORBAX_FOLDER" / "config.json").is_file()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_two_commands_are_those_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install '.[test]' && pytest" in README
    assert "'.[test]'" in ci
    assert re.search(r"^pytest$", ci, flags=re.MULTILINE)
    assert "mlmjax demo" in ci
