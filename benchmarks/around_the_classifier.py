"""Parts of the study that are not about labels: plain text, commands, and cost of scoring."""

import subprocess
import sys
import time
from resource import RUSAGE_SELF, getrusage

import numpy as np
from sklearn.metrics import roc_auc_score
from study import Study

from mlmjax import fill_mask, load_pretrained, pseudo_log_likelihood

SUITE = """
name = "small"
seeds = 2
limit = 200
[sweep]
epochs = [1]
learning_rate = [5e-4, 1e-3]
[[entries]]
task = "ag_news"
kind = "fine-tune"
train = { files = ["ag_news_sample5k_train*"] }
test = { files = ["ag_news_test*"] }
[[entries]]
task = "trec"
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
    (s.out / "small.toml").write_text(SUITE)

    def mlmjax(*words) -> str:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "mlmjax", *map(str, words)], capture_output=True, text=True
        )
        s.add(f"mlmjax {words[0]}", "seconds", time.perf_counter() - start, code=done.returncode)
        (s.out / f"{words[0]}.log").write_text(done.stdout + done.stderr)
        return done.stdout

    here = ["--data", s.data, "--out", s.out / "suite"]
    mlmjax("evaluate", "--model", s.model, "--suite", s.out / "small.toml", *here)
    print((s.out / "suite" / "suite.md").read_text())
    data = ["--task", "ag_news", "--data", s.data / "ag_news_test.parquet", "--limit", 500]
    data += ["--order-rows", 0]
    for name, model in (("a", s.model), ("b", s.out / "fitted")):
        mlmjax("evaluate", "--model", model, *data, "--out", s.out / name)
    print(mlmjax("compare", s.out / "b", s.out / "a"))


def speed(s: Study) -> None:
    """Measure the time and memory of 5,000 texts."""
    texts, _ = s.topics("test", 5000)
    asked = s.fitted()
    asked.predict(texts[:200])
    start = time.perf_counter()
    asked.predict(texts)
    seconds = time.perf_counter() - start
    scorer = asked.asking_.scorer
    tokens = sum(len(scorer.tokenizer.encode_plain(text)) for text in texts)
    s.add("5,000 texts", "texts per second", len(texts) / seconds)
    s.add("5,000 texts", "tokens of text per second", tokens / seconds)
    s.add("5,000 texts", "padding share", scorer.padding_share)
    s.add("5,000 texts", "peak memory, MiB", getrusage(RUSAGE_SELF).ru_maxrss / 1024)
