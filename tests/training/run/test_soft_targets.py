"""Run files whose answers are distributions or have weights: rows, loss, resume and devices."""

import json
import random

import jax
import numpy as np
import pytest
from training import OTHERS, TASKS, assert_same, make_config

from mlmjax.data.batch import UNUSED
from mlmjax.data.manifest import read_manifest
from mlmjax.data.preparing.prepare import prepare
from mlmjax.errors import InputError
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.run.inputs import open_loaders
from mlmjax.training.run.train import run_training

pytestmark = pytest.mark.usefixtures("orbax_leftovers")

COLORS = TASKS["color"]
LIST, TABLE, HARD, ONE_HOT = "list", "table", "hard", "one_hot"


def answer_of(kind, gold, shares):
    return {
        LIST: shares,
        TABLE: dict(zip(COLORS, shares, strict=True)),
        HARD: COLORS[gold],
        ONE_HOT: {COLORS[gold]: 1.0},
    }[kind]


def write_table(path, kinds, count=200, **more):
    """Write texts that name a color, whose answers are of these kinds in turn."""
    rng = random.Random(2)
    with path.open("w") as file:
        for number in range(count):
            gold = rng.randrange(3)
            shares = [0.1, 0.1, 0.1]
            shares[gold] = 0.8
            words = " ".join([COLORS[gold], *rng.choices(OTHERS, k=rng.randint(1, 6))])
            answer = answer_of(kinds[number % len(kinds)], gold, shares)
            line = {"text": words, "answer": answer, "sure": float(number % 4), **more}
            file.write(json.dumps(line) + "\n")
    return str(path)


def config_of(folder, name, kinds=(LIST, TABLE), source=(), **changes):
    """A run on a table of answers; another name has other rows and another run folder."""
    make_config(folder)  # writes the tokenizer
    path = write_table(folder / f"{name}.jsonl", kinds)
    usual = {"path": path, "prompt": "{text}\nAnswer: [unused0] [MASK]", "answer": "answer"}
    given = usual | {"labels": COLORS} | dict(source)
    source = {key: value for key, value in given.items() if value is not None}
    settings = {"objective": {}, "data__sources": [source], "data__rows": str(folder / name)}
    return make_config(folder, out=str(folder / f"{name}-run"), **settings | changes)


def batches(config):
    """Return the training batches of an epoch, and the manifest."""
    tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    prepare(config.data, tokenizer, head=config.head)
    train = open_loaders(config, tokenizer).train
    return [train.batch(step) for step in range(train.epoch_steps())], tokenizer


def test_rows_keep_the_distribution_of_every_answer(folder):
    config = config_of(folder, "soft", kinds=(LIST, TABLE, HARD))
    found, tokenizer = batches(config)
    (file,) = read_manifest(config.data.rows).splits["train"]
    ids = [tokenizer.encode_plain(f" {name}")[0] for name in COLORS]
    assert file.soft
    assert file.options == ids
    kinds = set()
    for batch in found:
        used = batch.target_ids != UNUSED
        assert (batch.options.ids[used] == ids).all()
        assert (batch.options.ids[~used] == UNUSED).all()
        probs = batch.options.probs[used]
        best = np.array(ids)[probs.argmax(axis=1)]
        np.testing.assert_array_equal(best, batch.target_ids[used])
        kinds |= {tuple(sorted(np.float64(row).round(3).tolist())) for row in probs}
        assert (batch.weights[used] == 1).all()
    assert kinds == {(0.1, 0.1, 0.8), (0.0, 0.0, 1.0)}


def test_one_hot_answers_give_the_rows_and_weights_of_hard_labels(folder):
    hard, one_hot = (config_of(folder, kind, kinds=[kind]) for kind in (HARD, ONE_HOT))
    assert_same(run_training(hard), run_training(one_hot))
    files = [read_manifest(one.data.rows).splits["train"][0] for one in (hard, one_hot)]
    assert files[0].sha256 == files[1].sha256
    assert not files[0].soft


