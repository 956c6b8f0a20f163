"""Preparing again, after a kill or by several: the same bytes, and no rows made otherwise used."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import row_files
from processes import finish, spawn
from row_files import change, change_source, content, make_rows, two_sources, write_table
from texts import small_table

from mlmjax import InputError
from mlmjax.data.manifest import read_manifest
from mlmjax.data.preparing import build
from mlmjax.data.preparing import prepare as prepare_module
from mlmjax.data.preparing.prepare import prepare
from mlmjax.data.preparing.workers import Workers
from mlmjax.errors import RunError
from mlmjax.text.tokenizer import Tokenizer


@pytest.fixture
def config(tmp_path):
    return two_sources(tmp_path)


def test_again_is_a_no_op(config, tokenizer, monkeypatch):
    Path(config.rows).mkdir()  # An empty folder is as good as none.
    folder = prepare(config, tokenizer)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(prepare_module, "_build", None)
    (folder / ".building").touch()  # The mark that a killed process leaves.
    # What is settled while training may change without preparing again.
    assert prepare(change(config, batch_size=7), tokenizer) == folder
    assert prepare(change_source(config, weight=3.0), tokenizer) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_rows_made_differently_are_rejected(config, tokenizer):
    folder = prepare(config, tokenizer)
    before = content(folder)
    other = type(tokenizer)(tokenizer.files)
    other.sha256 = "0" * 64
    fewer, prompt = config.sources[:1], "0.prompt is '{input}.', the rows have '{input}'"
    for changed, message in (
        (change(config, seq_length=128), "data.seq_length is 128, the rows have 64"),
        (change(config, pack=False), "data.pack is False, the rows have True"),
        (change_source(config, prompt="{input}."), f"data.sources.{prompt}"),
        (change_source(config, limit=5), "data.sources.0.limit is 5, the rows have None"),
        (change(config, sources=fewer), "data.sources has 1; the rows have 2"),
        (config, "the tokenizer's sha256 is 000000000000"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            prepare(changed, other if changed is config else tokenizer)
        assert "delete the folder to prepare again, or name another" in str(caught.value)
    assert content(folder) == before


def test_changed_source_files_are_rejected_and_absent_ones_are_not(config, tokenizer, tmp_path):
    folder = prepare(config, tokenizer)
    path = tmp_path / "a.jsonl"
    original = path.read_bytes()
    later = (folder / "manifest.json").stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    assert prepare(config, tokenizer) == folder

    other = original.replace(b"Question", b"Answered")
    # The last has the size and time of an old file, but its status changed after the rows.
    for changed, at in ((other, later), (original + original, later), (other, 0)):
        path.write_bytes(changed)
        os.utime(path, ns=(at, at))
        with pytest.raises(InputError, match=r"a\.jsonl has changed since"):
            prepare(config, tokenizer)
    path.unlink()
    assert prepare(config, tokenizer) == folder


# Runs in its own process, which loads everything once and then forks for each attempt.
ATTEMPTS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from mlmjax.config.data import DataConfig
from mlmjax.data.preparing import workers
from mlmjax.data.preparing.prepare import prepare
from mlmjax.text.tokenizer import Tokenizer
sys.path.append(sys.argv[1])
from row_files import change, content
tokenizer, done = Tokenizer.from_pretrained(), workers._do

def attempt(config, seconds=None, jobs=-1):
    run = os.fork()
    if run == 0:
        def do(*job):
            nonlocal jobs
            if jobs == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            jobs -= 1
            return done(*job)
        workers._do = do
        prepare(config, tokenizer)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(run, signal.SIGKILL)
    return os.waitpid(run, 0)[1]

for table, wanted in json.loads(sys.argv[2]):
    config = DataConfig.model_validate(table, strict=False)
    rows, kills, rng = Path(config.rows), 0, random.Random(wanted)
    partial = Path(f"{rows}.partial")
    begin = time.monotonic()
    prepare(change(config, workers=1), tokenizer)
    took = time.monotonic() - begin + (config.workers == 2)  # Processes take a second to start.
    expected = content(rows)
    for jobs in () if wanted else (0, 1, 2, 4):
        shutil.rmtree(rows)
        assert attempt(config, jobs=jobs) == signal.SIGKILL
        assert len(list((partial / "stage").glob("*.json"))) == min(jobs, 2)
        assert not rows.exists()
        calls = []
        prepare(config, tokenizer, lambda *read: calls.append(read))
        assert {name for name, _ in calls} == {"qa", "text"} - set(["qa", "text"][:jobs])
        assert content(rows) == expected
    while kills < wanted or not rows.exists():
        if rows.exists():
            shutil.rmtree(rows)
        status = attempt(config, rng.uniform(0, took) if kills < wanted else None)
        assert status in (0, signal.SIGKILL)
        kills += status != 0
        assert not rows.exists() or content(rows) == expected
    assert len(expected) >= 4  # the manifest, and a row file of each source
    assert not partial.exists()
    shutil.rmtree(rows)
"""


