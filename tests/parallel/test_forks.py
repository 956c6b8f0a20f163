"""A process forked from one that has used JAX says so, where JAX itself would wait for ever."""

import subprocess
import sys

from labelled_texts import word_model, word_tokenizer

from mlmjax import save_pretrained

FORKS = """
import multiprocessing, warnings
from mlmjax import InputError
from mlmjax.classification.predictor import Predictor  # what Classifier asks, without scikit-learn

warnings.simplefilter("ignore")  # JAX warns of the fork, too
warm = Predictor.from_pretrained({model!r}, ["sports", "money"])
assert {use}

def inherited(text):
    return warm.predict([text])

def sent(classifier):
    return classifier.predict(["a goal"])

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(1) as pool:
        for function, argument in ((inherited, "a goal"), (sent, warm)):
            try:
                pool.apply_async(function, (argument,)).get(60)
            except InputError as error:
                print(error)
"""


def test_a_forked_process_names_the_way_out(tmp_path):
    tokenizer = word_tokenizer(tmp_path / "tokenizer")
    save_pretrained(word_model(tokenizer), tokenizer, tmp_path / "model")
    code = FORKS.format(model=str(tmp_path / "model"), use="warm.shortened == 0")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("was forked from one that had used JAX" in line for line in lines)
    assert all("get_context('spawn')" in line for line in lines)
