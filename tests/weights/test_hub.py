"""`pytest -m hub`: the published models and datasets, on a machine that reaches the hub.

Each check is a function that a test here also runs on something local, so that it is known to run
and to fail.
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_models import small_model
from tiny_models import tensors_of, torch, transformers

from mlmjax import load_pretrained, run_evaluation, save_pretrained
from mlmjax.config.tables import shipped_names
from mlmjax.config.task import load_task
from mlmjax.data.reading.sources import read_source
from mlmjax.errors import InputError
from mlmjax.evaluation.questions import read_questions
from mlmjax.text.checks import check_row
from mlmjax.weights import hub, pretrained

BASE, INSTRUCT = "answerdotai/ModernBERT-base", "answerdotai/ModernBERT-Large-Instruct"
SLICES = Path(__file__).parents[1] / "data" / "modernbert_base_slices.json"
MMLU_ACCURACY = 0.4306  # arXiv 2502.03793, table 2
FIRST_ROWS = 20


def on_the_hub(test):
    """Mark a test; what the libraries of the network warn of is not ours to turn into errors."""
    return pytest.mark.hub(pytest.mark.filterwarnings("default")(test))


def check_slices(golden, model, tokenizer):
    """Compare logits and hidden states `[1, 5, ...]` of one sentence, and the words for a mask."""
    rows = [tokenizer.backend.encode(text["text"]).ids for text in (golden, golden["fill_mask"])]
    ids, mask = np.full((2, 2, max(map(len, rows))), tokenizer.pad_id)
    for row, mask_row, found in zip(ids, mask, rows, strict=True):
        row[: len(found)], mask_row[:] = found, np.arange(len(row)) < len(found)
    hidden = model.encode(ids, mask)
    logits = model.mlm_logits(hidden)
    for name, value in (("last_hidden_state", hidden), ("logits", logits)):
        value = value[:1, : len(rows[0])]
        assert list(value.shape) == golden[f"{name}_shape"]
        expected = golden[f"{name}[:, :3, :3]"]
        np.testing.assert_allclose(value[:, :3, :3], expected, **golden["tolerance"], err_msg=name)
    best = np.argsort(-np.asarray(logits[1, rows[1].index(tokenizer.mask_id)]))[:5]
    assert [tokenizer.decode([int(i)]).strip() for i in best] == golden["fill_mask"]["top5_tokens"]


def accuracy_bounds(accuracy, n, deviations=4):
    """The range of the accuracy on n rows drawn from those it was measured on (binomial)."""
    half = deviations * math.sqrt(accuracy * (1 - accuracy) / n)
    return accuracy - half, accuracy + half


def every_nth_row(task, n, path, data=None):
    """Write every n-th record of a task: in a table sorted by subject, its share of each."""
    with path.open("w") as file:
        for record in list(read_source(task.location(data)))[::n]:
            file.write(json.dumps(record.fields) + "\n")
    return path


def check_first_rows(task):
    questions, _ = read_questions(task, None, FIRST_ROWS)
    assert questions
    for question in questions:
        check_row(question.row, ["options"], 20)
        assert all(text.strip() for field, text in question.row.items() if field != "options")


def check_round_trip(source, out):
    model, tokenizer = load_pretrained(source)
    save_pretrained(model, tokenizer, out, dtype="source")
    before, after = tensors_of(hub.fetch(source)), tensors_of(out)
    if pretrained.DECODER not in after:  # it is the embedding, and is not written again
        before.pop(pretrained.DECODER, None)
    assert after == before


@on_the_hub
def test_modernbert_base_gives_its_published_outputs():
    check_slices(json.loads(SLICES.read_text()), *load_pretrained(BASE, attention="dense"))


@on_the_hub
def test_the_published_instruct_model_answers_mmlu(tmp_path):
    model, tokenizer = load_pretrained(INSTRUCT)
    rows = every_nth_row(load_task("mmlu"), 14, tmp_path / "mmlu.jsonl")
    results = run_evaluation(model, tokenizer, "mmlu", data=rows, protocol="published")
    assert results["n"] == 1003
    low, high = accuracy_bounds(MMLU_ACCURACY, results["n"])
    assert low <= results["accuracy"] <= high


@on_the_hub
@pytest.mark.parametrize("name", [name for name in shipped_names("task") if load_task(name).hub])
def test_every_shipped_task_is_on_the_hub(name):
    check_first_rows(load_task(name))


@on_the_hub
def test_the_published_instruct_model_comes_back_bit_by_bit(tmp_path):
    check_round_trip(INSTRUCT, tmp_path / "out")


@pytest.fixture(scope="module")
def local(tmp_path_factory, tokenizer):
    """A folder with a small model whose vocabulary is ModernBERT's."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    save_pretrained(small_model(), tokenizer, folder, dtype="bfloat16")
    return folder


