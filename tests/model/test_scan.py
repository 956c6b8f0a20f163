"""Layers as one loop: the same numbers as layer by layer, from a smaller program."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from noisy_models import build, config_of, loss_and_gradients, padded_batch

from mlmjax.model.architecture import GLOBAL, LOCAL
from mlmjax.model.encoder import _find_periods
from mlmjax.model.modernbert import ModernBertForMaskedLM

BATCH = padded_batch(61)
PATTERNS = {
    "periods of two and a rest": ("layer", range(1, 5), [GLOBAL, LOCAL] * 3),
    "all alike": ("dots", range(1, 4), [GLOBAL] * 4),
}


@pytest.mark.parametrize(
    "pattern",
    ["periods of two and a rest", pytest.param("all alike", marks=pytest.mark.long)],
)
def test_a_loop_gives_the_same_numbers(pattern):
    remat, scanned, kinds = PATTERNS[pattern]
    assert _find_periods(kinds)[0] == scanned
    config = config_of(num_hidden_layers=len(kinds), layer_types=kinds, norm_bias=True)
    found, expected = (
        loss_and_gradients(
            build(ModernBertForMaskedLM, config, 0.15, remat=how), *BATCH, compiled=how == "layer"
        )
        for how in (remat, "none")
    )
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        np.testing.assert_allclose(found[2][name], gradient, atol=1e-5, err_msg=name)


def test_the_compiler_sees_one_period():
    """A model of twice as many layers is no longer a program."""

    def size(layers, remat):
        config = config_of(num_hidden_layers=layers)
        model = build(ModernBertForMaskedLM, config, remat=remat)
        program = jax.make_jaxpr(partial(type(model).encode, model))(*BATCH[:2])
        return str(program).count("dot_general")

    assert size(13, "dots") == size(7, "dots")
    assert size(13, "none") > 1.5 * size(7, "none")


def test_hidden_states_are_those_of_every_layer():
    model = build(ModernBertForMaskedLM, config_of(num_hidden_layers=7), 0.15, remat="layer")
    hidden, states = model.encode(*BATCH[:2], output_hidden_states=True)
    assert len(states) == 8
    np.testing.assert_allclose(hidden, model.encode(*BATCH[:2]), atol=1e-5)


@given(st.lists(st.sampled_from([GLOBAL, LOCAL]), min_size=1, max_size=30))
def test_find_periods_is_true_and_leaves_out_the_first_layer(kinds):
    layers, period = _find_periods(kinds)
    if layers:
        assert 0 not in layers
        assert len(layers) > len(kinds) // 2
        assert len(layers) % period == 0
        assert all(kinds[i] == kinds[i + period] for i in layers[:-period])


def test_base_and_large_have_periods_of_three_and_others_may_have_none():
    for layers in (22, 28):
        kinds = config_of(num_hidden_layers=layers).layer_types
        assert _find_periods(kinds) == (range(1, layers), 3)
    for kinds in ([GLOBAL], [GLOBAL, LOCAL, GLOBAL], [GLOBAL, LOCAL, GLOBAL, GLOBAL, LOCAL, LOCAL]):
        assert not _find_periods(kinds)[0]
