"""Training, classifying and evaluating need no implicit promotion and no implicit transfer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAINING = """
import sys
from pathlib import Path

sys.modules["tensorboardX"] = None  # takes seconds to import
import jax
import training
from mlmjax import run_training
from mlmjax.config.run import parse_config

assert jax.config.jax_numpy_dtype_promotion == "strict"
assert jax.config.jax_transfer_guard == "disallow"
folder = Path(sys.argv[1])
training.write_tokenizer(folder / "tokenizer")
training.write_records(folder / "records.jsonl", 40)
table = training.make_table(folder, steps=4, data__validation_rows=2, dtype="bfloat16")
table["optimizer"] |= {"ema": 0.9, "skip_spikes": 9.0}
run_training(parse_config(table))
"""
ANSWERS = """
from mlmjax import Classifier, load_pretrained, run_evaluation
from mlmjax.config.task import Task

options = {"answer": "words", "template": "{text} [unused0] [MASK]", "max_length": 32}
classifier = Classifier(str(folder / "out" / "export"), ["red", "blue"], **options)
classifier.fit(["red", "blue"] * 2, ["red", "blue"] * 2, epochs=1, validation_share=0.5)
(folder / "rows.jsonl").write_text('{"text": "sun", "label": "red"}\\n' * 3)
task = Task.from_dict(
    {"name": "t", "data": str(folder / "rows.jsonl"), "prompt": "{text} [unused0] [MASK]",
     "answer": "label", "labels": ["red", "blue"],
     "verbalizer": {"red": [" red"], "blue": [" blue"]}}
)
loaded = load_pretrained(folder / "out" / "export")
results = run_evaluation(*loaded, task, data=folder / "rows.jsonl", order_rows=0)
shares = classifier.predict_proba(["sun moon", "fish"]).sum(axis=1).tolist()
assert results["n"] == 3
assert all(abs(share - 1) < 1e-6 for share in shares), shares
"""


@pytest.mark.parametrize(
    "core", [TRAINING, pytest.param(TRAINING + ANSWERS, marks=pytest.mark.long)]
)
def test_the_core_runs_without_implicit_promotion_and_transfer(tmp_path, core):
    helpers = str(Path(__file__).parents[1] / "helpers")
    path = os.pathsep.join(filter(None, [helpers, os.environ.get("PYTHONPATH")]))
    strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_TRANSFER_GUARD": "disallow"}
    done = subprocess.run(
        [sys.executable, "-c", core, str(tmp_path)],
        env={**os.environ, **strict, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
