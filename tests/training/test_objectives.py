"""Maskers and losses that a run names: those of the package, and code of one's own."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mlmjax.config.run import ObjectiveConfig, parse_config
from mlmjax.data.batch import UNUSED, Batch
from mlmjax.errors import InputError, RunError
from mlmjax.training.objectives import check_code, find_code, hash_files, masker_of, replaced_tokens

MODULE = """
import numpy as np

def first(tokenizer):
    return lambda ids, maskable, count, rng: maskable[:count]

def few(tokenizer):
    return lambda ids, maskable, count, rng: maskable[: count - 1]

def twice(tokenizer):
    return lambda ids, maskable, count, rng: np.repeat(maskable[:1], count)

def outside(tokenizer):
    return lambda ids, maskable, count, rng: np.arange(count)

def writes(tokenizer):
    def draw(ids, maskable, count, rng):
        ids[:] = 0
        return maskable[-count:]
    return draw

def nothing(tokenizer):
    return None

def fails(tokenizer):
    def draw(ids, maskable, count, rng):
        raise KeyError("noun")
    return draw

constant = 3
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A module in the working directory; what it changes is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "masks_of_mine.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("masks_of_mine", None)


def make(name, tokenizer):
    return masker_of(ObjectiveConfig(masking=f"masks_of_mine:{name}"), tokenizer)


def test_a_masker_of_ones_own_is_called(code, tokenizer):
    ids, maskable = np.array([1, 5, 6, 7, 2]), np.array([1, 2, 3])
    rng = np.random.default_rng(0)
    assert make("first", tokenizer)(ids, maskable, 2, rng).tolist() == [1, 2]
    assert make("writes", tokenizer)(ids, maskable, 2, rng).tolist() == [2, 3]
    assert ids.tolist() == [1, 5, 6, 7, 2]


@pytest.mark.parametrize(
    ("name", "found"), [("few", r"\[1\]"), ("twice", r"\[1, 1\]"), ("outside", r"\[0, 1\]")]
)
def test_positions_that_are_not_as_asked_are_rejected(code, tokenizer, name, found):
    draw = make(name, tokenizer)
    message = f"masks_of_mine:{name}: returned {found}; expected 2 different positions of the 3"
    with pytest.raises(InputError, match=message):
        draw(np.array([1, 5, 6, 7, 2]), np.array([1, 2, 3]), 2, np.random.default_rng(0))


def test_an_error_in_code_names_the_function(code, tokenizer):
    with pytest.raises(RunError, match="masks_of_mine:fails: raised KeyError: 'noun'; --debug"):
        make("fails", tokenizer)(np.array([5]), np.array([0]), 1, np.random.default_rng(0))
    with pytest.raises(InputError, match="nothing: returned NoneType for a tokenizer"):
        make("nothing", tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:mask", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("masks_of_mine:mask", "no attribute 'mask'.; expected a module masks_of_mine in the work"),
        ("masks_of_mine:constant", "is int; expected a function"),
        ("broken_of_mine:mask", "SyntaxError"),
    ],
)
def test_code_that_is_not_there_is_said(code, name, message):
    (code / "broken_of_mine.py").write_text("def mask(:\n")
    with pytest.raises(InputError, match=message):
        find_code(name)


def test_nothing_in_the_working_directory_replaces_a_package(code):
    (code / "numpy.py").write_text("raise SystemExit('a stranger ran')")
    find_code("masks_of_mine:first")
    assert sys.path[-1] == str(code)
    assert find_code("numpy:sort") is np.sort


def test_code_runs_only_if_its_module_is_named(code):
    objective = ObjectiveConfig(masking="masks_of_mine:first", loss="other.place:loss")
    with pytest.raises(InputError, match=r"objective\.masking: masks_of_mine:first is code, "):
        check_code(objective, ())
    with pytest.raises(InputError, match=r"objective\.loss: .* then give --code other\.place$"):
        check_code(objective, ["masks_of_mine", "other"])
    check_code(objective, ["masks_of_mine", "other.place"])
    check_code(ObjectiveConfig(), ())
    assert "masks_of_mine" not in sys.modules


