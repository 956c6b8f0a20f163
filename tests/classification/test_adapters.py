"""A classifier that trains an adapter or chosen parameters, saved and restored."""

import json

import numpy as np
import pytest
from labelled_texts import FAST, SHORT, examples

from mlmjax import load_pretrained, save_pretrained
from mlmjax.classification.classifier import Classifier
from mlmjax.errors import InputError
from mlmjax.model.modernbert import ModernBertForSequenceClassification, parameters
from mlmjax.storage import CARD

LABELS = ["sports", "money"]
WAYS = {
    "slot": {
        "template": "{text} [unused0] [MASK]",
        "answer": "words",
        "adapter": {"rank": 4, "alpha": 32.0},
    },
    "head": {"head": "classification", "adapter": "lora"},
}


@pytest.fixture(scope="module")
def base(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_pretrained(*pair, folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_learns_and_is_saved_without_its_base(base, tmp_path, way):
    classifier = Classifier(base, LABELS, **WAYS[way]).fit(*examples(96), **FAST)
    texts, labels = examples(60, seed=2)
    assert classifier.score(texts, labels) > 0.9
    expected = classifier.predict_proba(texts)
    classifier.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "mlmjax_classifier.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    card = (tmp_path / "saved" / CARD).read_text()
    assert f"Its base is {str(base)!r}" in card
    assert "PeftModel.from_pretrained(base" in card
    restored = Classifier.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(restored.predict_proba(texts), expected)
    restored.save_pretrained(tmp_path / "again")
    again, saved = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("again", "saved")
    )
    assert again == saved
    classifier.save_pretrained(tmp_path / "whole", merge=True)
    model, _ = load_pretrained(tmp_path / "whole")
    assert model.config.adapter is None
    assert isinstance(model, ModernBertForSequenceClassification) == (way == "head")
    whole = Classifier.from_pretrained(tmp_path / "whole")
    np.testing.assert_allclose(whole.predict_proba(texts), expected, atol=1e-5)
    classifier.save_pretrained(tmp_path / "half", dtype="bfloat16")
    half = Classifier.from_pretrained(tmp_path / "half").predict_proba(texts)
    np.testing.assert_allclose(half, expected, atol=0.05)


def test_chosen_parameters_are_the_only_ones_that_a_fit_changes(base, pair):
    classifier = Classifier(base, LABELS, template=SHORT, train=["*norm*", "decoder.bias"])
    classifier.fit(*examples(32), **FAST)
    before, after = parameters(pair[0]), parameters(classifier.asking_.scorer.model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if "norm" in name or name == "decoder.bias"}
    with pytest.raises(InputError, match="train: 'nothing' names no parameter"):
        classifier.fit(*examples(8), train=["nothing"])


def test_a_fit_from_an_adapter_goes_on_or_trains_all(base, tmp_path):
    fast = {**FAST, "epochs": 1}
    first = Classifier(base, LABELS, template=SHORT, adapter="lora").fit(*examples(16), **fast)
    first.save_pretrained(tmp_path / "adapter")
    whole = Classifier(tmp_path / "adapter").fit(*examples(16), **fast)
    whole.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()
    more = Classifier(tmp_path / "adapter", adapter="lora").fit(*examples(16), **fast)
    more.save_pretrained(tmp_path / "more")
    config = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert more.history_[-1]["loss"] < first.history_[-1]["loss"]
    with pytest.raises(InputError, match="the model has one already, of rank 8 and alpha 16; give"):
        Classifier(tmp_path / "adapter", adapter={"rank": 4}).fit(*examples(16), **fast)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"adapter": "dora"}, "adapter: found 'dora' .*should be 'lora'"),
        ({"adapter": {"rnak": 3}}, r"adapter\.rnak: unknown key; did you mean 'rank'"),
        ({"adapter": "lora", "train": ["*bias"]}, "leave out either it or train"),
        ({"train": []}, "train: found"),
    ],
)
def test_bad_recipes_are_rejected(base, recipe, says):
    with pytest.raises(InputError, match=says):
        Classifier(base, LABELS).fit(["goal", "bank"], LABELS, **recipe)


def test_a_pair_without_a_folder_is_saved_whole(pair, tmp_path):
    classifier = Classifier(pair, LABELS, template=SHORT, adapter="lora")
    classifier.fit(*examples(16), **{**FAST, "epochs": 1})
    with pytest.raises(InputError, match="was not loaded from a folder or hub id"):
        classifier.save_pretrained(tmp_path / "x")
    classifier.save_pretrained(tmp_path / "x", merge=True)
    assert json.loads((tmp_path / "x" / "config.json").read_text())["hidden_size"]
