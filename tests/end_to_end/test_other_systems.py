"""The package works where modules, signals and functions of POSIX are missing, as on Windows.

Libraries are imported first, because those for this system need what is then taken away. The paths
of Windows and its file locks are tested there, by the workflow of the repository.
"""

import os
import subprocess
import sys

import pytest
from labelled_texts import word_model, word_tokenizer

from mlmjax import save_pretrained

TAKE_AWAY = """
import asyncio, multiprocessing.pool, os, signal, subprocess, sys, tempfile, threading
import click, filelock, flax.nnx, huggingface_hub.hf_api, jax, joblib, matplotlib.pyplot
import optax, sklearn.base
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
kept = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}
for name in [name for name in dir(signal) if name.isupper() and name.startswith("SIG")]:
    if name not in kept and not name.startswith("SIG_"):
        delattr(signal, name)
for name in ("alarm", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt", "sigwait"):
    delattr(signal, name)
for name in (
    *("fork", "forkpty", "getpgid", "geteuid", "getuid", "getloadavg", "killpg", "mkfifo", "nice"),
    *("register_at_fork", "setsid", "sysconf", "uname", "wait3", "sched_getaffinity", "statvfs"),
    *("fchmod", "chown", "getgid", "lchown", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC"),
):
    delattr(os, name)
def kill(process, number):
    raise SystemError("on Windows this ends the process")
os.kill = kill
def symlink(*arguments, **options):
    raise OSError("on Windows this needs a right")
os.symlink = symlink
sys.platform = "win32"
"""

CLASSIFY = """
from pathlib import Path
from mlmjax.cli import main
from mlmjax.classification.predictor import Predictor
from mlmjax.weights.pretrained import load_pretrained, save_pretrained

main.listen_to_interrupts()
out = Path(sys.argv[1]) / "out"
(out.parent / ".out.new-00000000-1-00000000").mkdir()
(out.parent / f".out.new-{main_folder()}-999999999-00000000").mkdir()
save_pretrained(*load_pretrained(sys.argv[2]), out)
texts = out.parent / "texts.txt"
texts.write_text("a goal in the last minute\\n", encoding="utf-8")
assert main.run(["classify", "--labels", "sports,money", "--model", str(out), str(texts)]) == 0
print(Predictor.from_pretrained(out, ["sports", "money"]).predict(["a goal in the last minute"]))
"""
OWNER = """
def main_folder():
    from mlmjax.storage import _this_machine
    return _this_machine()
"""

FIT = """
from mlmjax import Classifier
from mlmjax.storage import alone_in, build_folder

texts, labels = ["a goal", "a bank", "a match", "a loan"] * 4, ["sports", "money"] * 8
fitted = Classifier("mlmjax-small", ["sports", "money"]).fit(texts, labels, epochs=1)
fitted.save_pretrained(out)
fitted.save_pretrained(out)
assert list(Classifier.from_pretrained(out).predict(texts)) == list(fitted.predict(texts))
with alone_in(out.parent / "run"), build_folder(out.parent / "rows") as rows:
    (rows / "a").write_bytes(b"1")
assert main.run(["init", "--out", str(out.parent / "run.toml")]) == 0
"""


def run(code, folder, model):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder), str(model)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_texts_are_classified_without_what_only_posix_has(tmp_path):
    tokenizer = word_tokenizer(tmp_path / "tokenizer")
    save_pretrained(word_model(tokenizer), tokenizer, tmp_path / "model")
    said = run(TAKE_AWAY + OWNER + CLASSIFY, tmp_path, tmp_path / "model")
    assert "sports" in said or "money" in said
    # Whether another process still lives is not known there, so its folders stay.
    assert sum(path.name.startswith(".out.new-") for path in tmp_path.iterdir()) == 2


@pytest.mark.long
def test_a_classifier_is_fitted_without_what_only_posix_has(tmp_path):
    run(TAKE_AWAY + OWNER + CLASSIFY + FIT, tmp_path, "mlmjax-small")
    assert (tmp_path / "rows" / "a").read_bytes() == b"1"
