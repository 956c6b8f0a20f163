"""The loader: a batch follows from seed and step alone, and masks as the recipe says."""

import hashlib
import itertools
import json
import math
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from row_files import change, two_sources
from scipy.stats import chisquare

from mlmjax import InputError
from mlmjax.config.run import ObjectiveConfig
from mlmjax.data.batch import ATP, DUMMY_MLM, MLM, UNUSED
from mlmjax.data.loader import Loader
from mlmjax.data.manifest import read_manifest
from mlmjax.data.masking.draws import mask_answer, mask_dummy, mask_random
from mlmjax.data.masking.maskers import MaskTable, make_masker
from mlmjax.data.preparing.prepare import prepare
from mlmjax.data.rows import open_rows
from mlmjax.data.schedule import RowSchedule, mask_rate
from mlmjax.text.words import word_starts

GOLDEN = json.loads((Path(__file__).parent / "golden_masks.json").read_text())
SEQ = 64
MIXED = ObjectiveConfig(dummy_mlm_share=0.3, mlm_share=0.2, mlm_rate=0.3)
ATP_ONLY = ObjectiveConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Rows of two sources: questions with answers, and plain text."""
    config = two_sources(tmp_path_factory.mktemp("loader"))
    return prepare(change(config, validation_rows=21), tokenizer)


@pytest.fixture
def make(folder, tokenizer):
    def loader(split="train", objective=MIXED, only=None, weights=None, **settings):
        sources = open_rows(folder, split, weights)
        sources = [source for source in sources if only in (None, source.name)]
        defaults = {"seed": 3, "batch_size": 8, "seq_length": SEQ, "tokenizer": tokenizer}
        return Loader(sources, objective=objective, **defaults | settings)

    return loader


def rows_by_index(folder, split, name=None):
    """Return the examples of every row, by the index of the first one."""
    sources = [one for one in open_rows(folder, split) if name in (None, one.name)]
    return {one[i][0].index: one[i] for one in sources for i in range(len(one))}


def assert_equal(one, other):
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("split", "masking"),
    [("train", "token"), ("validation", "token"), ("train", "whole_word"), ("train", "span")],
)
def test_a_batch_is_its_examples_masked_by_their_own_draws(make, folder, tokenizer, split, masking):
    loader = make(split, MIXED.model_copy(update={"masking": masking}))
    starts, mask_id = word_starts(tokenizer), tokenizer.mask_id
    rows = rows_by_index(folder, split)
    seen = set()
    for step in range(8):
        batch, tasks = loader.batch(step), loader.tasks(step)
        for r, indices in enumerate(loader.example_indices(step)):
            examples = rows[indices[0]] if len(indices) else []
            assert [example.index for example in examples] == indices.tolist()
            columns, targets = ([], [], []), []
            for segment, example in enumerate(examples, 1):
                ids, rng = example.ids, np.random.default_rng([3, 0, example.index])
                draw = 0.4 if example.answer_position < 0 else rng.random()
                objective = DUMMY_MLM if draw < 0.3 else MLM if draw < 0.5 else ATP
                if objective == ATP:
                    masked = mask_answer(ids, example.answer_position, mask_id=mask_id)
                else:
                    mask = mask_dummy if objective == DUMMY_MLM else mask_random
                    words = {"masking": masking, "word_starts": starts(ids)}
                    special = tokenizer.special_ids
                    masked = mask(ids, 0.3, rng, special_ids=special, mask_id=mask_id, **words)
                seen.add(objective)
                targets += [
                    (len(columns[0]) + position, target, objective, example.task)
                    for position, target in zip(*masked[1:], strict=True)
                ]
                parts = (masked[0], [segment] * len(ids), range(len(ids)))
                for column, part in zip(columns, parts, strict=True):
                    column.extend(part)
            fills = (tokenizer.pad_id, 0, 0)
            for array, column, fill in zip(batch[:3], columns, fills, strict=True):
                assert array[r].tolist() == column + [fill] * (SEQ - len(column))
            assert targets == sorted(targets)
            targets += [(UNUSED,) * 4] * (loader.target_width - len(targets))
            found = zip(*(column[r] for column in (*batch[3:6], tasks)), strict=True)
            assert list(found) == targets
    assert seen == {ATP, DUMMY_MLM, MLM}
    assert {array.dtype for array in (*batch[:6], tasks)} == {np.dtype(np.int32)}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_the_draws_of_version_0_1_never_change(make, case):
    """Published recipes name a seed: the same seed masks the same tokens in every later version."""
    objective = ObjectiveConfig.model_validate(case["objective"])
    loader = make(case["split"], objective, mask_rate=mask_rate(objective, 10))
    for step, expected in case["steps"].items():
        batch = loader.batch(int(step))
        first = batch.target_positions[0]
        assert first[first >= 0].tolist() == expected["first_row"]
        drawn = b"".join(array.astype("<i4").tobytes() for array in batch[:6])
        assert hashlib.sha256(drawn).hexdigest() == expected["sha256"]


def test_the_same_seed_and_step_give_the_same_batch(make):
    for step in (0, 7, 1000):
        assert_equal(make().batch(step), make().batch(step))
    assert (make().batch(5).input_ids != make(seed=4).batch(5).input_ids).any()
    assert (make().batch(5).input_ids != make().batch(6).input_ids).any()
    orders = [make(seed=seed).example_indices(0) for seed in range(3)]
    assert len({np.concatenate(order).tobytes() for order in orders}) == 3


WORDS = MaskTable("word", {"Question": 5.0, "words": 1.0, "Document": 2.0}, others=0.1)
RESEARCH = {
    "the usual": MIXED,
    "weights": MIXED.model_copy(update={"masking": "weights"}),
    "drawn rates": ObjectiveConfig.model_validate(
        {
            "mlm_share": 0.7,
            "mlm_rate": {"beta": (2.0, 5.0)},
            "target_weight": "inverse_rate",
            "random_tokens": 0.2,
            "kept_tokens": 0.2,
        }
    ),
}


@pytest.mark.parametrize("name", RESEARCH)
def test_the_global_batch_does_not_depend_on_who_reads_it(make, tokenizer, name):
    def again():
        weights = make_masker("weights", tokenizer, WORDS) if name == "weights" else None
        return make(objective=RESEARCH[name], masker=weights)

    loader = again()
    whole = loader.batch(11)
    for size in (8, 4, 1):
        parts = [again().batch(11, slice(first, first + size)) for first in range(0, 8, size)]
        joined = [
            np.concatenate(arrays) for arrays in zip(*map(jax.tree.leaves, parts), strict=True)
        ]
        assert_equal(jax.tree.leaves(whole), joined)
    scattered = np.array([6, 1, 3])
    own = jax.tree.leaves(loader.batch(11, scattered))
    assert_equal([array[scattered] for array in jax.tree.leaves(whole)], own)
    np.testing.assert_array_equal(loader.tasks(11)[scattered], loader.tasks(11, scattered))


def test_an_epoch_is_every_row_once_in_another_order_each_time(make, folder):
    expected = sorted(rows_by_index(folder, "train"))
    loader = make(batch_size=1)
    assert loader.epoch_steps() == len(expected)

    def order(epoch):
        steps = range(epoch * len(expected), (epoch + 1) * len(expected))
        return [loader.example_indices(step)[0][0] for step in steps]

    first, second = order(0), order(1)
    assert sorted(first) == sorted(second) == expected
    assert first != second
    assert first != expected


@pytest.mark.parametrize("masking", ["token", "whole_word", "span"])
def test_masks_change_from_epoch_to_epoch(make, folder, masking):
    loader = make("train", MIXED.model_copy(update={"masking": masking}), "text", batch_size=1)
    (first, *_) = sorted(rows_by_index(folder, "train", "text"))
    steps = [s for s in range(3 * loader.epoch_steps()) if loader.example_indices(s)[0][0] == first]
    masks = {loader.batch(step).target_positions.tobytes() for step in steps}
    assert len(steps) == len(masks) == 3


def test_a_batch_larger_than_the_rows_repeats_them(make, folder):
    rows = rows_by_index(folder, "train", "text")
    loader = make(only="text", batch_size=2 * len(rows))
    assert sorted(i[0] for i in loader.example_indices(0)) == sorted([*rows, *rows])


def test_weights_are_shares_of_the_rows(make, folder):
    texts = set(rows_by_index(folder, "train", "text"))
    loader = make(weights={"qa": 3.0, "text": 1.0}, batch_size=40)
    firsts = [i[0] for step in range(10) for i in loader.example_indices(step)]
    assert sum(first in texts for first in firsts) == 100
    # Each source goes round by itself, every row once before any comes again.
    drawn = [first for first in firsts if first in texts]
    assert set(drawn[: len(texts)]) == texts
    qa_only = make(weights={"qa": 1.0, "text": None}, only="qa")
    assert_equal(qa_only.batch(2), make(only="qa", weights={"qa": 5.0}).batch(2))


def test_validation_is_every_row_once_then_padding(make, folder):
    expected = list(rows_by_index(folder, "validation"))
    size = len(expected) // 3 - 1
    loader = make("validation", batch_size=size)
    steps = loader.epoch_steps()
    assert steps == math.ceil(len(expected) / size)
    indices = list(itertools.chain(*(loader.example_indices(step) for step in range(steps))))
    assert [i[0] for i in indices if len(i)] == expected
    has_text = loader.batch(steps - 1).segment_ids.any(axis=1)
    assert has_text.tolist() == [row < len(expected) % size for row in range(size)]
    assert not has_text.all()


def test_without_shares_answers_need_no_width_for_masks_and_text_is_masked(make, folder):
    most = max(len(row) for row in rows_by_index(folder, "train", "qa").values())
    loader = make(objective=ATP_ONLY, only="qa")
    assert loader.target_width == most
    objectives = loader.batch(0).target_objective
    assert set(np.unique(objectives)) == {UNUSED, ATP}
    assert (objectives == ATP).sum() == sum(map(len, loader.example_indices(0)))
    names = read_manifest(folder).tasks
    tasks = loader.tasks(0)
    assert {names[t] for t in np.unique(tasks[tasks >= 0])} == {"task0", "task1", "task2"}
    text = make(objective=ATP_ONLY, only="text").batch(0)
    assert set(np.unique(text.target_objective)) == {UNUSED, MLM}


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.95])
@pytest.mark.parametrize("masking", ["token", "whole_word", "span"])
def test_the_width_is_never_too_small(make, rate, masking):
    objective = ObjectiveConfig(mlm_share=1.0, mlm_rate=rate, masking=masking)
    loader = make(objective=objective, batch_size=64)
    for step in range(4):
        used = loader.batch(step).target_positions != UNUSED
        assert used.sum(axis=1).max() <= loader.target_width


def test_shares_are_kept(make):
    loader = make(objective=ObjectiveConfig(dummy_mlm_share=0.2), only="qa", batch_size=64)
    drawn = Counter()
    for step in range(20):
        batch = loader.batch(step)
        rows, columns = np.nonzero(batch.target_positions != UNUSED)
        examples = rows * SEQ + batch.segment_ids[rows, batch.target_positions[rows, columns]]
        objectives = batch.target_objective[rows, columns]
        drawn.update(dict(zip(examples, objectives, strict=True)).values())
    # Some 4000 draws: standard deviation 0.006.
    assert drawn[DUMMY_MLM] / drawn.total() == pytest.approx(0.2, abs=0.03)
    assert drawn[MLM] == 0


def test_batches_reads_ahead_in_order_and_stops(make):
    loader = make()
    before = set(threading.enumerate())
    found = list(loader.batches(3, 9, slice(2, 5)))
    assert [step for step, _ in found] == list(range(3, 9))
    for step, batch in found:
        assert_equal(batch, loader.batch(step, slice(2, 5)))
    assert list(loader.batches(5, 5)) == []
    endless = loader.batches(0, 10**9)
    assert next(endless)[0] == 0
    endless.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_an_error_while_reading_ahead_reaches_the_reader(make):
    loader = make()
    good = loader.batch

    def batch(step, rows=None):
        if step == 3:
            raise InputError("row 3 is damaged")
        return good(step, rows)

    loader.batch = batch
    batches = loader.batches(0, 10)
    assert [next(batches)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="row 3 is damaged"):
        next(batches)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": "nobody"}, "no rows to read"),
        ({"seq_length": 128}, "rows of 64 tokens, but seq_length is 128"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"weights": {"qa": 3.0}}, "text has no weight while others have"),
        ({"tokenizer": SimpleNamespace(sha256="0" * 64)}, "made with another tokenizer"),
    ],
)
def test_what_does_not_fit_is_rejected(make, settings, message):
    with pytest.raises(InputError, match=message):
        make(**settings)


def test_a_growing_batch_reads_the_same_rows_in_the_same_order(make):
    grown, whole = make(batch_size=RowSchedule(2, 8, 6)), make(batch_size=8)
    sizes = [len(grown.batch(step).input_ids) for step in range(9)]
    assert sizes == [2, 2, 4, 4, 6, 6, 8, 8, 8] == [grown.rows(step) for step in range(9)]
    rows = np.concatenate([grown.batch(step).input_ids for step in range(9)])
    expected = np.concatenate([whole.batch(step).input_ids for step in range(6)])
    np.testing.assert_array_equal(rows, expected)
    assert len(grown.batch(7, slice(2, 5)).input_ids) == 3


def test_the_mask_rate_follows_the_step(make, folder):
    objective = ObjectiveConfig(mlm_share=1.0, mlm_rate=0.1, mlm_rate_end=0.6)
    loader = make(objective=objective, mask_rate=mask_rate(objective, 11))
    assert loader.target_width >= math.ceil(0.6 * SEQ)
    for step, low, high in ((0, 0, 0.15), (5, 0.25, 0.45), (10, 0.45, 0.65)):
        batch = loader.batch(step)
        assert low < (batch.target_ids >= 0).sum() / (batch.segment_ids > 0).sum() < high


def examples_of(batch):
    """Yield for each masked example its tokens (by the ids at their places) and its targets."""
    for row, positions in enumerate(batch.target_positions):
        places = positions[positions >= 0]
        of_targets = batch.segment_ids[row, places]
        for segment in np.unique(of_targets):
            mine = np.flatnonzero(of_targets == segment)
            yield row, np.flatnonzero(batch.segment_ids[row] == segment), places[mine], mine


def test_drawn_rates_differ_by_example_and_weights_undo_them(make, tokenizer):
    """With the inverse rate as weight, the weights of an example sum to its maskable tokens."""
    settings = {"mlm_share": 1.0, "mlm_rate": {"uniform": (0.0, 1.0)}}
    settings["target_weight"] = "inverse_rate"
    loader = make(objective=ObjectiveConfig.model_validate(settings), batch_size=64)
    batch, rates = loader.batch(3), []
    assert batch.weights.dtype == np.float32
    for row, tokens, places, mine in examples_of(batch):
        ids = batch.input_ids[row].copy()
        ids[places] = batch.target_ids[row, mine]
        maskable = (~np.isin(ids[tokens], list(tokenizer.special_ids))).sum()
        assert batch.weights[row, mine].sum() == pytest.approx(maskable)
        rates.append(len(places) / maskable)
    assert min(rates) < 0.15
    assert max(rates) == 1
    assert abs(np.mean(rates) - 0.5) < 0.1
    assert (batch.target_ids >= 0).sum(axis=1).max() <= loader.target_width
    assert not batch.weights[batch.target_ids < 0].any()


def test_answers_weigh_one_beside_masked_tokens(make):
    batch = make(objective=RESEARCH["drawn rates"], batch_size=64).batch(0)
    assert (batch.weights[batch.target_objective == ATP] == 1).all()
    assert (batch.weights[batch.target_objective == MLM] >= 1).all()


def test_mlm_replaces_tokens_by_shares_and_no_other_objective_does(make, tokenizer):
    shares = {"random_tokens": 0.3, "kept_tokens": 0.2}
    plain = make(objective=MIXED, batch_size=64).batch(5)
    batch = make(objective=MIXED.model_copy(update=shares), batch_size=64).batch(5)
    np.testing.assert_array_equal(plain.target_positions, batch.target_positions)
    np.testing.assert_array_equal(plain.target_ids, batch.target_ids)
    rows, columns = np.nonzero(batch.target_ids >= 0)
    inputs = batch.input_ids[rows, batch.target_positions[rows, columns]]
    targets, is_mlm = batch.target_ids[rows, columns], batch.target_objective[rows, columns] == MLM
    assert (inputs[~is_mlm] == tokenizer.mask_id).all()
    inputs, targets = inputs[is_mlm], targets[is_mlm]
    counts = [(inputs == tokenizer.mask_id).sum(), (inputs == targets).sum()]
    counts.append(len(inputs) - sum(counts))
    assert chisquare(counts, np.array([0.5, 0.2, 0.3]) * len(inputs)).pvalue > 0.001
    assert not np.isin(inputs[inputs != tokenizer.mask_id], list(tokenizer.special_ids)).any()
