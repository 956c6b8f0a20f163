"""Fine-tuning of both heads on one task, and the choice of a setting."""

import numpy as np
import pytest
from flax import nnx
from small_models import noisy, small_config
from suite_files import REVIEWS, SWEEP, questions, right

from mlmjax.config.suite import HEADS, Sweep
from mlmjax.config.tables import decode
from mlmjax.evaluation.questions import Question
from mlmjax.evaluation.suite.entrants import (
    DivergedError,
    Setting,
    answer_fine_tuned,
    choose,
    read_texts,
    settings_of,
)
from mlmjax.model.modernbert import ModernBertForMaskedLM
from mlmjax.statistics.metrics import bootstrap, macro_f1, mcc, mean_interval


@pytest.fixture(scope="module")
def model():
    config = small_config(num_hidden_layers=1)
    return noisy(ModernBertForMaskedLM(config, rngs=nnx.Rngs(0)), scale=0.02)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_learns_by_its_seed_and_leaves_the_model_as_it_was(model, tokenizer, head):
    train, asked = questions(48, 1), questions(20, 2)
    before = [np.asarray(leaf) for leaf in nnx.to_flat_state(nnx.state(model)).leaves]

    def answer(seed, rows=asked):
        return answer_fine_tuned(
            model, tokenizer, REVIEWS, head, train, rows, Setting(8, 2e-2), SWEEP, seed=seed
        )

    answers = answer(1)
    assert right(answers.log_probs, asked) > 0.9
    assert len(answers.losses) == 8
    assert answers.losses[-1] < 0.5 * answers.losses[0]
    assert answers.shortened == 0
    after = [np.asarray(leaf) for leaf in nnx.to_flat_state(nnx.state(model)).leaves]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    long = [*asked[:3], Question(9, "long", {**asked[0].row, "text": "fine " * 90}, 1, "")]
    if head == "classification":  # what follows is the same for both
        return
    again = answer(1, long)
    assert again.shortened == 1
    np.testing.assert_allclose(again.log_probs[:3], answers.log_probs[:3], atol=1e-5)
    assert again.losses == answers.losses


def test_a_training_that_diverges_says_so(model, tokenizer):
    rows = questions(8, 1)
    with pytest.raises(DivergedError, match="not finite"):
        answer_fine_tuned(
            model, tokenizer, REVIEWS, "mlm", rows, rows, Setting(3, 1e30), SWEEP, seed=0
        )


def test_heads_and_baselines_read_the_fields_alone(tokenizer):
    task = REVIEWS.model_copy(
        update={"prompt": "Read {{this}}.\n{title}\n{text}\n{options}A: [unused0] [MASK]"}
    )
    row = {"title": "On [MASK]", "text": "a {b}", "options": ["bad", "good"]}
    template = task.for_head().head_template()
    assert template.fields == ("title", "text")
    assert template.shorten == {"text": "tail"}
    (text,) = read_texts(task, [Question(0, "", row, 0, "")])
    assert text == "On [MASK]\na {b}"
    ids, slot = template.encode(tokenizer, row, 64)
    assert ids[1:-1] == tokenizer.encode_plain(text)
    assert slot == -1


def test_the_best_setting_is_chosen_and_ties_go_to_the_smaller():
    settings = settings_of(decode(Sweep, {"epochs": [3, 1], "learning_rate": [5e-5, 2e-5]}, "s"))
    assert settings == [(1, 2e-5), (1, 5e-5), (3, 2e-5), (3, 5e-5)]
    assert choose(dict.fromkeys(reversed(settings), 0.5)) == settings[0]
    assert choose(dict(zip(settings, [0.1, None, 0.3, 0.2], strict=True))) == settings[2]
    assert choose(dict.fromkeys(settings)) is None


def test_intervals_of_a_mean_over_seeds_keep_the_rows_together():
    rng = np.random.default_rng(0)
    gold = [str(label) for label in rng.integers(3, size=60)]
    guess = [label if rng.random() < 0.7 else "0" for label in gold]
    for statistic in (macro_f1, mcc):
        ((_, alone),) = bootstrap(gold, [guess], lambda models, s=statistic: [s(*models[0])])
        same = mean_interval(gold, [guess] * 3, statistic)
        np.testing.assert_allclose(same, alone, atol=0.02)  # agreeing seeds tell nothing more
    other = [label if rng.random() < 0.7 else "0" for label in gold]
    low, high = mean_interval(gold, [guess, other], macro_f1)
    draws = rng.integers(60, size=(400, 60))
    means = []
    for rows in draws:
        scores = []
        for answers in (guess, other):
            names = sorted({gold[i] for i in rows} | {answers[i] for i in rows})
            own = [
                2 * sum(gold[i] == answers[i] == n for i in rows)
                / sum((gold[i] == n) + (answers[i] == n) for i in rows)
                for n in names
            ]  # fmt: skip
            scores.append(np.mean(own))
        means.append(np.mean(scores))
    np.testing.assert_allclose([low, high], np.quantile(means, [0.025, 0.975]), atol=0.03)
