"""The corpus of hostile inputs: every command exits as declared, says why, and harms nothing."""

import hashlib
import io
import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from hostile import checkpoints, data, models, runs, tasks, texts, weights
from hostile.good import write_good
from safetensors.numpy import load_file, save_file

from mlmjax import Tokenizer
from mlmjax.cli import main
from mlmjax.data.rows import open_rows
from mlmjax.errors import InputError
from mlmjax.weights.pretrained import load_pretrained
from mlmjax.weights.tensors.tensor_files import WEIGHTS

ROOT = Path(__file__).parents[2]
KINDS = (weights, models, data, runs, checkpoints, tasks, texts)
WRITTEN = [case for kind in KINDS for case in kind.cases()]
CASES = {re.sub(r"[^\w.]+", "-", case.name).strip("-"): case for case in WRITTEN}
TOOL = runpy.run_path(str(ROOT / "tools" / "convert_weights.py"))
PROGRAMS = {"mlmjax": main.run, "convert_weights.py": TOOL["run"]}
MOST_MEMORY = 300 * 1024  # KiB that a rejection may take, with a step compiled before it
MOST_LINES = 22  # the first line, 20 details, and the number of further ones


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Write the inputs that every case changes a copy of."""
    folder = tmp_path_factory.mktemp("hostile") / "good"
    folder.mkdir()
    write_good(folder)
    return folder


@pytest.fixture(scope="module")
def _used(good, tmp_path_factory):
    """Import and compile before any case, so that no rejection has to."""
    folder = tmp_path_factory.mktemp("used") / "good"
    shutil.copytree(good, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main.run(["train", "run.toml"]) == 0


@pytest.fixture
def perform(_used, good, tmp_path, monkeypatch, capsys):
    """Write a case and run its command; return its folder, exit code, stdout and stderr."""

    def run(case):
        folder = tmp_path / "case"
        case.write(good, folder)
        monkeypatch.chdir(folder)
        stdin = io.BufferedReader(io.BytesIO(case.stdin.encode()))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
        before = contents(folder)
        program, *arguments = case.command
        code = PROGRAMS[program](arguments)
        check_harmless(case, before, contents(folder))
        return folder, code, *capsys.readouterr()

    return run


def contents(folder):
    """Return every name below a folder, with a hash of its content or the target of its link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "other"
    return found


def check_harmless(case, before, after):
    """Check that a command changes and leaves nothing but what the case allows it to write."""

    # Sources that were read before the error are kept for the next try.
    kept = ["rows.partial"] if any(fnmatch(n, "rows.partial/stage/*.json") for n in after) else []

    def is_ours(name):
        return any(fnmatch(name, own) or fnmatch(name, f"{own}/*") for own in (*case.writes, *kept))

    assert [n for n in before if before[n] != after.get(n) and not is_ours(n)] == []
    assert [n for n in after if n not in before and not is_ours(n)] == []


def check_said(case, code, out, err):
    assert "Traceback" not in err
    assert "internal error" not in err
    assert code == case.exit, err
    if code == 0:
        assert case.says in out + err
        return
    lines = err.splitlines()
    start = f"{case.command[0]}: "
    first = next((i for i, line in enumerate(lines) if line.startswith(start)), None)
    assert first is not None, err
    assert case.says in lines[first]
    assert len(lines[first]) < 1000
    assert len(lines) - first <= MOST_LINES
    assert out == ""


@pytest.mark.parametrize("name", CASES)
def test_case(name, perform, request):
    if name.startswith(("checkpoint", "conversion")):
        request.getfixturevalue("orbax_leftovers")
    case = CASES[name]
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MOST_MEMORY
    _, code, out, err = perform(case)
    check_said(case, code, out, err)
    assert code == 0 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < limit


def test_the_corpus_is_large_and_not_only_rejected():
    assert len(CASES) == len(WRITTEN) >= 150
    assert sum(case.exit == 0 for case in CASES.values()) >= 20