@pytest.mark.parametrize("head", [pytest.param("mlm", marks=pytest.mark.long), "classification"])
def test_a_run_resumes_bit_by_bit_and_eight_devices_are_one(folder, stop_after, head):
    changes = {"source": {"weight": "sure"}}
    if head == "classification":
        changes |= {"head": head, "data__pack": False, "objective": {"ordered": True}}
        changes["source"] |= {"prompt": "{text}"}
    name = f"whole-{head}"
    config = config_of(folder, name, **changes)
    state = run_training(config)
    broken = config_of(folder, name, **changes)
    broken = broken.model_copy(update={"out": str(folder / f"{name}-broken")})
    stop_after(4, lambda: run_training(broken))
    assert_same(run_training(broken), state)
    mesh = {"data": 4, "fsdp": 2}
    spread = config_of(folder, name, **changes, mesh=mesh)
    spread = spread.model_copy(update={"out": str(folder / f"{name}-spread")})
    pairs = zip(
        jax.tree.leaves(run_training(spread).params), jax.tree.leaves(state.params), strict=True
    )
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_smoothing_reaches_the_batches_of_a_classification_head(folder):
    changes = {"head": "classification", "data__pack": False}
    changes |= {"objective": {"label_smoothing": 0.3}, "source": {"prompt": "{text}"}}
    for kinds in ([HARD], [TABLE]):
        found, _ = batches(config_of(folder, f"head-{kinds[0]}", kinds=kinds, **changes))
        probs = np.concatenate([one.probs[~np.isnan(one.labels)] for one in found])
        best = 0.7 * (1.0 if kinds == [HARD] else 0.8) + 0.1
        expected = np.sort([best, (1 - best) / 2, (1 - best) / 2])
        np.testing.assert_allclose(np.sort(probs, axis=1), [expected] * len(probs), rtol=1e-5)


def test_weights_and_smoothing_reach_the_batches(folder):
    objective = {"objective": {"label_smoothing": 0.3}}
    config = config_of(folder, "weighted", kinds=[HARD], source={"weight": "sure"}, **objective)
    found, _ = batches(config)
    weights = np.concatenate([one.weights[one.target_ids != UNUSED] for one in found])
    assert set(weights.tolist()) == {0.0, 1.0, 2.0, 3.0}
    probs = np.concatenate([one.options.probs[one.target_ids != UNUSED] for one in found])
    np.testing.assert_allclose(np.sort(probs, axis=1), [[0.1, 0.1, 0.8]] * len(probs), rtol=1e-6)
    assert int(run_training(config).step) == config.steps


@pytest.mark.parametrize(
    "objective",
    [{"ordered": True}, pytest.param({"normalize": "labels"}, marks=pytest.mark.long)],
)
def test_hard_labels_learn_from_losses_over_the_labels(folder, objective):
    name = f"over-{next(iter(objective))}"
    changes = {"steps": 30, "optimizer": {"learning_rate": 1e-2}, "evaluation": {"every": 30}}
    config = config_of(folder, name, kinds=[HARD], objective=objective, **changes)
    run_training(config)
    report = json.loads((folder / f"{name}-run" / "validation.json").read_text())
    assert report["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([0.5, 0.5], "has 2 probabilities; expected 3, one for each of 'red', 'blue', 'green'"),
        ([0.5, 0.5, 0.5], "its probabilities sum to 1.5; expected 1"),
        ([1.5, -0.5, 0.0], "gives 'blue' the probability -0.5; expected a number from 0 to 1"),
        ({"red": 0.5, "pink": 0.5}, "gives a probability to 'pink', which is not a label"),
        ({"red": "much"}, "gives 'red' the probability 'much'"),
        ([float("nan"), 0.5, 0.5], "gives 'red' the probability nan"),
    ],
)
def test_a_column_that_is_no_distribution_is_rejected_by_row(folder, answer, says):
    config = config_of(folder, "bad", kinds=[LIST])
    path = folder / "bad.jsonl"
    lines = path.read_text().splitlines()
    lines[6] = json.dumps({"text": "red tree", "answer": answer, "sure": 1})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=f"bad.jsonl line 7: column 'answer' {says}"):
        batches(config)


@pytest.mark.parametrize(
    ("source", "changes", "says"),
    [
        ({"weight": "text"}, {}, "line 1: column 'text' is '.*'; expected a number from 0 to"),
        ({"weight": "heavy"}, {}, "heavy"),
        ({"labels": None}, {}, "is a distribution .*; give labels to name what it is over"),
        ({"labels": None}, {"objective": {"ordered": True}}, "ordered needs the labels of every"),
        ({}, {"objective": {"ordered": True, "mlm_share": 0.1}}, "is for answers alone"),
    ],
)
def test_settings_that_cannot_work_are_rejected(folder, source, changes, says):
    with pytest.raises(InputError, match=says):
        batches(config_of(folder, "unfit", source=source, **changes))
