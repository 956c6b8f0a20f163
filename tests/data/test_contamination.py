"""What an export says about its training, and what an evaluation makes of it."""

import json
import shutil

import pytest
from flax import nnx
from small_models import small_config
from training import make_config

from mlmjax import InputError
from mlmjax.cli import main
from mlmjax.config.task import Task
from mlmjax.data.contamination import (
    ExcludedSet,
    TrainingFile,
    TrainingManifest,
    TrainingRun,
    TrainingSource,
    add_unknown_run,
    contamination,
    read_training_manifest,
    training_manifest,
)
from mlmjax.data.manifest import read_manifest
from mlmjax.data.preparing.prepare import prepare
from mlmjax.model.modernbert import ModernBertForMaskedLM
from mlmjax.storage import TRAINING, hash_file
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.weights.pretrained import save_pretrained

LABELS = ["red", "blue", "green", "cat", "dog"]
TASK = f"""
name = "quiz"
prompt = "{{prompt}} [unused0] [MASK]"
answer = "answer"
labels = {json.dumps(LABELS)}
verbalizer = "words"
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Models with the manifests of a run on the tasks color and animal, and of one from there."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "other.jsonl").write_text('{"body": "the sun and the moon"}\n')
    books = {"path": str(folder / "other.jsonl"), "text": "body", "name": "books"}
    first = make_config(folder, data__validation_rows=0)
    more = {"data__rows": str(folder / "more"), "data__sources": [books]}
    second = make_config(folder, data__validation_rows=0, **more)
    tokenizer = Tokenizer.from_pretrained(first.tokenizer)
    pad, cls, sep = tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id
    special = {"pad": pad, "cls": cls, "sep": sep, "bos": cls, "eos": sep}
    ids = {f"{name}_token_id": token for name, token in special.items()}
    config = small_config(vocab_size=384, num_hidden_layers=1, **ids)
    model, before = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0)), None
    for name, run in (("first", first), ("second", second)):
        rows = read_manifest(prepare(run.data, tokenizer))
        before = training_manifest(before and "first", rows, before)
        save_pretrained(model, tokenizer, folder / name, more_files={TRAINING: before.text()})
    return folder


def evaluate(folder, data, capsys, model):
    (folder / "task.toml").write_text(TASK)
    names = ["--model", str(folder / model), "--task", str(folder / "task.toml")]
    arguments = ["evaluate", "--json", *names]
    assert main.run([*arguments, "--data", str(data), "--out", str(folder / "results")]) == 0
    out, err = capsys.readouterr()
    results = json.loads((folder / "results" / "results.json").read_text())
    assert results == json.loads(out)
    return results["contamination"], results["trained_on"], err


def fresh(folder):
    path = folder / "fresh.jsonl"
    path.write_text('{"prompt": "the color: red house", "answer": "red"}\n')
    return path


def test_the_manifest_names_the_tasks_and_files_of_every_run(exports):
    (run,) = json.loads((exports / "first" / TRAINING).read_text())["runs"]
    assert run["tasks"] == ["animal", "color"]
    digest = hash_file(exports / "records.jsonl")
    assert run["sources"][0]["files"] == [{"name": "records.jsonl", "sha256": digest}]
    later = read_training_manifest(exports / "second")
    assert later.runs[:1] == read_training_manifest(exports / "first").runs
    assert [later.runs[1].tasks, later.runs[1].sources[0].name] == [["books"], "books"]


def test_the_very_file_is_found_whatever_it_is_called(exports, capsys):
    copy = exports / "copy.jsonl"
    copy.write_bytes((exports / "records.jsonl").read_bytes())
    status, found, err = evaluate(exports, copy, capsys, "second")
    assert status == "found"
    (line,) = found
    assert "trained on the file of this evaluation, copy.jsonl" in line
    assert f"not zero-shot: the model was {line}" in err


def test_tasks_of_the_same_name_are_found(tmp_path):
    known = look([run_of(tasks=["animal", "color"])], fresh(tmp_path), name="Colo_r")
    assert known.status == "found"
    found = "trained on 'color', whose name contains the name of this task, 'Colo_r'"
    assert known.lines == [f"not zero-shot: the model was {found}"]
    known = look([run_of(tasks=[f"quiz_{i}" for i in range(9)])], fresh(tmp_path))
    assert known.trained_on[0].startswith("trained on 'quiz_0',")
    assert "'quiz_4' and 4 more, whose names contain" in known.trained_on[0]


def test_a_run_of_unknown_data_makes_the_answer_unknown(tmp_path):
    start = TrainingManifest(format=1, runs=[run_of(tasks=["animal"])])
    assert look(start.runs, fresh(tmp_path)).status == "none found"
    added = add_unknown_run(start.text().encode(), "the texts given to Classifier.fit")
    (tmp_path / TRAINING).write_bytes(added)
    runs = read_training_manifest(tmp_path).runs
    assert runs[:1] == start.runs
    known = look(runs, fresh(tmp_path))
    assert known.status == "unknown"
    assert (
        "what the texts given to Classifier.fit held is not known (training run 2 of 2)"
        in known.remarks
    )
    assert known.remarks[0].endswith("were not kept out by any of the 2 training runs")
    with pytest.raises(InputError, match="not a training manifest of format 1"):
        add_unknown_run(b'{"format": 2, "runs": []}', "x")


def test_without_a_manifest_nothing_is_known(exports, capsys):
    ignore = shutil.ignore_patterns(TRAINING)
    shutil.copytree(exports / "first", exports / "bare", ignore=ignore)
    status, found, err = evaluate(exports, fresh(exports), capsys, "bare")
    assert (status, found) == ("unknown", [])
    assert "contamination: unknown: the model folder has no training manifest" in err


def run_of(**parts):
    empty = {"init_from": None, "tasks": [], "sources": [], "excluded_tasks": [], "excluded": []}
    return TrainingRun(**{**empty, **parts})


def look(runs, data=None, **keys):
    values = {"name": "quiz", "prompt": "{text} {options}", "answer": "label"} | keys
    task = Task(labels=("a", "b"), **values)
    return contamination(task, data, TrainingManifest(format=1, runs=runs))


def test_exclusion_by_overlap_is_reported_when_it_was_of_this_data(tmp_path):
    data = fresh(tmp_path)
    file = TrainingFile(name="any.jsonl", sha256=hash_file(data))
    kept_out = run_of(excluded=[ExcludedSet(task="quiz", ngram=13, files=[file])])
    partly = "not every run kept out examples that share text with quiz"
    mine = TrainingSource(name="mine", files=[TrainingFile(name="b", sha256="0" * 64)])
    some = look([kept_out, run_of(sources=[mine])], fresh(tmp_path)).lines[0]
    assert some.endswith(": training run 2 of 2 (mine)")
    for runs, name, status, remark in (
        ([kept_out], "quiz", "excluded", "examples that share 13 words in a row with quiz were"),
        ([kept_out, kept_out], "quiz", "excluded", "kept out of training"),
        ([kept_out, run_of()], "quiz", "none found", partly),
        ([kept_out], "test", "none found", "examples that share text with it were not kept out"),
        ([run_of(init_from="org/base")], "quiz", "unknown", "no file, dataset or task of quiz"),
        # A file or a task that was trained on is worse than what was kept out.
        ([kept_out, run_of(tasks=["a quiz"])], "quiz", "found", "trained on 'a quiz'"),
    ):
        known = look(runs, data, name=name)
        assert known.status == status
        assert remark in known.lines[0]
        assert known.lines[1:] == [
            f"contamination: unknown: what {run.init_from}, the start of the first run, was "
            "trained on is not known"
            for run in runs
            if run.init_from
        ]
    data.write_text('{"text": "other", "label": "a"}\n')
    changed = look([kept_out], data).remarks[0]
    assert partly in changed
    assert changed.endswith("another copy of it: the only training run")


def test_datasets_of_the_hub_are_reported_by_their_id():
    place = {"hub": "org/sets", "subset": "quiz", "split": "test", "revision": "0" * 40}
    kept_out = run_of(excluded=[ExcludedSet(task="quiz", ngram=8, **place)])
    assert look([kept_out], **place).status == "excluded"
    assert look([kept_out], **{**place, "revision": "1" * 40}).status == "none found"
    trained_on = run_of(sources=[TrainingSource(name="mine", **{**place, "split": "train"})])
    known = look([kept_out, trained_on], **place)
    assert known.status == "found"
    assert known.trained_on == ["trained on the dataset of this evaluation, mine, split train"]
    assert look([trained_on], **{**place, "subset": "other"}, name="x").status == "none found"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object"),
        ('{"format": 2, "runs": []}', "not a training manifest of format 1: format"),
        ('{"format": 1, "runs": [{"tasks": 5}]}', r"runs\.0\.init_from"),
        ("[" * 10**5, "is not valid JSON"),
    ],
)
def test_a_broken_manifest_is_rejected(tmp_path, text, message):
    (tmp_path / TRAINING).write_text(text)
    with pytest.raises(InputError, match=message):
        read_training_manifest(tmp_path)


def test_nothing_is_none_found_where_records_name_no_task(tmp_path):
    source = {"name": "mine", "records": 9, "files": [TrainingFile(name="a", sha256="0")]}
    named = run_of(tasks=["math"], sources=[TrainingSource(**source, unnamed=0)])
    assert look([named], fresh(tmp_path)).status == "none found"
    unnamed = run_of(tasks=["mine"], sources=[TrainingSource(**source, unnamed=9)])
    known = look([named, unnamed], fresh(tmp_path))
    assert known.status == "unknown"
    assert known.remarks[1:] == ["records of mine name no task"]
    some = run_of(tasks=["math", "mine"], sources=[TrainingSource(**source, unnamed=2)])
    assert look([some], fresh(tmp_path)).remarks[1:] == ["2 of 9 records of mine name no task"]


def test_manifests_of_earlier_versions_tell_by_the_names_of_their_tasks(tmp_path):
    sources = [TrainingSource(name="mine", files=[TrainingFile(name="a", sha256="0")])]
    assert look([run_of(tasks=["math"], sources=sources)], fresh(tmp_path)).status == "none found"
    assert look([run_of(tasks=["mine"], sources=sources)], fresh(tmp_path)).status == "unknown"
