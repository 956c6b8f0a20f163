"""What a fit learned is told from chance by intervals."""

import numpy as np
import pytest

from mlmjax.statistics.learning import find_problems, label_frequencies, measure

RNG = np.random.default_rng(0)
LABELS = np.eye(2)[RNG.integers(0, 2, 200)]
EVEN = np.array([0.5, 0.5])
FLAT = [{"epoch": 1, "loss": 0.7, "loss_error": 0.01}, {"epoch": 2, "loss": 0.69}]


def answers(sureness, right=LABELS):
    """Log probabilities that give the right label this much, with some noise."""
    shares = np.clip(sureness + RNG.normal(0, 0.02, (len(right), 1)), 0.01, 0.99)
    return np.log(np.where(right == 1, shares, 1 - shares))


@pytest.mark.parametrize(
    ("log_probs", "history", "says"),
    [
        (answers(0.9), FLAT, []),
        (answers(0.6), FLAT, []),
        (answers(0.5), FLAT, ["its loss on 200 training texts is 0.69"]),
        (
            np.log(np.tile([0.52, 0.48], (200, 1))),
            FLAT,
            ["its loss on 200 training texts", "it answers 'no' for 100% of 200 training texts"],
        ),
        (
            answers(0.9),
            [*FLAT[:1], {"epoch": 2, "loss": 0.9, "loss_error": 0.05}],
            ["its loss grew from 0.700 in epoch 1 to 0.900 in epoch 2"],
        ),
        (answers(0.9), [*FLAT[:1], {"epoch": 2, "loss": 0.72, "loss_error": 0.05}], []),
        (answers(0.9), [{"epoch": 1, "loss": 0.7}], []),
    ],
)
def test_problems_are_what_chance_does_not_explain(log_probs, history, says):
    training = measure(log_probs, LABELS, EVEN)
    found = find_problems(history, training, None, ["no", "yes"])
    assert len(found) == len(says)
    assert all(one.startswith(start) for one, start in zip(found, says, strict=True))


def test_texts_learned_by_heart_are_told_by_held_out_texts():
    training = measure(answers(0.99), LABELS, EVEN)
    noise = measure(answers(0.9, LABELS[::-1]), LABELS, EVEN)
    (found,) = find_problems(FLAT, training, noise, ["no", "yes"])
    assert found.startswith("its loss on 200 held-out texts is ")
    # Sure and often wrong is a bad loss, but more often right than the commonest label is learning.
    sure = answers(0.99, np.where(RNG.random((200, 1)) < 0.75, LABELS, 1 - LABELS))
    assert find_problems(FLAT, training, measure(sure, LABELS, EVEN), ["no", "yes"]) == []


@pytest.mark.parametrize(
    ("first", "is_silent"),
    [
        ({"loss": 0.70, "accuracy": 0.45}, False),
        ({"loss": 0.60, "accuracy": 0.45}, True),  # the loss was lower than the baseline's
        ({"loss": 0.70, "accuracy": 0.60}, True),  # so many are not right by chance
        ({"loss": 0.70, "accuracy": 0.45, "n": 40}, True),  # too few to tell
    ],
)
def test_without_held_out_texts_the_first_sight_of_texts_tells(first, is_silent):
    training = measure(answers(0.9), LABELS, EVEN)
    history = [{"epoch": 1, "n": 500, "loss_error": 0.02, "baseline_loss": 0.69} | first]
    found = find_problems([*history, {"epoch": 2, "loss": 0.5}], training, None, ["no", "yes"])
    assert found == [] if is_silent else "nothing shows that it answers others" in found[0]
    known = measure(answers(0.8), LABELS, EVEN)
    assert find_problems(history, training, known, ["no", "yes"]) == []


def test_a_rare_label_is_no_sign_of_a_collapse():
    rare = np.eye(2)[(np.arange(200) < 4).astype(int)]
    found = measure(answers(0.9, np.eye(2)[np.zeros(200, int)]), rare, label_frequencies(rare))
    assert found.answer_share == 1.0
    assert found.majority == 0.98
    problems = find_problems(FLAT, found, None, ["no", "yes"])
    assert not any(one.startswith("it answers") for one in problems)


def test_distributions_have_the_loss_of_their_cross_entropy():
    targets = RNG.dirichlet([1, 1, 1], 50)
    shares = label_frequencies(targets)
    found = measure(np.log(targets), targets, shares)
    entropy = -(targets * np.log(targets)).sum(axis=1).mean()
    assert found.loss == pytest.approx(entropy)
    assert found.baseline_loss > found.loss
    assert found.accuracy == 1.0
    np.testing.assert_allclose(shares.sum(), 1)


def test_groups_have_frequencies_of_their_own():
    targets = np.array([[1, 0], [0, 1]] * 10)
    expected = [[10.5 / 11, 0.5 / 11], [0.5 / 11, 10.5 / 11]]
    np.testing.assert_allclose(label_frequencies(targets, 2), expected)


def test_weights_are_so_many_equal_rows():
    targets = RNG.dirichlet([1, 1], 40)
    found = answers(0.8, np.eye(2)[RNG.integers(0, 2, 40)])
    weights = RNG.integers(1, 4, 40)
    often = np.repeat(np.arange(40), weights)
    shares = label_frequencies(targets, weights=weights)
    weighted = measure(found, targets, shares, weights)
    repeated = measure(found[often], targets[often], shares)
    for name in ("loss", "baseline_loss", "accuracy", "majority", "answer", "answer_share"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name)), name
    assert weighted.n == 40
    assert 20 < weighted.effective_n < 40
    low, high = weighted.gain_ci95
    assert high - low > repeated.gain_ci95[1] - repeated.gain_ci95[0]
    # Half a row is added whatever the weights add up to.
    np.testing.assert_allclose(label_frequencies(targets, weights=9.0 * weights), shares)
    alike = measure(found, targets, shares, np.full(40, 0.25))
    assert alike.effective_n == 40
    assert alike.accuracy_ci95 == pytest.approx(measure(found, targets, shares).accuracy_ci95)
