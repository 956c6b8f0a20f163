"""Run files with maskers, rates, weights and losses of research: they train, stop and resume."""

import base64
import json

import numpy as np
import pytest
from training import OTHERS, assert_same, lines_of, make_config

from mlmjax.config.run import CheckpointConfig
from mlmjax.data.masking.maskers import LossMasker
from mlmjax.errors import InputError
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.run.train import prepare_rows, run_training
from mlmjax.weights.checkpoints import Checkpoints

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
        "loss": {"mlm_share": 0.9, "masking": "loss"},
        "replaced": {"mlm_share": 1.0, "random_tokens": 1.0, "loss": "replaced_tokens"},
    }


def config_of(folder, name, objective, **changes):
    return make_config(folder, out=str(folder / f"research-{name}"), objective=objective, **changes)


@pytest.mark.parametrize(
    "name",
    ["loss", *(pytest.param(name, marks=pytest.mark.long) for name in ("weights", "replaced"))],
)
def test_a_run_learns_and_a_stopped_one_resumes_to_the_same_bits(folder, table, stop_after, name):
    objective = objectives(table)[name]
    straight = run_training(config_of(folder, name, objective))
    lines = lines_of(folder / f"research-{name}")
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    stopped = config_of(folder, f"{name}-stopped", objective)
    for step in (4, 6) if name == "loss" else (3,):  # before and after a validation
        stop_after(step, lambda: run_training(stopped))
    assert_same(run_training(stopped), straight)
    assert lines_of(folder / f"research-{name}-stopped") == lines
    assert (folder / f"research-{name}" / "export" / "model.safetensors").is_file()


@pytest.mark.long
@pytest.mark.parametrize("name", ["loss", "replaced"])
def test_eight_devices_learn_the_same(folder, table, name):
    """Up to rounding; the straight run of the test above is on one device."""
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    changes = {"mesh": mesh, "data__accumulate": 2}
    run_training(config_of(folder, f"{name}-eight", objectives(table)[name], **changes))
    one, eight = (lines_of(folder / f"research-{name}{end}") for end in ("", "-eight"))
    losses = [[line["loss"] for line in lines] for lines in (one, eight)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_losses_of_tokens_are_those_of_the_last_validation(folder):
    """The straight run of the test above has validated after updates 4 and 8."""
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    masker = LossMasker(tokenizer.vocab_size)
    with Checkpoints(str(folder / "research-loss" / "checkpoints"), CheckpointConfig()) as saved:
        masker.load(saved.metadata(8)["token_losses"], "here")
    (fish,) = tokenizer.encode_plain(" fish")
    ids, rng = np.array([fish, tokenizer.encode_plain("Z")[0]]), np.random.default_rng(0)
    assert masker.dump() != LossMasker(tokenizer.vocab_size).dump()
    lines = lines_of(folder / "research-loss")
    (last,) = [one for one in lines if (one["step"], one["split"]) == (8, "validation")]
    means = np.frombuffer(base64.b64decode(masker.dump()), "<f4")
    assert means[-1] == pytest.approx(last["loss_mlm"], rel=1e-5)
    assert 0 < means[fish] < 8
    assert np.isnan(means[ids[1]])
    assert masker(ids, np.arange(2), 1, rng).shape == (1,)


def test_a_checkpoint_without_losses_is_said():
    for text in (None, 3, "", "AAAA", "!", "gibberish"):
        with pytest.raises(InputError, match="out/8: holds no losses of 5 tokens"):
            LossMasker(5).load(text, "out/8")


def test_losses_need_validations(folder):
    objective = {"mlm_share": 1.0, "masking": "loss"}
    for changes, message in (
        ({"data__validation_rows": 0}, "masking = 'loss' follows the losses of validations, which"),
        ({"evaluation": {"every": 0}}, "set evaluation.every above 0"),
    ):
        with pytest.raises(InputError, match=message):
            config_of(folder, "none", objective, **changes)


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


def test_rows_are_prepared_without_running_code(folder):
    objective = {"mlm_share": 1.0, "masking": "no_such_module:masker"}
    assert prepare_rows(config_of(folder, "none", objective)) == folder / "rows"


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
