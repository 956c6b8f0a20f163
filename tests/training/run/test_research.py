"""Run files with maskers, rates, weights and losses of research: they train, stop and resume."""

import json

import numpy as np
import pytest
from training import OTHERS, assert_same, lines_of, make_config

from mlmjax.errors import InputError
from mlmjax.training.run.train import run_training

pytestmark = pytest.mark.usefixtures("orbax_leftovers")

SHORT = {"steps": 2, "schedule__warmup": 1, "schedule__decay": 1}
MODULE = """
import jax.numpy as jnp
import numpy as np

from mlmjax.training.step import masked_token_loss


def last(tokenizer):
    return lambda ids, maskable, count, rng: maskable[-count:]


def doubled(tokenizer):
    def loss(model, batch):
        loss_sum, metrics = masked_token_loss(model, batch)
        return 2 * loss_sum, {"loss_sum": 2 * loss_sum, "loss_count": metrics["loss_count"]}
    return loss
"""


@pytest.fixture(scope="module")
def table(folder):
    make_config(folder)  # writes the tokenizer and the records
    path = folder / "weights.csv"
    path.write_text("word,weight\n" + "".join(f"{word},{len(word)}\n" for word in OTHERS))
    return str(path)


def objectives(table):
    return {
        "weights": {
            "mlm_share": 0.9,
            "masking": "weights",
            "mask_table": table,
            "random_tokens": 0.1,
            "mlm_rate": {"uniform": [0.0, 1.0]},
            "target_weight": "inverse_rate",
        },
        "replaced": {"mlm_share": 1.0, "random_tokens": 1.0, "loss": "replaced_tokens"},
    }


def config_of(folder, name, objective, **changes):
    return make_config(folder, out=str(folder / f"research-{name}"), objective=objective, **changes)


@pytest.mark.parametrize("name", ["weights", "replaced"])
def test_a_run_learns_and_a_stopped_one_resumes_to_the_same_bits(folder, table, stop_after, name):
    objective = objectives(table)[name]
    straight = run_training(config_of(folder, name, objective))
    lines = lines_of(folder / f"research-{name}")
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    stopped = config_of(folder, f"{name}-stopped", objective)
    stop_after(3, lambda: run_training(stopped))
    assert_same(run_training(stopped), straight)
    assert lines_of(folder / f"research-{name}-stopped") == lines
    assert (folder / f"research-{name}" / "export" / "model.safetensors").is_file()


def test_another_table_is_another_run(folder, table):
    objective, path = objectives(table)["weights"], folder / "other.csv"
    path.write_text("word,weight\nhouse,1\n")
    config = config_of(folder, "table", {**objective, "mask_table": str(path)}, **SHORT)
    run_training(config)
    path.write_text("word,weight\nhouse,2\n")
    with pytest.raises(InputError, match=r"objective_files\.mask_table is .*, the run there has"):
        run_training(config)
    card = (folder / "research-table" / "export" / "README.md").read_text()
    assert "- masking: weights, table `other.csv`" in card


def test_code_of_ones_own_trains_and_is_on_the_card(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    (folder / "research_code.py").write_text(MODULE)
    names = {"masking": "research_code:last", "loss": "research_code:doubled"}
    config = config_of(folder, "code", {"mlm_share": 1.0, **names}, **SHORT)
    with pytest.raises(InputError, match="give --code research_code"):
        run_training(config)
    run_training(config, code=["research_code"])
    plain = config_of(folder, "plain", {"mlm_share": 1.0, "masking": names["masking"]}, **SHORT)
    run_training(plain, code=["research_code"])
    first, other = (lines_of(folder / f"research-{name}")[0] for name in ("code", "plain"))
    assert first["loss"] == pytest.approx(2 * other["loss"], rel=1e-6)
    card = (folder / "research-code" / "export" / "README.md").read_text()
    assert "**code that is not part of mlmjax decided the training**: research_code:last, " in card
    saved = json.loads((folder / "research-code" / "config.json").read_text())
    assert saved["objective"]["loss"] == "research_code:doubled"
