"""A small suite of one zero-shot and one fine-tuned task, with all its files, and a model."""

import tomllib
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
from labelled_texts import word_model, word_tokenizer
from task_files import write_csv

from mlmjax.config.suite import Sweep, load_suite
from mlmjax.config.task import Task
from mlmjax.evaluation.questions import Question
from mlmjax.evaluation.suite.suite import run_suite
from mlmjax.weights.pretrained import save_pretrained

TASK = """
name = "reviews"
prompt = "Text: {text}\\n{options}[unused0] [MASK]"
shorten = { text = "tail" }
answer = "label"
labels = ["bad", "good"]
"""
SUITE = """
name = "small"
seeds = 1
[sweep]
epochs = [1]
learning_rate = [1e-3, 3e-3]
batch_size = 16
max_length = 64
held_out = 0.25
[[entries]]
task = "reviews.toml"
kind = "zero-shot"
tables = [2]
test = { files = ["*reviews*test*"] }
published = { zero-shot = 12.5 }
[[entries]]
task = "reviews.toml"
kind = "fine-tune"
train = { files = ["*reviews*train*"] }
validation = { files = ["*reviews*dev*"] }
test = { files = ["*reviews*test*"] }
[[entries]]
task = "ag_news"
kind = "fine-tune"
tables = [3]
train = { files = ["*news*train*"] }
test = { files = ["*news*test*"] }
[[missing]]
task = "dreams"
tables = [3]
reason = "nobody has written them down"
"""
GOOD, BAD = ["fine", "lovely", "bright"], ["dull", "lost", "grey"]


def reviews(count, seed):
    """Return rows with one word that decides the label."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        words = (BAD, GOOD)[number % 2]
        text = f"{rng.choice(['a', 'the'])} {rng.choice(words)} film {rng.integers(99)}"
        rows.append({"text": text, "label": ("bad", "good")[number % 2]})
    return rows


REVIEWS = Task.from_dict(tomllib.loads(TASK))
SWEEP = Sweep(batch_size=16, max_length=32)


def questions(count, seed):
    """Return the same rows as questions of the task."""
    names = ["bad", "good"]
    return [
        Question(i, f"row {i}", {"text": row["text"], "options": names}, i % 2, "")
        for i, row in enumerate(reviews(count, seed))
    ]


def right(log_probs, asked):
    return np.mean(log_probs.argmax(axis=1) == [question.gold for question in asked])


def small_pair(folder, scale=0.1):
    """Return a model that learns these words fast, and its tokenizer."""
    tokenizer = word_tokenizer(folder, (*GOOD, *BAD, "film", "good", "bad"))
    return word_model(tokenizer, scale=scale), tokenizer


def write_model(path, scale=0.1):
    save_pretrained(*small_pair(path.parent / "tokenizer", scale), path)


def write_suite(folder):
    """Write the suite file, its task file and the data folder, which has no validation file."""
    folder.mkdir(exist_ok=True)
    (folder / "small.toml").write_text(SUITE)
    (folder / "reviews.toml").write_text(TASK)
    (folder / "data" / "Reviews").mkdir(parents=True)
    write_csv(folder / "data" / "Reviews" / "train.csv", reviews(32, 1))
    write_csv(folder / "data" / "my-reviews.test.csv", reviews(12, 2))


def run_small(
    folder, out, *overrides, suite="small.toml", models=("model",), data="data", **options
):
    """Run the suite of a folder; return the results, and what is printed (all, cells, computed)."""
    lines = []
    results = run_suite(
        *load_suite(folder / suite, overrides),
        [str(folder / name) for name in models],
        data=folder / data,
        out=out,
        tell=lines.append,
        counting=lambda what: nullcontext(lambda done, total: None),
        **options,
    )
    cells = [line for line in lines if line.startswith("[")]
    computed = [line for line in cells if "already computed" not in line]
    return results, SimpleNamespace(lines=lines, cells=cells, computed=computed)


def files_of(out):
    """Return the bytes of every file of a run's folder except its lock."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
