"""A disk that fills up during a run: the run fails with a reason, and the same command resumes."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostile.good import RUN
from training import lines_of, write_records, write_tokenizer

from mlmjax.cli.main import run
from mlmjax.config.run import CheckpointConfig, load_config
from mlmjax.training.run.log import MetricsLog
from mlmjax.training.run.train import run_training
from mlmjax.weights.checkpoints import Checkpoints

# When a write fails, Orbax closes its event loop while TensorStore still reports other writes.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).parents[3]
OVERRIDES = (
    "steps=30",
    "schedule.warmup=1",
    "log.every=10",
    "checkpoint.every=10",
    "checkpoint.keep_last=30",
)
ADVICE = "those saved before it are whole; free some space and run the same command again"
# More than the metrics need, and less than the arrays of a checkpoint.
LIMIT = 16 * 1024


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    write_records(tmp_path / "records.jsonl", count=60)
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


def check_failure(text, reason):
    """Check what a run said that failed while it saved; return the step it could not save."""
    assert "Traceback" not in text
    last = text.splitlines()[-1]
    assert last.startswith("mlmjax: ")
    assert last.endswith(f"could not be saved ({reason}); {ADVICE}")
    return int(re.search(r"the checkpoint of step (\d+) could not be saved", last)[1])


def results(out):
    """Return the exported weights of a run, and its figures."""
    return Path(out, "export", "model.safetensors").read_bytes(), lines_of(Path(out))


def test_a_checkpoint_that_finds_no_room_fails_the_run(folder, monkeypatch, capfd):
    """A limit on the size of files is a full disk that every process can have: the kernel refuses
    the write in whatever library and thread it happens.
    """
    monkeypatch.chdir(folder)
    write, usual = MetricsLog.write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_and_fill(self, step, split, values):
        write(self, step, split, values)
        if (step, split) == (10, "train"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, usual[1]))

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_and_fill)
        try:
            assert run(["train", "run.toml", *OVERRIDES]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    step = check_failure(capfd.readouterr().err, "File too large")
    with Checkpoints(folder / "out" / "checkpoints", CheckpointConfig(keep_last=30)) as kept:
        assert kept.resumable() == (step - 10 or None)
        assert kept.steps() == [*range(10, step, 10)]
    run_training(load_config("run.toml", OVERRIDES))
    run_training(load_config("run.toml", [*OVERRIDES, "out=straight"]))
    assert results("out") == results("straight")
    assert not list(folder.glob("out/checkpoints/*tmp*"))


SMALL_DISK = """
mount -t tmpfs -o size=400k none "$1" && cd "$1" && cp -r "$2"/run.toml "$2"/records.jsonl . &&
cp -r "$2"/tokenizer . || exit 77
shift 2
"$@"
echo "ended with $?" >&2
mount -o remount,size=64m none .
"$@" 2>/dev/null
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
def test_a_disk_that_is_full(folder):
    disk = folder / "disk"
    disk.mkdir()
    command = (sys.executable, "-m", "mlmjax", "train", "run.toml", *OVERRIDES, "steps=80")
    script = ["unshare", "-rm", "sh", "-c", SMALL_DISK, "sh", disk, folder, *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8"}
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode == 77 or ended.stderr.startswith("unshare:"):
        pytest.skip(f"a small disk cannot be mounted here: {ended.stderr.strip()}")
    first, code = ended.stderr.rstrip().rsplit("\n", 1)
    assert code == "ended with 1"
    assert check_failure(first, "No space left on device") > 10
    assert ended.returncode == 0
    assert "export: out/export" in ended.stdout
