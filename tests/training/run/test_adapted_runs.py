"""Runs that train an adapter or chosen parameters: stopped, resumed, exported."""

import json

import jax
import numpy as np
import pytest
from training import assert_same, lines_of, make_config, make_table

from mlmjax import load_pretrained
from mlmjax.config.run import parse_config
from mlmjax.errors import InputError
from mlmjax.model.modernbert import merged, parameters
from mlmjax.parallel.sharding import named_leaves
from mlmjax.training.run.train import run_training

pytestmark = pytest.mark.usefixtures("orbax_leftovers")
WAYS = {
    "adapter": {"adapter": {"rank": 2}},
    "chosen": {"optimizer": {"learning_rate": 1e-2, "train": ["*bias", "*norm*"]}},
}


def config_of(folder, out, **changes):
    table = make_table(folder, out=str(out))
    del table["model"]
    return parse_config({**table, "init_from": str(folder / "out" / "export"), **changes})


@pytest.mark.parametrize("way", ["adapter", pytest.param("chosen", marks=pytest.mark.long)])
def test_a_stopped_run_resumes_bit_by_bit(folder, straight, stop_after, tmp_path, way):
    whole, parts = (config_of(folder, tmp_path / name, **WAYS[way]) for name in ("a", "b"))
    expected = run_training(whole)
    stop_after(3, lambda: run_training(parts))
    assert_same(run_training(parts), expected)
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")
    start, _ = load_pretrained(folder / "out" / "export")
    trained = named_leaves(expected.params)
    assert len(trained) < len(parameters(start))
    exported = parameters(load_pretrained(tmp_path / "b" / "export")[0])
    for name, value in parameters(start).items():
        is_changed = name in trained or f"{name.removesuffix('.weight')}.lora_B.weight" in trained
        assert np.array_equal(exported[name], value) != is_changed, name
    if way == "adapter":
        adapted = merged(load_pretrained(tmp_path / "b" / "adapter")[0])
        jax.tree.map(np.testing.assert_array_equal, parameters(adapted), exported)
        saved = json.loads((tmp_path / "b" / "adapter" / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(folder / "out" / "export")


def test_a_run_does_not_replace_its_base(folder, straight):
    with pytest.raises(InputError, match=r"init_from: .*export is in out = .*would replace it"):
        run_training(config_of(folder, folder / "out", **WAYS["adapter"]))


def test_a_run_with_another_base_or_adapter_is_another_run(folder, straight, tmp_path):
    first = config_of(folder, tmp_path / "run", **WAYS["adapter"])
    run_training(first)
    other = config_of(folder, tmp_path / "run", adapter={"rank": 3})
    with pytest.raises(InputError, match=r"adapter\.rank is 3, the run there has 2"):
        run_training(other)
    run_training(make_config(folder, out=str(tmp_path / "base"), seed=1))
    (folder / "out" / "export").rename(tmp_path / "kept")
    try:
        (tmp_path / "base" / "export").rename(folder / "out" / "export")
        with pytest.raises(InputError, match="frozen_parameters is "):
            run_training(first)
        (folder / "out" / "export").rename(tmp_path / "base" / "export")
    finally:
        (tmp_path / "kept").rename(folder / "out" / "export")
