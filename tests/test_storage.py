"""Files and folders are there whole or not at all, and locked while they are made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlmjax.errors import InputError, RunError
from mlmjax.storage import (
    PARTIAL,
    alone_in,
    build_folder,
    check_writable,
    describe_file,
    expand_home,
    find_moved_away,
    hash_file,
    hash_value,
    read_json,
    replace_folder,
    write_json,
    write_whole,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch):
    def fail(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", fail)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": "ä"})
    write_json(path, {"b": [1]})
    assert path.read_text() == '{\n  "b": [\n    1\n  ]\n}\n'
    assert read_json(tmp_path, "a.json") == {"b": [1]}
    assert names(tmp_path) == ["a.json"]


def test_a_file_that_cannot_be_written_stays(tmp_path, full_disk):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(RunError, match=r"a: cannot be written \(No space left .*free some space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_two_processes_write_one_file_and_it_is_whole(tmp_path, monkeypatch):
    path, flush = tmp_path / "a", os.fsync

    def write_in_another_process(descriptor):
        monkeypatch.setattr("os.fsync", flush)
        monkeypatch.setattr("os.getpid", lambda: 0)
        write_whole(path, b"longer content of the other")

    monkeypatch.setattr("os.fsync", write_in_another_process)
    write_whole(path, b"mine")
    assert path.read_bytes() == b"mine"
    assert names(tmp_path) == ["a"]


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "made"
    for content in ("old", "new"):
        with replace_folder(path, {"a", "*.bin"}) as folder:
            (folder / "a").write_text(content)
            (folder / "x.bin").touch()
    assert (path / "a").read_text() == "new"

    def fail(replaceable):
        with replace_folder(path, replaceable) as folder:
            (folder / "a").write_text("newer")
            raise OSError(28, os.strerror(28))

    with pytest.raises(RunError, match="made: cannot be written"):
        fail({"a", "*.bin"})
    assert (path / "a").read_text() == "new"
    with pytest.raises(InputError, match=r"not part of a model \(x\.bin\)"):
        fail({"a"})
    assert names(tmp_path) == ["made"]


def test_a_folder_is_built_once_and_from_what_is_left(tmp_path):
    path = tmp_path / "made"

    def stop():
        with build_folder(path) as folder:
            (folder / "stage").mkdir()
            (folder / "stage" / "a.json").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert names(tmp_path) == ["made.partial"]
    with build_folder(path) as folder:
        assert (folder / "stage" / "a.json").exists()
    with build_folder(path) as folder:
        assert folder is None
    assert names(tmp_path) == ["made"]
    assert names(path) == ["stage"]
    below = path / "stage" / "a.json" / "x"
    with pytest.raises(InputError, match="cannot be written"), build_folder(below):
        pass


def test_a_run_folder_has_one_process_and_is_checked(tmp_path):
    def check(out):
        raise InputError("not ours")

    message = "another process uses it"
    with alone_in(tmp_path), pytest.raises(InputError, match=message), alone_in(tmp_path):
        pass
    with pytest.raises(InputError, match="not ours"), alone_in(tmp_path, check):
        pass
    with alone_in(tmp_path):
        pass


def test_hashes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert hash_file(path).startswith("ba7816bf")
    assert describe_file(path) == {"path": str(path), "bytes": 3, "sha256": hash_file(path)}
    assert hash_value({"a": 1, "b": "\udcff"}) == hash_value({"b": "\udcff", "a": 1})
    with pytest.raises(InputError, match="cannot be read"):
        hash_file(tmp_path / "b")


def test_a_leading_tilde_means_home_unless_a_folder_is_called_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expand_home("~/model") == tmp_path / "model"
    assert expand_home("./~x/model") == Path("~x/model")
    with pytest.raises(InputError, match="~nobody-here/model: the home directory that"):
        expand_home("~nobody-here/model")
    (tmp_path / "~nobody-here").mkdir()
    assert expand_home("~nobody-here/model") == Path("~nobody-here/model")


def test_a_place_is_tried_before_the_work_for_it(tmp_path):
    check_writable(tmp_path / "new" / "model")
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"file/model: cannot be written .*; give a folder in a place"
    ):
        check_writable(tmp_path / "file" / "model")


def test_a_pipe_is_not_read_twice(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: is a pipe or a device; expected a file"):
        hash_file(tmp_path / "pipe")


KILLED = """
import os, sys
from pathlib import Path
from mlmjax.storage import replace_folder

with replace_folder(Path(sys.argv[1]) / "export", ()) as folder:
    (folder / "weights").write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    (left,) = names(tmp_path)
    assert left.startswith(".export.new-")
    theirs = tmp_path / f".export.new-{'0' * 8}-{os.getpid()}-{'0' * 8}"  # of another machine
    theirs.mkdir()
    with replace_folder(tmp_path / "export", ()) as folder:
        (folder / "weights").write_text("whole")
        assert left not in names(tmp_path)
    assert names(tmp_path) == sorted([theirs.name, "export"])


SAVE = """
import os, random, signal, sys, time
from pathlib import Path
from mlmjax.storage import find_moved_away, replace_folder

out = Path(sys.argv[1]) / "export"

def save(number):
    with replace_folder(out, ("a", "b")) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(f"{number} " * 1000)
"""
KILLS = f"""{SAVE}
def save_for_ever():
    number = 0
    while True:
        save(number := number + 1)

save(0)
for _ in range(20):
    child = os.fork()
    if not child:
        save_for_ever()
    time.sleep(random.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    folder = find_moved_away(out) or out
    print(*(len(set((folder / name).read_text().split())) for name in ("a", "b")))
"""
AWAY = f"""{SAVE}
rename = Path.rename
save(1)
Path.rename = lambda self, to: rename(self, to) if self == out else os.kill(os.getpid(), 9)
save(2)
"""


def test_a_killed_save_leaves_the_old_or_the_new_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["1 1"] * 20, done.stderr


def test_a_folder_that_a_killed_process_moved_away_comes_back(tmp_path):
    subprocess.run([sys.executable, "-c", AWAY, str(tmp_path)], check=False)
    out = tmp_path / "export"
    assert not out.exists()
    assert find_moved_away(out).name.startswith(".export.old-")
    with pytest.raises(ZeroDivisionError), replace_folder(out, ("a", "b")):
        raise ZeroDivisionError
    assert names(tmp_path) == ["export"]
    assert out.joinpath("a").read_text().split()[0] == "1"


def test_a_run_folder_keeps_nothing_unfinished(tmp_path):
    left = [tmp_path / ".export.new-0123abcd", tmp_path / ".export.old-0123abcd-7-0123abcd"]
    for folder in left:
        folder.mkdir()
    (tmp_path / f"config.json.77{PARTIAL}").write_text("{")
    kept = [tmp_path / ".export.new-mine", tmp_path / "export"]
    for folder in kept:
        folder.mkdir()
    with alone_in(tmp_path):
        assert set(names(tmp_path)) - {".lock"} == {folder.name for folder in kept}
