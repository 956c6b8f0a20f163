"""Parts of the study that are not about labels: plain text and commands."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score
from study import Study

from mlmjax import fill_mask, load_pretrained, pseudo_log_likelihood

TASKS = Path(__file__).parents[1] / "configs" / "tasks" / "words"
SUITE = """
name = "small"
seeds = 1
limit = 200
[sweep]
epochs = [2]
learning_rate = [5e-4, 1e-3]
[[entries]]
task = "$tasks/ag_news.toml"
kind = "fine-tune"
train = { files = ["ag_news_sample5k_train*"] }
test = { files = ["ag_news_test*"] }
[[entries]]
task = "$tasks/trec.toml"
kind = "zero-shot"
test = { files = ["trec_test*"] }
"""


def language(s: Study) -> None:
    """Measure how well likelihood tells acceptable sentences, and `fill_mask` finds words."""
    model, tokenizer = load_pretrained(s.model)
    rows = s.read("cola_in_domain_dev")
    good = [row["label"] for row in rows]
    for method in ("word_l2r", "original"):
        found = pseudo_log_likelihood(model, tokenizer, [r["text"] for r in rows], method=method)
        for measure in ("total", "per_token", "per_word"):
            values = [getattr(one, measure) for one in found]
            s.add(f"CoLA, {method}, {measure}", "AUC", roc_auc_score(good, values), rows=len(rows))
    rng, texts, words = np.random.default_rng(0), [], []
    for text in s.topics("test", 500)[0]:
        split = text.split()[:40]
        at = rng.integers(1, len(split) - 1)
        if len(tokenizer.encode_plain(f" {split[at]}")) == 1 and split[at].isalpha():
            words.append(split[at])
            texts.append(" ".join([*split[:at], "[MASK]", *split[at + 1 :]]))
    found = fill_mask(model, tokenizer, texts, top_k=5)
    hits = [
        word in [one.token.strip() for one in masks[0]]
        for word, masks in zip(words, found, strict=True)
    ]
    s.add("masked words of news", "among the first five", np.mean(hits), len(hits))


def commands(s: Study) -> None:
    """Measure the commands: a suite, two evaluations, and their comparison."""
    (s.out / "small.toml").write_text(SUITE.replace("$tasks", str(TASKS)))

    def mlmjax(*words) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mlmjax", *map(str, words)], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"mlmjax {words[0]}: {done.stderr}")
        (s.out / f"{words[0]}.log").write_text(done.stdout + done.stderr)
        return done.stdout

    here = ["--data", s.data, "--out", s.out / "suite"]
    mlmjax("evaluate", "--model", s.model, "--suite", s.out / "small.toml", *here)
    print((s.out / "suite" / "suite.md").read_text())
    file = s.data / "ag_news_test.parquet"
    data = ["--task", TASKS / "ag_news.toml", "--data", file, "--limit", 300, "--order-rows", 0]
    for name, model in (("a", s.model), ("b", s.out / "fitted-words")):
        mlmjax("evaluate", "--model", model, *data, "--out", s.out / name)
    print(mlmjax("compare", s.out / "b", s.out / "a"))
