"""A decider that trains an adapter, saved without its base."""

import numpy as np

from mlmjax import Choice, Decider, save_pretrained
from mlmjax.model.modernbert import parameters

QUESTIONS = {"topic": Choice("Which topic?", {"sports": None, "money": None})}
STATES = ["goal match", "bank price", "team goal", "stock bank"] * 8
ANSWERS = [{"topic": "sports"}, {"topic": "money"}] * 16
FAST = {"epochs": 4, "learning_rate": 3e-2, "batch_size": 8}


def test_an_adapter_of_a_decider(word_pair, tmp_path):
    save_pretrained(*word_pair, tmp_path / "base")
    decider = Decider(tmp_path / "base")
    decider.fit(STATES, QUESTIONS, ANSWERS, adapter={"rank": 2}, **FAST)
    assert decider.history_[-1]["loss"] < decider.history_[0]["loss"]
    before, after = parameters(word_pair[0]), parameters(decider.model)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    found = decider.decide("goal", QUESTIONS)
    decider.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    assert Decider.from_pretrained(tmp_path / "saved").decide("goal", QUESTIONS) == found
    decider.save_pretrained(tmp_path / "whole", merge=True)
    assert (tmp_path / "whole" / "model.safetensors").exists()
    decider.fit(STATES, QUESTIONS, ANSWERS, adapter={"rank": 2}, **FAST)  # goes on
    decider.fit(STATES, QUESTIONS, ANSWERS, train=["*norm*"], **{**FAST, "epochs": 1})
    assert decider.model.config.adapter is None