def test_the_hash_of_code_changes_with_its_file(code):
    objective = ObjectiveConfig(masking="masks_of_mine:first")
    before = hash_files(objective)
    (code / "masks_of_mine.py").write_text(MODULE + "\n")
    assert before.keys() == hash_files(objective).keys() == {"masks_of_mine:first"}
    assert before != hash_files(objective)
    table = ObjectiveConfig(masking="weights", mask_table="none.csv")
    with pytest.raises(InputError, match=r"none\.csv"):
        hash_files(table)


class FixedLogits:
    """A model whose logit of `[MASK]` is given for every position."""

    def __init__(self, logits):
        self.logits = logits

    def encode(self, input_ids, segment_ids, position_ids):
        return jnp.zeros((*input_ids.shape, 1))

    def mlm_logits(self, hidden, vocabulary_ids):
        assert len(vocabulary_ids) == 1
        return jnp.asarray(self.logits)[..., None]


def test_replaced_tokens_are_found_among_all_that_are_not_special(tokenizer):
    """A random token that is by chance the original one is not replaced."""
    cls, sep, pad, unused = tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, UNUSED
    rows = np.array([[cls, 300, 301, 302, sep, 400, pad], [cls, 500, sep, pad, pad, pad, pad]])
    segments = np.array([[1, 1, 1, 1, 1, 2, 0], [1, 1, 1, 0, 0, 0, 0]])
    positions = np.array([[2, 3, unused], [unused] * 3])
    originals = np.array([[999, 302, unused], [unused] * 3])
    batch = Batch(rows, segments, rows, positions, originals, originals)
    logits = np.random.default_rng(0).normal(size=rows.shape).astype(np.float32)
    loss_sum, metrics = replaced_tokens(tokenizer)(FixedLogits(logits), batch)
    places = [(0, 1), (0, 2), (0, 3), (0, 5), (1, 1)]
    signs = [1, -1, 1, 1, 1]  # only the token at position 2 was replaced
    expected = sum(
        np.log1p(np.exp(sign * logits[at])) for at, sign in zip(places, signs, strict=True)
    )
    assert float(loss_sum) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics["loss_count"]) == len(places)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"masking": "wholeword"}, "objective.masking is 'wholeword'; did you mean 'whole_word'"),
        ({"masking": "os.system"}, "or code of your own as package.module:function"),
        ({"masking": "os:system()"}, "or code of your own as package.module:function"),
        ({"masking": "weights"}, "masking is 'weights', and there is no mask_table"),
        ({"mask_table": "a.csv"}, "masking is 'token', and there is mask_table = 'a.csv'"),
        ({"mlm_rate": {"beta": [1.0]}}, "mlm_rate"),
        ({"mlm_rate": {}}, "give exactly one of beta"),
        ({"mlm_rate": {"uniform": [0.5, 0.2]}}, "expected the lowest rate first"),
        ({"mlm_rate": {"uniform": [0.5, 1.2]}}, "mlm_rate"),
        ({"mlm_rate": {"beta": [1.0, float("inf")]}}, "mlm_rate"),
        ({"mlm_rate": {"beta": [2.0, 5.0]}, "mlm_rate_end": 0.1}, "leave mlm_rate_end out"),
        ({"random_tokens": 0.6, "kept_tokens": 0.6}, "is above 1"),
        ({"loss": "replaced_tokens"}, "set mlm_share = 1.0 and random_tokens = 1.0"),
        ({"loss": "cross-entropy"}, "did you mean 'cross_entropy'"),
        ({"loss": "my.place:loss", "normalize": "labels"}, "leave normalize, ordered and label_sm"),
    ],
)
def test_what_does_not_fit_together_is_rejected(objective, message):
    table = {"out": "o", "steps": 1, "init_from": "m", "data": {"rows": "r"}}
    with pytest.raises(InputError, match=message):
        parse_config({**table, "objective": objective})