@pytest.mark.parametrize(
    "cases",
    [
        [(None, 0), (1, 2)],
        pytest.param([(2, 1)], marks=pytest.mark.long),
        pytest.param([(2, 10)], marks=pytest.mark.long),
    ],
)
def test_killed_at_any_moment_it_resumes_and_gives_the_same_bytes(config, tmp_path, cases):
    """Kill the first process: between jobs, then at random; those that it started end, too."""
    tables = []
    for workers, kills in cases:
        for part in range(8 if kills else 0):
            write_table(tmp_path / f"p{part:02}.jsonl", make_rows(50 * kills, salt=part))
        path = str(tmp_path / ("p*.jsonl" if kills else "a.jsonl"))
        select = {"sizes": (100 * kills, 150 * kills)} if workers == 1 else {}
        one = change(change_source(config, path=path), workers=workers, select=select)
        tables.append((one.model_dump(mode="json"), kills))
    helpers = str(Path(row_files.__file__).parent)
    subprocess.run([sys.executable, "-c", ATTEMPTS, helpers, json.dumps(tables)], check=True)


def test_what_was_staged_of_other_files_is_not_used(config, tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"leaves nothing to train on; lower data\.validation_row"):
        prepare(change(config, validation_rows=10_000), tokenizer)
    # What was read is kept for the next try.
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", "rows.partial"}
    write_table(tmp_path / "a.jsonl", make_rows(200, salt=5))
    rows = prepare(config, tokenizer)
    assert read_manifest(rows).sources[0].records == 200
    other = change(config, rows=str(tmp_path / "other"))
    assert content(rows) == content(prepare(other, tokenizer))


@pytest.fixture
def workers():
    small = Tokenizer({"tokenizer.json": json.dumps(small_table()).encode()})
    with closing(Workers(small)) as workers:
        yield workers


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_process_that_dies_fails_the_run(workers, tmp_path, when):
    def work(tokenizer, progress, *, out, dies):
        import os

        if dies:
            os._exit(9)
        with open(out, "w") as file:
            file.write("done")
        return {}

    jobs = [{"out": str(tmp_path / str(n)), "dies": when == "at once" or n == 4} for n in range(5)]
    with pytest.raises(RunError, match=r"a process that prepares data died; .* to resume"):
        workers.run(work, jobs, 2)
    jobs[4]["dies"] = False
    assert when == "at once" or workers.run(work, jobs, 1) == [{}] * 5


def test_what_a_process_rejects_keeps_its_details_and_processes_stay(workers, tmp_path):
    def work(tokenizer, progress, *, out, text):
        import os
        import sys

        from mlmjax.errors import InputError

        assert "jax" not in sys.modules
        if text is None:
            raise InputError("a.csv row 1: no text", ["row 2: neither"])
        with open(out, "w") as file:
            file.write(text)
        return {"process": os.getpid()}

    def jobs(name, text):
        return [{"out": str(tmp_path / f"{name}{n}"), "text": text} for n in range(5)]

    with pytest.raises(InputError) as caught:
        workers.run(work, jobs("a", None), 2)
    assert caught.value.message == "a.csv row 1: no text"
    assert caught.value.details == ("row 2: neither",)
    assert not list(tmp_path.iterdir())
    used = {one["process"] for name in "bc" for one in workers.run(work, jobs(name, ""), 2)}
    assert len(used - {os.getpid()}) == len(used) <= 2


def test_two_at_once_build_one_folder(tmp_path):
    target = tmp_path / "made"
    code = (
        "import sys, time, pathlib\n"
        "from mlmjax.storage import build_folder\n"
        "with build_folder(pathlib.Path(sys.argv[1])) as partial:\n"
        "    print('builds' if partial else 'finds', flush=True)\n"
        "    if partial:\n"
        "        (partial / 'x').write_text('x')\n"
        "        time.sleep(0.3)\n"
    )
    codes, printed, _ = finish([spawn(code, target) for _ in range(3)])
    assert (codes, sorted(printed)) == ([0] * 3, ["builds\n", "finds\n", "finds\n"])
    assert [path.name for path in target.iterdir()] == ["x"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_file_changed_while_it_is_read_is_rejected(config, tokenizer, tmp_path):
    def touch(name, records):
        if name == "text":
            (tmp_path / "a.jsonl").touch()

    with pytest.raises(InputError, match=r"a\.jsonl: has changed while it was read"):
        prepare(config, tokenizer, touch)
    assert not (tmp_path / "rows").exists()
    again = content(prepare(config, tokenizer))
    assert again == content(prepare(change(config, rows=str(tmp_path / "other")), tokenizer))


def test_rows_packed_before_a_kill_are_used_unless_they_are_of_another_choice(
    config, tokenizer, tmp_path, monkeypatch
):
    packed = []
    pack_bucket = build.pack_bucket

    def fail_at(limit):
        def pack(*args, **arguments):
            if len(packed) == limit:
                raise KeyboardInterrupt
            packed.append(arguments["out"])
            return pack_bucket(*args, **arguments)

        monkeypatch.setattr(build, "pack_bucket", pack)

    fail_at(2)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tokenizer)
    fail_at(-1)
    other = change(config, validation_rows=4)
    expected = content(prepare(change(other, rows=str(tmp_path / "other")), tokenizer))
    files = len(packed) - 2
    fail_at(len(packed) + 1)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tokenizer)
    assert len(packed) == 2 + files + 1  # The two of before, then the one of this time.
    fail_at(-1)
    assert content(prepare(other, tokenizer)) == expected
    assert len(packed) == 2 + files + 1 + files
