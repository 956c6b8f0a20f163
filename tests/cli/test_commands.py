"""The command line: exit codes, first lines, no traceback, only results on stdout."""

import json
import os
import signal
import subprocess
import sys

import click
import pytest

from mlmjax.cli import commands
from mlmjax.cli.main import keep_compiled, run
from mlmjax.cli.tables.inputs import read_labels
from mlmjax.errors import InputError, RunError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.toml"], "absent.toml: cannot be read"),
        (["prepare", "absent.toml"], "absent.toml: cannot be read"),
        (["train"], "Missing argument 'CONFIG'"),
        (["trian", "x.toml"], "No such command 'trian'"),
        (["evaluate", "--model", "absent", "--task", "mmul"], "mmlu"),
    ],
)
def test_bad_input_exits_2_with_one_clear_line(capsys, arguments, message):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    assert message in err.splitlines()[0]


def test_an_own_protocol_is_accepted_and_an_unknown_one_rejected_first(capsys, tmp_path):
    (tmp_path / "reviews.jsonl").write_text('{"text": "A fine film.", "label": 1}\n' * 2)
    path = tmp_path / "reviews.toml"
    path.write_text(
        "name = 'reviews'\ndata = 'reviews.jsonl'\nprompt = 'TEXT: {text}\\nCHOICES:\\n{options}"
        " [unused0] [MASK]'\nanswer = 'label'\nlabels = ['bad', 'good']\n"
        "[protocols.plain]\nbare = true\n"
    )
    command = ["evaluate", "--json", "--task", str(path), "--order-rows", "0", "--protocol"]
    assert run([*command, "plain"]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"] == "plain"
    assert run([*command, "other"]) == 2
    message = "mlmjax: task reviews: has no protocol 'other'; it has default, plain"
    assert capsys.readouterr().err.splitlines()[0] == message


def test_the_help_has_a_whole_line_for_every_command():
    for command in commands.cli.commands.values():
        assert len(command.get_short_help_str(1000)) <= 45
        options = [one for one in command.params if isinstance(one, click.Option)]
        assert all(option.help for option in options)


def test_labels_from_a_file(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("sports\tgames and athletes\nworld\n\n")
    assert read_labels(str(path)) == {"sports": "games and athletes", "world": ""}
    path.write_text("a\nb\n")
    assert read_labels(str(path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("error", "code", "first"),
    [
        (InputError("bad", [f"line {i}" for i in range(50)]), 2, "mlmjax: bad"),
        (RunError("loss is nan at step 3"), 1, "mlmjax: loss is nan at step 3"),
        (OSError(28, "No space left on device"), 1, "mlmjax: [Errno 28] No space left on device"),
        (KeyError("x"), 1, "mlmjax: internal error: KeyError: 'x'"),
    ],
)
def test_errors_become_exit_codes(capsys, monkeypatch, error, code, first):
    def raises(*args, **kwargs):
        raise error

    monkeypatch.setattr(commands.cli, "main", raises)
    assert run(["train"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(first)
    assert len(lines) <= 22


def test_debug_shows_the_traceback(capsys):
    assert run(["train", "absent.toml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_and_version_need_no_jax():
    code = "import sys; from mlmjax.cli.main import run; run(['--help']); run(['--version']); "
    code += "sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "classify" in done.stdout


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_compiled_programs_are_kept_for_the_next_command(cache_home):
    code = (
        "from mlmjax.cli.main import keep_compiled; keep_compiled(); import jax, numpy as np\n"
        "seen = []; jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))\n"
        "for _ in range(2):\n"
        "    print(jax.jit(lambda x: (x @ x).sum())(np.ones((64, 64), np.float32)))\n"
        "    jax.clear_caches()\n"
        "assert seen.count('/jax/compilation_cache/cache_hits') == 1, seen"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("262144.0\n" * 2, "")
    kept = [file for file in (cache_home / "mlmjax" / "xla").rglob("*-cache") if file.is_file()]
    assert kept
    assert not any(file.stat().st_mode & 0o002 for file in kept)


def test_the_folder_of_compiled_programs_is_the_users_choice(cache_home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    keep_compiled()
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE")
    (cache_home / "mlmjax").write_text("no folder can be made here")
    keep_compiled()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


IN_A_CALLBACK = """
def interrupt(phase, info):
    gc.callbacks.remove(interrupt)
    signal.raise_signal(signal.SIGINT)
gc.callbacks.append(interrupt)
gc.collect()
time.sleep(60)
"""
IN_AN_IMPORT = """
try:
    import interrupted
except BaseException as error:
    raise ImportError("cannot initialize") from None
"""


@pytest.mark.parametrize("code", [IN_A_CALLBACK, IN_AN_IMPORT])
def test_an_interrupt_is_not_lost_where_its_exception_would_be(tmp_path, code):
    (tmp_path / "interrupted.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    begin = (
        "import gc, signal, sys, time\nfrom mlmjax.cli import main\n"
        # A job in the background inherits that the signal is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "main.listen_to_interrupts()\n"
        f"sys.path.append({str(tmp_path)!r})\n"
        f"code = {code!r}\ntry:\n    exec(code)\nexcept KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", begin], capture_output=True, timeout=30, check=False
    )
    assert done.returncode in (130, -signal.SIGINT)
    assert not done.stderr.strip()