def test_slices_of_a_local_model_are_those_of_transformers(local):
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(local, dtype=torch.float32).eval()
    model, tokenizer = load_pretrained(local)
    golden = json.loads(SLICES.read_text())
    assert golden["model"] == BASE
    with torch.no_grad():
        ids = tokenizer.backend.encode(golden["text"]).ids
        hidden = theirs.model(torch.tensor([ids])).last_hidden_state
        logits = theirs(torch.tensor([ids])).logits
        for name, value in (("last_hidden_state", hidden), ("logits", logits)):
            assert np.shape(golden[f"{name}[:, :3, :3]"]) == (1, 3, 3)
            golden[f"{name}_shape"] = list(value.shape)
            golden[f"{name}[:, :3, :3]"] = value[:, :3, :3].tolist()
        ids = tokenizer.backend.encode(golden["fill_mask"]["text"]).ids
        best = theirs(torch.tensor([ids])).logits[0, ids.index(tokenizer.mask_id)].topk(5).indices
    golden["fill_mask"]["top5_tokens"] = [tokenizer.decode([int(i)]).strip() for i in best]
    check_slices(golden, model, tokenizer)
    for name in ("last_hidden_state[:, :3, :3]", "logits[:, :3, :3]"):
        wrong = copy.deepcopy(golden)
        wrong[name][0][2][1] += 0.01
        with pytest.raises(AssertionError, match=name.partition("[")[0]):
            check_slices(wrong, model, tokenizer)
    wrong = copy.deepcopy(golden)
    wrong["fill_mask"]["top5_tokens"].reverse()
    with pytest.raises(AssertionError):
        check_slices(wrong, model, tokenizer)


def test_bounds_hold_the_published_figure_and_not_that_of_a_guess():
    low, high = accuracy_bounds(MMLU_ACCURACY, 1003)
    assert (round(low, 3), round(high, 3)) == (0.368, 0.493)
    rng = np.random.default_rng(0)
    drawn = rng.binomial(1003, MMLU_ACCURACY, 10_000) / 1003
    assert ((low <= drawn) & (drawn <= high)).mean() > 0.999
    assert low > 0.27  # always the commonest letter


@pytest.mark.data
def test_every_nth_question_is_the_share_of_each_subject(test_data, tmp_path):
    path = test_data / "eval" / "mmlu_test.parquet"
    task = load_task("mmlu")
    rows = every_nth_row(task, 14, tmp_path / "rows.jsonl", path)
    questions, _ = read_questions(task, rows, None)
    assert len(questions) == 1003
    drawn = [question.group for question in questions]
    for subject in pq.read_table(path, columns=["subject"])["subject"].value_counts():
        count = subject["counts"].as_py()
        assert abs(drawn.count(subject["values"].as_py()) - count / 14) < 1


def test_first_rows_of_a_local_task_are_read(tmp_path):
    rows = [{"text": "fine", "label": "good"}, {"text": "dull", "label": "bad"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("sst2").model_copy(
        update={"hub": str(tmp_path), "split": "test", "labels": ("bad", "good")}
    )
    check_first_rows(task)
    with pytest.raises(InputError, match="cannot be read"):
        check_first_rows(task.model_copy(update={"split": "train"}))


def test_a_local_model_comes_back_bit_by_bit(local, tmp_path):
    check_round_trip(local, tmp_path / "out")
    assert {dtype for dtype, *_ in tensors_of(tmp_path / "out").values()} == {"bfloat16"}


def test_without_a_hub_the_checks_fail():
    with pytest.raises(InputError, match=r"not in the cache, and the hub|switched off"):
        check_round_trip("nobody/nothing-at-all", "unused")
