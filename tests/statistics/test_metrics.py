"""Metrics and their intervals, against scikit-learn and plain loops."""

import json

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from mlmjax.statistics import metrics


def random_answers(n, labels, seed, right=0.5):
    rng = np.random.default_rng(seed)
    gold = rng.integers(labels, size=n)
    predicted = np.where(rng.random(n) < right, gold, rng.integers(labels, size=n))
    return [f"label {i}" for i in gold], [f"label {i}" for i in predicted]


@pytest.mark.parametrize(("n", "labels"), [(1, 1), (2, 2), (40, 3), (300, 20)])
def test_metrics_are_those_of_scikit_learn(n, labels):
    gold, predicted = random_answers(n, labels, seed=n)
    found = metrics.classification_metrics(gold, predicted)
    expected = f1_score(gold, predicted, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected, abs=1e-12)
    if len({*gold, *predicted}) > 1:
        assert found["mcc"] == pytest.approx(matthews_corrcoef(gold, predicted), abs=1e-12)


@pytest.mark.parametrize(("n", "labels"), [(25, 2), (60, 4)])
def test_bootstrap_is_that_of_rows_drawn_one_by_one(n, labels):
    """The two draw other rows: with 4,000 resamples their bounds are a little apart."""
    gold, predicted = map(np.array, random_answers(n, labels, seed=1))
    rng = np.random.default_rng(7)
    drawn = []
    for _ in range(4000):
        rows = rng.integers(n, size=n)
        truth, guess = gold[rows], predicted[rows]
        drawn.append((plain_f1(truth, guess), plain_mcc(truth, guess)))
    expected = np.quantile(drawn, [0.025, 0.975], axis=0).T
    found = metrics.bootstrap(
        list(gold),
        [list(predicted)],
        lambda models: [metrics.macro_f1(*models[0]), metrics.mcc(*models[0])],
        resamples=4000,
    )
    for (_, interval), bounds in zip(found, expected, strict=True):
        assert np.abs(np.subtract(interval, bounds)).max() < 0.08 * (bounds[1] - bounds[0])


def plain_f1(gold, predicted):
    names = np.unique([*gold, *predicted])
    hits = [((gold == name) & (predicted == name)).sum() for name in names]
    sizes = [(gold == name).sum() + (predicted == name).sum() for name in names]
    return np.mean([2 * hit / size for hit, size in zip(hits, sizes, strict=True)])


def plain_mcc(gold, predicted):
    names = np.unique([*gold, *predicted])
    truth, guess = gold[:, None] == names, predicted[:, None] == names
    truth, guess = truth - truth.mean(0), guess - guess.mean(0)
    scale = np.sqrt((truth * truth).sum() * (guess * guess).sum())
    return (truth * guess).sum() / scale if scale else 0.0


def test_intervals_of_a_mean_over_seeds_keep_the_rows_together():
    gold, guess = map(np.array, random_answers(60, 3, seed=0, right=0.7))
    for statistic in (metrics.macro_f1, metrics.mcc):
        found = metrics.bootstrap(gold, [guess], lambda models, s=statistic: [s(*models[0])])
        same = metrics.mean_interval(gold, [guess] * 3, statistic)
        np.testing.assert_allclose(same, found[0][1], atol=0.02)  # equal seeds add nothing
    rng = np.random.default_rng(0)
    other = np.where(rng.random(60) < 0.7, gold, "label 0")
    interval = metrics.mean_interval(gold, [guess, other], metrics.macro_f1)
    means = [
        np.mean([plain_f1(gold[rows], one[rows]) for one in (guess, other)])
        for rows in rng.integers(60, size=(2000, 60))
    ]
    np.testing.assert_allclose(interval, np.quantile(means, [0.025, 0.975]), atol=0.03)


def test_intervals_are_the_same_every_time_and_shrink_with_rows():
    gold, predicted = random_answers(400, 4, seed=3)
    found = metrics.classification_metrics(gold, predicted)
    assert found == metrics.classification_metrics(gold, predicted)
    few = metrics.classification_metrics(gold[:40], predicted[:40])
    for name in ("macro_f1", "mcc"):
        low, high = found[f"{name}_ci95"]
        assert low < found[name] < high
        assert high - low < few[f"{name}_ci95"][1] - few[f"{name}_ci95"][0]


@pytest.mark.parametrize(
    ("gold", "predicted", "f1", "f1_interval"),
    [
        (["a"], ["a"], 1, [1, 1]),
        (["a"], ["b"], 0, [0, 0]),
        (["a"] * 9, ["a"] * 9, 1, [1, 1]),
        (["a"] * 9, ["b"] * 9, 0, [0, 0]),
        (["a", "b"] * 40, ["a", "b"] * 40, 1, [1, 1]),
    ],
)
def test_intervals_of_little_data_are_figures(gold, predicted, f1, f1_interval):
    found = json.loads(json.dumps(metrics.classification_metrics(gold, predicted), allow_nan=False))
    assert (found["macro_f1"], found["macro_f1_ci95"]) == (f1, f1_interval)
    assert found["mcc"] == (1 if set(gold) == set(predicted) == {"a", "b"} else 0)
    assert found["mcc_ci95"] == [found["mcc"]] * 2