@pytest.mark.long
def test_the_command_itself(good, tmp_path):
    case = CASES["checkpoint-with-bits-flipped"]
    case.write(good, tmp_path / "case")
    ended = subprocess.run(
        [sys.executable, "-m", *case.command],
        cwd=tmp_path / "case",
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8"},  # compiled before
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    check_said(case, ended.returncode, ended.stdout, ended.stderr)


# --- what exit codes do not show -------------------------------------------------------------


def test_prompts_that_imitate_the_template_have_one_slot(perform):
    folder, code, _, _ = perform(CASES["data-with-prompts-that-imitate-the-template"])
    assert code == 0
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    (rows,) = open_rows(folder / "rows", "train")
    examples = [example for row in range(len(rows)) for example in rows[row]]
    assert len(examples) == 8
    prompts = set()
    for example in examples:
        ids, slot = example.ids.tolist(), example.answer_position
        special = [i for i, token in enumerate(ids) if token in tokenizer.special_ids]
        # The mask of this tokenizer does not include the space before it.
        assert special == [0, slot - 2, len(ids) - 1]
        assert [*ids[slot - 2 : slot]] == [tokenizer.anchor_id, *tokenizer.encode_plain(" ")]
        assert tokenizer.decode([ids[slot]]) == " red"
        prompts.add(tokenizer.decode(ids[1 : slot - 2]).rstrip())
    assert prompts == {prompt.rstrip() for prompt in data.INJECTED}


def test_odd_texts_are_answered_one_line_each(perform):
    _, code, out, err = perform(CASES["texts-odd"])
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == len(texts.ODD) + 1
    assert all(sum(a["probabilities"].values()) == pytest.approx(1.0, abs=1e-5) for a in answers)
    assert re.fullmatch(  # the last line, after those of the progress on a slow machine
        r"warning: 1 of the texts did not fit and were truncated: prompt and text together "
        r"have at most [\d,]+ tokens, all that the model reads",
        err.splitlines()[-1],
    )


def test_byte_order_marks_and_carriage_returns_are_ignored(good, perform, monkeypatch, capsys):
    _, _, marked, _ = perform(CASES["texts-of-Windows"])
    Path("labels").write_text("red\ta warm one\nblue\n")
    shutil.copy(good / "texts.txt", "texts.txt")
    main.run(CASES["texts-of-Windows"].command[1:])
    assert capsys.readouterr().out == marked
    assert [json.loads(line)["label"] in ("red", "blue") for line in marked.splitlines()]


@pytest.fixture
def model(good, tmp_path):
    """A copy of the good model for a test to change."""
    return Path(shutil.copytree(good / "model", tmp_path / "model"))


def test_all_problems_of_the_weights_are_listed_at_once(model):
    tensors = load_file(model / WEIGHTS)
    del tensors[weights.NORM]
    tensors["extra.weight"] = np.ones(2, np.float32)
    tensors["head.norm.weight"] = np.ones(3, np.int32)
    save_file(tensors, model / WEIGHTS)
    with pytest.raises(InputError) as caught:
        load_pretrained(model)
    lines = [caught.value.message, *caught.value.details]
    for expected in (
        f"{weights.NORM}: is missing",
        "extra.weight: is unexpected",
        "head.norm.weight: has shape [3]; expected [16]",
        "head.norm.weight: has dtype I32",
    ):
        assert sum(expected in line for line in lines) == 1


def test_weights_truncated_anywhere_are_rejected(model):
    whole = (model / WEIGHTS).read_bytes()
    for length in np.random.default_rng(0).integers(0, len(whole), 40):
        (model / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(InputError):
            load_pretrained(model)


def test_remote_code_is_reported(perform, caplog):
    perform(CASES["config-with-code-that-is-not-run"])
    assert "auto_map" in caplog.text


def test_an_older_run_without_checkpoints_is_not_taken_for_this_one(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    exported = Path("out/export/model.safetensors")
    before = exported.read_bytes()
    shutil.rmtree("out/checkpoints")
    assert main.run(["train", "run.toml", "seed=1"]) == 0
    assert exported.read_bytes() != before
