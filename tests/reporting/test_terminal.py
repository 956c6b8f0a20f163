"""Lines and progress bars."""

import io
import re
import sys
import time

import pytest
from rich.console import Console

from mlmjax.reporting import terminal
from mlmjax.reporting.terminal import (
    Figures,
    count_progress,
    describe_compiling,
    new_bar,
    progress_bar,
    working,
)


@pytest.fixture
def hurry(monkeypatch):
    """Show progress after 20 ms, and a line every 50 ms."""
    monkeypatch.setattr(terminal, "PATIENCE_SECONDS", 0.02)
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.05)


def test_quick_work_shows_nothing(capsys, monkeypatch):
    for terminal_or_pipe in ("", "1"):
        if terminal_or_pipe:
            monkeypatch.setenv("FORCE_COLOR", "1")
        with count_progress("rows") as show, working("loading"):
            for done in range(1, 101):
                show(done, 100)
    assert capsys.readouterr().err == ""


def test_a_pipe_gets_lines_at_intervals_with_the_time_left(capsys, hurry):
    with count_progress("rows scored", "compiling", "testing") as show:
        time.sleep(0.1)
        for done in range(1, 8):
            show(done, 8)
            time.sleep(0.03)
        show(8, 8)
        time.sleep(0.1)
    first, *middle = capsys.readouterr().err.splitlines()
    middle, last = [line for line in middle if "8/8" not in line], middle[-1]
    assert first == "rows scored: compiling | 0 s so far"
    assert any(re.fullmatch(r"rows scored [1-7]/8 \| about 1 s left", line) for line in middle)
    assert len(middle) < 12
    assert last == "rows scored 8/8 | testing | 0 s so far"
    with count_progress("rows scored", "compiling", "testing") as show:
        time.sleep(0.1)
        show(8, 8)
    assert capsys.readouterr().err.splitlines()[-1] == "rows scored 8/8 | 0 s"


def test_work_that_counts_nothing_is_seen_to_go_on(capsys, hurry, monkeypatch):
    with working("downloading weights"):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert set(lines) == {"downloading weights | 0 s so far"}
    with count_progress("records read") as show:
        show(1200, 0)
        time.sleep(0.06)
    assert "records read 1,200 | 0 s so far" in capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")
    with working("downloading weights"):
        time.sleep(0.2)
    assert "downloading weights" in capsys.readouterr().err


def test_rows_are_counted_by_a_bar_on_a_terminal(capsys, monkeypatch, hurry):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with count_progress("rows") as show:
        time.sleep(0.1)
        show(3, 4)
    assert "3/4" in capsys.readouterr().err


def test_a_failure_ends_the_bar(capsys, monkeypatch, hurry):
    monkeypatch.setenv("FORCE_COLOR", "1")

    def work():
        with count_progress("rows") as show:
            show(1, 4)
            time.sleep(0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert "\x1b[?25h" in capsys.readouterr().err  # the cursor is back


def test_results_stay_on_stdout_while_a_bar_is_shown(capsys, monkeypatch, hurry):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with count_progress("texts") as show:
        time.sleep(0.1)
        show(1, 2)
        print('{"label": "a"}')
    shown = capsys.readouterr()
    assert shown.out == '{"label": "a"}\n'
    assert "label" not in shown.err


def test_a_bar_appears_when_work_takes_long_or_is_asked_for(capsys, monkeypatch):
    with progress_bar("rows", False) as show:
        assert show is None
    with progress_bar("rows", None) as show:
        assert show is None  # no terminal
    with progress_bar("rows", True) as show:
        show(1, 2)
    assert capsys.readouterr().err == "rows 1/2\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("rows", None) as show:
        show(1, 2)
    assert not capsys.readouterr().err
    monkeypatch.setattr(terminal, "PATIENCE_SECONDS", 0.0)
    with progress_bar("rows", None) as show:
        time.sleep(0.05)
        show(1, 2)
    assert "1/2" in capsys.readouterr().err


def test_what_happens_first_is_shown_in_part_where_there_is_little_room():
    text = describe_compiling(38)
    assert Figures(text).fitting(80) == text
    assert Figures(text).fitting(30) == "compiling, about 40 s"


FIGURES = "loss 0.712 | atp 0.711 | dummy 0.400 | accuracy 0.800 | grad 1.23 | lr 4.9e-04"


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("total", [40, 1_000_000])
def test_bar_step_and_time_left_keep_their_room(width, total):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, soft_wrap=True)
    bar = new_bar("training", console)
    task = bar.add_task("", total=total, completed=total // 2, figures=FIGURES)
    bar.update(task, completed=total // 2 + 1)
    console.print(bar.get_renderable())
    line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).rstrip("\n")
    assert "\n" not in line
    assert len(line) <= width
    assert "━" * 3 in line
    assert f"{total // 2 + 1}/{total}" in line
    assert re.search(r"[\d-]:[\d-]{2}:[\d-]{2}", line)
    shown = line.rstrip().rpartition(":")[2][2:].strip()
    assert FIGURES.startswith(shown)  # whole figures only
    assert shown == "" or FIGURES[len(shown) :][:3] in ("", " | ")
    assert width < 80 or "loss 0.712" in line
