"""Options of every command: how much it prints, its version, and examples that are true."""

import logging
import shlex
import subprocess
import sys
import warnings

import click
import pytest

from mlmjax.cli.commands import cli
from mlmjax.cli.main import WarnOnce, run
from mlmjax.config.run import load_config
from mlmjax.config.suite import load_suite
from mlmjax.reporting import verbosity
from mlmjax.reporting.terminal import count_progress, say, working


@pytest.fixture(autouse=True)
def normal():
    yield
    verbosity.set_verbosity("normal")


def commands(group=cli, name="mlmjax"):
    """Yield every command with the words that call it."""
    yield name, group
    for each in group.commands.values():
        if isinstance(each, click.Group):
            yield from commands(each, f"{name} {each.name}")
        else:
            yield f"{name} {each.name}", each


ALL = dict(commands())
EXAMPLES = [(name, line) for name, command in ALL.items() for line in command.examples]


def parse(line):
    """Parse a line as the shell and the program do; return the context of its last command."""
    program, *arguments = shlex.split(line)
    assert program == "mlmjax"
    command, context = cli, cli.make_context("mlmjax", arguments)
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(context, context._protected_args)
        arguments = [*rest, *context.args]
        context = command.make_context(name, arguments, parent=context)
    return context


@pytest.mark.parametrize("name", list(ALL))
def test_help_ends_with_an_example(name, capsys):
    assert run([*name.split()[1:], "--help"]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    examples = ALL[name].examples
    assert examples
    assert [line.strip() for line in lines[-len(examples) :]] == list(examples)
    assert lines[-len(examples) - 1].strip() in ("Example:", "Examples:")


@pytest.mark.parametrize(("name", "line"), EXAMPLES)
def test_an_example_is_of_its_command_and_parses(name, line):
    context = parse(line)
    assert context.command_path.startswith(name)
    given = context.params
    if "config" in given:
        load_config(given["config"], given["overrides"])
    if given.get("suite"):
        load_suite(given["suite"], given["overrides"])


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("option", ["-V", "--version", "-h"])
def test_version_and_help_are_known_before_and_after_the_name(name, option, capsys):
    words = name.split()[1:]
    for arguments in ([option, *words], [*words, option]):
        assert run(arguments) == 0
        out, err = capsys.readouterr()
        assert "mlmjax" in out
        assert err == ""


@pytest.mark.parametrize(
    "arguments", [["compare", "--debug", "a", "b"], ["--debug", "compare", "a", "b"]]
)
def test_debug_shows_the_traceback_wherever_it_stands(arguments, capsys):
    assert run(arguments) == 2
    assert "Traceback" in capsys.readouterr().err
    assert run([one for one in arguments if one != "--debug"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["-q", "-v", "compare"], ["-q", "compare", "--verbose"]])
def test_quiet_and_verbose_exclude_each_other(arguments, capsys):
    assert run([*arguments, "a", "b"]) == 2
    assert "--quiet and --verbose exclude each other" in capsys.readouterr().err


def test_quiet_keeps_results_warnings_and_errors(monkeypatch, capsys, caplog):
    @cli.command("probe")
    def probe():
        import time

        from mlmjax.reporting import terminal

        monkeypatch.setattr(terminal, "PATIENCE_SECONDS", 0.01)
        with count_progress("rows", "compiling") as show, working("loading"):
            time.sleep(0.05)
            show(1, 2)
        say("a remark")
        say("warning: look out")
        logging.getLogger("mlmjax.probe").info("more of it")
        logging.getLogger("mlmjax.probe").warning("look again")
        click.echo("result")

    try:
        seen = {}
        for option in ("--quiet", "--verbose"):
            caplog.clear()
            assert run(["probe", option]) == 0
            out, err = capsys.readouterr()
            assert out == "result\n"
            seen[option] = err.splitlines(), [record.message for record in caplog.records]
    finally:
        cli.commands.pop("probe")
    assert seen["--quiet"] == (["warning: look out"], ["look again"])
    lines, logged = seen["--verbose"]
    assert lines[0].startswith("mlmjax 0.")
    assert {"rows: compiling | 0 s so far", "loading | 0 s so far", "a remark"} <= {*lines}
    assert lines[-1].startswith("took ")
    assert logged == ["more of it", "look again"]
    assert logging.lastResort.level <= logging.DEBUG  # what prints our log outside of tests


def test_a_repeated_warning_is_printed_once():
    once = WarnOnce()
    texts = [("a", 30), ("a", 30), ("b", 20), ("b", 20), ("c", 40), ("a", 30)]
    records = [logging.LogRecord("x", level, "", 1, "%s", (text,), None) for text, level in texts]
    assert [one.getMessage() for one in records if once.filter(one)] == ["a", "b", "b", "c"]
    assert run(["--version"]) == 0
    assert [type(one) for one in logging.lastResort.filters] == [WarnOnce]


WARNS = """
import sys, warnings
import click
from mlmjax.cli.commands import cli
from mlmjax.cli.main import run

@cli.command("probe")
def probe():
    warnings.warn("the text\\nis long", stacklevel=2)
    warnings.warn("it is late", FutureWarning)
    click.echo("result")

code = run(["probe"])
warnings.warn("over", UserWarning)
sys.exit(code)
"""


def test_a_warning_of_python_is_one_line_without_its_place():
    done = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "result\n")
    printed, after = done.stderr.splitlines()[:2], done.stderr.splitlines()[2:]
    assert printed == ["warning: the text is long", "warning: it is late"]
    assert after == ["<string>:14: UserWarning: over"]


def test_a_warning_of_python_is_recorded_or_an_error_where_that_is_asked_for(capsys):
    @cli.command("probe")
    def probe():
        warnings.warn("the text is long", stacklevel=2)

    try:
        with pytest.warns(UserWarning, match="the text is long"):
            assert run(["probe"]) == 0
        assert capsys.readouterr().err == ""
        assert run(["probe"]) == 1  # the tests turn warnings into errors
        assert "UserWarning: the text is long" in capsys.readouterr().err
    finally:
        cli.commands.pop("probe")
